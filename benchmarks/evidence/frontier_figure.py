"""The picture of the frontier: test loss against FLOPs, AdamW's own over its number of steps in it."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.candidates import CANDIDATES
from benchmarks.evidence.frontier_report import DENSE, REFERENCE, finals, losses_on_test
from benchmarks.evidence.paired import difference
from benchmarks.evidence.trials import TUNING_SEED, Outcome, Setting, Trials
from slsam_ds.report.figures import LIGHT

_DPI = 110
_WIDTH_OF_A_NAME = 0.25
"""In units of FLOPs."""


def draw_frontier(path: Path, trials: Trials, task: str) -> None:
    """A point a candidate; a line of AdamW with its best setting over numbers of steps."""
    with rc_context(LIGHT.style()):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        longer = _adamw_by_steps(trials, task)
        axes.plot(
            [statistics.fmean(one.flops for one in some) for some in longer],
            [statistics.fmean(losses_on_test(some).values()) for some in longer],
            color=LIGHT.muted,
            linestyle="--",
            zorder=1,
        )
        adamw = losses_on_test(finals(trials, task, REFERENCE))
        named: list[tuple[float, float, str, str]] = []
        for name in CANDIDATES:
            outcomes = finals(trials, task, name)
            if not outcomes:
                continue
            losses = losses_on_test(outcomes)
            place = (statistics.fmean(one.flops for one in outcomes), statistics.fmean(losses.values()))
            paired = difference(losses, adamw)
            error = paired.error if paired is not None and name != REFERENCE else 0.0
            color = {REFERENCE: LIGHT.ink, DENSE: LIGHT.red}.get(name, LIGHT.blue)
            axes.errorbar(*place, yerr=error, color=color, marker="o", markersize=4, linewidth=1)
            named.append((*place, name, color))
        _label(axes, named)
        axes.set_xlabel("FLOPs of the run (AdamW over all steps: 1)")
        axes.set_ylabel("test loss, checkpoint chosen by validation data")
        axes.set_title(f"{task}: bars are standard errors of the difference from AdamW", fontsize=9)
        figure.savefig(path, dpi=_DPI)


def _label(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the points, and none over another: from below, each is lifted above those near it."""
    low, high = axes.get_ylim()
    line = (high - low) * 0.028
    placed: list[tuple[float, float]] = []
    for x, y, name, color in sorted(points, key=lambda point: point[1]):
        height = y
        for other_x, other_height in placed:
            if abs(other_x - x) < _WIDTH_OF_A_NAME and height - other_height < line:
                height = other_height + line
        placed.append((x, height))
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.4}
        axes.annotate(name, (x, y), xytext=(x + 0.03, height), fontsize=7, color=color, va="center", arrowprops=arrow)


def _adamw_by_steps(trials: Trials, task: str) -> list[list[Outcome]]:
    by_setting: dict[Setting, list[Outcome]] = defaultdict(list)
    for one in trials.of(task, REFERENCE):
        if one.trial.seed != TUNING_SEED:
            by_setting[one.trial.setting].append(one)
    return sorted(by_setting.values(), key=lambda some: some[0].trial.setting.share)
