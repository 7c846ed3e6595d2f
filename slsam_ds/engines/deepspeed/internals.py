"""Every private or undocumented name of DeepSpeed that slsam_ds relies on, in one table for each of its classes.

An engine checks the tables of the objects that it is built around, whole, before the first step: a DeepSpeed that has
moved something is refused with the name of what it lacks, instead of going wrong in some later step.

To support another version, read the files named here in it. A name that only some versions have goes into `since` or
`until` of its table, and `check_internals` asks for it in those versions alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import deepspeed
from packaging import version

Version = tuple[int, int, int]

OLDEST: Version = (0, 18, 6)
"""The first version of DeepSpeed that these tables were read in."""

FIRST_UNKNOWN: Version = (0, 20, 0)
"""The first that they were not read in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Internals:
    """What one class of DeepSpeed has.

    Attributes:
        source: Where it is defined.
        lists: Lists with one entry per group of parameters that the optimizer steps at once.
        empty_at_first: Those of the lists that have no entries before the first step.
        dicts: Dicts whose keys are such groups; a group may be missing.
        offloaded_lists: More such lists, where the optimizer's state is on the host.
        offloaded_dicts: Likewise.
        names: Whatever else is relied on, by dotted path.
        offloaded_names: Likewise.
        keys: Keys of what is saved in checkpoints. Not checked: files are read long after.
        since: The first version that has a name, where that is not `OLDEST`.
        until: The first version that has it no more.
    """

    source: str
    lists: Sequence[str] = ()
    empty_at_first: Sequence[str] = ()
    dicts: Sequence[str] = ()
    offloaded_lists: Sequence[str] = ()
    offloaded_dicts: Sequence[str] = ()
    names: Sequence[str] = ()
    offloaded_names: Sequence[str] = ()
    keys: Sequence[str] = ()
    since: Mapping[str, Version] = field(default_factory=dict)
    until: Mapping[str, Version] = field(default_factory=dict)

    def exists(self, name: str) -> bool:
        """Whether the DeepSpeed that is installed has the name."""
        here = installed_version()
        return self.since.get(name, OLDEST) <= here and (name not in self.until or here < self.until[name])

    def group_lists(self, *, offloaded: bool) -> list[str]:
        """The lists per group in the DeepSpeed that is installed."""
        names = [*self.lists, *(self.offloaded_lists if offloaded else ())]
        return [name for name in names if self.exists(name)]

    def group_dicts(self, *, offloaded: bool) -> list[str]:
        """The dicts per group, likewise."""
        names = [*self.dicts, *(self.offloaded_dicts if offloaded else ())]
        return [name for name in names if self.exists(name)]


