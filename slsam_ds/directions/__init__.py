"""Where a step climbs.

A new direction is a file with a subclass of `Direction` and an entry in `DIRECTIONS`.
"""

from collections.abc import Mapping

from slsam_ds.directions.current import CurrentGradient
from slsam_ds.directions.direction import Direction
from slsam_ds.directions.friendly import Friendly
from slsam_ds.directions.momentum import Momentum
from slsam_ds.directions.previous import PreviousGradients
from slsam_ds.directions.random import Random

__all__ = ["DIRECTIONS", "Direction"]

DIRECTIONS: Mapping[str, type[Direction]] = {
    "current": CurrentGradient,
    "previous": PreviousGradients,
    "momentum": Momentum,
    "friendly": Friendly,
    "random": Random,
}
"""The values of the knob `ascent_source`."""
