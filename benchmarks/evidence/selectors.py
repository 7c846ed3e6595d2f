"""Ways to choose layers that the package does not have, to see whether they would earn their keep."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slsam_ds.selectors import Selector


class _Around:
    """A selector with another inside."""

    def __init__(self, inner: Selector) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class NormalisedPerArm(_Around):
    """Rewards a layer by its gradient norm against the largest of its own, which decays, and not of all layers'."""

    def __init__(self, inner: Selector, decay: float) -> None:
        super().__init__(inner)
        self._decay = decay
        self._largest: dict[int, float] = {}
        self._rewards: dict[int, float] = {}

    def observe(self, norms: Mapping[int, float]) -> None:
        for arm, norm in norms.items():
            self._largest[arm] = max(norm, self._decay * self._largest.get(arm, 0.0))
            self._rewards[arm] = norm / self._largest[arm] if self._largest[arm] > 0 else 0.0
        self._inner.observe(norms)

    def update(self, active: Sequence[int], rewards: Sequence[float], probabilities: Any = None) -> None:
        self._inner.update(active, [self._rewards[arm] for arm in active], probabilities=probabilities)


AROUND: dict[str, Callable[[Selector, Any], Selector]] = {
    "normalised_per_arm": NormalisedPerArm,
}
"""By the name under which `study.KNOBS` has them."""
