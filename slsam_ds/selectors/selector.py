"""What every selector has."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from slsam_ds.bandit import Numbers
from slsam_ds.pricing.cost import PriceList


class Selector(Protocol):
    """Draws some of `num_arms` arms for each step, and may learn from what the step saw.

    Attributes:
        num_arms: How many there are.
        k: How many a sample holds; on average, where that varies.
        rewarded_by: What `update` is given: rewards in [0, 1] made of descent-gradient norms, or the norms of the
            ascent gradient as they are.
    """

    num_arms: int
    k: int
    rewarded_by: ClassVar[Literal["rewards", "ascent_norms"]]

    def probabilities(self) -> Tensor:
        """Inclusion probability of every arm in the next sample. Shape (num_arms,), float64, each ≤ 1, sum k."""

    def sample(self, step: int) -> tuple[int, ...]:
        """Distinct arms, ascending, at least one, for `step` (from 1). Changes nothing: ask as often as you like."""

    def observe(self, norms: Mapping[int, float]) -> None:
        """See the raw gradient norms of the arms that were active; comes before `update`."""

    def update(self, active: Sequence[int], rewards: Numbers, probabilities: Numbers | None = None) -> None:
        """Learn from rewards, one per active arm, in the order of `active`.

        `probabilities`, in (0, 1] and likewise one per active arm, say how likely each was to be active where that was
        not this selector's doing: a forced sample counts as probability 1.
        """

    def use_prices(self, prices: PriceList) -> None:
        """See what samples cost, before the first one is drawn, where the configuration chooses or rewards by price."""

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as JSON-serialisable values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit; ValueError where it was saved by another kind, num_arms or k."""
