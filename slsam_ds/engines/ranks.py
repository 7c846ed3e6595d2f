"""The ranks of a process group: the two small collectives that every engine needs, and how long they may take."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from slsam_ds.engines.agreement import describe_disagreement, fingerprint
from slsam_ds.protocol import RanksDisagreeError

# Gradients travel in buckets of up to this many elements: large enough that latency does not count.
_BUCKET_NUMEL = 2**24

T = TypeVar("T")


class ProcessGroupRanks:
    """`Ranks` over a process group; a single rank where none is up.

    Args:
        group: The data-parallel group; None: the default group.
        device: Where the group's backend expects tensors.

    Raises:
        ValueError: Several ranks, and the device is not the current one of this process.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device
        up = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if up else 0
        self.world_size = dist.get_world_size(group) if up else 1
        if self.world_size > 1:
            _check_current(device)

    def all_reduce(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, group=self._group)
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Mean over ranks, in place, in few large calls. The same tensors in the same order on every rank."""
        if self.world_size > 1:
            for bucket in buckets(tensors, lambda tensor: tensor):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                dist.all_reduce(flat.div_(self.world_size), group=self._group)
                pieces = flat.split([tensor.numel() for tensor in bucket])
                torch._foreach_copy_(
                    bucket, [piece.view_as(tensor) for piece, tensor in zip(pieces, bucket, strict=True)]
                )

    def check_together(self, check: Callable[[], None]) -> None:
        problem: str | None = None
        try:
            check()
        except (ValueError, OSError) as error:
            problem = str(error)
        problems: list[str | None] = [problem]
        if self.world_size > 1:
            problems = [None] * self.world_size
            dist.all_gather_object(problems, problem, group=self._group)
        for found in problems:
            if found is not None:
                raise ValueError(found)

    def agree(self, claims: Mapping[str, Any], *, stop: bool = False) -> Callable[[], bool]:
        if self.world_size == 1:
            return lambda: stop
        prints = [fingerprint(value) for value in claims.values()]
        # The maximum of x and of -x over ranks: they cancel exactly where all ranks hold the same x. Started here and
        # awaited before the first gradient travels, so it hides behind the forward and backward.
        extremes = self._maximum([*prints, *(-number for number in prints), int(stop)])

        def check() -> bool:
            *numbers, any_stop = extremes()
            highest, negated_lowest = numbers[: len(claims)], numbers[len(claims) :]
            if all(high == -low for high, low in zip(highest, negated_lowest, strict=True)):
                return bool(any_stop)
            per_rank: list[Any] = [None] * self.world_size
            dist.all_gather_object(per_rank, dict(claims), group=self._group)
            raise RanksDisagreeError(f"slsam: ranks disagree about {describe_disagreement(per_rank)}")

        return functools.cache(check)  # asked before every backward that sends, and once is enough

    def all_of(self, flags: Sequence[bool]) -> Callable[[], list[bool]]:
        if self.world_size == 1:
            return lambda: list(flags)
        lowered = self._maximum([int(not flag) for flag in flags])
        return lambda: [not number for number in lowered()]

    def _maximum(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Start a maximum over ranks of what their hosts know; the returned function waits for it.

        On an accelerator it takes a stream of its own, so that a host waits for the other hosts and not for the work
        that its device still has to do.
        """
        aside = torch.get_device_module(self._device).stream
        with aside(self._stream_aside):
            highest = torch.tensor(numbers, dtype=torch.int64).to(self._device)
            work = dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

        def result() -> list[int]:
            with aside(self._stream_aside):
                if not work.is_completed() or self._device.type != "cpu":
                    work.wait()
                found: list[int] = highest.tolist()
                return found

        return result

    @functools.cached_property
    def _stream_aside(self) -> Any:
        return torch.get_device_module(self._device).Stream()


def _check_current(device: torch.device) -> None:
    """Refuse what would end in a "Duplicate GPU": NCCL sends objects, and new streams are, on the current device."""
    if device.type == "cpu" or device.index is None:
        return
    current = torch.get_device_module(device).current_device()
    if current != device.index:
        raise ValueError(
            f"the model is on {device}, but {device.type}:{current} is this rank's current device: call "
            f"torch.{device.type}.set_device({device.index}) before the process group is made"
        )


def share_deadline(group: dist.ProcessGroup, device: torch.device) -> None:
    """Let a group's collectives wait as long as the default group's, which the user set, and no longer.

    DeepSpeed makes its groups with torch's own deadlines (10 minutes under NCCL, 30 under gloo), whatever the default
    group was made with (deepspeed/comm/torch.py, `new_group`, 0.19.8).

    Args:
        group: Not yet waited on by anybody.
        device: Where the group's backend expects tensors.
    """
    if dist.get_backend(group) in (dist.Backend.GLOO, dist.Backend.NCCL):  # what torch can set it for
        default = dist.distributed_c10d._get_default_group()
        _set_pg_timeout(default._get_backend(device).options._timeout, group)


def buckets(things: Iterable[T], tensor_of: Callable[[T], Tensor]) -> Iterator[list[T]]:
    """Neighbours whose tensors are of one dtype, and together below the bucket size unless one alone is larger."""
    bucket: list[T] = []
    numel, dtype = 0, None
    for thing in things:
        tensor = tensor_of(thing)
        numel += tensor.numel()
        if bucket and (tensor.dtype != dtype or numel > _BUCKET_NUMEL):
            yield bucket
            bucket, numel = [], tensor.numel()
        bucket.append(thing)
        dtype = tensor.dtype
    if bucket:
        yield bucket
