"""How far a step climbs.

A metric is a function from the squared gradient norms of the perturbed arms to the factor by which each arm's gradient
becomes its part of the perturbation.
"""

import torch
from torch import Tensor


def euclidean(global_sq_norms: Tensor, *, rho: float) -> Tensor:
    """One sphere of radius rho around the weights of all perturbed arms together.

    Args:
        global_sq_norms: Squared L2 norms of the ascent gradient by arm, over all ranks. Shape (n,), float64.
        rho: Radius in parameter units.

    Returns:
        The factor of each arm, the same for all: see `perturbation_scale`. Shape (n,), float64.
    """
    return perturbation_scale(global_sq_norms.sum(), rho=rho).expand(global_sq_norms.shape)


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
