"""The pictures of the evidence, in the colours of `slsam_ds.report`."""

import statistics
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.runs import Runs
from benchmarks.evidence.tables import REFERENCE, Mean
from slsam_ds.report.figures import LIGHT

_DPI = 110


def draw_curves(path: Path, runs: Runs, task: str) -> None:
    """Mean validation loss of every method, against steps and against time; bands are standard errors."""
    with rc_context(LIGHT.style()):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        assert isinstance(by_step, Axes)
        assert isinstance(by_time, Axes)
        reference = [run.found["seconds"] for run in runs.of("final", task, REFERENCE)]
        unit = statistics.median(reference) if reference else 1.0
        for name, (color, line) in _styles().items():
            curves = [run.found["validation"] for run in runs.of("final", task, name)]
            if not curves:
                continue
            losses = [Mean.of([point["loss"] for point in points]) for points in zip(*curves, strict=True)]
            steps = [point["step"] for point in curves[0]]
            times = [statistics.median(p["seconds"] for p in points) / unit for points in zip(*curves, strict=True)]
            for axes, places in ((by_step, steps), (by_time, times)):
                axes.plot(
                    places, [loss.mean for loss in losses], color=color, linestyle=line, label=METHODS[name].title
                )
                low, high = ([loss.mean + sign * loss.error for loss in losses] for sign in (-1, 1))
                axes.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)
        by_step.set_xlabel("steps")
        by_step.set_ylabel("validation loss")
        by_time.set_xlabel("wall clock" + (", AdamW's run being 1" if reference else " in seconds"))
        by_time.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path, dpi=_DPI)


def _styles() -> dict[str, tuple[str, str]]:
    """What is dense in grey and red, what is sparse in blue and orange."""
    return {
        "adamw": (LIGHT.ink, "-"),
        "adamw_as_long": (LIGHT.muted, "--"),
        "lisa": (LIGHT.probability[3], "-"),
        "dense_sam": (LIGHT.red, "-"),
        "slsam": (LIGHT.blue, "-"),
        "quarter": (LIGHT.blue, "--"),
        "previous": (LIGHT.blue, ":"),
        "single_pass": (LIGHT.orange, ":"),
        "all_previous": (LIGHT.red, ":"),
        "budget": (LIGHT.orange, "-"),
        "adamw_price": (LIGHT.orange, "--"),
    }
