"""The picture of the frontier: test loss against FLOPs, time and memory, AdamW's own over its number of steps in it."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.candidates import CANDIDATES
from benchmarks.evidence.frontier_report import DENSE, REFERENCE, SUMMARISED, finals, losses_on_test
from benchmarks.evidence.long_tasks import LONG_TASKS
from benchmarks.evidence.paired import difference
from benchmarks.evidence.step_costs import StepCost
from benchmarks.evidence.trials import Outcome, Setting, Trials
from slsam_ds.report.figures import LIGHT

_DPI, _COLUMNS = 110, 2
_WIDTH_OF_A_NAME = 0.2
"""As a share of the axis."""

Price = Callable[[str, Sequence[Outcome]], float | None]
"""Of a candidate's runs; None where it is not known."""


@dataclass(frozen=True)
class _Point:
    name: str
    loss: float
    error: float
    outcomes: Sequence[Outcome]

    @property
    def color(self) -> str:
        return {REFERENCE: LIGHT.ink, DENSE: LIGHT.red}.get(self.name, LIGHT.blue)


def draw_frontier(path: Path, trials: Trials, task: str, costs: Mapping[str, StepCost]) -> None:
    """A point a candidate; a dashed line of AdamW with its best setting over numbers of steps."""
    points = list(_points(trials, task))
    prices = _prices(costs)
    with rc_context(LIGHT.style()):
        figure = Figure(figsize=(7 * len(prices), 5), layout="constrained")
        panels = figure.subplots(1, len(prices), sharey=True, squeeze=False)[0]
        for axes, (title, price) in zip(panels, prices.items(), strict=True):
            axes.margins(x=0.12)  # names are to the right of their points
            _draw(axes, points, price)
            _draw_adamw(axes, trials, task, price)
            axes.set_xlabel(title)
        panels[0].set_ylabel("test loss, checkpoint chosen by validation data")
        figure.suptitle(f"{task}: bars are standard errors of the difference from AdamW", fontsize=9)
        figure.savefig(path, dpi=_DPI)


def draw_summary(path: Path, trials: Trials, tasks: Sequence[str]) -> None:
    """Test loss against FLOPs, a panel a task, at the height where the recipes are."""
    rows = math.ceil(len(tasks) / _COLUMNS)
    columns = min(len(tasks), _COLUMNS)
    with rc_context(LIGHT.style()):
        figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
        panels = iter(figure.subplots(rows, columns, squeeze=False).flat)
        for task, axes in zip(tasks, panels, strict=False):
            points = [point for point in _points(trials, task) if len(point.outcomes) >= SUMMARISED]
            axes.margins(x=0.2, y=0.2)
            _draw(axes, points, _flops)
            heights = axes.get_ylim()
            _draw_adamw(axes, trials, task, _flops)
            axes.set_ylim(*heights)
            axes.set_title(LONG_TASKS[task].title, fontsize=9)
            axes.set_xlim(left=0)
            axes.set_xlabel("FLOPs (AdamW: 1)")
            axes.set_ylabel("test loss")
        for axes in panels:
            axes.set_visible(False)
        figure.suptitle("Lower is better; the dashed line is AdamW with fewer steps", fontsize=9)
        figure.savefig(path, dpi=_DPI)


def _flops(name: str, outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(one.flops for one in outcomes)


def _prices(costs: Mapping[str, StepCost]) -> dict[str, Price]:
    """By what an axis says."""

    def seconds(name: str, outcomes: Sequence[Outcome]) -> float | None:
        return costs[name].time * outcomes[0].trial.setting.share if name in costs else None

    def memory(name: str, outcomes: Sequence[Outcome]) -> float | None:
        return costs[name].memory if name in costs else None

    known: dict[str, Price] = {"FLOPs of the run (AdamW over all steps: 1)": _flops}
    if costs:
        known["time under ZeRO-2 on two ranks (stock AdamW over all steps: 1)"] = seconds
        known["peak memory under ZeRO-2 on two ranks (stock AdamW: 1)"] = memory
    return known


def _points(trials: Trials, task: str) -> Sequence[_Point]:
    adamw = losses_on_test(finals(trials, task, REFERENCE))
    points = []
    for name in CANDIDATES:
        outcomes = finals(trials, task, name)
        if outcomes:
            losses = losses_on_test(outcomes)
            paired = difference(losses, adamw)
            error = paired.error if paired is not None and name != REFERENCE else 0.0
            points.append(_Point(name, statistics.fmean(losses.values()), error, outcomes))
    return points


def _draw(axes: Axes, points: Sequence[_Point], price: Price) -> None:
    placed = [(found, point) for point in points if (found := price(point.name, point.outcomes)) is not None]
    for x, point in placed:
        axes.errorbar(x, point.loss, yerr=point.error, color=point.color, marker="o", markersize=4, linewidth=1)
    _label(axes, [(x, point.loss, point.name, point.color) for x, point in placed])


def _draw_adamw(axes: Axes, trials: Trials, task: str, price: Price) -> None:
    longer = _adamw_by_steps(trials, task)
    places = [(price(REFERENCE, some), statistics.fmean(losses_on_test(some).values())) for some in longer]
    known = [(x, loss) for x, loss in places if x is not None]
    axes.plot([x for x, _ in known], [loss for _, loss in known], color=LIGHT.muted, linestyle="--", zorder=1)


def _label(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the points, and none over another: from below, each is lifted above those near it."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    line, width = (high - low) * 0.028, (right - left) * _WIDTH_OF_A_NAME
    placed: list[tuple[float, float]] = []
    for x, y, name, color in sorted(points, key=lambda point: point[1]):
        height = y
        for other_x, other_height in placed:
            if abs(other_x - x) < width and height - other_height < line:
                height = other_height + line
        placed.append((x, height))
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.4}
        text = (x + (right - left) * 0.02, height)
        axes.annotate(name, (x, y), xytext=text, fontsize=7, color=color, va="center", arrowprops=arrow)


def _adamw_by_steps(trials: Trials, task: str) -> list[list[Outcome]]:
    by_setting: dict[Setting, list[Outcome]] = defaultdict(list)
    for one in trials.of(task, REFERENCE):
        if not one.is_tuning:
            by_setting[one.trial.setting].append(one)
    return sorted(by_setting.values(), key=lambda some: some[0].trial.setting.share)
