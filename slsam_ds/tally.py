"""The numbers of a step: added up on the device by name, summed over ranks together, read by the host once.

```python
tally = Tally(engine.ranks, engine.device)
tally.add("loss", local_loss / world_size)
tally.add("sq_norms", local_sq_norms(shards, arms, rank=rank, device=device))
tally.reduce()                                  # one all-reduce for all of it; the host goes on
scale = rho / tally["sq_norms"].sum().sqrt()    # on the device
numbers = tally.read()                          # the host waits for the device
numbers["loss"], numbers.by_arm("sq_norms", arms)
```
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from slsam_ds.protocol import Ranks, Shard

# Squared norms are taken of so many elements at once and added up in float64: on the CPU, torch's float32 norm of a
# vector is too small by 1e-5 at this size and by 4e-3 at 5e7 elements.
_NORM_NUMEL = 2**20


class Tally:
    """Named float64 vectors of one step.

    Args:
        ranks: Over whom they are summed.
        device: Where they are.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._local: dict[str, Tensor] = {}
        self._reduced: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add to this rank's part of a number, or of a vector of numbers. Shape () or (n,), any device."""
        values = values.detach().reshape(-1).to(self._device, torch.float64)
        self._local[name] = self._local[name] + values if name in self._local else values

    def local_sum(self, *names: str) -> Tensor:
        """Sum of what this rank has added under those of these names that are not reduced yet. Shape (), local."""
        return torch.cat([self._local[name] for name in names if name in self._local]).sum()

    def reduce(self) -> None:
        """Sum over ranks what was added since the last time, in one all-reduce. The same names on every rank."""
        flat = self._ranks.all_reduce(torch.cat(list(self._local.values())))
        sizes = [values.numel() for values in self._local.values()]
        self._reduced.update(zip(self._local, torch.split(flat, sizes), strict=True))
        self._local = {}

    def __getitem__(self, name: str) -> Tensor:
        """What was reduced under this name. Shape (n,), global, on the device."""
        return self._reduced[name]

    def read(self) -> "Numbers":
        """Wait for the device and read everything that was reduced."""
        values = iter(torch.cat(list(self._reduced.values())).tolist())
        return Numbers({name: [next(values) for _ in range(each.numel())] for name, each in self._reduced.items()})


class Numbers:
    """What the host read of a step, by name: the same on every rank.

    Args:
        values: By name.
    """

    def __init__(self, values: Mapping[str, Sequence[float]]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> float:
        """A number that stands alone."""
        (value,) = self._values[name]
        return value

    def get(self, name: str) -> float | None:
        """A number that stands alone; None where it was not reduced."""
        found = self._values.get(name)
        return None if found is None else found[0]

    def vector(self, name: str) -> Sequence[float]:
        """All numbers under a name."""
        return self._values[name]

    def all_finite(self, *names: str) -> bool:
        """Whether all numbers under those of these names that were reduced are finite."""
        return all(math.isfinite(value) for name in names for value in self._values.get(name, ()))

    def by_arm(self, name: str, arms: Sequence[int]) -> dict[int, float]:
        """A vector with a number for each of these arms."""
        return dict(zip(arms, self._values[name], strict=True))

    def raised(self, name: str) -> tuple[int, ...]:
        """The places, ranks for instance, whose number is not zero."""
        return tuple(place for place, value in enumerate(self._values.get(name, ())) if value)


def local_sq_norms(shards: Iterable[Shard], arms: Sequence[int], *, rank: int, device: torch.device) -> Tensor:
    """Squared gradient norm of each arm over the elements this rank speaks for; summed over ranks they are global.

    Returns:
        One number per entry of `arms`, in that order. Shape (len(arms),), float64, local.
    """
    own = spoken_for(shards, rank)
    if not own:
        return torch.zeros(len(arms), dtype=torch.float64, device=device)
    parts = [(shard.piece.arm, part) for shard in own for part in torch.split(shard.gradient, _NORM_NUMEL)]
    norms = torch._foreach_norm([part for _, part in parts], 2, dtype=torch.float32)
    squares = torch.stack([norm.to(device) for norm in norms]).double().square()
    belongs = upload(arms, device)[:, None] == upload([arm for arm, _ in parts], device)
    return torch.where(belongs, squares, 0.0).sum(dim=1)


def spoken_for(shards: Iterable[Shard], rank: int) -> list[Shard]:
    """The shards that this rank counts, none of them empty: replicas of one are counted once."""
    return [shard for shard in shards if shard.piece.owner == rank and shard.gradient.numel() > 0]


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Of two vectors, on the device of the first. Shape (), float64."""
    parts = zip(torch.split(one, _NORM_NUMEL), torch.split(other.to(one.device), _NORM_NUMEL), strict=True)
    return torch.stack([torch.dot(a.float(), b.float()).double() for a, b in parts]).sum()


def upload(numbers: Sequence[float], device: torch.device) -> Tensor:
    """The numbers on a device. Shape (len(numbers),), float64.

    The host goes on at once; `torch.tensor` with a device waits until all work handed to the device is done.
    """
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
