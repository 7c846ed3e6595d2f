"""How the arms of a step are chosen: the bandit, and simpler selectors for comparison."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from slsam_ds.bandit import Exp3M, FixedCount, Numbers, counter_generator, shuffled
from slsam_ds.config import SLSAMConfig
from slsam_ds.pricing.budget import BudgetedExp3
from slsam_ds.pricing.cost import PriceList


class Selector(Protocol):
    """Chooses k of `num_arms` arms for each step, and may learn from what the step saw."""

    num_arms: int
    k: int

    def probabilities(self) -> Tensor:
        """Inclusion probability of every arm in the next sample. Shape (num_arms,), float64, each ≤ 1, sum k."""

    def sample(self, step: int) -> tuple[int, ...]:
        """Exactly k distinct arms, ascending, for `step` (from 1). Changes nothing: ask as often as you like."""

    def observe(self, norms: Mapping[int, float]) -> None:
        """See the raw gradient norms of the arms that were active; comes before `update`."""

    def update(self, active: Sequence[int], rewards: Numbers, probabilities: Numbers | None = None) -> None:
        """Learn from rewards in [0, 1], one per active arm, in the order of `active`.

        `probabilities`, in (0, 1] and likewise one per active arm, say how likely each was to be active where that was
        not this selector's doing: a forced sample counts as probability 1.
        """

    def use_prices(self, prices: PriceList) -> None:
        """See what samples cost, before the first one is drawn, where the configuration chooses or rewards by price."""

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as JSON-serialisable values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit; ValueError where it was saved by another kind, num_arms or k."""


class Uniform(FixedCount):
    """Every set of k arms is equally likely (LISA's choice)."""

    kind = "uniform"

    def __init__(self, num_arms: int, k: int, seed: int = 0) -> None:
        super().__init__(num_arms, k)
        self.seed = seed

    def sample(self, step: int) -> tuple[int, ...]:
        return tuple(sorted(shuffled(self.num_arms, counter_generator(self.seed, step))[: self.k]))


class Cyclic(FixedCount):
    """The next k arms in turn: step 1 takes 0..k-1. Probabilities are the long-run shares, k/L."""

    kind = "cyclic"

    def sample(self, step: int) -> tuple[int, ...]:
        start = (step - 1) * self.k
        return tuple(sorted((start + offset) % self.num_arms for offset in range(self.k)))


class AllArms(FixedCount):
    """Every arm, at every step."""

    kind = "all"

    def __init__(self, num_arms: int) -> None:
        super().__init__(num_arms, num_arms)

    def sample(self, step: int) -> tuple[int, ...]:
        return tuple(range(self.num_arms))


class TopK(FixedCount):
    """The k arms whose gradient norm was largest when last seen; arms never seen come first, lowest index first."""

    kind = "top_k"

    def __init__(self, num_arms: int, k: int) -> None:
        super().__init__(num_arms, k)
        self._norms: list[float | None] = [None] * num_arms

    def probabilities(self) -> Tensor:
        """1 for the arms of the next sample, 0 for the others. Shape (L,), float64."""
        chosen = self.sample(1)
        return torch.tensor([float(arm in chosen) for arm in range(self.num_arms)], dtype=torch.float64)

    def sample(self, step: int) -> tuple[int, ...]:
        ranks = [-math.inf if norm is None else -norm for norm in self._norms]
        return tuple(sorted(sorted(range(self.num_arms), key=ranks.__getitem__)[: self.k]))

    def observe(self, norms: Mapping[int, float]) -> None:
        for arm, norm in norms.items():
            if not (0 <= arm < self.num_arms and 0 <= norm < math.inf):
                raise ValueError(f"norms={dict(norms)}: give finite norms ≥ 0 of arms from 0 to {self.num_arms - 1}")
        for arm, norm in norms.items():
            self._norms[arm] = float(norm)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._norms = list(state["norms"])


def make_selector(config: SLSAMConfig, num_arms: int, *, total_steps: int | None = None) -> Selector:
    """The selector that the configuration asks for.

    Args:
        config: Names the selector, how many arms it activates, and its knobs.
        num_arms: Number of arms.
        total_steps: Length T of the run; only `gamma="auto"` needs it.

    Raises:
        ValueError: `gamma="auto"` without a run length, or a number out of range.
    """
    if config.budget is not None:
        gamma = _gamma(config, num_arms, 1, total_steps)
        return BudgetedExp3(num_arms, config.budget, gamma, config.seed, share=config.share)
    k = config.num_active(num_arms)
    match config.selector:
        case "exp3m":
            return Exp3M(num_arms, k, _gamma(config, num_arms, k, total_steps), config.seed, share=config.share)
        case "uniform":
            return Uniform(num_arms, k, config.seed)
        case "cyclic":
            return Cyclic(num_arms, k)
        case "all":
            return AllArms(num_arms)
        case "top_k":
            return TopK(num_arms, k)


def _gamma(config: SLSAMConfig, num_arms: int, k: int, total_steps: int | None) -> float:
    return _tuned_gamma(num_arms, k, total_steps) if config.gamma == "auto" else config.gamma


def _tuned_gamma(num_arms: int, k: int, total_steps: int | None) -> float:
    """min(1, sqrt(L ln(L/k) / ((e-1) k T))): Uchiya et al. 2010, for rewards of at most 1."""
    if total_steps is None or total_steps < 1:
        raise ValueError(
            f'slsam.gamma="auto" with total_steps={total_steps}: tell the number of steps of the run (at least 1), '
            "or choose gamma in (0, 1]"
        )
    if k == num_arms:
        return 1.0  # nothing to explore, and the formula gives 0, which is no gamma
    return min(1.0, math.sqrt(num_arms * math.log(num_arms / k) / ((math.e - 1) * k * total_steps)))
