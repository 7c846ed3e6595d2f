"""What a DeepSpeedEngine must be for SL-SAM to step it, whatever its ZeRO stage."""

from collections.abc import Iterable, Mapping
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from slsam_ds.engines.deepspeed.compatibility import accumulation_is_unmanaged


def refuse(features: Mapping[str, bool], *, remedy: str) -> None:
    """Refuse features that would end in a silent dense or wrong step.

    Args:
        features: By what people call them: whether they are on.
        remedy: What to do.

    Raises:
        ValueError: Naming the first that is on.
    """
    for feature, present in features.items():
        if present:
            raise ValueError(f"DeepSpeed's {feature}: not supported by slsam_ds; {remedy}")


def unsupported_of(engine: DeepSpeedEngine) -> dict[str, bool]:
    """Features of the engine itself that no stage supports, and whether they are on."""
    return {
        "mixture-of-experts parameter groups": engine.has_moe_layers,
        "tensor or sequence parallelism": engine.mp_world_size > 1 or engine.sequence_parallel_size > 1,
        "managed_gradient_accumulation=false": accumulation_is_unmanaged(engine),
        "DeepCompile": engine.is_deepcompile_enabled(),
    }


def check_split(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse an optimizer whose groups do not tell their arms.

    Raises:
        ValueError: Saying how to build the engine.
    """
    if any("arm" not in group for group in param_groups):
        raise ValueError(
            "the optimizer's parameter groups are not split by layer: build the engine with slsam_ds.initialize"
        )
