"""Differences seed by seed, and when they say that a recipe reaches dense SAM."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
LARGEST_SHARE = 0.2
"""Of the gap from AdamW to dense SAM, that may be missing."""

# Student's t at 0.95, one-sided, for 1, 2, ... degrees of freedom; beyond them the last is a little too large.
_QUANTILES = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812,
    1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725,
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A mean of differences.

    Attributes:
        mean: Ours less theirs; below 0 is better.
        error: Standard error; nan of one seed alone.
        num: Seeds in common.
    """

    mean: float
    error: float
    num: int

    @property
    def upper(self) -> float:
        """One-sided upper 95 % bound of the mean, by Student's t; infinite where the error is not known."""
        if math.isnan(self.error):
            return math.inf
        return self.mean + _QUANTILES[min(self.num - 1, len(_QUANTILES)) - 1] * self.error

    @property
    def is_lower(self) -> bool:
        """Below zero by more than two standard errors."""
        return self.mean < -2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Of losses by seed; None where there is no seed in common."""
    return _mean([loss - theirs[seed] for seed, loss in ours.items() if seed in theirs])


def reaches(ours: Mapping[int, float], dense: Mapping[int, float], adamw: Mapping[int, float]) -> bool | None:
    """Whether losses reach those of dense SAM, seed by seed.

    They do where the upper 95 % bound of their difference is below 20 % of the gap from AdamW to dense SAM.

    Args:
        ours: By seed.
        dense: Dense SAM's.
        adamw: AdamW's.

    Returns:
        None where the gap decides nothing: dense SAM is not below AdamW by more than two standard errors.
    """
    gap, missing = difference(dense, adamw), difference(ours, dense)
    if gap is None or missing is None or not gap.is_lower:
        return None
    return missing.upper < LARGEST_SHARE * -gap.mean


def _mean(values: Sequence[float]) -> Difference | None:
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(statistics.fmean(values), error, len(values))
