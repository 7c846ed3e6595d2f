"""Climb along a direction drawn at random: what is left of SAM where the gradient does not say which way is up."""

import torch

from slsam_ds.directions.direction import Direction
from slsam_ds.gradient import Gradient
from slsam_ds.protocol import Piece, Shard
from slsam_ds.rng import seed_of
from slsam_ds.tally import local_sq_norms


class Random(Direction):
    """z with a standard normal for every weight, drawn anew in every step: ε is uniform on the sphere of radius rho.

    A single pass. Ranks draw their shards by themselves, so another number of ranks draws another z. Where weights are
    replicated, all ranks draw the same.

    Compare Li et al. 2022 (random weight perturbation), who let the variance follow each filter's norm.
    """

    def climb(self, arms: tuple[int, ...], ascent: Gradient | None, *, seed: int) -> Gradient | None:
        engine = self._engine
        pieces = enumerate(engine.pieces(arms))
        shards = [Shard(piece, normal(piece, seed_of(seed, piece.owner, number))) for number, piece in pieces]
        local = local_sq_norms(shards, arms, rank=engine.ranks.rank, device=engine.device)
        return Gradient(arms, shards, engine.ranks.all_reduce(local))


def normal(piece: Piece, seed: int) -> torch.Tensor:
    """A standard normal for each element of a piece. float32, 1-D, on the device of its weights."""
    device = piece.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(piece.weight.shape, generator=generator, device=device, dtype=torch.float32)
