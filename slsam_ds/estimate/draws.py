"""Which layers a step may draw, and what it takes on average: exactly, without drawing any."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from slsam_ds.config import PerturbSpread, SLSAMConfig
from slsam_ds.pricing.budget import BudgetedExp3
from slsam_ds.pricing.cost import PriceList
from slsam_ds.selectors import make_selector


@dataclass(frozen=True, slots=True)
class Draw:
    """A set of arms, or the mean of all those with the same lowest arm: a sample, or who is perturbed or updated by it.

    Attributes:
        lowest: The lowest arm.
        included: By arm: how likely it is in there; 0 and 1 alone for one set.
    """

    lowest: int
    included: tuple[float, ...]

    @classmethod
    def of(cls, sample: Sequence[int], num_arms: int) -> "Draw":
        """One sample."""
        return cls(min(sample), tuple(float(arm in sample) for arm in range(num_arms)))

    def total(self, by_arm: Sequence[float]) -> float:
        """Sum over the arms that are included."""
        return math.fsum(chance * value for chance, value in zip(self.included, by_arm, strict=True))

    def largest(self, by_arm: Sequence[float]) -> float:
        """The largest value of those that are included: exact for one set, else as if each were drawn by itself."""
        expected, none_yet = 0.0, 1.0
        for value, chance in sorted(zip(by_arm, self.included, strict=True), reverse=True):
            expected += none_yet * chance * value
            none_yet *= 1 - chance
        return expected

    def price(self, prices: PriceList) -> float:
        """As `PriceList.of`, on average."""
        return prices.base[self.lowest] + self.total(prices.share)

    def spread(self, how: PerturbSpread, norm_layers: Sequence[int] = ()) -> "Draw":
        """Who takes part, given this sample: as `Policy` has it."""
        num_arms = len(self.included)
        match how:
            case "sample":
                return self
            case "above":
                return Draw.of(range(self.lowest, num_arms), num_arms)
            case "all":
                return Draw.of(range(num_arms), num_arms)
            case "norm_layers":
                return Draw.of(norm_layers, num_arms)

    def joined(self, other: "Draw") -> "Draw":
        """Who is in either. An arm that is in one by chance is in the other by the same chance, never or always."""
        included = tuple(max(pair) for pair in zip(self.included, other.included, strict=True))
        return Draw(min(self.lowest, other.lowest), included)


_GAMMA = 0.1  # of `gamma="auto"`, whose value needs the length of the run

Quantity = Callable[[Draw], float]
"""Something that depends on the lowest arm anyhow, and linearly on which others are included."""


@dataclass(frozen=True, slots=True)
class Draws:
    """All samples that a step may draw.

    Attributes:
        by_lowest: How likely each arm is the lowest one, and the mean of the samples from there.
        extremes: For each lowest arm the smallest and the largest sample.
    """

    by_lowest: tuple[tuple[float, Draw], ...]
    extremes: tuple[Draw, ...]

    def mean(self, quantity: Quantity) -> float:
        """Expected value."""
        return math.fsum(chance * quantity(draw) for chance, draw in self.by_lowest)

    def range(self, quantity: Quantity) -> tuple[float, float]:
        """Lowest and highest value."""
        values = [quantity(draw) for draw in self.extremes]
        return min(values), max(values)

    @property
    def num_sampled(self) -> float:
        """Expected number of arms."""
        return self.mean(lambda draw: sum(draw.included))


def find_draws(config: SLSAMConfig, numels: Sequence[int], prices: PriceList) -> Draws:
    """The samples that a configuration draws in its first step, and how likely they are.

    `exp3m` begins with equal weights, and every set of k arms is equally likely; what `top_k` will prefer nobody knows
    beforehand, and it is taken for that too.

    Args:
        config: The knobs.
        numels: Weights by arm.
        prices: Of its samples; for `budget`.

    Raises:
        ValueError: More layers per step than there are, or a budget that cannot be met.
    """
    num_arms = len(numels)
    if config.budget is not None or config.selector == "depth":
        return _budgeted(config, numels, prices)
    if config.selector == "bernoulli":
        return _independent(config.expected_active(num_arms) / num_arms, numels)
    k = config.num_active(num_arms)
    if config.selector == "cyclic":
        num_steps = num_arms // math.gcd(num_arms, k)
        turns = [tuple(sorted((step * k + place) % num_arms for place in range(k))) for step in range(num_steps)]
        draws = [Draw.of(turn, num_arms) for turn in turns]
        return Draws(tuple((1 / num_steps, draw) for draw in draws), tuple(draws))
    lowest = range(num_arms - k + 1)
    return Draws(
        tuple((_chance_of_lowest(arm, num_arms, k), _uniform_above(arm, num_arms, k)) for arm in lowest),
        tuple(extreme for arm in lowest for extreme in _extremes(arm, numels, k)),
    )


def _chance_of_lowest(arm: int, num_arms: int, k: int) -> float:
    """Of all sets of k arms, the share whose other arms are all above this one."""
    return math.comb(num_arms - 1 - arm, k - 1) / math.comb(num_arms, k)


def _uniform_above(arm: int, num_arms: int, k: int) -> Draw:
    above = num_arms - 1 - arm
    return Draw(arm, (*[0.0] * arm, 1.0, *[(k - 1) / above if above else 0.0] * above))


def _independent(chance: float, numels: Sequence[int]) -> Draws:
    """Every arm by itself, as likely; never none."""
    num_arms = len(numels)
    some = 1 - (1 - chance) ** num_arms
    by_lowest = [
        (chance * (1 - chance) ** arm / some, Draw(arm, (*[0.0] * arm, 1.0, *[chance] * (num_arms - 1 - arm))))
        for arm in range(num_arms)
    ]
    alone = [Draw.of((arm,), num_arms) for arm in range(num_arms)]
    return Draws(tuple(by_lowest), (*alone, Draw.of(range(num_arms), num_arms)))


def _budgeted(config: SLSAMConfig, numels: Sequence[int], prices: PriceList) -> Draws:
    num_arms = len(numels)
    selector = make_selector(replace(config, gamma=_GAMMA if config.gamma == "auto" else config.gamma), num_arms)
    assert isinstance(selector, BudgetedExp3)
    if config.budget is not None:
        selector.use_prices(prices)
    chances, above = selector.choice()
    lowest = range(num_arms)
    draws = [Draw(arm, (*[0.0] * arm, 1.0, *(above[arm] or [0.0] * (num_arms - 1 - arm)))) for arm in lowest]
    sizes = [1 + round(math.fsum(marginals)) for marginals in above]
    return Draws(
        tuple(zip(chances, draws, strict=True)),
        tuple(extreme for arm in lowest for extreme in _extremes(arm, numels, sizes[arm])),
    )


def _extremes(arm: int, numels: Sequence[int], k: int) -> Iterator[Draw]:
    by_size = sorted(range(arm + 1, len(numels)), key=numels.__getitem__)
    for others in (by_size[: k - 1], by_size[len(by_size) - (k - 1) :]):
        yield Draw.of((arm, *others), len(numels))
