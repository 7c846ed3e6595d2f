"""DeepSpeed ZeRO stages 1 and 2: every rank holds whole weights, but steps only its partition of each group.

The optimizer has one parameter group per arm, so a layer's gradients, master weights and optimizer state are whole
groups of the ZeRO optimizer. Reduction, clipping, stepping and the gather afterwards are DeepSpeed's own code, run
over a view in which only the sampled groups exist: what is not sampled is neither sent, nor zero-filled, nor stepped.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor

from slsam_ds.engines.param_groups import scaled_learning_rates
from slsam_ds.engines.ranks import ProcessGroupRanks
from slsam_ds.layers import LayerMap
from slsam_ds.protocol import ALWAYS, Shard

# deepspeed/runtime/zero/stage_1_and_2.py, 0.19.8: everything that DeepSpeedZeroOptimizer keeps per parameter group.
_PER_GROUP_LISTS = (
    "bit16_groups",
    "bit16_groups_flat",
    "first_offset",
    "groups_padding",
    "parallel_partitioned_bit16_groups",
    "params_in_partition",
    "params_not_in_partition",
    "partition_count",
    "partition_size",
    "real_dp_process_group",
    "round_robin_bit16_groups",
    "round_robin_bit16_indices",
    "round_robin_bit16_meta",
    "round_robin_bit16_offsets",
    "round_robin_bit16_padding",
    "single_partition_of_fp32_groups",
)
_PER_GROUP_DICTS = (
    "all_grad_tensors",
    "averaged_gradients",
    "first_param_index_in_partition",
    "grad_partition_insertion_offset",
    "grad_start_offset",
    "is_grad_computed",
    "is_partition_reduced",
    "param_to_partition_ids",
    "remaining_grads_in_partition",
    "total_grads_in_partition",
)


class ZeroStage12Engine:
    """SL-SAM's view of a DeepSpeedEngine with ZeRO stage 1 or 2.

    Args:
        engine: Initialised with one parameter group per arm (key "arm"), everything that may ever be active trainable.
        layer_map: The arms.

    Raises:
        ValueError: A DeepSpeed feature or layout that is not supported.
    """

    def __init__(self, engine: DeepSpeedEngine, layer_map: LayerMap) -> None:
        _check_supported(engine)
        self._engine = engine
        self._zero: DeepSpeedZeroOptimizer = engine.optimizer
        self._groups_of = _groups_by_arm(self._zero, layer_map)
        self._active = set(self._groups_of)
        self._linked: set[int] = set()
        self.device = torch.device(engine.device)
        self.ranks = ProcessGroupRanks(self._zero.dp_process_group, self.device)
        # DeepSpeed adds up micro-batches in float32 only in its reduced partitions: where it is asked to, the
        # reduction cannot be held back until the window ends.
        self._reduces_every_micro_batch = self._zero.gradient_accumulation_dtype != self._zero.dtype

    def activate(self, arms: Collection[int] | None) -> None:
        wanted = set(self._groups_of) if arms is None else set(arms)
        for arm in wanted ^ self._active:
            for parameter in self._parameters([arm]):
                parameter.requires_grad_(arm in wanted)
        self._active = wanted

    @property
    def sends_during_backward(self) -> bool:
        return self._reduces_every_micro_batch

    def begin_micro_batch(self, *, last: bool) -> None:
        """Every micro-batch is treated alike."""

    def backward(self, loss: Tensor) -> None:
        with _reduction_held(self._engine):
            self._engine.backward(loss, scale_wrt_gas=False)
        if self._reduces_every_micro_batch:
            self._flush()

    def reduce(self) -> list[Shard]:
        if not self._reduces_every_micro_batch:
            self._flush()
        return [
            shard
            for arm in sorted(self._active)
            for group in self._groups_of[arm]
            for shard in self._shards(arm, group)
        ]

    def discard(self) -> None:
        for parameter in self._parameters(self._groups_of):
            parameter.grad = None
        for group in self._groups(self._groups_of):
            self._zero.averaged_gradients[group] = None
            self._zero.all_grad_tensors[group] = None

    def live_weights(self, arms: Collection[int]) -> list[Tensor]:
        return [self._zero.bit16_groups_flat[group] for group in self._groups(arms)]

    def publish(self, arms: Collection[int]) -> None:
        with _only_groups(self._zero, self._groups(arms)):
            all_gather_dp_groups(
                groups_flat=self._zero.bit16_groups_flat,
                partitioned_param_groups=self._zero.parallel_partitioned_bit16_groups,
                dp_process_group=self._zero.real_dp_process_group,
                start_alignment_factor=self._zero.nccl_start_alignment_factor,
                allgather_bucket_size=self._zero.allgather_bucket_size,
            )

    def update(
        self, arms: Collection[int], *, num_micro_batches: int, learning_rate_scale: Mapping[int, float], skip: bool
    ) -> bool:
        # One engine.step() per micro-batch, as in a stock loop, keeps DeepSpeed's counters, timers, monitor and
        # scheduler at their usual meaning; only the last one is a boundary and steps the optimizer.
        previous_boundary = self._engine._is_gradient_accumulation_boundary
        try:
            self._engine.set_gradient_accumulation_boundary(False)
            for _ in range(num_micro_batches - 1):
                self._engine.step()
            self._engine.set_gradient_accumulation_boundary(True)
            with self._sparse_optimizer_step(arms, learning_rate_scale, skip):
                self._engine.step()
        finally:
            self._engine.set_gradient_accumulation_boundary(previous_boundary)
        return not self._zero.overflow

    def _parameters(self, arms: Collection[int]) -> Iterator[torch.nn.Parameter]:
        for group in self._groups(arms):
            yield from self._zero.bit16_groups[group]

    def _groups(self, arms: Collection[int]) -> list[int]:
        return sorted(group for arm in arms for group in self._groups_of[arm])

    def _flush(self) -> None:
        """Let DeepSpeed average what the backward passes left on the parameters of the active arms."""
        for parameter in self._parameters(self._active):
            if parameter.grad is None:  # a rank whose data never touched it must still take part
                parameter.grad = torch.zeros_like(parameter)
        with _only_groups(self._zero, self._groups(self._active)), self._engine.coalesce_grad_reduction():
            pass  # the reduction happens on the way out

    def _shards(self, arm: int, group: int) -> Iterator[Shard]:
        """This rank's partition of a group, in the pieces DeepSpeed keeps its reduced gradient in (no copy)."""
        weight = self._zero.parallel_partitioned_bit16_groups[group][self.ranks.rank]
        master = self._zero.single_partition_of_fp32_groups[group].detach()
        offset = 0
        for piece in self._zero.averaged_gradients[group]:
            end = min(offset + piece.numel(), weight.numel())
            yield Shard(arm, weight[offset:end], master[offset:end], piece.view(-1)[: end - offset], self.ranks.rank)
            offset = end

    @contextlib.contextmanager
    def _sparse_optimizer_step(
        self, arms: Collection[int], learning_rate_scale: Mapping[int, float], skip: bool
    ) -> Iterator[None]:
        """Within, the `optimizer.step()` that engine.step() calls steps these arms alone, or reports an overflow.

        Only that one call sees the view: the scheduler, which engine.step() advances right after, sees all groups.
        """
        zero, groups = self._zero, self._groups(arms)
        stock_step = zero.step

        def step(*args: Any, **kwargs: Any) -> None:
            if skip:
                _report_overflow(zero)
                return
            with _only_groups(zero, groups), scaled_learning_rates(zero.optimizer.param_groups, learning_rate_scale):
                stock_step(*args, **kwargs)
            if not zero.overflow:
                self._link_optimizer_state(groups)

        zero.step = step
        try:
            yield
        finally:
            zero.step = stock_step

    def _link_optimizer_state(self, groups: Sequence[int]) -> None:
        """Link each group's optimizer state to its parameters when it first exists.

        `_lazy_init_hp_params_optimizer_state` does it once for all groups at the first step, when most have no state
        yet; universal checkpoints and `safe_get_full_optimizer_state` would miss them.
        """
        for group in set(groups) - self._linked:
            lazy_init_hp_params_optimizer_state(
                self._zero.bit16_groups[group],
                self._zero.single_partition_of_fp32_groups[group],
                self._zero.optimizer.state,
            )
            self._linked.add(group)


