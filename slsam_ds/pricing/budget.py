"""EXP3.M under a price: how many layers, and how deep, so that the expected step costs what it may."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slsam_ds.bandit import Exp3M, capped_marginals, counter_generator, dependent_rounding
from slsam_ds.pricing.cost import PriceList

_GOLDEN = (math.sqrt(5) - 1) / 2
_NUM_BISECTIONS = 80
_MAX_TILT = 1000.0  # times the spread of prices: all chances but the smallest vanish

# A layer more is cheap where backward passes through it anyway; gradients, traffic and optimizer work are not FLOPs.
_MAX_SHARE = 1 / 3


class BudgetedExp3(Exp3M):
    """Draws the lowest arm first, then k - 1 of the arms above it (sleeping below), by EXP3.M's weights.

    The lowest arm is drawn in proportion to its weight times exp(-λ · expected price of a sample from there), λ such
    that the expected price is the budget; a part gamma is drawn uniformly, so that no arm starves. Inclusion
    probabilities follow exactly. k, up to a third of the arms, is the number that lets all of them take part most
    evenly at that price: the largest sum of the logarithms of their probabilities.

    Args:
        num_arms: Number of arms L.
        budget: Expected price of a step, AdamW's being 1.
        gamma: Exploration in (0, 1].
        seed: Seed of the samples.
        share: EXP3.S sharing in [0, 1).
    """

    kind = "budgeted_exp3"

    def __init__(
        self, num_arms: int, budget: float, gamma: float = 0.1, seed: int = 0, *, share: float = 0.001
    ) -> None:
        super().__init__(num_arms, 1, gamma, seed, share=share)
        self.budget = budget
        self._prices: PriceList | None = None
        self._solved: tuple[object, tuple[list[float], list[list[float]]]] | None = None

    @property
    def prices(self) -> PriceList:
        """Of the samples; known once they were counted, and needed for all but state."""
        assert self._prices is not None, "use_prices comes first"
        return self._prices

    def use_prices(self, prices: PriceList) -> None:
        """Choose k by what samples cost.

        Raises:
            ValueError: No way of choosing layers costs the budget; in one sentence with what is possible.
        """
        self._prices, self._solved = prices, None
        fairness = {}
        reach = {}
        for k in range(1, self.num_arms + 1):
            self.k = k
            lowest, highest = reach[k] = self._reach()
            if lowest <= self.budget <= highest:
                fairness[k] = math.fsum(map(math.log, self._marginals()[0]))
        if not fairness:
            raise self._out_of_reach(reach[1][0], reach[self.num_arms][1])
        few = [k for k in fairness if k <= math.ceil(_MAX_SHARE * self.num_arms)] or [min(fairness)]
        self.k = max(few, key=fairness.__getitem__)

    def sample(self, step: int) -> tuple[int, ...]:
        """As many as k arms, ascending: fewer where fewer are above the lowest."""
        lowest_chances, above = self.choice()
        # A golden-ratio sequence from a random start: each draw is uniform, and together they cover the unit interval
        # evenly, so that what a run pays follows the budget more closely than independent draws would.
        draw = (counter_generator(self.seed, 0).random() + step * _GOLDEN) % 1.0
        lowest = 0
        while lowest < self.num_arms - 1 and draw >= lowest_chances[lowest]:
            draw -= lowest_chances[lowest]
            lowest += 1
        chosen = dependent_rounding(above[lowest], counter_generator(self.seed, step)) if above[lowest] else ()
        return (lowest, *(lowest + 1 + place for place in chosen))

    def choice(self) -> tuple[list[float], list[list[float]]]:
        """How likely each arm is the lowest; and from there, how likely each arm above it is included."""
        state = self.k, tuple(self._log_weights)
        if self._solved is None or self._solved[0] != state:  # a step asks several times
            above = self._above()
            self._solved = state, (self._tilted(self._prices_from(above)), above)
        return self._solved[1]

    def expected_price(self) -> float:
        """Of the next step."""
        lowest_chances, above = self.choice()
        return math.fsum(chance * price for chance, price in zip(lowest_chances, self._prices_from(above), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._prices is None:
            self.k = int(state["k"]) if state.get("kind") == self.kind else self.k
        super().load_state_dict(state)

    def _marginals(self) -> tuple[list[float], frozenset[int]]:
        lowest_chances, above = self.choice()
        marginals = list(lowest_chances)
        for lowest, chance in enumerate(lowest_chances):
            for place, marginal in enumerate(above[lowest]):
                marginals[lowest + 1 + place] += chance * marginal
        return [min(1.0, marginal) for marginal in marginals], frozenset()

    def _above(self) -> list[list[float]]:
        rest = [self._log_weights[lowest + 1 :] for lowest in range(self.num_arms)]
        return [
            capped_marginals(weights, min(self.k - 1, len(weights)), self.gamma)[0] if weights and self.k > 1 else []
            for weights in rest
        ]

    def _prices_from(self, above: Sequence[Sequence[float]]) -> list[float]:
        """Expected price of a sample, by its lowest arm."""
        base, share = self.prices.base, self.prices.share
        return [
            base[lowest] + share[lowest] + math.fsum(p * share[lowest + 1 + place] for place, p in enumerate(marginals))
            for lowest, marginals in enumerate(above)
        ]

    def _tilted(self, prices: Sequence[float]) -> list[float]:
        """Chances of being the lowest arm under which the expected price is the budget."""
        low, high = -_MAX_TILT / _spread(prices), _MAX_TILT / _spread(prices)
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            if _mean(self._chances(prices, middle), prices) > self.budget:
                low = middle
            else:
                high = middle
        return self._chances(prices, (low + high) / 2)

    def _chances(self, prices: Sequence[float], tilt: float) -> list[float]:
        exponents = [weight - tilt * price for weight, price in zip(self._log_weights, prices, strict=True)]
        highest = max(exponents)
        weights = [math.exp(exponent - highest) for exponent in exponents]
        total = math.fsum(weights)
        return [(1 - self.gamma) * weight / total + self.gamma / self.num_arms for weight in weights]

    def _out_of_reach(self, lowest: float, highest: float) -> ValueError:
        return ValueError(
            f"slsam.budget={self.budget:g}: with these settings a step costs from {lowest:.2f} to {highest:.2f} of "
            "AdamW's; choose a number in between"
        )

    def _reach(self) -> tuple[float, float]:
        """Lowest and highest expected price with this k."""
        prices = self._prices_from(self._above())
        spread = _spread(prices)
        ends = [_mean(self._chances(prices, tilt / spread), prices) for tilt in (_MAX_TILT, -_MAX_TILT)]
        return ends[0], ends[1]


def _spread(prices: Sequence[float]) -> float:
    return max(max(prices) - min(prices), 1e-9)


def _mean(chances: Sequence[float], prices: Sequence[float]) -> float:
    return math.fsum(chance * price for chance, price in zip(chances, prices, strict=True))
