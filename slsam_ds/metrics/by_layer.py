"""Every layer climbs by the same share of its own weights."""

import torch
from torch import Tensor

from slsam_ds.gradient import Gradient
from slsam_ds.metrics.metric import Metric
from slsam_ds.tally import dot


class ByLayer(Metric):
    """ε_l = ρ ‖w_l‖ g_l / ‖g_l‖: a sphere for each arm, whose radius is in proportion to the norm of its weights.

    rho is that proportion. An arm without a gradient, or with weights of zero, does not move.
    """

    def scales(self, ascent: Gradient, *, rho: float, over_ranks: bool) -> Tensor:
        sq_weights = self._sums(ascent, lambda shard: dot(shard.piece.master, shard.piece.master), over_ranks)
        climbs = (ascent.sq_norms > 0) & ascent.sq_norms.sum().isfinite()
        return torch.where(climbs, rho * (sq_weights / ascent.sq_norms).sqrt(), 0.0)
