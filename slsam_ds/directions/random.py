"""Climb along a direction drawn at random: what is left of SAM where the gradient does not say which way is up."""

import math

import torch
from torch import Tensor

from slsam_ds.directions.direction import Direction
from slsam_ds.gradient import Gradient
from slsam_ds.numbering import numbers_of
from slsam_ds.protocol import Piece, Shard
from slsam_ds.rng import random_bits, seed_of
from slsam_ds.tally import local_sq_norms

_RANDOM = 2**30  # above what `random_bits` gives


class Random(Direction):
    """z with a standard normal for every weight, drawn anew in every step: ε is uniform on the sphere of radius rho.

    A single pass. A weight's z is a function of its number in the model, the step and the seed, and so the same
    whatever the sharding.

    Compare Li et al. 2022 (random weight perturbation), who let the variance follow each filter's norm.
    """

    def climb(self, arms: tuple[int, ...], ascent: Gradient | None, *, seed: int) -> Gradient | None:
        engine = self._engine
        shards = [Shard(piece, self._drawn(piece, seed)) for piece in engine.pieces(arms)]
        local = local_sq_norms(shards, arms, rank=engine.ranks.rank, device=engine.device)
        return Gradient(arms, shards, engine.ranks.all_reduce(local))

    def _drawn(self, piece: Piece, seed: int) -> Tensor:
        return normals(numbers_of(self._engine, piece, 0, piece.weight.numel(), piece.weight.device), seed)


def normals(numbers: Tensor, seed: int) -> Tensor:
    """A standard normal for each number, and 0 for negative ones. int64, to float32 of the same shape.

    By the transform of Box and Muller, of which one of the two is taken.
    """
    radius = (-2 * torch.log((random_bits(numbers, seed_of(seed, 0)) + 1) / _RANDOM)).sqrt()
    angle = random_bits(numbers, seed_of(seed, 1)) * (2 * math.pi / _RANDOM)
    return torch.where(numbers >= 0, radius * torch.cos(angle), 0.0)
