"""DeepSpeed ZeRO stages 1 and 2: every rank holds whole weights, but steps only its partition of each group.

After the step only the sampled groups are gathered again; so are they when their shards were perturbed.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn

from slsam_ds.engines.deepspeed.compatibility import wait_for_offload
from slsam_ds.engines.deepspeed.gathering import gather_groups
from slsam_ds.engines.deepspeed.internals import check_internals
from slsam_ds.engines.deepspeed.step import overlaid
from slsam_ds.engines.deepspeed.zero import ZeroEngine
from slsam_ds.engines.placement import Replicated
from slsam_ds.protocol import Piece, Shard


class ZeroStage12Engine(Replicated, ZeroEngine):
    """SL-SAM's view of a DeepSpeedEngine with ZeRO stage 1 or 2. Its groups are the optimizer's parameter groups."""

    zero_class = DeepSpeedZeroOptimizer
    reducing_hook = "process_gradients"
    norm_finder = "scaled_global_norm"

    may_skip_modules = True

    def begin_micro_batch(self, *, last: bool) -> None:
        """Every micro-batch is treated alike."""

    def keep_state_at(self, home: torch.device | None) -> None:
        super().keep_state_at(home)
        if home is None:
            return
        groups: Sequence[Sequence[Any]] = self._members
        for members, partition in zip(groups, self._partitions(), strict=True):
            for parameter in members:  # `safe_get_full_fp32_param` would read where the masters were
                linked = parameter._hp_mapping
                if linked is not None:
                    place = linked.hp_fragment_address
                    linked.hp_fragment = partition.detach().narrow(0, place.start, place.numel)

    def discard(self) -> None:
        super().discard()
        for group in self._groups(self._groups_of):
            self._zero.averaged_gradients[group] = None
            self._zero.all_grad_tensors[group] = None
        if self._offloaded:  # the next gradient shall not be added to this one, nor its bad numbers be blamed on it
            self._zero.micro_step_id = INITIAL_MICRO_STEP_ID
            self._zero.reset_cpu_buffers()

    def live_weights(self, arms: Collection[int]) -> list[Tensor]:
        return [self._zero.bit16_groups_flat[group] for group in self._groups(arms)]

    def publish(self, arms: Collection[int]) -> None:
        with self._narrowed_to(arms):
            gather_groups(
                groups_flat=self._zero.bit16_groups_flat,
                partitioned_param_groups=self._zero.parallel_partitioned_bit16_groups,
                dp_process_group=self._zero.real_dp_process_group,
                start_alignment_factor=self._zero.nccl_start_alignment_factor,
                allgather_bucket_size=self._zero.allgather_bucket_size,
            )

    def update(
        self,
        arms: Collection[int],
        *,
        num_micro_batches: int,
        learning_rate_scale: Mapping[int, float],
        grad_norm: float,
        skip: bool,
    ) -> bool:
        with overlaid(stage_1_and_2, "all_gather_dp_groups", gather_groups):  # else each group by itself
            return super().update(
                arms,
                num_micro_batches=num_micro_batches,
                learning_rate_scale=learning_rate_scale,
                grad_norm=grad_norm,
                skip=skip,
            )

    def _check_supported(self) -> None:
        super()._check_supported()
        check_internals(stage_1_and_2, "stage_1_and_2")
        check_internals(self._zero.bit16_groups[0][0], "LinkedParameter")

    def _as_found(self, norm: Tensor) -> Tensor:
        return norm

    def _is_offloaded(self) -> bool:
        return bool(getattr(self._zero, "cpu_offload", False))

    def _find_members(self) -> Sequence[Sequence[nn.Parameter]]:
        return list(self._zero.bit16_groups)

    def _param_group(self, group: int) -> int:
        return group

    def _active_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        return ((arm, parameter) for arm in sorted(self._active) for parameter in self._parameters_of([arm]))

    def _read_dtype(self, parameter: nn.Parameter) -> torch.dtype | None:
        return None  # as it is; what DeepSpeed's torch_autocast rounds is not looked at

    def _flush(self) -> None:
        for parameter in self._parameters_of(self._active):
            if parameter.grad is None:  # a rank whose data never touched it must still take part
                parameter.grad = torch.zeros_like(parameter)
        super()._flush()

    def _reduce_held(self) -> None:
        zero = self._zero
        zero.setup_buckets()
        for group, parameters in enumerate(zero.bit16_groups):
            for parameter in parameters:
                if zero.get_gradient_for_reduction(parameter) is not None:
                    zero.reduce_ready_partitions_and_remove_grads(parameter, group)
        zero.overlapping_partition_gradients_reduce_epilogue()

    def _partitions(self) -> Sequence[Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def _pieces(self, arm: int, group: int) -> Iterator[Piece]:
        weight = self._zero.parallel_partitioned_bit16_groups[group][self.ranks.rank]
        master = self._zero.single_partition_of_fp32_groups[group]
        yield Piece(arm, weight, master.detach(), master, self.ranks.rank)

    def _shards(self, arm: int, group: int) -> Iterator[Shard]:
        """This rank's partition of a group, in the pieces DeepSpeed keeps its reduced gradient in (no copy)."""
        (partition,) = self._pieces(arm, group)
        if self._offloaded:
            wait_for_offload(self._zero)
            gradients = [self._zero.single_partition_of_fp32_groups[group].grad]
        else:
            gradients = self._zero.averaged_gradients[group]
        offset = 0
        for gradient in gradients:
            end = min(offset + gradient.numel(), partition.weight.numel())
            weight, master = partition.weight[offset:end], partition.master[offset:end]
            piece = Piece(arm, weight, master, partition.stepped, partition.owner, offset)
            yield Shard(piece, gradient.view(-1)[: end - offset])
            offset = end

    @contextlib.contextmanager
    def _narrowed_to(self, arms: Collection[int]) -> Iterator[None]:
        linked = self._zero._hp_optimizer_states_linked
        try:
            self._zero._hp_optimizer_states_linked = True  # ours to do: see _after_step
            with super()._narrowed_to(arms):
                yield
        finally:
            self._zero._hp_optimizer_states_linked = linked

    def _after_step(self, arms: Collection[int]) -> None:
        """Link the optimizer state of each group to its parameters, where it is new or may have been replaced.

        `_lazy_init_hp_params_optimizer_state` does it once for all groups at the first step, when most have no state
        yet; and loading a checkpoint cuts the links. `safe_get_full_optimizer_state` would miss them.
        """
        zero, stepped = self._zero, set(self._groups(arms))
        for group, partition in enumerate(zero.single_partition_of_fp32_groups):
            if group in stepped or (zero.optimizer.state.get(partition) and _lacks_link(zero.bit16_groups[group])):
                lazy_init_hp_params_optimizer_state(zero.bit16_groups[group], partition, zero.optimizer.state)


def _lacks_link(parameters: Sequence[Any]) -> bool:
    return any(each._hp_mapping is not None and each._hp_mapping.optim_fragment is None for each in parameters)
