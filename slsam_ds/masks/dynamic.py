"""A mask that begins at random, drops flat elements and tries others: SSAM-D."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from slsam_ds.masks.mask import Mask, magnitude
from slsam_ds.masks.selection import Choose, Largest, Part, Parts
from slsam_ds.protocol import Engine
from slsam_ds.rng import random_bits, seed_of

_DROPPED_AT_FIRST = 0.5
_RANDOM = 2**30
"""Above every random key."""


class Dynamic(Mask):
    """Of the elements that move, those with the smallest |g| are dropped, and as many others drawn that did not move.

    Dropped is a share d = 0.25 (1 + cos(π t / T)) of those that move, which falls from a half to nothing over the
    run's T steps; t steps are over. Dropped are never more than there are others. What was dropped is not drawn in the
    same refresh. At first each element moves with probability `density`; from the first refresh on exactly so many do.

    In the authors' code as many are dropped where there are fewer others (`density` above 1 / (1 + d)), so that fewer
    and fewer move; here `density` stays what it is. They can also drop by |w| and draw by |g|; the ways here are those
    that they use unless told otherwise.

    Raises:
        ValueError: The length of the run is not known.

    Reference: Mi et al. 2022; SSAMD in their code.
    """

    def __init__(
        self,
        engine: Engine,
        numels: Mapping[int, int],
        *,
        density: float,
        every: int,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(engine, numels, density=density, every=every)
        if total_steps is None or total_steps < 1:
            raise ValueError(
                f'slsam.mask="dynamic" with total_steps={total_steps}: give the number of steps of the run (at least '
                '1), or use mask="fisher"'
            )
        self._seed, self._total_steps = seed, total_steps
        self._first_key = seed_of(seed, 0)

    def first(self, numbers: Tensor) -> Tensor:
        return (numbers >= 0) & (random_bits(numbers, self._first_key) < round(self._density * _RANDOM))

    def choose(self, step: int, parts: Parts, count: int, numel: int) -> Choose:
        engine, key = self._engine, seed_of(self._seed, step)
        num_dropped = min(round(self._share_dropped(step) * count), numel - count)
        wanted = torch.full((), count, dtype=torch.int64, device=engine.device)

        def flatness(part: Part) -> Tensor:
            return torch.where(part.moves(), magnitude(part.gradient), -1)

        # The arms may come from different refreshes: fewer of them may move than are to stay.
        stay = Largest(engine, parts, flatness, wanted - num_dropped, numel=self._total_numel)

        def chance(part: Part) -> Tensor:
            """Those that did not move come before those just dropped, which make up for what is missing."""
            drawn = random_bits(part.numbers, key) + torch.where(part.moves(), 0, _RANDOM)
            return torch.where(stay(part), -1, drawn)

        come = Largest(engine, parts, chance, wanted - stay.num, numel=self._total_numel)
        return lambda part: stay(part) | come(part)

    def _share_dropped(self, step: int) -> float:
        over = min((step - 1) / self._total_steps, 1.0)
        return _DROPPED_AT_FIRST * (1 + math.cos(math.pi * over)) / 2
