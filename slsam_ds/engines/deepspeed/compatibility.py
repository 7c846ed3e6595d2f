"""What the versions of DeepSpeed that are supported do differently, each difference in one function.

Which version has which name is said in `INTERNALS`; an engine asks here, and knows of no versions.
"""

from collections.abc import Sequence
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from slsam_ds.engines.deepspeed.internals import INTERNALS


def accumulation_is_unmanaged(engine: DeepSpeedEngine) -> bool:
    """Whether the user has switched `managed_gradient_accumulation` off, where there is such a switch."""
    known = INTERNALS["DeepSpeedEngine"].exists("managed_gradient_accumulation")
    return known and not engine.managed_gradient_accumulation()


def wait_for_offload(zero: Any) -> None:
    """Wait until gradients have arrived on the host; older versions copy them on the current stream, in order."""
    if INTERNALS["DeepSpeedZeroOptimizer"].exists("_wait_for_offload_copies"):
        zero._wait_for_offload_copies()


def paddings_of(zero: Any) -> Sequence[Sequence[int]] | None:
    """Elements of padding after each parameter of each ZeRO-1 or ZeRO-2 group; older versions have none."""
    known = INTERNALS["DeepSpeedZeroOptimizer"].exists("round_robin_bit16_padding")
    return zero.round_robin_bit16_padding if known else None
