"""What every metric has."""

from collections.abc import Callable

import torch
from torch import Tensor

from slsam_ds.gradient import Gradient
from slsam_ds.protocol import Engine, Shard
from slsam_ds.radius import perturbation_scale
from slsam_ds.tally import dot, spoken_for


class Metric:
    """Says how far a step climbs, and in which geometry: ε = ρ T² g / ‖T g‖, with a T for each metric.

    This is the Euclidean one, T = 1: one sphere of radius rho around the weights of all perturbed arms together (Foret
    et al. 2021). Everything here works on this rank's shards; a few numbers are reduced over ranks.

    Args:
        engine: Where the weights and the optimizer's state are.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def stretched(self, shard: Shard) -> Tensor:
        """T² g of a shard. 1-D; the gradient itself where nothing is stretched."""
        return shard.gradient

    def scales(self, ascent: Gradient, *, rho: float, over_ranks: bool) -> Tensor:
        """By what factor each arm's stretched gradient becomes its part of ε, the loss scale left out.

        Args:
            ascent: What the step climbs along.
            rho: Radius in parameter units.
            over_ranks: The gradient is that of all ranks; else this rank climbs by itself.

        Returns:
            Shape (len(ascent.arms),), float64; 0 where there is nothing to climb along.
        """
        return perturbation_scale(ascent.sq_norms.sum(), rho=rho).expand(ascent.sq_norms.shape)

    def _sums(self, ascent: Gradient, value_of: Callable[[Shard], Tensor], over_ranks: bool) -> Tensor:
        """Of each arm, the sum of a number over its elements. Shape (len(ascent.arms),), float64."""
        engine, place_of = self._engine, {arm: place for place, arm in enumerate(ascent.arms)}
        sums = torch.zeros(len(ascent.arms), dtype=torch.float64, device=engine.device)
        for shard in spoken_for(ascent.shards, engine.ranks.rank):
            sums[place_of[shard.piece.arm]] += value_of(shard).to(engine.device)
        return engine.ranks.all_reduce(sums) if over_ranks else sums


class Stretching(Metric):
    """A metric with a T other than 1: its length is that of T g, over all perturbed arms."""

    def scales(self, ascent: Gradient, *, rho: float, over_ranks: bool) -> Tensor:
        sq_lengths = self._sums(ascent, lambda shard: dot(shard.gradient, self.stretched(shard)), over_ranks)
        sq_length = sq_lengths.sum() / ascent.loss_scale**2
        return perturbation_scale(sq_length, rho=rho).expand(sq_lengths.shape)
