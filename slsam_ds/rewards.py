"""What the bandit learns from: gradient norms as rewards in [0, 1]."""

import math
from collections.abc import Mapping, Sequence

from slsam_ds.config import Reward

# How long the bandit remembers the largest norm: it forgets half in about 70 steps.
_MAXIMUM_DECAY = 0.99


class RewardScale:
    """Turns gradient norms into rewards in [0, 1] by a decayed running maximum.

    Args:
        kind: "grad_norm"; "grad_rms" (norm divided by the square root of the layer's element count), or
            "grad_norm_per_cost" (divided by what a step on the layer alone costs).
        numels: Element count of each arm, global.

    Attributes:
        costs: Of each arm, for rewards per cost; set before the first of them.
    """

    def __init__(self, kind: Reward, numels: Sequence[int]) -> None:
        self.kind = kind
        self.numels = tuple(numels)
        self.maximum = 0.0
        self.costs: Sequence[float] = ()

    def rewards(self, norms: Mapping[int, float]) -> dict[int, float]:
        """Reward of each arm seen this step; moves the running maximum. All-zero norms give all-zero rewards."""
        values = {arm: self._value(arm, norm) for arm, norm in norms.items()}
        self.maximum = max([_MAXIMUM_DECAY * self.maximum, *values.values()])
        return {arm: value / self.maximum if self.maximum > 0 else 0.0 for arm, value in values.items()}

    def _value(self, arm: int, norm: float) -> float:
        match self.kind:
            case "grad_norm":
                return norm
            case "grad_rms":
                return norm / math.sqrt(self.numels[arm])
            case "grad_norm_per_cost":
                return norm / self.costs[arm]
