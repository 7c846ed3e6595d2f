"""Perturb in steps drawn at random."""

from typing import Any, ClassVar

from slsam_ds.bandit import counter_generator
from slsam_ds.choices import is_number
from slsam_ds.schedules.schedule import Schedule


class Probability(Schedule):
    """Each step climbs with this probability, by itself; which ones is a function of the seed.

    Compare Zhao, Zhang, Hu 2022 (SS-SAM: randomized sharpness-aware training).
    """

    takes: ClassVar[str | None] = "a probability in (0, 1]"

    def __init__(self, argument: float, total_steps: int | None, seed: int) -> None:
        self._seed = seed
        self.share = float(argument)

    @staticmethod
    def accepts(argument: Any) -> bool:
        return is_number(argument) and 0 < argument <= 1

    def ascends(self, step: int) -> bool:
        return counter_generator(self._seed, step, purpose="schedule").random() < self.share
