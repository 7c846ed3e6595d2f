"""In which steps the weights are perturbed. In the others rho is 0, and no ascent pass is run or paid for.

A new schedule is a file with a subclass of `Schedule` and an entry in `SCHEDULES`.
"""

from collections.abc import Mapping
from typing import Any

from slsam_ds.choices import read_choice
from slsam_ds.schedules.always import Always
from slsam_ds.schedules.every import Every
from slsam_ds.schedules.last import Last
from slsam_ds.schedules.norm_above import NormAbove
from slsam_ds.schedules.probability import Probability
from slsam_ds.schedules.schedule import Schedule

__all__ = ["SCHEDULES", "Schedule", "make_schedule"]

SCHEDULES: Mapping[str, type[Schedule]] = {
    "always": Always,
    "every": Every,
    "last": Last,
    "probability": Probability,
    "norm_above": NormAbove,
}
"""The values of the knob `ascend_when`."""


def make_schedule(value: Any, *, total_steps: int | None = None, seed: int = 0) -> Schedule:
    """The schedule that `ascend_when` names.

    Args:
        value: The knob's value.
        total_steps: Length of the run; some schedules need it.
        seed: Of what is drawn.

    Raises:
        ValueError: A value that is not allowed, or a schedule that needs the length of the run and was not given it.
    """
    member, argument = read_choice(value, SCHEDULES)
    return member(argument, total_steps, seed)
