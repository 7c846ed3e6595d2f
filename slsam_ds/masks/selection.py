"""Which elements have the largest keys, over the shards of all ranks: exactly so many, whatever the sharding.

Sorting would need all keys in one place. Counting does not: byte by byte from the top, all ranks count how many of the
elements still in question have each value of the next byte, and add up the counts. So a key of four bytes is found with
four all-reduces of 256 counts. Elements with this very key are told apart by their numbers, in the same way.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slsam_ds.protocol import Engine

KEY_BYTES = 4
_BINS = 256
_LANES = 1024  # an accelerator counts an element in one of so many places for each value: seldom two in the same


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring elements of a shard. All tensors are 1-D, of the same length and on the same device.

    Attributes:
        start: Where in what is stepped, laid flat, the first one is.
        gradient: What the step climbs along. Any float dtype.
        numbers: Of each element in the model, see `LayerMap.numbers`; -1 where it is padding. int64.
        moves: Tells which of them the present mask lets move. bool.
        counted: This rank speaks for them in sums over ranks.
    """

    start: int
    gradient: Tensor
    numbers: Tensor
    moves: Callable[[], Tensor]
    counted: bool


Parts = Callable[[], Iterable[Part]]
"""All of this rank's parts, anew each time: they are made when they are looked at, and nobody holds them all."""
Choose = Callable[[Part], Tensor]
"""Of a part, the elements that are chosen. bool."""


class Largest:
    """The elements with the largest keys over all ranks, as many as wanted; of equal keys those with lower numbers.

    Called with a part, it tells which of its elements are among them. Every rank must make it at the same time.

    Args:
        engine: Knows the ranks.
        parts: This rank's.
        key_of: Key of each element of a part: int64 in [0, 2^32), or -1 where it may not be chosen. Padding never is.
        count: How many are wanted. Shape (), int64, on the engine's device.
        numel: Above all numbers of elements.

    Attributes:
        num: How many are chosen: `count`, or all that may be where there are fewer. Shape (), int64, global.
    """

    def __init__(
        self, engine: Engine, parts: Parts, key_of: Callable[[Part], Tensor], count: Tensor, *, numel: int
    ) -> None:
        self._engine, self._key_of, self._highest = engine, key_of, numel - 1
        number_bytes = (numel.bit_length() + 7) // 8  # numel itself fits: it is above all that are compared
        self._key, left, num_allowed = self._nth(lambda: map(self._keys, _counted(parts)), count, KEY_BYTES)
        self._place, _, _ = self._nth(lambda: map(self._places_of_ties, _counted(parts)), left, number_bytes)
        self.num = torch.minimum(count, num_allowed)

    def __call__(self, part: Part) -> Tensor:
        keys = self._keys(part)
        return (keys > self._key.to(keys.device)) | (self._places_of_ties(part) >= self._place.to(keys.device))

    def _keys(self, part: Part) -> Tensor:
        return torch.where(part.numbers >= 0, self._key_of(part), -1)

    def _places_of_ties(self, part: Part) -> Tensor:
        """Of elements with the last key that is chosen: the larger, the lower their number. -1 for all others."""
        keys = self._keys(part)
        return torch.where(keys == self._key.to(keys.device), self._highest - part.numbers, -1)

    def _nth(
        self, values: Callable[[], Iterable[Tensor]], count: Tensor, num_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `count`-th largest of all ranks' values that are not negative.

        Args:
            values: This rank's, int64, anew each time.
            count: Shape (), int64. 0 gives a number above all.
            num_bytes: Of the largest value there may be.

        Returns:
            That value, or 0 where there are fewer; how many equal to it are among the `count` largest; how many values
            there are. Shape (), int64, global.
        """
        device = self._engine.device
        bins = torch.arange(_BINS, device=device)
        found, left = torch.zeros((), dtype=torch.int64, device=device), count
        num_values: Tensor | None = None
        for shift in range(8 * (num_bytes - 1), -1, -8):
            counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
            for each in values():
                in_question = each >> (shift + 8) == found.to(each.device)
                lanes = 1 if each.device.type == "cpu" else _LANES
                counts += histogram(torch.where(in_question, each >> shift & (_BINS - 1), _BINS), lanes).to(device)
            counts = self._engine.ranks.all_reduce(counts)
            num_values = counts.sum() if num_values is None else num_values
            reached = counts.flip(0).cumsum(0).flip(0)  # how many have this value of the byte, or a larger one
            byte = ((reached >= left).sum() - 1).clamp(min=0)
            left = left - torch.where(bins > byte, counts, 0).sum()
            found = found * _BINS + byte
        assert num_values is not None
        return found, left, num_values


def _counted(parts: Parts) -> Iterable[Part]:
    """Replicas hold the same elements: one rank counts them."""
    return (part for part in parts() if part.counted)


def histogram(values: Tensor, lanes: int = 1) -> Tensor:
    """How often each value below 256 is there; 256 is not counted. int64, 1-D, to shape (256,).

    With several lanes, neighbouring elements are counted in different places, which are then added up.

    `torch.bincount` would make the host wait, and `torch.histc` counts in float32, and not where deterministic
    algorithms are asked for.
    """
    lane = torch.arange(values.numel(), device=values.device) % lanes
    counts = torch.zeros((_BINS + 1) * lanes, dtype=torch.int64, device=values.device)
    counts.scatter_add_(0, values * lanes + lane, torch.ones_like(values))
    return counts.view(_BINS + 1, lanes).sum(dim=1)[:_BINS]