@contextlib.contextmanager
def _only_groups(zero: DeepSpeedZeroOptimizer, groups: Sequence[int]) -> Iterator[None]:
    """Within, the ZeRO optimizer and its inner optimizer consist of these groups alone, renumbered from 0.

    Entries that DeepSpeed rebinds inside are carried back into the original containers, which others hold on to.
    """
    inner = zero.optimizer
    lists = {name: getattr(zero, name) for name in _PER_GROUP_LISTS}
    dicts = {name: getattr(zero, name) for name in _PER_GROUP_DICTS}
    param_groups = inner.param_groups
    linked = zero._hp_optimizer_states_linked
    try:
        for name, whole in lists.items():
            setattr(zero, name, [whole[group] for group in groups])
        for name, whole in dicts.items():
            setattr(zero, name, {place: whole[group] for place, group in enumerate(groups) if group in whole})
        inner.param_groups = [param_groups[group] for group in groups]
        zero._hp_optimizer_states_linked = True  # ours to do: see _link_optimizer_state
        yield
    finally:
        for name, whole in lists.items():
            for group, value in zip(groups, getattr(zero, name), strict=True):
                whole[group] = value
            setattr(zero, name, whole)
        for name, whole in dicts.items():
            shown = getattr(zero, name)
            for place, group in enumerate(groups):
                if place in shown:
                    whole[group] = shown[place]
            setattr(zero, name, whole)
        inner.param_groups = param_groups
        zero._hp_optimizer_states_linked = linked


