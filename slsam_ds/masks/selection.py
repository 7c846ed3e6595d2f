"""Which elements have the largest keys, over the shards of all ranks: exactly so many, whatever the sharding.

Sorting would need all keys in one place. Counting does not: two bytes at a time, from the top, all ranks count how many
of the elements still in question have each value of these bytes, and add up the counts. So a key of four bytes is found
with two all-reduces of 65,536 counts. Elements with this very key are told apart by their numbers, in the same way.
With one byte at a time the all-reduces would be shorter, and the elements looked at twice as often.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slsam_ds.protocol import Engine

_DIGIT_BITS = 16
_BINS = 2**_DIGIT_BITS
_KEY_BITS = 32
_LANES = 16  # an accelerator counts an element in one of so many places for each value: seldom two in the same


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
        self._key, left, num_allowed = self._nth(lambda: map(self._keys, _counted(parts)), count, _KEY_BITS)
        place, _, _ = self._nth(lambda: map(self._places_of_ties, _counted(parts)), left, numel.bit_length())
        self._last_number = self._highest - place  # of the elements with that key
        self.num = torch.minimum(count, num_allowed)

    def __call__(self, part: Part) -> Tensor:
        keys = self._keys(part)
        key, last_number = self._key.to(keys.device), self._last_number.to(keys.device)
        return (keys > key) | ((keys == key) & (part.numbers <= last_number))

    def _keys(self, part: Part) -> Tensor:
        return torch.where(part.numbers >= 0, self._key_of(part), -1)

    def _places_of_ties(self, part: Part) -> Tensor:
        """Of elements with the last key that is chosen: the larger, the lower their number. -1 for all others."""
        keys = self._keys(part)
        return torch.where(keys == self._key.to(keys.device), self._highest - part.numbers, -1)

    def _nth(
        self, values: Callable[[], Iterable[Tensor]], count: Tensor, num_bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `count`-th largest of all ranks' values that are not negative.

        Args:
            values: This rank's, int64, anew each time.
            count: Shape (), int64. 0 gives a number above all.
            num_bits: Of a number above all values.

        Returns:
            That value, or 0 where there are fewer; how many equal to it are among the `count` largest; how many values
            there are. Shape (), int64, global.
        """
        device = self._engine.device
        bins = torch.arange(_BINS, device=device)
        found, left = torch.zeros((), dtype=torch.int64, device=device), count
        num_values: Tensor | None = None
        for shift in range((num_bits - 1) // _DIGIT_BITS * _DIGIT_BITS, -1, -_DIGIT_BITS):
            counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
            for each in values():
                in_question = each >> (shift + _DIGIT_BITS) == found.to(each.device)
                digits = torch.where(in_question, each >> shift & (_BINS - 1), _BINS)
                counts += histogram(digits, _BINS, lanes=1 if digits.device.type == "cpu" else _LANES).to(device)
            counts = self._engine.ranks.all_reduce(counts)
            num_values = counts.sum() if num_values is None else num_values
            reached = counts.flip(0).cumsum(0).flip(0)  # how many have this digit, or a larger one
            digit = ((reached >= left).sum() - 1).clamp(min=0)
            left = left - torch.where(bins > digit, counts, 0).sum()
            found = found * _BINS + digit
        assert num_values is not None
        return found, left, num_values


def _counted(parts: Parts) -> Iterable[Part]:
    """Replicas hold the same elements: one rank counts them."""
    return (part for part in parts() if part.counted)


def histogram(values: Tensor, num_bins: int, *, lanes: int = 1) -> Tensor:
    """How often each value below `num_bins` is there; `num_bins` itself is not counted. int64, 1-D, to (num_bins,).

    With several lanes, neighbouring elements are counted in different places, which are then added up: on an
    accelerator, where `torch.bincount` would make the host wait, and `torch.histc` counts in float32, and not where
    deterministic algorithms are asked for.
    """
    if lanes == 1:
        return torch.bincount(values, minlength=num_bins + 1)[:num_bins]
    places = values * lanes + torch.arange(values.numel(), device=values.device) % lanes
    counts = torch.zeros((num_bins + 1) * lanes, dtype=torch.int64, device=values.device)
    counts.scatter_add_(0, places, torch.ones_like(values))
    return counts.view(num_bins + 1, lanes).sum(dim=1)[:num_bins]
