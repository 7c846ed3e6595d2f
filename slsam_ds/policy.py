"""Who takes part in a step, and what is learned from it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slsam_ds.config import PerturbSpread, Spread
from slsam_ds.plan import Choice
from slsam_ds.pricing.cost import PriceList
from slsam_ds.rewards import RewardScale
from slsam_ds.selectors import Selector


@dataclass(frozen=True, slots=True)
class _Held:
    """A sample, the step that it was drawn for, and the probabilities that it was drawn with."""

    step: int = 0
    sample: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()


class Policy:
    """A selector with its rewards, and what becomes of a sample: who is perturbed, and who is updated.

    Args:
        selector: Draws samples and learns from rewards.
        rewards: Makes rewards of gradient norms.
        perturb: Who is perturbed, given the sample.
        update: Who is updated, likewise.
        norm_layers: The arms that are weights of normalisation layers, ascending.
        redraw_every: Steps for which a sample stays.

    Raises:
        ValueError: There are none, and they are to be perturbed.
    """

    def __init__(
        self,
        selector: Selector,
        rewards: RewardScale,
        *,
        perturb: PerturbSpread = "sample",
        update: Spread = "sample",
        norm_layers: Sequence[int] = (),
        redraw_every: int = 1,
    ) -> None:
        self.selector, self.rewards = selector, rewards
        self._perturb, self._update, self._norm_layers = perturb, update, tuple(norm_layers)
        self._redraw_every, self._held = redraw_every, _Held()
        if perturb == "norm_layers" and not self._norm_layers:
            raise ValueError('slsam.perturb="norm_layers": the model trains no weights of normalisation layers')

    def choose(self, step: int) -> Choice:
        """The choice for a step (from 1): a pure function of the state, the seed and the step."""
        if not self._held.step <= step < self._held.step + self._redraw_every or not self._held.sample:
            self._held = _Held(step, self.selector.sample(step), self._probabilities())
        sample, probabilities = self._held.sample, self._held.probabilities
        updated = self._spread(self._update, sample)
        drawn = self._update == "sample"
        return Choice(
            sampled=sample,
            perturbed=self._spread(self._perturb, sample),
            updated=updated,
            probability={arm: min(1.0, probabilities[arm]) if drawn else 1.0 for arm in updated},
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
                raise ValueError(
                    "active cannot be combined with perturbed and updated: give active alone, or both of the others"
                )
            perturbed = updated = self._checked("active", active)
        elif perturbed is None and updated is None:
            return None
        elif perturbed is None or updated is None:
            raise ValueError("perturbed and updated go together: give both, or active for the same arms")
        else:
            perturbed, updated = self._checked("perturbed", perturbed), self._checked("updated", updated)
        return Choice(
            sampled=updated,
            perturbed=perturbed,
            updated=updated,
            probability=dict.fromkeys(updated, 1.0),
            probabilities=self._probabilities(),
            forced=True,
        )

    def learn(self, choice: Choice, grad_norms: Mapping[int, float], ascent_norms: Mapping[int, float]) -> None:
        """Learn from a step that was taken.

        Args:
            choice: Its choice.
            grad_norms: Descent-gradient norms; of the updated arms at least.
            ascent_norms: Norms of the gradient at the weights, of the ascended arms; empty where there are none.
        """
        if self.selector.rewarded_by == "ascent_norms":
            # Without an ascent pass, the descent's gradient is the one at the weights, or the nearest to it.
            norms = ascent_norms or grad_norms
            seen = tuple(arm for arm in choice.sampled if arm in norms)
            chances = [1.0 if choice.forced else choice.probabilities[arm] for arm in seen]
            self.selector.update(seen, [norms[arm] for arm in seen], probabilities=chances)
            return
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
        state = {"selector": self.selector.state_dict(), "reward_maximum": self.rewards.maximum}
        return state if self._redraw_every == 1 else {**state, "held": dataclasses.asdict(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; other entries are passed over.

        Raises:
            ValueError: The state of another selector.
        """
        self.selector.load_state_dict(state["selector"])
        self.rewards.maximum = float(state["reward_maximum"])
        held = state.get("held") or {}
        self._held = _Held(held.get("step", 0), tuple(held.get("sample", ())), tuple(held.get("probabilities", ())))

    def _probabilities(self) -> tuple[float, ...]:
        return tuple(self.selector.probabilities().tolist())

    def _spread(self, spread: PerturbSpread, sample: tuple[int, ...]) -> tuple[int, ...]:
        match spread:
            case "sample":
                return sample
            case "above":
                return tuple(range(sample[0], self.selector.num_arms))
            case "all":
                return tuple(range(self.selector.num_arms))
            case "norm_layers":
                return self._norm_layers

    def _checked(self, name: str, arms: Iterable[int]) -> tuple[int, ...]:
        checked = tuple(sorted({int(arm) for arm in arms}))
        if not checked or checked[0] < 0 or checked[-1] >= self.selector.num_arms:
            raise ValueError(f"{name}={list(checked)}: choose arms from 0 to {self.selector.num_arms - 1}")
        return checked
