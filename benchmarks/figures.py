"""The pictures of the report, in the colours of `slsam_ds.report`."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.breakdown import PARTS
from benchmarks.rows import rows
from slsam_ds.report.figures import LIGHT

_DPI = 110
_LABEL_WIDTH = 24  # characters


def draw_comparison(path: Path, comparison: Mapping[str, Any]) -> None:
    """Bars of time and FLOPs by mode, AdamW being 1."""
    found = list(rows(comparison))
    with rc_context(LIGHT.style()):
        figure = Figure(figsize=(8.5, 0.55 * len(found) + 0.9), layout="constrained")
        axes = figure.subplots()
        assert isinstance(axes, Axes)
        places = range(len(found))
        times = [one.time for one in found]
        low, high = zip(*(one.time_range for one in found), strict=True)
        errors = [
            [max(0.0, time - bound) for time, bound in zip(times, low, strict=True)],
            [max(0.0, bound - time) for time, bound in zip(times, high, strict=True)],
        ]
        axes.barh([p - 0.2 for p in places], times, 0.36, color=LIGHT.blue, label="time", xerr=errors, ecolor=LIGHT.ink)
        axes.barh([p + 0.2 for p in places], [one.flops for one in found], 0.36, color=LIGHT.orange, label="FLOPs")
        axes.axvline(1.0, color=LIGHT.muted, linewidth=1)
        axes.set_yticks(list(places), [one.one.mode for one in found])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.set_xlabel("a step against AdamW's")
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=_DPI)


def draw_sweeps(path: Path, sweeps: Mapping[str, Any]) -> None:
    """Time and FLOPs against AdamW over each of what was swept."""
    panels = {
        "active": "share of layers active",
        "blocks": "layers, as many weights",
        "world_size": "ranks",
        "window": "micro-batches of a step",
    }
    with rc_context(LIGHT.style()):
        figure = Figure(figsize=(8.5, 5.6), layout="constrained")
        for axes, (name, label) in zip(figure.subplots(2, 2, sharey=True).flat, panels.items(), strict=True):
            points = sweeps[name]
            values = [point["value"] for point in points]
            ranges = [point["time_range"] for point in points]
            axes.fill_between(values, *zip(*ranges, strict=True), color=LIGHT.blue, alpha=0.18, linewidth=0)
            axes.plot(values, [point["time"] for point in points], "o-", color=LIGHT.blue, label="time")
            axes.plot(values, [point["flops"] for point in points], "o-", color=LIGHT.orange, label="FLOPs")
            if name == "blocks":
                axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:.0%}" if name == "active" else f"{value:g}" for value in values])
            axes.minorticks_off()
            axes.axhline(1.0, color=LIGHT.muted, linewidth=1)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(label)
        figure.axes[0].set_ylabel("a step against AdamW's")
        figure.axes[0].legend(loc="lower right")
        figure.savefig(path, dpi=_DPI)


def draw_breakdown(path: Path, breakdown: Mapping[str, Any]) -> None:
    """Stacked bars: the parts of each mode's step."""
    modes: Mapping[str, Any] = breakdown["modes"]
    whole = modes["AdamW"]["seconds"]["all"]
    with rc_context(LIGHT.style()):
        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        axes = figure.subplots()
        assert isinstance(axes, Axes)
        left = [0.0] * len(modes)
        for part, color in zip(PARTS, _colors(), strict=True):
            widths = [max(0.0, mode["seconds"][part]) / whole for mode in modes.values()]
            axes.barh(range(len(modes)), widths, 0.6, left=left, color=color, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(modes)), [textwrap.fill(name, _LABEL_WIDTH) for name in modes])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.set_xlabel("seconds of a step, AdamW's whole step being 1")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=_DPI)


def _colors() -> Sequence[str]:
    """The ascent's parts in shades of orange, the descent's in shades of blue, what is neither apart."""
    ascent, descent = LIGHT.norm, LIGHT.selection
    return (
        *(ascent[shade] for shade in (4, 3, 2, 1)),
        LIGHT.red,
        *(descent[shade] for shade in (4, 3, 2, 1)),
        LIGHT.probability[3],
        LIGHT.probability[1],
        LIGHT.faint,
    )
