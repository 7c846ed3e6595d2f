"""Few enough points to draw: spans of consecutive steps, and what a number was within each."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slsam_ds.report.history import Floats


class StepBins:
    """Cuts the range of step numbers into spans of equal length.

    Args:
        steps: Numbers of the recorded steps, ascending. Shape (T,).
        max_bins: At most so many spans. With no more steps than that, every span is one step.

    Attributes:
        edges: Between the spans, half way between two step numbers. Shape (B + 1,).
        centers: In the middle of the spans. Shape (B,).
    """

    def __init__(self, steps: NDArray[np.int64], max_bins: int) -> None:
        first, last = int(steps[0]), int(steps[-1])
        self.width = -(-(last - first + 1) // max_bins)
        num_bins = -(-(last - first + 1) // self.width)
        self.edges = first - 0.5 + self.width * np.arange(num_bins + 1)
        self.edges[-1] = last + 0.5
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2
        self._bounds = np.searchsorted(steps, self.edges)

    def __len__(self) -> int:
        return len(self.centers)

    def means(self, values: NDArray[Any]) -> Floats:
        """Mean by span of what is not NaN; NaN where there is nothing.

        Args:
            values: Shape (T, ...).

        Returns:
            Shape (B, ...).
        """
        known = ~np.isnan(values)
        sums, counts = self.sums(np.where(known, values, 0)), self.sums(known)
        means: Floats = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        return means

    def sums(self, values: NDArray[Any]) -> Floats:
        """Sum by span. From shape (T, ...) to shape (B, ...), float64."""
        return np.stack([values[span].sum(axis=0, dtype=np.float64) for span in self._spans()])

    def quantiles(self, values: Floats, *shares: float) -> list[Floats]:
        """Quantiles by span of what is not NaN; NaN where there is nothing.

        Args:
            values: Shape (T,).
            *shares: Which, in [0, 1].

        Returns:
            For each share: shape (B,).
        """
        found = np.full((len(shares), len(self)), np.nan)
        for number, span in enumerate(self._spans()):
            known = values[span][~np.isnan(values[span])]
            if known.size:
                found[:, number] = np.quantile(known, shares)
        return list(found)

    def _spans(self) -> list[slice]:
        return [slice(*bounds) for bounds in zip(self._bounds[:-1], self._bounds[1:], strict=True)]
