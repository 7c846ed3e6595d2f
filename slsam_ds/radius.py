"""How far a step climbs: rho over the length of what it climbs along."""

import torch
from torch import Tensor


def perturbation_scale(global_sq_norm: Tensor, *, rho: float) -> Tensor:
    """Scale that puts the ascent step on the sphere of radius rho.

    Args:
        global_sq_norm: Squared L2 norm of the ascent gradient over the active layers and all ranks. Any shape, float64.
        rho: Radius in parameter units.

    Returns:
        rho / norm, or 0 where the norm is 0 or not finite (no direction to climb). As `global_sq_norm`.

    Reference: Foret et al. 2021, eq. 2.
    """
    climbs = (global_sq_norm > 0) & global_sq_norm.isfinite()
    return torch.where(climbs, rho / global_sq_norm.sqrt(), 0.0)
