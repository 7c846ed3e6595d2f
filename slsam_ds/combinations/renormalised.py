"""Descend along the gradient at the perturbed point, as long as the one at the weights."""

from typing import ClassVar

from slsam_ds.combinations.combination import Combination


class Renormalised(Combination):
    """h ||g|| / ||h||: the direction of SAM with the step size of the base optimizer.

    The gradient at the perturbed point is usually the longer one, by more the larger rho is. With an optimizer that
    does not normalise by itself (SGD) and with gradient clipping, it otherwise acts as a larger learning rate.
    """

    reads_ascent: ClassVar[bool] = True

    def factor(self, ascent_norm: float | None, descent_norm: float) -> float:
        return ascent_norm / descent_norm if ascent_norm and descent_norm > 0 else 1.0  # no norm, no perturbation
