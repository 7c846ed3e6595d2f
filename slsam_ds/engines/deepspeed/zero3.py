"""DeepSpeed ZeRO stage 3: every rank holds a shard of each parameter, and modules gather theirs while they run.

Perturbing and restoring happen on the shards, so nothing that was gathered may outlive a change of them; what is not
sampled may, from the ascent's first backward to the descent's last. DeepSpeed learns in which order modules fetch their
parameters; since backward ends at the lowest active layer, it learns that once for each depth.
"""

import contextlib
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from slsam_ds.engines.deepspeed.internals import check_internals
from slsam_ds.engines.deepspeed.step import boundary, overlaid
from slsam_ds.engines.deepspeed.zero import ZeroEngine
from slsam_ds.engines.placement import Sharded, as_many_as_fit
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.param_groups import leave_empty_groups
from slsam_ds.protocol import ALWAYS, Piece, Shard

_ASCENT = "ascent"
_HOLDER = -1
"""Stands for a module where DeepSpeed notes by number which modules use a parameter."""


class ZeroStage3Engine(Sharded, ZeroEngine):
    """SL-SAM's view of a DeepSpeedEngine with ZeRO stage 3. Its groups are DeepSpeed's sub-groups."""

    zero_class = DeepSpeedZeroOptimizer_Stage3
    reducing_hook = "reduce_ready_partitions_and_remove_grads"
    norm_finder = "_get_norm_groups"

    may_skip_modules = True
    sends_during_backward = True  # weights in every backward, gradients in the window's last

    def __init__(self, engine: DeepSpeedEngine, layer_map: LayerMap) -> None:
        super().__init__(engine, layer_map)
        check_internals(engine.module, "Module")
        check_internals(layer_map[0].parameters[0][1], "Parameter")
        leave_empty_groups(self._zero.optimizer)
        self._traces = _FetchTraces(engine)
        # DeepSpeed raises where a module that it fetches whole runs otherwise than it has learned.
        self.may_skip_modules = not any(map(z3_leaf_module, engine.module.modules()))
        self._is_last_micro_batch = False
        self._pass: str | None = None  # which one; within, gradients of the active arms may have been reduced
        self._kept: list[Any] = []  # parameters that stay gathered when a backward has used them
        self._find_depths(engine.module, layer_map)

    def begin_step(self, ascended: Collection[int], updated: Collection[int]) -> None:
        super().begin_step(ascended, updated)
        self._drop_gathered()
        self._make_reduced({*ascended, *updated})

    def begin_ascent(self) -> None:
        super().begin_ascent()
        self._begin_pass(_ASCENT)
        self._kept = self._unchanged_within_reuse()

    def begin_descent(self) -> None:
        super().begin_descent()
        self._begin_pass("descent after ascent" if self._ascended else "descent")

    def end_step(self) -> None:
        super().end_step()
        self._drop_gathered()
        self._make_reduced(())
        self._pass, self._kept = None, []
        self._traces.use(None)

    def begin_micro_batch(self, *, last: bool) -> None:
        self._is_last_micro_batch = last

    def backward(self, loss: Tensor) -> None:
        """Until the window's last, gradients stay whole on the parameters; then each is reduced while backward goes on.

        So a window of one never holds more than a bucket of whole gradients, and a longer one reduces once.
        """
        with self._held():
            if self._reduces_every_micro_batch or not self._is_last_micro_batch:
                super().backward(loss)
            else:
                with self._narrowed_to(self._active), boundary(self._engine, True):
                    self._run_backward(loss)

    def discard(self) -> None:
        super().discard()
        self._zero.zero_grad()  # also makes the next reduction overwrite the partitions instead of adding to them
        if self._pass is not None:
            self._clear_reduced(self._active)
        for bucket in self._zero.ipg_buckets.values():  # a backward that raised left gradients behind
            bucket.clear_params()

    def live_weights(self, arms: Collection[int]) -> list[Tensor]:
        return [_shard(parameter) for parameter in self._parameters_of(arms)]

    def publish(self, arms: Collection[int]) -> None:
        written: Iterator[Any] = self._parameters_of(arms)
        for parameter in written:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay gathered as they were
                # Before 0.19.3, DeepSpeed believes that modules which backward has not reached go on using theirs.
                parameter.ds_active_sub_modules.clear()
                parameter.partition()
        self._traces.fetch_after_writes()

    def _as_found(self, norm: Tensor) -> list[Tensor]:
        return [norm]

    def _is_offloaded(self) -> bool:
        return bool(getattr(self._zero, "offload_optimizer", False))

    def _find_members(self) -> Sequence[Sequence[nn.Parameter]]:
        return list(self._zero.fp16_groups)

    def _param_group(self, group: int) -> int:
        return int(self._zero.sub_group_to_group_id[group])

    def _unsupported_features(self) -> dict[str, bool]:
        zero = self._zero
        return super()._unsupported_features() | {
            "zero_optimization.offload_optimizer to NVMe": zero.swap_optimizer,
            "zero_optimization.offload_optimizer.ratio": zero.offload_optimizer and zero.partial_offload != 1.0,
            "zero_optimization.offload_param to NVMe": zero.params_in_nvme_and_cpu,
            "zero_optimization.zero_hpz_partition_size": zero.zero_hpz_partition_size > 1,
            "zero_optimization.zero_quantized_weights": zero.parameter_offload.zero_quantized_weights,
            "zero_optimization.zero_quantized_nontrainable_weights": zero.zero_quantized_nontrainable_weights,
            "zero_optimization.zero_quantized_gradients": zero.all2all_process_group is not None,
        }

    def _reduce_held(self) -> None:
        zero = self._zero
        for parameters in zero.fp16_groups:
            for parameter in parameters:
                if parameter.grad is not None:
                    zero.reduce_ready_partitions_and_remove_grads(parameter)
        zero.independent_gradient_partition_epilogue()

    def _partitions(self) -> Sequence[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _pieces(self, arm: int, group: int) -> Iterator[Piece]:
        stepped = self._zero.fp32_partitioned_groups_flat[group]
        master = stepped.detach()
        for parameter in self._members[group]:
            weight, (_, offset, numel) = _shard(parameter), self._grad_position(parameter)
            # The last shards are padded with whatever the memory held.
            real = max(0, min(numel, _numel(parameter) - numel * self.ranks.rank))
            yield Piece(arm, weight[:real], master[offset : offset + real], stepped, self.ranks.rank, offset)

    def _shards(self, arm: int, group: int) -> Iterator[Shard]:
        for piece, parameter in zip(self._pieces(arm, group), self._members[group], strict=True):
            yield Shard(piece, self._reduced_gradient(parameter)[: piece.weight.numel()])

    def _drop_gathered(self) -> None:
        """Partition whatever is still gathered: forward would read it instead of the shards.

        Small parameters stay gathered over the whole step (stage3_param_persistence_threshold), others from
        the ascent's first backward to the descent's last (`_held`), and any may after a pass that raised.
        """
        self._zero.empty_partition_cache()

    def _begin_pass(self, kind: str) -> None:
        """Passes whose modules run in another order have learned another order of fetches."""
        self._pass = kind
        self._traces.use((kind, _lowest(self._active), _lowest({*self._ascended, *self._updated})))
        self._clear_reduced(self._active)  # else a parameter that takes no part would keep its last gradient

    def _unchanged_within_reuse(self) -> list[Any]:
        """What the descent reads again as it is, as far as DeepSpeed's settings would keep it.

        Within a pass, DeepSpeed keeps from forward to backward what it reads again within so many elements. Between
        passes, the same rule holds for the way down and up again.
        """
        offload = self._zero.parameter_offload
        if offload.fast_sharding_for_leaf_module:  # it empties what it releases, whoever uses it
            return []
        room = min(offload._max_reuse_distance_in_numel, offload._max_available_parameters_in_numel) // 2
        return as_many_as_fit(((each, _numel(each)) for each in self._unchanged(self._ascended, self._updated)), room)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Within, which is a backward, DeepSpeed does not release what is to be kept. The step's last may release all.

        It releases nothing that a module uses (partitioned_param_coordinator.py, 0.19.8), and `_HOLDER` stands for such
        a module. Not longer: the user's own `GatheredParameters` fail on what is in use.
        """
        kept = self._kept if self._pass == _ASCENT or not self._is_last_micro_batch else []
        for parameter in kept:
            parameter.ds_active_sub_modules.add(_HOLDER)
        try:
            yield
        finally:
            for parameter in kept:
                parameter.ds_active_sub_modules.discard(_HOLDER)

    def _make_reduced(self, arms: Iterable[int]) -> None:
        """Room for the averaged gradients of these arms alone; DeepSpeed keeps some for all that is trainable.

        One tensor for each arm: blocks are alike, and the allocator gives the next sample what the last one had.
        """
        zero = self._zero
        if self._offloaded:  # all of it is on the host
            return
        received = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        received.clear()
        zero.averaged_gradients.clear()
        zero.grad_partitions_flat_buffer = torch.empty(0, dtype=zero.gradient_accumulation_dtype, device=self.device)
        for arm in sorted(arms):
            parameters: list[Any] = list(self._parameters_of([arm]))
            numels = [parameter.partition_numel() for parameter in parameters]
            room = zero.grad_partitions_flat_buffer.new_zeros(sum(numels))
            received.update(zip(map(zero.get_param_id, parameters), room.split(numels), strict=True))

    def _clear_reduced(self, arms: Collection[int]) -> None:
        """Zero these arms' averaged gradients, bad numbers of a lost step too: DeepSpeed looks for them in all arms."""
        received = self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        parameters = list(self._parameters_of(arms))
        gradients = [self._reduced_gradient(parameter) for parameter in parameters]
        torch._foreach_zero_(gradients)
        if self._offloaded:  # there it arrived, on its way to the host
            torch._foreach_zero_([received[self._zero.get_param_id(parameter)] for parameter in parameters])

    def _grad_position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Sub-group of a parameter, and where its shard lies in the sub-group's flat buffers: offset and length."""
        return self._zero.grad_position[self._zero.get_param_id(parameter)]

    def _reduced_gradient(self, parameter: nn.Parameter) -> Tensor:
        """This rank's shard of the averaged gradient, in place. 1-D, padded."""
        gradient, _ = self._zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)
        return gradient

    @contextlib.contextmanager
    def _narrowed_to(self, arms: Collection[int]) -> Iterator[None]:
        param_group_of = [self._param_group(group) for group in self._groups(arms)]
        shown = sorted(set(param_group_of))
        renumbered = {place: shown.index(param_group) for place, param_group in enumerate(param_group_of)}
        with super()._narrowed_to(arms), overlaid(self._zero, "sub_group_to_group_id", renumbered):
            yield

    def _stepped(self, arms: Collection[int]) -> list[Tensor]:
        # A sub-group is in the inner optimizer only while DeepSpeed steps it. The list is a view of these arms now.
        return list(self._zero.fp32_partitioned_groups_flat)

    def _after_step(self, arms: Collection[int]) -> None:
        """Nothing to link: DeepSpeed finds a parameter's optimizer state by its place in the flat buffers."""


