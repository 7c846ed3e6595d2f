"""Perturb in the last part of the run."""

import math
from typing import Any, ClassVar

from slsam_ds.choices import is_number
from slsam_ds.schedules.schedule import Schedule


class Last(Schedule):
    """The last share of the run's steps, rounded up; the steps before are those of the base optimizer.

    Compare Zhou et al. 2024, arXiv 2410.10373 (sharpness-aware minimization late in training).
    """

    takes: ClassVar[str | None] = "a share of the run in (0, 1]"

    def __init__(self, argument: float, total_steps: int | None, seed: int) -> None:
        if total_steps is None or total_steps < 1:
            raise ValueError(
                f'slsam.ascend_when={{"last": {argument:g}}} with total_steps={total_steps}: give the number of steps '
                "of the run (at least 1), or choose another schedule"
            )
        # 1e-9: a share of 0.3 of 10 steps is 3 of them, though 0.3 * 10 is a little more than 3 in floating point.
        num_ascents = math.ceil(argument * total_steps - 1e-9)
        self._first = total_steps - num_ascents + 1
        self.share = num_ascents / total_steps

    @staticmethod
    def accepts(argument: Any) -> bool:
        return is_number(argument) and 0 < argument <= 1

    def ascends(self, step: int) -> bool:
        return step >= self._first
