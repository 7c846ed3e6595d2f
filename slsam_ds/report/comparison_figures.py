"""The pictures of several runs: the curves of all in one. Needs matplotlib, as `slsam_ds.report.figures`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from slsam_ds.report.bins import StepBins
from slsam_ds.report.facts import active_shares, loss_rises
from slsam_ds.report.figures import COUNT, HEIGHT, LIGHT, PERCENT, PLAIN, WIDE, WIDTH, Theme, picture_of
from slsam_ds.report.history import Floats
from slsam_ds.report.runs import Run

_MAX_POINTS = 80
_LEGEND = 60  # characters of a line of the legend, in the narrow picture
_WINDOWS = 8  # a training loss is averaged over this part of the run


@dataclass(frozen=True, slots=True)
class ComparisonPanel:
    """One picture of all runs: what it shows, how to read it, and how it is drawn."""

    title: str
    caption: str
    draw: Callable[[Axes, Sequence[Run], Theme], None]
    wide: bool = False


def draw_comparison_panel(panel: ComparisonPanel, runs: Sequence[Run], theme: Theme, *, wide: bool = False) -> bytes:
    """One panel with its legend, without its title, as PNG."""
    with rc_context(theme.style()):
        figure = Figure(figsize=(WIDE if wide else WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        panel.draw(axes, runs, theme)
        _legend(figure, axes)
        return picture_of(figure)


def draw_comparison(runs: Sequence[Run], theme: Theme = LIGHT) -> bytes:
    """Loss against steps and against price, side by side, as PNG."""
    panels = COMPARISON_PANELS[:2]
    with rc_context(theme.style()):
        figure = Figure(figsize=(2 * WIDTH, HEIGHT + 0.9), layout="constrained")
        for axes, panel in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            panel.draw(axes, runs, theme)
            axes.set_title(f"{panel.title} (dots: held out; lines: training)")
        _legend(figure, axes)
        return picture_of(figure)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0) + 8  # the handle, and what is between two
    columns = max(min(len(labels), _LEGEND // longest), 1)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)


def _colors(theme: Theme, runs: Sequence[Run]) -> list[str]:
    return [theme.series[number % len(theme.series)] for number in range(len(runs))]


def _draw_loss(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    _draw_loss_along(axes, runs, theme, lambda run: run.history.steps.astype(np.float64))
    axes.set_xlabel("step")


def _draw_loss_by_price(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
    _draw_loss_along(axes, runs, theme, lambda run: np.cumsum(np.nan_to_num(run.history.price, nan=0.0)))
    axes.set_xlabel("price so far, in steps of AdamW")


def _draw_loss_along(axes: Axes, runs: Sequence[Run], theme: Theme, along: Callable[[Run], Floats]) -> None:
    """Training loss, averaged, as a line; held-out losses as dots."""
    for run, color in zip(runs, _colors(theme, runs), strict=True):
        history, spent = run.history, along(run)
        if not spent[-1]:  # a run without prices has no place on that axis
            continue
        smooth = _averaged(history.loss_at_weights)
        axes.plot(spent, smooth, color=color, alpha=0.55, linewidth=1.3, label=run.name)
        if history.held_out:
            steps, losses = zip(*history.held_out, strict=True)
            places = np.interp(steps, [0, *history.steps], [0.0, *spent])
            axes.plot(places, losses, "o--", color=color, linewidth=1.1, markersize=5)
    axes.set_ylabel("loss")
    axes.yaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(COUNT)


def _averaged(values: Floats) -> Floats:
    """Mean of each step and those around it, of what is not NaN; over fewer steps near the ends."""
    reach = max(len(values) // (2 * _WINDOWS), 1) if len(values) > 2 else 0
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    spans = [slice(max(place - reach, 0), place + reach + 1) for place in range(len(values))]
    sums, counts = (np.array([each[span].sum() for span in spans], dtype=np.float64) for each in (filled, known))
    means: Floats = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means


def _curves(
    read: Callable[[Run], Floats], formatter: FuncFormatter = PLAIN, *, from_zero: bool = True
) -> Callable[[Axes, Sequence[Run], Theme], None]:
    """What draws a number of every step, in the mean over spans of many."""

    def draw(axes: Axes, runs: Sequence[Run], theme: Theme) -> None:
        for run, color in zip(runs, _colors(theme, runs), strict=True):
            bins = StepBins(run.history.steps, _MAX_POINTS)
            means = bins.means(read(run))
            known = ~np.isnan(means)
            if not known.any():
                continue
            marker = "o" if known.sum() <= 40 else ""
            axes.plot(bins.centers[known], means[known], marker=marker, color=color, label=run.name, markersize=3)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(COUNT)
        axes.yaxis.set_major_formatter(formatter)

    return draw


COMPARISON_PANELS: Sequence[ComparisonPanel] = (
    ComparisonPanel(
        "Loss by step",
        "Look for the run whose dots end lowest: they are held-out losses, joined by dashes. Bad: dots that rise while "
        "the solid line, the training loss averaged over an eighth of the run, still falls.",
        _draw_loss,
    ),
    ComparisonPanel(
        "Loss by price",
        "Look for the lowest curve at the same distance from the left, which is the same number of FLOPs. Bad: a run "
        "that is ahead by step and behind here, because it pays more for each step.",
        _draw_loss_by_price,
    ),
    ComparisonPanel(
        "Seconds per step",
        "Look for the lower curve. Bad: a curve that climbs during the run, or jumps, which points to other work on "
        "the machine.",
        _curves(lambda run: run.history.seconds),
    ),
    ComparisonPanel(
        "Weights updated",
        "Look for the share that you asked for: fewer weights are cheaper and learn more slowly. Bad: a share that "
        "drifts far from it, because the selector prefers large or small layers.",
        _curves(lambda run: active_shares(run.history), PERCENT),
    ),
    ComparisonPanel(
        "Price of a step",
        "Look for the price that you meant to pay, in FLOPs of forward and backward: a step of AdamW costs 1, one of "
        "dense SAM 2. Bad: a price above that.",
        _curves(lambda run: run.history.price),
    ),
    ComparisonPanel(
        "Rise of the loss under perturbation",
        "Look for a few percent in runs that perturb. Bad: jumps (halve rho), or zero (the perturbation does nothing).",
        _curves(lambda run: loss_rises(run.history), PERCENT, from_zero=False),
    ),
)
"""The first two are those of `draw_comparison`."""


def comparison_panels_of(runs: Sequence[Run]) -> list[ComparisonPanel]:
    """Those that some run has numbers for."""
    has_price = any(not np.isnan(run.history.price).all() for run in runs)
    has_rise = any(not np.isnan(loss_rises(run.history)).all() for run in runs)
    missing = set() if has_price else {"Loss by price", "Price of a step"}
    missing |= set() if has_rise else {"Rise of the loss under perturbation"}
    return [panel for panel in COMPARISON_PANELS if panel.title not in missing]
