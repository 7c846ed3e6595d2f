"""Writes pictures and pages into a folder: of one run, or of several side by side."""

import os
from collections.abc import Sequence
from pathlib import Path

from slsam_ds.report.comparison import BASIS, numbers_table, sentences, settings_table
from slsam_ds.report.facts import PRICE_ASSUMPTIONS, run_facts
from slsam_ds.report.history import RunHistory
from slsam_ds.report.page import Picture, build_page
from slsam_ds.report.runs import Run
from slsam_ds.report.tables import layer_table, progress_table

_INTRODUCTION = (
    "SL-SAM trains a few layers of a model in each step. It measures the gradient, moves the weights of these layers a "
    "little in the direction in which the loss rises (the perturbation, of length rho), measures the gradient again "
    "there, moves the weights back, and updates the same layers with the second gradient. A selector draws the layers, "
    "and prefers those whose gradients are large. This favors weights around which the loss is flat."
)

PICTURE_FILE = "slsam_report.png"
PAGE_FILE = "slsam_report.html"
COMPARISON_PICTURE_FILE = "slsam_comparison.png"
COMPARISON_PAGE_FILE = "slsam_comparison.html"


def write_report(history: RunHistory, name: str, target: Path, *, refresh: float | None = None) -> None:
    """Write picture and page of one run into a folder, which is made where missing.

    Args:
        history: The run.
        name: What to call it.
        target: The folder.
        refresh: Seconds after which a browser loads the page again; None: it does not.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The files cannot be written.
    """
    from slsam_ds.report.figures import DARK, LIGHT, draw_panel, draw_report, panels_of

    target.mkdir(parents=True, exist_ok=True)
    title = f"SL-SAM: {name}"
    subtitle = _described(history)
    pictures = [
        Picture(
            panel.title,
            panel.caption,
            *(draw_panel(panel, history, theme) for theme in (LIGHT, DARK)),
            *(draw_panel(panel, history, theme, wide=True) for theme in (LIGHT, DARK) if panel.wide),
        )
        for panel in panels_of(history)
    ]
    tables = (progress_table(history), layer_table(history))
    if refresh is not None:
        subtitle += f". The run goes on; this page loads itself again every {refresh:g} seconds"
    page = build_page(
        title,
        subtitle,
        run_facts(history),
        pictures,
        tables,
        [PRICE_ASSUMPTIONS],
        introduction=_INTRODUCTION,
        refresh=refresh,
    )
    _write(target / PICTURE_FILE, draw_report(history, title, subtitle))
    _write(target / PAGE_FILE, page.encode("utf-8"))


def write_comparison(runs: Sequence[Run], target: Path, *, refresh: float | None = None) -> None:
    """Write picture and page of several runs, as `write_report`."""
    from slsam_ds.report.comparison_figures import comparison_panels_of, draw_comparison, draw_comparison_panel
    from slsam_ds.report.figures import DARK, LIGHT

    target.mkdir(parents=True, exist_ok=True)
    pictures = [
        Picture(panel.title, panel.caption, *(draw_comparison_panel(panel, runs, theme) for theme in (LIGHT, DARK)))
        for panel in comparison_panels_of(runs)
    ]
    title = f"SL-SAM: {', '.join(run.name for run in runs)}"
    going_on = [run.name for run in runs if not run.has_ended] if refresh is not None else []
    live = [f"Still going on: {', '.join(going_on)}; this page loads itself again."] if going_on else []
    page = build_page(
        title,
        " ".join([*sentences(runs), *live]) or f"{len(runs)} runs side by side",
        [],
        pictures,
        [table for table in (numbers_table(runs), settings_table(runs)) if table.rows],
        [BASIS, PRICE_ASSUMPTIONS],
        tables_first=True,
        refresh=refresh,
    )
    _write(target / COMPARISON_PICTURE_FILE, draw_comparison(runs))
    _write(target / COMPARISON_PAGE_FILE, page.encode("utf-8"))


def _described(history: RunHistory) -> str:
    first, last, num_layers = history.steps[0], history.steps[-1], len(history.names)
    steps = f"Steps {first:,} to {last:,}" if last > first else f"Step {first:,}"
    return f"{steps}, {num_layers} layers, {history.numels.sum():,} weights"


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: a page that is open in a browser may be loaded again at any moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