INTERNALS: Mapping[str, Internals] = {
    "DeepSpeedEngine": Internals(
        source="deepspeed/runtime/engine.py",
        names=(
            "_get_all_zero_checkpoint_names",
            "_get_ckpt_name",
            "_get_mp_rank_zero_checkpoint_names",
            "_get_zero_param_shapes",
            "_is_gradient_accumulation_boundary",
            "_load_zero_checkpoint",
            "allreduce_gradients",
            "bfloat16_enabled",
            "checkpoint_engine.is_decoupled",
            "checkpoint_engine.load",
            "clip_fp32_gradients",
            "enable_backward_allreduce",
            "fp16_enabled",
            "has_moe_layers",
            "inside_no_sync_ctxt",
            "is_deepcompile_enabled",
            "load_module_state_dict",
            "managed_gradient_accumulation",
            "monitor",
            "mp_world_size",
            "no_sync",
            "optimizer",
            "param_names",
            "seq_dp_world_size",
            "sequence_parallel_size",
            "set_gradient_accumulation_boundary",
            "torch_autocast_z0_gradscaler",
            "tput_timer.micro_step_count",
            "tput_timer.start",
            "tput_timer.started",
            "tput_timer.stop",
            "use_node_local_storage",
            "zero_load_from_fp32_weights",
            "zero_optimization_partition_weights",
            "zero_optimization_stage",
        ),
        keys=("dp_world_size", "ds_config", "frozen_param_fragments", "optimizer_state_dict", "param_shapes"),
        since={"managed_gradient_accumulation": (0, 19, 4)},
    ),
    "DeepSpeedZeroOptimizer": Internals(
        source="deepspeed/runtime/zero/stage_1_and_2.py",
        lists=(
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
        ),
        dicts=(
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
        ),
        offloaded_lists=("param_buffer_of_bit16_for_cpu_offload_groups",),
        names=(
            "_hp_optimizer_states_linked",
            "_update_scale",
            "allgather_bucket_size",
            "dp_process_group",
            "dtype",
            "exit_backward",
            "get_gradient_for_reduction",
            "get_param_id",
            "gradient_accumulation_dtype",
            "loss_scale",
            "nccl_start_alignment_factor",
            "optimizer",
            "overlapping_partition_gradients_reduce_epilogue",
            "process_gradients",
            "reduce_ready_partitions_and_remove_grads",
            "has_overflow",
            "initialize_optimizer_states",
            "scaled_global_norm",
            "sequence_parallel_size",
            "setup_buckets",
            "torch_autocast_gradscaler",
            "zenflow",
        ),
        offloaded_names=(
            "_wait_for_offload_copies",
            "grad_position",
            "micro_step_id",
            "reset_cpu_buffers",
        ),
        keys=(
            "base_optimizer_state",
            "group_paddings",
            "param_alignment_paddings",
            "param_slice_mappings",
            "partition_count",
            "single_partition_of_fp32_groups",
        ),
        since={
            "_wait_for_offload_copies": (0, 19, 8),
            "round_robin_bit16_offsets": (0, 19, 7),
            "round_robin_bit16_padding": (0, 19, 7),
        },
    ),
    "stage_1_and_2": Internals(
        source="deepspeed/runtime/zero/stage_1_and_2.py",
        names=("all_gather_dp_groups",),
    ),
    "DeepSpeedZeroOptimizer_Stage3": Internals(
        source="deepspeed/runtime/zero/stage3.py",
        lists=(  # all but what `ZeroStage3Engine._narrowed_to` sees to
            "fp16_groups",
            "fp16_partitioned_groups",
            "fp16_partitioned_groups_flat",
            "fp16_partitioned_groups_flat_id",
            "fp16_partitioned_groups_flat_numel",
            "fp32_partitioned_groups_flat",
            "groups_padding",
            "next_swappable_fp32_partitioned_groups",
            "sub_group_partition_counts",
            "sub_group_process_groups",
        ),
        dicts=("averaged_gradients",),
        offloaded_dicts=("subgroup_to_device",),
        names=(
            "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
            "_get_fp32_grad_state_partition",
            "_get_norm_groups",
            "has_overflow",
            "_update_scale",
            "all2all_process_group",
            "dp_process_group",
            "dtype",
            "empty_partition_cache",
            "exit_backward",
            "get_param_id",
            "grad_partitions_flat_buffer",
            "grad_position",
            "gradient_accumulation_dtype",
            "independent_gradient_partition_epilogue",
            "ipg_buckets",
            "loss_scale",
            "optimizer",
            "parameter_offload._DeepSpeedZeRoOffload__allgather_stream",
            "parameter_offload._max_available_parameters_in_numel",
            "parameter_offload._max_reuse_distance_in_numel",
            "parameter_offload._prefetch_bucket_sz",
            "parameter_offload.fast_sharding_for_leaf_module",
            "parameter_offload.log_trace_cache_warnings",
            "parameter_offload.param_coordinator",
            "parameter_offload.timers",
            "parameter_offload.zero_quantized_weights",
            "params_in_nvme_and_cpu",
            "reduce_ready_partitions_and_remove_grads",
            "sequence_parallel_size",
            "sub_group_to_group_id",
            "swap_optimizer",
            "torch_autocast_gradscaler",
            "zenflow",
            "zero_hpz_partition_size",
            "zero_quantized_nontrainable_weights",
        ),
        offloaded_names=("partial_offload",),
        keys=("fp32_flat_groups", "optimizer_state_dict"),
        since={"sub_group_partition_counts": (0, 19, 3), "sub_group_process_groups": (0, 19, 3)},
    ),
    "FP16_UnfusedOptimizer": Internals(
        source="deepspeed/runtime/fp16/unfused_optimizer.py",
        lists=("fp16_groups", "fp32_groups"),
        names=(
            "_update_scale",
            "initialize_optimizer_states",
            "optimizer",
            "overflow_checker.check",
            "overflow_checker.has_overflow",
            "refresh_fp32_params",
        ),
    ),
    "unfused_optimizer": Internals(
        source="deepspeed/runtime/fp16/unfused_optimizer.py", names=("get_global_norm", "get_weight_norm")
    ),
    "FP16_Optimizer": Internals(
        source="deepspeed/runtime/fp16/fused_optimizer.py",
        lists=("fp16_groups", "fp16_groups_flat", "fp32_groups_flat", "flatten_grad_norm_mask_list"),
        empty_at_first=("flatten_grad_norm_mask_list",),
        names=(
            "_update_scale",
            "has_executed_step",
            "initialize_optimizer_states",
            "optimizer",
            "overflow_checker.check",
            "overflow_checker.has_overflow",
            "refresh_fp32_params",
        ),
    ),
    "fused_optimizer": Internals(
        source="deepspeed/runtime/fp16/fused_optimizer.py", names=("get_flattened_grad_norm", "get_global_norm")
    ),
    "Module": Internals(  # what ZeRO-3 notes on the model
        source="deepspeed/runtime/zero/parameter_offload.py",
        names=("ds_inflight_param_registry",),
    ),
    "LinkedParameter": Internals(  # what ZeRO-1 and ZeRO-2 note on parameters
        source="deepspeed/utils/mixed_precision_linkage.py",
        names=("_hp_mapping",),
    ),
    "Parameter": Internals(  # and on its parameters
        source="deepspeed/runtime/zero/partition_parameters.py",
        names=(
            "ds_active_sub_modules",
            "ds_numel",
            "ds_shape",
            "ds_status",
            "ds_tensor",
            "partition",
            "partition_numel",
        ),
    ),
}
"""By class; `_global_grad_norm` and `overflow`, which DeepSpeed's optimizers set in a step, are only written."""

