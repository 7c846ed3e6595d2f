"""DeepSpeed without ZeRO (stage 0): every rank holds whole weights and a whole optimizer, and DeepSpeed steps it.

In float32 the engine's optimizer is the user's own; in bf16 DeepSpeed puts one with float32 master weights around it.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from slsam_ds.engines.deepspeed.internals import INTERNALS, check_internals
from slsam_ds.engines.deepspeed.step import DeepSpeedStep, boundary, narrowed, overlaid
from slsam_ds.engines.deepspeed.support import check_split, refuse, unsupported_of
from slsam_ds.engines.local import LocalEngine
from slsam_ds.model.layers import LayerMap

_WRAPPERS: Mapping[type, tuple[Any, str]] = {
    FP16_UnfusedOptimizer: (unfused_optimizer, "get_weight_norm"),
    FP16_Optimizer: (fused_optimizer, "get_flattened_grad_norm"),
}
"""What DeepSpeed puts around the user's optimizer in bf16: its module, and what that calls for the norm of a group."""


class ZeroStage0Engine(DeepSpeedStep, LocalEngine):
    """SL-SAM's view of a DeepSpeedEngine without ZeRO.

    Args:
        engine: Initialised with one parameter group per arm (key "arm"), everything that may ever be active trainable.
        layer_map: The arms.

    Raises:
        ValueError: A DeepSpeed feature or layout that is not supported.
    """

    def __init__(self, engine: DeepSpeedEngine, layer_map: LayerMap) -> None:
        self._engine = engine
        _check_supported(engine)
        wrapper: Any = engine.optimizer
        inner = getattr(wrapper, "optimizer", wrapper)
        check_split(inner.param_groups)
        super().__init__(engine.module, inner, layer_map)
        self.device = torch.device(engine.device)
        self._wrapper = wrapper if wrapper is not inner else None
        self._master_places: dict[nn.Parameter, tuple[Tensor, int]] = {}
        if self._wrapper is not None:
            self._master_places = _find_masters(self._wrapper)
            _undo_first_step(engine, self._wrapper)

    def update(
        self,
        arms: Collection[int],
        *,
        num_micro_batches: int,
        learning_rate_scale: Mapping[int, float],
        grad_norm: float,
        skip: bool,
    ) -> bool:
        """As `DeepSpeedStep.update`; what the host knows, DeepSpeed does not ask the device for each parameter."""
        known: dict[str, Any] = {"check": lambda *_, **__: False, "has_overflow": lambda *_, **__: False}
        with contextlib.ExitStack() as stack:
            if self._wrapper is not None:
                module, norm_of_group = _WRAPPERS[type(self._wrapper)]
                for name, value in known.items():
                    stack.enter_context(overlaid(self._wrapper.overflow_checker, name, value))
                stack.enter_context(overlaid(module, norm_of_group, lambda *_, **__: 0.0))
                stack.enter_context(overlaid(module, "get_global_norm", lambda *_, **__: grad_norm))
            return super().update(
                arms,
                num_micro_batches=num_micro_batches,
                learning_rate_scale=learning_rate_scale,
                grad_norm=grad_norm,
                skip=skip,
            )

    def backward(self, loss: Tensor) -> None:
        with self._engine.no_sync():
            self._engine.backward(loss, scale_wrt_gas=False)

    def _average(self, gradients: Sequence[Tensor]) -> None:
        """By DeepSpeed's own reduction, which takes the gradients of all that is trainable now: these."""
        with boundary(self._engine, True):
            self._engine.allreduce_gradients()

    def _stepped_as(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        return self._master_places.get(parameter, (parameter, 0))

    @contextlib.contextmanager
    def _narrowed_to(self, arms: Collection[int]) -> Iterator[None]:
        if self._wrapper is None:  # a torch optimizer passes over what has no gradient
            yield
            return
        wanted = [index for index, group in enumerate(self._optimizer.param_groups) if group["arm"] in arms]
        with (
            narrowed(self._wrapper, wanted, lists=INTERNALS[type(self._wrapper).__name__].group_lists(offloaded=False)),
            narrowed(self._optimizer, wanted, lists=["param_groups"]),
        ):
            yield

    def _after_step(self, arms: Collection[int]) -> None:
        """Nothing to see to: whole weights need no gathering."""


def _check_supported(engine: DeepSpeedEngine) -> None:
    """Refuse at construction what would otherwise be a silent dense or wrong step.

    Raises:
        ValueError: Naming the feature and what to do.
    """
    optimizer = engine.optimizer
    check_internals(engine, "DeepSpeedEngine")
    if type(optimizer) in _WRAPPERS:
        check_internals(optimizer, type(optimizer).__name__)
        module, _ = _WRAPPERS[type(optimizer)]
        check_internals(module, module.__name__.rpartition(".")[2])
    elif not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"DeepSpeed without ZeRO, with {type(optimizer).__name__}: not supported by slsam_ds")
    features = {
        "fp16 without ZeRO": engine.fp16_enabled(),  # 0.19.8 unscales gradients there that it has never scaled
        "torch_autocast with a gradient scaler": engine.torch_autocast_z0_gradscaler is not None,
        "optimizers that communicate by themselves (1-bit)": not engine.enable_backward_allreduce,
        **unsupported_of(engine),
    }
    refuse(features, remedy="switch it off, or use ZeRO stage 1")


def _find_masters(wrapper: Any) -> dict[nn.Parameter, tuple[Tensor, int]]:
    """Of each parameter, what the optimizer steps that holds its float32 copy, and where in it that begins."""
    found: dict[nn.Parameter, tuple[Tensor, int]] = {}
    for index, members in enumerate(wrapper.fp16_groups):
        if isinstance(wrapper, FP16_UnfusedOptimizer):
            found |= {member: (copy, 0) for member, copy in zip(members, wrapper.fp32_groups[index], strict=True)}
            continue
        begin = 0
        for member in members:
            found[member] = wrapper.fp32_groups_flat[index], begin
            begin += member.numel()
    return found


def _undo_first_step(engine: DeepSpeedEngine, wrapper: Any) -> None:
    """Take back the step on gradients of zero by which DeepSpeed makes optimizer state for all layers.

    It decays weights and counts as a step. A checkpoint that was loaded meanwhile has replaced all of it.
    """
    if engine.global_steps == 0:
        wrapper.optimizer.state.clear()
        wrapper.refresh_fp32_params()
    if isinstance(wrapper, FP16_Optimizer):
        # One mask per group of what tensor parallelism replicates, which is nothing. Left to its first step, it would
        # make them for the groups of that step alone.
        wrapper.flatten_grad_norm_mask_list = [torch.empty(0, device=engine.device) for _ in wrapper.fp16_groups]
        wrapper.has_executed_step = True