@contextlib.contextmanager
def _reduction_held(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within, backward leaves local gradients on the parameters and sends nothing.

    These are the two flags of `DeepSpeedEngine.coalesce_grad_reduction` (deepspeed/runtime/engine.py, 0.19.8), which
    itself would reduce on the way out even when the pass raised, and then hang the ranks where it did not.
    """
    engine.optimizer._coalesce_grad_reduction = True
    engine.inside_no_sync_ctxt = True
    try:
        yield
    finally:
        engine.optimizer._coalesce_grad_reduction = False
        engine.inside_no_sync_ctxt = False


def _report_overflow(zero: DeepSpeedZeroOptimizer) -> None:
    """What `step` leaves behind when it finds an overflow: the engine counts a skipped step, the scheduler waits."""
    zero.overflow = True
    zero._global_grad_norm = float("inf")
    zero.zero_grad(set_to_none=True)


def _groups_by_arm(zero: DeepSpeedZeroOptimizer, layer_map: LayerMap) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(zero.optimizer.param_groups):
        if "arm" not in group:
            raise ValueError(
                "the optimizer's parameter groups are not split by layer: build the engine with slsam_ds.initialize"
            )
        groups.setdefault(group["arm"], []).append(index)
    expected = {layer.index: {id(parameter) for _, parameter in layer.parameters} for layer in layer_map}
    if layer_map.always:
        expected[ALWAYS] = {id(parameter) for _, parameter in layer_map.always}
    held = {arm: {id(p) for index in indices for p in zero.bit16_groups[index]} for arm, indices in groups.items()}
    if held != expected:
        raise ValueError("the engine's parameter groups do not hold the layers of this model: rebuild the engine")
    return groups


def _check_supported(engine: DeepSpeedEngine) -> None:
    """Refuse at construction what would otherwise be a silent dense or wrong step.

    Raises:
        ValueError: Naming the feature and what to do.
    """
    zero = engine.optimizer
    stage = engine.zero_optimization_stage()
    if type(zero) is not DeepSpeedZeroOptimizer:
        raise ValueError(
            f"DeepSpeed ZeRO stage {int(stage)} with {type(zero).__name__}: not supported yet; use ZeRO stage 1 or 2 "
            "in float32 or bf16 without data_types.grad_accum_dtype (with stage 2 it may be fp32)"
        )
    num_groups = len(zero.optimizer.param_groups)
    for name in _PER_GROUP_LISTS + _PER_GROUP_DICTS:
        container = getattr(zero, name, None)
        kind = list if name in _PER_GROUP_LISTS else dict
        if not isinstance(container, kind) or (kind is list and len(container) != num_groups):
            raise ValueError(f"DeepSpeedZeroOptimizer.{name} is not the {kind.__name__} per group that slsam_ds knows")
    unsupported = {
        "fp16": zero.dtype == torch.float16,
        "zero_optimization.offload_optimizer": zero.cpu_offload,
        "zero_optimization.zenflow": zero.zenflow,
        "mixture-of-experts parameter groups": zero.has_moe_layers,
        "the Muon optimizer": "muon" in type(zero.optimizer).__name__.lower(),
        "tensor or sequence parallelism": engine.mp_world_size > 1 or zero.sequence_parallel_size > 1,
        "managed_gradient_accumulation=false": not engine.managed_gradient_accumulation(),
        "DeepCompile": engine.is_deepcompile_enabled(),
    }
    for feature, present in unsupported.items():
        if present:
            raise ValueError(f"DeepSpeed's {feature}: not supported by slsam_ds yet; switch it off")
