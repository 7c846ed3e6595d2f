"""Perturb in every m-th step."""

from typing import Any, ClassVar

from slsam_ds.schedules.schedule import Schedule


class Every(Schedule):
    """Steps 1, 1 + m, 1 + 2m, ...: the first one climbs, so that a short run climbs at all.

    Compare Liu et al. 2022 (LookSAM), which also keeps a part of the gradient between its ascents.
    """

    takes: ClassVar[str | None] = "a whole number of steps from 1"

    def __init__(self, argument: int, total_steps: int | None, seed: int) -> None:
        self._period = argument
        self.share = 1 / argument

    @staticmethod
    def accepts(argument: Any) -> bool:
        return isinstance(argument, int) and not isinstance(argument, bool) and argument >= 1

    def ascends(self, step: int) -> bool:
        return (step - 1) % self._period == 0
