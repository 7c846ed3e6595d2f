"""The tables of a report, as cells: the command prints them, the page lays them out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slsam_ds.report.bins import StepBins
from slsam_ds.report.facts import active_shares, layer_facts, loss_rises
from slsam_ds.report.history import RunHistory

_NUM_SPANS = 10


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text; the first column stands left, numbers stand right.

    Attributes:
        title: What it lists.
        header: Names of the columns.
        rows: Their cells.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self._aligned(self.header, widths), *(self._aligned(row, widths) for row in self.rows)]
        return "\n".join([self.title, *lines])

    @staticmethod
    def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
        first, *others = (
            f"{cell:{side}{width}}"
            for cell, width, side in zip(cells, widths, "<" + ">" * (len(cells) - 1), strict=True)
        )
        return "  ".join(["", first, *others]).rstrip()


def layer_table(history: RunHistory) -> Table:
    """One row for every layer, in forward order."""
    apart = history.perturbs_others
    return Table(
        f"Layers over {_counted(len(history))}",
        (
            *("layer", "weights", "active in", "of steps"),
            *(("perturbed in", "of steps") if apart else ()),
            *("probability", "the last", "gradient norm"),
        ),
        tuple(
            (
                layer.name,
                f"{layer.numel:,}",
                f"{layer.num_active:,}",
                f"{100 * layer.share_active:.1f}%",
                *((f"{layer.num_perturbed:,}", f"{100 * layer.share_perturbed:.1f}%") if apart else ()),
                f"{layer.probability:.3f}",
                f"{layer.last_probability:.3f}",
                _number(layer.grad_norm),
            )
            for layer in layer_facts(history)
        ),
    )


def progress_table(history: RunHistory) -> Table:
    """One row for every tenth of the run: means."""
    bins = StepBins(history.steps, _NUM_SPANS)
    columns: tuple[tuple[str, Callable[[float], str], np.ndarray], ...] = (
        ("loss", _number, bins.means(history.loss_at_weights)),
        ("rise", _percent, bins.means(loss_rises(history))),
        ("active weights", _percent, bins.means(active_shares(history))),
        ("price", _number, bins.means(history.price)),
        ("perturbation", _number, bins.means(history.perturbation_projection)),
        ("seconds", _number, bins.means(history.seconds)),
        ("skipped", lambda count: f"{count:.0f}", bins.sums(history.skipped)),
    )
    firsts, lasts = np.ceil(bins.edges[:-1]), np.floor(bins.edges[1:])
    rows = []
    for number, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        steps = f"{first:,.0f} to {last:,.0f}" if last > first else f"{first:,.0f}"
        rows.append((steps, *(shown(values[number]) for _, shown, values in columns)))
    return Table("Course of the run", ("steps", *(name for name, _, _ in columns)), tuple(rows))


def _counted(num_steps: int) -> str:
    return f"{num_steps:,} step{'s' if num_steps != 1 else ''}"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4g}"


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.1f}%"
