"""How every candidate is tuned: so many trials each, on a grid that has no edge where the winner may stand.

Learning rate and radius have ladders without end. The next trial is a neighbour of the best one so far; when all of its
neighbours were tried, of the second best, and so on: a candidate that is tuned early looks around for the rest of its
trials.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from benchmarks.evidence.candidates import Axis, Candidate
from benchmarks.evidence.trials import Setting

_FIRST_RATE = 1e-3
_ENDED: Mapping[Axis, Sequence[float]] = {"share": (0.125, 0.25, 0.5, 1.0), "dropout": (0.0, 0.1, 0.2, 0.3)}
"""Ladders with natural ends: no dropout is less than none, and no run is longer than the task's."""


def start(candidate: Candidate) -> Setting:
    """The first trial's."""
    plain = candidate.knobs.get("rho") == 0
    return Setting(learning_rate=_FIRST_RATE, rho=0.0 if plain else candidate.rho, share=candidate.share)


def next_setting(tried: Mapping[Setting, float], candidate: Candidate) -> Setting:
    """What to try next.

    Args:
        tried: Validation losses; one at least.
        candidate: Whose.
    """
    for setting in sorted(tried, key=tried.__getitem__):
        for neighbour in neighbours(setting, candidate):
            if neighbour not in tried:
                return neighbour
    raise AssertionError("two ladders have no end")


def is_enclosed(setting: Setting, tried: Mapping[Setting, float], candidate: Candidate) -> bool:
    """Whether all neighbours were tried: the best setting is then at no edge."""
    return all(neighbour in tried for neighbour in neighbours(setting, candidate))


def neighbours(setting: Setting, candidate: Candidate) -> Iterator[Setting]:
    """One step up or down on one axis."""
    for axis in candidate.axes:
        for up in (True, False):
            value = _next(axis, getattr(setting, axis), up=up)
            if value is not None:
                yield replace(setting, **{axis: value})


def _next(axis: Axis, value: float, *, up: bool) -> float | None:
    if axis in _ENDED:
        ladder = _ENDED[axis]
        place = ladder.index(value) + (1 if up else -1)
        return ladder[place] if 0 <= place < len(ladder) else None
    if axis == "learning_rate":  # 1, 3, 10, 30, ...
        is_one = f"{value:e}".startswith("1")
        factor = 3.0 if is_one == up else 10 / 3
        return tidy(value * factor if up else value / factor)
    return tidy(value * (2.0 if axis == "rho" else 10.0) ** (1 if up else -1))


def tidy(value: float) -> float:
    """Without what arithmetic leaves in the last places: equal settings are equal."""
    return float(f"{value:.6g}")
