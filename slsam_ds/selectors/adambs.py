"""The bandit of the SL-SAM paper: every arm has a probability of its own, and as many take part as happen to be drawn.

It learns from the norms of the ascent gradient as they are. So it depends on their scale: where all norms are below
about 0.003 it stays near uniform, and above 0.3 it soon gives most of the probability to a few arms.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from slsam_ds.bandit import FixedCount, Numbers, checked_numbers, counter_generator

# The constants of the authors' code.
_LEARNING_RATE = 0.001
_LOSS_PROBABILITY = 0.001
_LOWEST_PROBABILITY = 1e-8
_SMALLEST_SUM = 1e-5


class AdamBS(FixedCount):
    """Independent draws, whose probabilities move towards arms with a large ascent gradient.

    With norms g_i of the arms that took part and L the largest of them, the loss of an arm is
    l_i = (L / 0.001)² - (g_i / p_i)², less the smallest of them; w_i = p_i exp(-0.001 l_i / p_i), and w_i = p_i where
    an arm took no part. The new probabilities are these weights, scaled so that they sum to the budget and none is
    above 1. Where a few arms have taken nearly all of the weight, the others are not scaled up beyond w_i / 0.00001 of
    what is left of the budget, and the sum stays below it.

    Args:
        num_arms: Number of arms N.
        budget: Expected number of arms in a sample, from above 0 to N: at first each has probability budget / N.
        seed: Seed of the samples.

    Attributes:
        k: The budget, rounded.

    Raises:
        ValueError: An argument outside its range, in one sentence.

    Reference: the authors' code of arXiv 2602.09395; compare Liu et al. 2020, arXiv 2010.12986 (AdamBS).
    """

    kind = "bernoulli"
    rewarded_by: ClassVar[Literal["rewards", "ascent_norms"]] = "ascent_norms"

    def __init__(self, num_arms: int, budget: float, seed: int = 0) -> None:
        if not 0 < budget <= num_arms:
            raise ValueError(f"budget={budget}: choose an expected number of arms above 0, up to num_arms={num_arms}")
        super().__init__(num_arms, max(1, round(budget)))
        self.budget = budget
        self.seed = seed
        self._probabilities = [budget / num_arms] * num_arms

    def probabilities(self) -> Tensor:
        """Of each arm, by itself. Shape (N,), float64. They sum to the budget, or to less where few arms have all."""
        return torch.tensor(self._probabilities, dtype=torch.float64)

    def sample(self, step: int) -> tuple[int, ...]:
        """The arms drawn, ascending: at least one, drawn again as a whole until there is one."""
        generator = counter_generator(self.seed, step)
        while True:
            sample = tuple(arm for arm, chance in enumerate(self._probabilities) if generator.random() < chance)
            if sample:
                return sample

    def update(self, active: Sequence[int], rewards: Numbers, probabilities: Numbers | None = None) -> None:
        """Learn from gradient norms.

        Args:
            active: The arms that took part, ascending.
            rewards: Their gradient norms, finite and ≥ 0, in that order.
            probabilities: As for every selector. 1 for forced arms.

        Raises:
            ValueError: Arms, norms or probabilities outside their ranges; nothing was learned.
        """
        chances = self._chances_of(active, self._probabilities, probabilities)
        norms = checked_numbers("rewards", rewards, active)
        if not all(0 <= norm < math.inf for norm in norms):
            raise ValueError(f"rewards={norms}: give finite norms ≥ 0")
        if not active:
            return
        ceiling = (max(norms) / _LOSS_PROBABILITY) ** 2
        losses = [ceiling - (norm / chance) ** 2 for norm, chance in zip(norms, chances, strict=True)]
        lowest = min(losses)
        weights = list(self._probabilities)
        for arm, loss, chance in zip(active, losses, chances, strict=True):
            weights[arm] *= math.exp(-_LEARNING_RATE * (loss - lowest) / chance)
        self._probabilities = scaled_to_budget(weights, self.budget)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "budget": self.budget, "probabilities": list(self._probabilities)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._probabilities = checked_numbers("probabilities", state["probabilities"], range(self.num_arms))


def scaled_to_budget(weights: Sequence[float], budget: float) -> list[float]:
    """Weights scaled so that they sum to the budget, from the heaviest down: who would get more than 1 gets 1.

    What they are divided by, their own sum, is at least 1e-5.

    Returns:
        Probabilities from 1e-8 to 1.
    """
    order = sorted(range(len(weights)), key=weights.__getitem__, reverse=True)
    ordered = [weights[arm] for arm in order]
    sums = [0.0] * (len(order) + 1)  # of the weights from each place on, added up from the small end
    for place in reversed(range(len(order))):
        sums[place] = sums[place + 1] + ordered[place]
    sums = [max(each, _SMALLEST_SUM) for each in sums]
    num_capped = 0
    while num_capped < len(order) and ordered[num_capped] * (budget - num_capped) > sums[num_capped]:
        num_capped += 1
    left = max(0.0, budget - num_capped)
    scaled = [1.0] * len(weights)
    for arm in order[num_capped:]:
        scaled[arm] = min(1.0, max(_LOWEST_PROBABILITY, weights[arm] * left / sums[num_capped]))
    return scaled
