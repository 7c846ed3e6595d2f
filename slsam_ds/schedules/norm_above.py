"""Perturb where the gradient is larger than usual."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from slsam_ds.choices import is_number
from slsam_ds.schedules.schedule import Schedule

_DECAY = 0.9


class NormAbove(Schedule):
    """A step climbs where the last one's ‖g‖² was at least μ + c σ, the running mean and deviation of ‖g‖² with it.

    μ ← 0.9 μ + 0.1 ‖g‖² and σ² ← 0.9 σ² + 0.1 (‖g‖² - μ)², with the new μ; the first step climbs. The norm is that of
    the gradient at the weights, over all arms: every step has to update all of them, so that norms can be compared.

    Compare Jiang et al. 2023 (AE-SAM). There the same step's gradient decides, a step that does not climb descends
    along it, and c falls in the course of the run from 1 to -1.
    """

    takes: ClassVar[str | None] = "a number from -10 to 10"
    compares_norms: ClassVar[bool] = True

    def __init__(self, argument: float, total_steps: int | None, seed: int) -> None:
        self._threshold = float(argument)
        self.share = math.erfc(self._threshold / math.sqrt(2)) / 2  # as if the squared norms were normal
        self._mean = self._variance = 0.0
        self._last: float | None = None

    @staticmethod
    def accepts(argument: Any) -> bool:
        return is_number(argument) and -10 <= argument <= 10

    def ascends(self, step: int) -> bool:
        return self._last is None or self._last >= self._mean + self._threshold * math.sqrt(self._variance)

    def observe(self, sq_norm: float) -> None:
        self._last = sq_norm
        self._mean = _DECAY * self._mean + (1 - _DECAY) * sq_norm
        self._variance = _DECAY * self._variance + (1 - _DECAY) * (sq_norm - self._mean) ** 2

    def state_dict(self) -> dict[str, float] | None:
        if self._last is None:
            return None
        return {"mean": self._mean, "variance": self._variance, "last": self._last}

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        self._mean, self._variance, self._last = 0.0, 0.0, None
        if state is not None:
            self._mean, self._variance, self._last = state["mean"], state["variance"], state["last"]