def _lowest(arms: Collection[int]) -> int:
    """The lowest arm; what is always trained may be anywhere, and does not count among others."""
    return min((arm for arm in arms if arm != ALWAYS), default=ALWAYS)


def _shard(parameter: Any) -> Tensor:
    """This rank's piece of a parameter, which module fetches read and `partition` leaves alone. 1-D, padded."""
    return parameter.ds_tensor


def _numel(parameter: Any) -> int:
    """Elements over all ranks, without padding."""
    return int(parameter.ds_numel)


class _FetchTraces:
    """One learned order of fetching parameters for each kind of pass, and DeepSpeed's own outside.

    DeepSpeed learns the order of a forward and backward once, prefetches by it, and starts over when a module comes
    that it does not expect. With one trace, every change of the lowest active layer would end that, or prefetch what
    backward never reaches; and the descent may start above blocks that the ascent has run.

    Private structures: DeepSpeedZeRoOffload in deepspeed/runtime/zero/parameter_offload.py, 0.19.8.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._offload: Any = engine.optimizer.parameter_offload
        self._registry = engine.module.ds_inflight_param_registry
        self._stream = self._offload._DeepSpeedZeRoOffload__allgather_stream  # None where nothing is asynchronous
        self._stock = self._offload.param_coordinator
        self._known: dict[Hashable, PartitionedParameterCoordinator] = {}

    def use(self, key: Hashable | None) -> None:
        """Go by the trace of such passes; None: DeepSpeed's own. What was written into the shards is seen."""
        if key is not None and key not in self._known:
            self._known[key] = self._new()
        self._offload.param_coordinator = self._stock if key is None else self._known[key]
        self.fetch_after_writes()

    def fetch_after_writes(self) -> None:
        """Let the next fetch see what was written into the shards: on a GPU it runs on a stream that would not wait."""
        if self._stream is not None:
            self._stream.wait_stream(get_accelerator().current_stream())

    def _new(self) -> PartitionedParameterCoordinator:
        """As DeepSpeedZeRoOffload makes its own."""
        offload = self._offload
        return PartitionedParameterCoordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=self._stream,
            inflight_param_registry=self._registry,
            timers=offload.timers,
            fast_sharding_for_leaf_module=offload.fast_sharding_for_leaf_module,
            log_trace_cache_warnings=offload.log_trace_cache_warnings,
        )
