"""The pictures of a report. The only module that needs matplotlib; whoever draws imports it then.

A panel is drawn the same way into the one large picture and, alone, into the page.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from slsam_ds.report.bins import StepBins
from slsam_ds.report.facts import DENSE_SAM_PRICE, active_shares, loss_rises
from slsam_ds.report.history import Floats, RunHistory

WIDTH, HEIGHT, WIDE = 5.5, 2.9, 11.0  # inches; small ones are for a phone as well
_DPI = 160
_MAX_COLUMNS = 320  # of a heat map
_MAX_POINTS = 160  # of a curve
_MAX_LAYER_LABELS = 18
_MAX_LABEL_LENGTH = 26
_DASHES = (0, (4, 3))


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours for one background."""

    background: str
    ink: str
    muted: str
    faint: str
    blue: str
    orange: str
    red: str
    selection: tuple[str, ...]
    probability: tuple[str, ...]
    norm: tuple[str, ...]
    series: tuple[str, ...]

    def style(self) -> dict[str, Any]:
        """As matplotlib's settings."""
        return {
            "figure.facecolor": self.background,
            "savefig.facecolor": self.background,
            "axes.facecolor": self.background,
            "axes.edgecolor": self.muted,
            "axes.labelcolor": self.muted,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlepad": 9,
            "axes.labelsize": 9,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": self.faint,
            "grid.linewidth": 0.8,
            "text.color": self.ink,
            "text.parse_math": False,  # a layer may be named by a regular expression, which ends in $
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "font.size": 9,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "legend.labelcolor": self.ink,
            "lines.linewidth": 1.7,
            "lines.solid_capstyle": "round",
        }


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2733",
    muted="#667085",
    faint="#e6e9ef",
    blue="#2f6bd8",
    orange="#d9731a",
    red="#cc2f45",
    selection=("#f4f7fd", "#b9cff6", "#5e8ff0", "#2757b8", "#14316e"),
    probability=("#f2faf8", "#b4e2d7", "#4fb8a3", "#17826f", "#0a4a40"),
    norm=("#fdf6ee", "#fbd3a2", "#f29a4a", "#c7571b", "#6d2410"),
    series=("#667085", "#2f6bd8", "#d9731a", "#17826f", "#8e44ad", "#cc2f45"),
)
DARK = Theme(
    background="#171c25",
    ink="#e8ecf3",
    muted="#98a3b5",
    faint="#2a3240",
    blue="#6ea0ff",
    orange="#f5a353",
    red="#ff6b7d",
    selection=("#1e2531", "#2a4478", "#3f74d6", "#83b0ff", "#dce9ff"),
    probability=("#1d2830", "#1d5a54", "#2a9a87", "#6fd8c3", "#dcfaf3"),
    norm=("#292521", "#6b3a1c", "#bf6423", "#f5a353", "#ffe6c7"),
    series=("#98a3b5", "#6ea0ff", "#f5a353", "#4fc9b0", "#c792ea", "#ff6b7d"),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: what it shows, how to read it, and how it is drawn."""

    title: str
    caption: str
    draw: Callable[[FigureBase, RunHistory, Theme], None]
    wide: bool = False


def draw_panel(panel: Panel, history: RunHistory, theme: Theme, *, wide: bool = False) -> bytes:
    """One panel, without its title, as PNG."""
    with rc_context(theme.style()):
        figure = Figure(figsize=(WIDE if wide else WIDTH, HEIGHT), layout="constrained")
        panel.draw(figure, history, theme)
        return picture_of(figure)


def draw_report(history: RunHistory, title: str, subtitle: str, theme: Theme = LIGHT) -> bytes:
    """All panels with their titles in one picture, as PNG."""
    panels = panels_of(history)
    wide = [panel for panel in panels if panel.wide]
    narrow = [panel for panel in panels if not panel.wide]
    num_rows = len(wide) + -(-len(narrow) // 2)
    header = 0.9
    with rc_context(theme.style()):
        figure = Figure(figsize=(2 * WIDTH + 0.4, header + num_rows * (HEIGHT + 0.45)), layout="constrained")
        heights = [header] + [HEIGHT + 0.45] * num_rows
        rows = figure.subfigures(num_rows + 1, 1, height_ratios=heights, hspace=0.02)
        rows[0].text(0.012, 0.72, title, size=18, weight="bold", va="center")
        rows[0].text(0.012, 0.28, subtitle, size=10.5, color=theme.muted, va="center")
        places = list(rows[1 : len(wide) + 1])
        for row in rows[len(wide) + 1 :]:
            places += list(row.subfigures(1, 2, wspace=0.03))
        for place, panel in zip(places, wide + narrow, strict=False):
            panel.draw(place, history, theme)
            place.axes[0].set_title(panel.title)
        return picture_of(figure)


def picture_of(figure: Figure) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


COUNT = FuncFormatter(lambda value, _: f"{value:,.0f}")
PLAIN = FuncFormatter(lambda value, _: f"{value:.4g}")
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


def _draw_selection(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    _draw_layers(figure, history, theme, history.active, "active")


def _draw_perturbed(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    _draw_layers(figure, history, theme, history.perturbed_layers, "perturbed")


def _draw_layers(figure: FigureBase, history: RunHistory, theme: Theme, layers: NDArray[np.bool_], label: str) -> None:
    """Which layers took part in which steps."""
    bins = StepBins(history.steps, _MAX_COLUMNS)
    shares = bins.means(layers.astype(np.float32))
    label = label if bins.width == 1 else "share of steps"
    axes, side = _heat_map(figure, history, theme, bins, shares, colors=theme.selection, label=label)
    _mark_skipped(axes, history, theme)
    _bars(side, layers.mean(axis=0).tolist(), theme.blue)
    side.set_xlabel("of all steps")
    side.xaxis.set_major_formatter(PERCENT)


def _draw_probabilities(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    bins = StepBins(history.steps, _MAX_COLUMNS)
    means = bins.means(history.probabilities)
    _, side = _heat_map(figure, history, theme, bins, means, colors=theme.probability, label="probability")
    _bars(side, history.probabilities[-1], theme.probability[-2])
    side.set_xlabel("last step")


def _draw_grad_norms(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    bins = StepBins(history.steps, _MAX_COLUMNS)
    positive = np.where(history.grad_norms > 0, history.grad_norms, np.nan)
    norms = np.exp(bins.means(np.log(positive)))
    known = positive[~np.isnan(positive)]
    low, high = (float(bound) for bound in np.quantile(known, (0.01, 0.99))) if known.size else (1.0, 1.0)
    low, high = min(low, math.sqrt(low * high) / 1.5), max(high, math.sqrt(low * high) * 1.5)
    _, side = _heat_map(figure, history, theme, bins, norms, colors=theme.norm, label="norm", scale=LogNorm(low, high))
    chosen = [layer for layer, column in enumerate(positive.T) if not np.isnan(column).all()]
    ranges = [np.nanquantile(positive[:, layer], (0.1, 0.5, 0.9)) for layer in chosen]
    lowest, middle, highest = np.array(ranges).reshape(-1, 3).T
    side.hlines(chosen, lowest, highest, color=theme.norm[2], linewidth=1.4)
    side.plot(middle, chosen, "o", color=theme.norm[-2], markersize=3)
    side.set_xscale("log")
    side.set_xticks([low, high], [f"{low:.1g}", f"{high:.1g}"])
    side.set_xticks([], minor=True)
    side.set_xlabel("median, 10 to 90%")


def _draw_loss(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    axes = _curve_axes(figure, history)
    at_weights = np.where(history.perturbed, history.ascent_loss, history.loss_at_weights)
    at_perturbed = np.where(history.perturbed, history.loss, np.nan)
    for losses, color, label in (
        (at_weights, theme.blue, "at the weights"),
        (at_perturbed, theme.orange, "at the perturbed weights"),
    ):
        if not np.isnan(losses).all():
            _curve(axes, history, losses, color, label)
            _legend(axes)
    if history.held_out:
        axes.plot(*zip(*history.held_out, strict=True), "o", color=theme.ink, markersize=4, label="held out")
        _legend(axes)
    _mark_skipped(axes, history, theme)


def _draw_rise(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    axes = _curve_axes(figure, history)
    _curve(axes, history, loss_rises(history), theme.orange)
    axes.axhline(0, color=theme.muted, linewidth=0.9)
    axes.yaxis.set_major_formatter(PERCENT)


def _draw_radius(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    axes = _curve_axes(figure, history)
    reached = np.where(history.perturbed, history.perturbation_norm, np.nan)
    asked_for = np.where(history.rho > 0, history.rho, np.nan)  # of a span of steps, the mean of those that ascend
    _curve(axes, history, reached, theme.blue, "change made")
    _levels(axes, history, asked_for, theme, "rho")
    _from_zero(axes, reached, asked_for)
    _legend(axes)


def _draw_projection(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    axes = _curve_axes(figure, history)
    _curve(axes, history, history.perturbation_projection, theme.blue)
    axes.axhline(1, color=theme.muted, linewidth=0.9, linestyle=_DASHES)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.95), max(high, 1.05))


def _draw_active_share(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    axes = _curve_axes(figure, history)
    shares = active_shares(history)
    _curve(axes, history, shares, theme.blue, banded=False)
    axes.axhline(shares.mean(), color=theme.muted, linewidth=0.9, linestyle=_DASHES)
    _from_zero(axes, shares)
    axes.yaxis.set_major_formatter(PERCENT)


def _draw_price(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    axes = _curve_axes(figure, history)
    _curve(axes, history, history.price, theme.blue, banded=False)
    for price, name in ((1.0, "AdamW"), (DENSE_SAM_PRICE, "dense SAM")):
        axes.axhline(price, color=theme.muted, linewidth=0.9, linestyle=_DASHES)
        place = {"xy": (1, price), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(name, xytext=(-2, 3), ha="right", color=theme.muted, size=8.5, **place)
    axes.set_ylim(0, 2.35)


def _draw_seconds(figure: FigureBase, history: RunHistory, theme: Theme) -> None:
    axes = _curve_axes(figure, history)
    _curve(axes, history, history.seconds, theme.blue)
    known = history.seconds[~np.isnan(history.seconds)]
    if known.size:
        axes.set_ylim(0, 1.6 * float(np.quantile(known, 0.95)) or 1.0)
    _mark_skipped(axes, history, theme)


PANELS: Sequence[Panel] = (
    Panel(
        "Which layers were active",
        "Look for color in every row: each layer is updated now and then. Bad: rows that stay empty, or red marks, "
        "which are skipped steps. A column is a step, or the mean of several; the first layer is at the bottom; the "
        "bars count all steps.",
        _draw_selection,
        wide=True,
    ),
    Panel(
        "Loss",
        "Look for a blue line that falls, with the orange one a little above it. Bad: lines that rise, an orange line "
        "that jumps away (halve rho), red marks (skipped steps). Blue is the training loss at the weights, orange the "
        "same at the perturbed weights; the band holds 80% of the steps. Dots are held-out losses: "
        "where they rise while the blue line falls, the run overfits.",
        _draw_loss,
        wide=True,
    ),
    Panel(
        "Inclusion probabilities",
        "Look for shades that move apart slowly as the selector learns which layers have large gradients. Bad: a few "
        "dark rows and the rest near zero, whose layers are hardly ever updated again. The bars are the last step's.",
        _draw_probabilities,
    ),
    Panel(
        "Gradient norms",
        "Look for shades that stay alike along a row. Bad: a row or a moment that is far darker than the others "
        "(unstable training), or that fades to nothing. The scale is logarithmic; the dots are medians.",
        _draw_grad_norms,
    ),
    Panel(
        "Rise of the loss under perturbation",
        "Look for a few percent, which is what the perturbation climbed. Bad: jumps (halve rho), or values near zero "
        "(the perturbation does nothing).",
        _draw_rise,
    ),
    Panel(
        "Size of the perturbation",
        "Look for a line at the dashed rho. Bad: a line far below it, or at zero. In bf16, rounding adds noise: "
        "somewhat above rho is usual.",
        _draw_radius,
    ),
    Panel(
        "How much of the perturbation arrived",
        "Look for values near 1: the low-precision weights moved as asked. Bad: values well below 1, where rounding "
        "lost part of the perturbation.",
        _draw_projection,
    ),
    Panel(
        "Active parameters",
        "Look for the share of weights that you want to train per step; the dashed line is its mean. Bad: a mean far "
        "from what active_layers says, because large or small layers are preferred.",
        _draw_active_share,
    ),
    Panel(
        "Price of a step",
        "Look for the line between the dashed ones: forward and backward FLOPs relative to AdamW's. Bad: a price "
        "near dense SAM's, if you wanted to save. How it is known is said below.",
        _draw_price,
    ),
    Panel(
        "Seconds per step",
        "Look for a level line. Bad: a line that climbs, or long stretches of slow steps: something else needs the "
        "machine. It is the first rank's clock; single steps far above the others are cut off.",
        _draw_seconds,
    ),
)


_PERTURBED = Panel(
    "Which layers were perturbed",
    "Look for the layers that the recipe says should be perturbed. Bad: rows that stay empty although they should not. "
    "It is drawn like the picture above, which shows the layers that were updated.",
    _draw_perturbed,
    wide=True,
)


def panels_of(history: RunHistory) -> list[Panel]:
    """The panels that a run needs."""
    first, *others = PANELS
    return [first, *([_PERTURBED] if history.perturbs_others else []), *others]


def _heat_map(
    figure: FigureBase,
    history: RunHistory,
    theme: Theme,
    bins: StepBins,
    values: Floats,
    *,
    colors: tuple[str, ...],
    label: str,
    scale: Normalize | None = None,
) -> tuple[Axes, Axes]:
    """Steps from left to right, layers from bottom to top; returns its axes and those of one bar per layer."""
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    num_layers = len(history.names)
    if scale is None:
        highest = float(np.nanmax(values))
        scale = Normalize(0, highest if highest > 0 else 1)
    image = axes.imshow(
        values.T,
        origin="lower",
        aspect="auto",
        cmap=_colormap(colors, theme),
        norm=scale,
        extent=(bins.edges[0], bins.edges[-1], -0.5, num_layers - 0.5),
        interpolation="nearest" if num_layers <= 200 else "antialiased",
    )
    _label_steps(axes, history)
    labelled = _labelled_layers(num_layers)
    axes.set_yticks(labelled, [_short(history.names[layer]) for layer in labelled])
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    side.tick_params(axis="y", length=0, labelleft=False)
    side.spines["left"].set_color(theme.faint)
    side.grid(True, axis="x")
    side.grid(False, axis="y")
    side.xaxis.set_major_locator(MaxNLocator(2))
    bar = figure.colorbar(image, ax=[axes, side], location="right", fraction=0.03, pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(label)
    if isinstance(scale, LogNorm):
        bar.set_ticks(LogLocator(subs=(1.0, 2.0, 5.0)), minor=False)
        bar.minorticks_off()
    bar.ax.yaxis.set_major_formatter(PLAIN)
    return axes, side


def _bars(side: Axes, lengths: Sequence[float], color: str) -> None:
    """One for every layer; with gaps only where there is room for them."""
    height = 0.75 if len(lengths) <= 60 else 1.0
    side.barh(range(len(lengths)), lengths, height=height, color=color, linewidth=0, antialiased=height < 1)


def _label_steps(axes: Axes, history: RunHistory) -> None:
    axes.set_xlabel("step")
    num_labels = 6 if history.steps[-1] < 10_000 else 4
    axes.xaxis.set_major_locator(MaxNLocator(num_labels, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(COUNT)


def _curve_axes(figure: FigureBase, history: RunHistory) -> Axes:
    axes = figure.subplots()
    assert isinstance(axes, Axes)
    axes.set_xlim(history.steps[0] - 0.5, history.steps[-1] + 0.5)
    _label_steps(axes, history)
    axes.yaxis.set_major_formatter(PLAIN)
    return axes


def _curve(
    axes: Axes, history: RunHistory, values: Floats, color: str, label: str = "", *, banded: bool = True
) -> None:
    """Every step, where they are few; else the mean over spans, within a band that holds 80% of the steps.

    Where nothing was measured, the line goes on to the next step that did: with `ascend_when` the steps that ascend
    may all stand alone, and a line broken between them would not be seen.
    """
    bins = StepBins(history.steps, _MAX_POINTS if len(history) > 2 * _MAX_POINTS else 2 * _MAX_POINTS)
    means = bins.means(values)
    known = ~np.isnan(means)
    marker = "o" if known.sum() <= 40 else ""
    axes.plot(bins.centers[known], means[known], color=color, label=label, marker=marker, markersize=3.5)
    if bins.width > 1 and banded:
        low, high = bins.quantiles(values, 0.1, 0.9)
        axes.fill_between(bins.centers[known], low[known], high[known], color=color, alpha=0.16, linewidth=0)


def _levels(axes: Axes, history: RunHistory, values: Floats, theme: Theme, label: str) -> None:
    """What was asked for: dashed."""
    bins = StepBins(history.steps, _MAX_POINTS)
    axes.stairs(
        bins.means(values), bins.edges, baseline=None, color=theme.muted, linewidth=1.1, linestyle=_DASHES, label=label
    )


def _from_zero(axes: Axes, *series: Floats) -> None:
    highest = max((float(values[~np.isnan(values)].max(initial=0.0)) for values in series), default=0.0)
    axes.set_ylim(0, 1.15 * highest or 1.0)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=3, borderaxespad=0, handlelength=1.6)


def _mark_skipped(axes: Axes, history: RunHistory, theme: Theme) -> None:
    skipped = history.steps[history.skipped]
    if skipped.size:
        bottom = axes.get_xaxis_transform()
        axes.plot(skipped, [0.0] * skipped.size, "^", color=theme.red, markersize=4, transform=bottom, clip_on=False)


def _colormap(colors: tuple[str, ...], theme: Theme) -> Colormap:
    colormap = LinearSegmentedColormap.from_list("report", colors)
    return colormap.with_extremes(bad=theme.background)


def _labelled_layers(num_layers: int) -> list[int]:
    """The first, the last, and as many between them, at equal distances, as there is room for."""
    stride = -(-num_layers // _MAX_LAYER_LABELS)
    return [*range(0, num_layers - stride, stride), num_layers - 1]


def _short(name: str) -> str:
    """The end of a module path tells layers apart, the beginning is the same for all."""
    return name if len(name) <= _MAX_LABEL_LENGTH else "…" + name[-_MAX_LABEL_LENGTH + 1 :]
