"""Who takes part in a step, and what is learned from it."""

from collections.abc import Iterable, Mapping
from typing import Any

from slsam_ds.plan import Choice
from slsam_ds.pricing.cost import PriceList
from slsam_ds.rewards import RewardScale
from slsam_ds.selectors import Selector


class Policy:
    """A selector with its rewards: what it samples is perturbed and updated.

    Args:
        selector: Draws samples and learns from rewards.
        rewards: Makes rewards of gradient norms.
    """

    def __init__(self, selector: Selector, rewards: RewardScale) -> None:
        self.selector, self.rewards = selector, rewards

    def choose(self, step: int) -> Choice:
        """The choice for a step (from 1): a pure function of the state, the seed and the step."""
        sample, probabilities = self.selector.sample(step), self._probabilities()
        return Choice(
            perturbed=sample,
            updated=sample,
            probability={arm: min(1.0, probabilities[arm]) for arm in sample},
            probabilities=probabilities,
        )

    def forced(
        self, active: Iterable[int] | None, perturbed: Iterable[int] | None, updated: Iterable[int] | None
    ) -> Choice | None:
        """The caller's own choice; None: there is none. A forced arm counts as probability 1.

        Args:
            active: Arms to perturb and update.
            perturbed: Or arms to perturb,
            updated: and arms to update.

        Raises:
            ValueError: Arms that do not exist, or only one of the two.
        """
        if active is not None:
            if perturbed is not None or updated is not None:
                raise ValueError("active excludes perturbed and updated: give active, or both of the others")
            perturbed = updated = self._checked("active", active)
        elif perturbed is None and updated is None:
            return None
        elif perturbed is None or updated is None:
            raise ValueError("perturbed and updated go together: give both, or active for the same arms")
        else:
            perturbed, updated = self._checked("perturbed", perturbed), self._checked("updated", updated)
        return Choice(
            perturbed=perturbed,
            updated=updated,
            probability=dict.fromkeys(updated, 1.0),
            probabilities=self._probabilities(),
        )

    def learn(self, choice: Choice, grad_norms: Mapping[int, float]) -> None:
        """Learn from a step that was taken.

        Args:
            choice: Its choice.
            grad_norms: Descent-gradient norms; of the updated arms at least.
        """
        norms = {arm: grad_norms[arm] for arm in choice.updated}
        rewards = self.rewards.rewards(norms)
        self.selector.observe(norms)
        self.selector.update(
            choice.updated,
            [rewards[arm] for arm in choice.updated],
            probabilities=[choice.probability[arm] for arm in choice.updated],
        )

    def use_prices(self, prices: PriceList) -> None:
        """Go by what samples cost from here on.

        Raises:
            ValueError: A budget that cannot be met.
        """
        self.rewards.costs = [base + share for base, share in zip(prices.base, prices.share, strict=True)]
        self.selector.use_prices(prices)

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as JSON-serialisable values."""
        return {"selector": self.selector.state_dict(), "reward_maximum": self.rewards.maximum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; other entries are passed over.

        Raises:
            ValueError: The state of another selector.
        """
        self.selector.load_state_dict(state["selector"])
        self.rewards.maximum = float(state["reward_maximum"])

    def _probabilities(self) -> tuple[float, ...]:
        return tuple(self.selector.probabilities().tolist())

    def _checked(self, name: str, arms: Iterable[int]) -> tuple[int, ...]:
        checked = tuple(sorted({int(arm) for arm in arms}))
        if not checked or checked[0] < 0 or checked[-1] >= self.selector.num_arms:
            raise ValueError(f"{name}={list(checked)}: choose arms from 0 to {self.selector.num_arms - 1}")
        return checked
