"""Gathering ZeRO-1's and ZeRO-2's groups in few large calls: DeepSpeed makes at least one for each group.

With `granularity: tensor` a sample is of a hundred groups, most of them a few kilobytes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from slsam_ds.engines.ranks import buckets

# Groups of up to so many elements are copied into buffers and travel together. Larger ones gain nothing by it, and
# travel in place.
_SMALL_NUMEL = 2**20


def gather_groups(
    groups_flat: Sequence[Tensor],
    partitioned_param_groups: Sequence[Sequence[Tensor]],
    dp_process_group: Sequence[Any],
    start_alignment_factor: int,
    allgather_bucket_size: int,
) -> None:
    """Give every rank the partitions of all ranks: in the place of DeepSpeed's `all_gather_dp_groups`.

    Args:
        groups_flat: By group, its weights. 1-D.
        partitioned_param_groups: By group, views of it, one for each rank. All of the same length.
        dp_process_group: By group, the ranks.
        start_alignment_factor: As DeepSpeed's.
        allgather_bucket_size: Likewise.
    """
    numbers = range(len(groups_flat))
    small = [number for number in numbers if groups_flat[number].numel() <= _SMALL_NUMEL]
    if len(small) < 2:
        small = []
    alone = sorted(set(numbers).difference(small))
    if alone:
        all_gather_dp_groups(
            groups_flat=[groups_flat[number] for number in alone],
            partitioned_param_groups=[partitioned_param_groups[number] for number in alone],
            dp_process_group=[dp_process_group[number] for number in alone],
            start_alignment_factor=start_alignment_factor,
            allgather_bucket_size=allgather_bucket_size,
        )
    for bucket in buckets(small, groups_flat.__getitem__):
        _gather_together([partitioned_param_groups[number] for number in bucket], dp_process_group[bucket[0]])


def _gather_together(partitions: Sequence[Sequence[Tensor]], ranks: dist.ProcessGroup) -> None:
    rank, world_size = dist.get_rank(ranks), dist.get_world_size(ranks)
    if world_size == 1:
        return
    own = torch.cat([of_ranks[rank].detach() for of_ranks in partitions])
    received = own.new_empty(world_size * own.numel())
    dist.all_gather_into_tensor(received, own, group=ranks)
    sizes = [of_ranks[rank].numel() for of_ranks in partitions]
    for place, part in enumerate(received.chunk(world_size)):
        if place != rank:
            torch._foreach_copy_([of_ranks[place].detach() for of_ranks in partitions], list(part.split(sizes)))