WRITTEN = ("_global_grad_norm",)
"""Names that need not be there before they are set."""


def installed_version() -> Version:
    """Of the DeepSpeed that runs."""
    major, minor, patch = (*version.parse(str(deepspeed.__version__)).release, 0, 0)[:3]
    return major, minor, patch


def check_version() -> None:
    """Refuse a DeepSpeed that the tables say nothing about.

    Raises:
        ValueError: Saying which versions are supported.
    """
    if not OLDEST <= installed_version() < FIRST_UNKNOWN:
        oldest = ".".join(map(str, OLDEST))
        unknown = ".".join(map(str, FIRST_UNKNOWN[:2]))
        raise ValueError(f"slsam_ds supports deepspeed >={oldest},<{unknown}; found {deepspeed.__version__}")


def check_internals(holder: Any, name: str, *, offloaded: bool = False) -> None:
    """Refuse an object that lacks something of its class's table.

    Args:
        holder: The object.
        name: Of the table.
        offloaded: The optimizer's state is on the host.

    Raises:
        ValueError: Naming what is missing.
    """
    table = INTERNALS[name]
    lists, dicts = table.group_lists(offloaded=offloaded), table.group_dicts(offloaded=offloaded)
    num_groups = len(getattr(holder, lists[0], None) or ()) if lists else 0
    for attribute in (*lists, *dicts):
        kind = list if attribute in lists else dict
        container = getattr(holder, attribute, None)
        may_be_empty = kind is dict or (attribute in table.empty_at_first and not container)
        if not isinstance(container, kind) or not (may_be_empty or len(container) == num_groups):
            raise ValueError(f"{name}.{attribute} is not the {kind.__name__} per group that slsam_ds knows")
    for path in (*table.names, *(table.offloaded_names if offloaded else ())):
        if table.exists(path):
            try:
                attrgetter(path)(holder)
            except AttributeError:
                raise ValueError(
                    f"{name}.{path} is not there: slsam_ds does not know this DeepSpeed ({deepspeed.__version__})"
                ) from None
