"""Climb in proportion to the weights: what a rescaled layer computes stays the same, and so does its perturbation."""

from torch import Tensor

from slsam_ds.metrics.metric import Stretching
from slsam_ds.protocol import Shard


class Adaptive(Stretching):
    """ε = ρ w² g / ‖|w| g‖: T is |w|, element by element.

    A weight of zero does not move. The usual rho is larger than SAM's, by one over a typical weight.

    Reference: Kwon et al. 2021 (ASAM), whose code adds 0.01 to |w|.
    """

    def stretched(self, shard: Shard) -> Tensor:
        return shard.gradient.float() * shard.piece.master.to(shard.gradient.device).float().square()
