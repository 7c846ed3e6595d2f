"""A lowest layer is drawn, and everything above it takes part."""

from typing import Self

from slsam_ds.pricing.budget import BudgetedExp3
from slsam_ds.pricing.cost import PriceList


class Depth(BudgetedExp3):
    """Draws the lowest arm by EXP3's weights; all arms above it are in the sample.

    A backward that has come down to the lowest arm has done most of what the gradients above it cost: such samples are
    the cheapest way to update many layers. The lowest arm is drawn so that the expected price of a step is the budget;
    or, with `of_size`, so that the expected number of arms is what was asked for. An arm is rewarded for its own
    gradient, as with EXP3.M: a layer with large gradients is the lowest one more often.

    Args: as `BudgetedExp3`.
    """

    kind = "depth"

    _counts_arms = False

    @classmethod
    def of_size(cls, num_arms: int, size: float, gamma: float, seed: int, *, share: float) -> Self:
        """Samples hold so many arms on average, or as near to it as exploration and the last arm allow."""
        selector = cls(num_arms, size, gamma, seed, share=share)
        selector._counts_arms = True
        selector._prices = PriceList(base=(0.0,) * num_arms, share=(1.0,) * num_arms)
        lowest, highest = selector._reach()
        selector.budget = min(max(size, lowest), highest)
        return selector

    def use_prices(self, prices: PriceList) -> None:
        """Choose the depth by what samples cost.

        Raises:
            ValueError: No way of choosing the depth costs the budget; in one sentence with what is possible.
        """
        if self._counts_arms:
            return
        self._prices = prices
        lowest, highest = self._reach()
        if not lowest <= self.budget <= highest:
            raise self._out_of_reach(lowest, highest)

    def _above(self) -> list[list[float]]:
        return [[1.0] * above for above in reversed(range(self.num_arms))]
