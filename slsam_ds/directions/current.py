"""Climb along the gradient at the weights: the two-pass SAM of Foret et al. 2021."""

from typing import ClassVar

from slsam_ds.directions.direction import Direction
from slsam_ds.gradient import Gradient


class CurrentGradient(Direction):
    """The ascent pass's own gradient, of the same window that the step descends on."""

    needs_pass: ClassVar[bool] = True
    is_gradient: ClassVar[bool] = True

    def climb(self, arms: tuple[int, ...], ascent: Gradient | None, *, seed: int) -> Gradient | None:
        return ascent
