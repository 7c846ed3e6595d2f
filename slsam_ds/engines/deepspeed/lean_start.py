"""DeepSpeed makes state or gradients of all layers at once while it is initialised, and SL-SAM needs none of it.

In bf16 without ZeRO it steps the optimizer on gradients of zero: 20 bytes a weight, where training takes 6 and those of
the layers that were sampled. ZeRO-1 and ZeRO-2 make gradients of zero of all partitions, and drop them. The optimizer
makes the state of a layer in the layer's first step.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from slsam_ds.engines.deepspeed.step import overlaid

_METHOD = "initialize_optimizer_states"


@contextlib.contextmanager
def without_initial_state() -> Iterator[None]:
    """Within, DeepSpeed's optimizers are made without state of layers that no step has seen."""
    stock = getattr(DeepSpeedZeroOptimizer, _METHOD)

    def of_zero(zero: Any) -> None:
        if zero.cpu_offload or isinstance(zero.optimizer, torch.optim.Adagrad):
            stock(zero)  # there the gradients stay, and are written into; Adagrad is made anew

    with (
        overlaid(DeepSpeedZeroOptimizer, _METHOD, of_zero),
        overlaid(FP16_UnfusedOptimizer, _METHOD, _nothing),
        overlaid(FP16_Optimizer, _METHOD, _nothing),
    ):
        yield


def _nothing(wrapper: Any) -> None:
    """In the place of a step."""
