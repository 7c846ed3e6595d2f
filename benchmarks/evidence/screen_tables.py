"""The screen's rows as Markdown."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.candidates import CANDIDATES
from benchmarks.evidence.long_tasks import LONG_TASKS

FILE = "screen.jsonl"
REPORT = "screen.md"

_POINTS = ("early", "middle", "late")
_GROUPS = {"before": "before the blocks", "lower": "lower half", "upper": "upper half", "after": "after the blocks"}

_INTRODUCTION = f"""# Screen: what each recipe captures of dense SAM's correction

Written by `python -m benchmarks.evidence.screen`; do not edit. The numbers are in [`{FILE}`]({FILE}).

An AdamW run is stopped after a tenth, a half and nine tenths of its steps. From there each recipe takes steps over
held-back data, in windows as large as a training step's, with a learning rate that moves nothing. What it hands to the
optimizer, less the gradient at the weights over the same window, is its correction; d is the mean over windows. Of a
recipe that draws layers, a layer counts in the windows in which it was drawn, which is what its scaled learning rate
amounts to. delta is d of dense SAM at the same radius.

*projection* is ⟨d, delta⟩ / ‖delta‖²: 1 for dense SAM, 0 for AdamW. *cosine* says how much of d is not noise or
something else. The price is the mean of the steps', AdamW's being 1; of a recipe that perturbs now and then, d is the
mean over all steps. Gradients differ in size from layer to layer, most of all those of embeddings, and Adam does not
mind: so the same is shown in its units. The radius is {{rho}} where no other is named; recipes with another geometry
or a random direction have one in proportion to it, so that for them the cosine alone counts.
"""


def write_tables(folder: Path) -> Path:
    """The report of all rows of a folder.

    Returns:
        Its path.
    """
    lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rhos = sorted({row["rho"] for row in rows if row["point"] == "early"})
    parts = [_INTRODUCTION.format(rho=", ".join(f"{rho:g}" for rho in rhos))]
    for name, task in LONG_TASKS.items():
        of_task = [row for row in rows if row["task"] == name]
        if of_task:
            parts += [f"## {name}: {task.title}", *_tables(of_task)]
    path = folder / REPORT
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return path


def _tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    usual = next(row["rho"] for row in rows if row["point"] == "early")
    at = {(row["candidate"], row["point"], row["rho"]): row for row in rows}
    names = [name for name in CANDIDATES if all((name, point, usual) in at for point in _POINTS)]
    if not names:
        return
    shares = at[names[0], "middle", usual]["shares"]
    yield _table(
        ["recipe", "price", *(f"{point}: projection | cosine" for point in _POINTS)],
        [
            [_title(name), f"{at[name, 'middle', usual]['price']:.2f}"]
            + [_both(at[name, point, usual]["all"]) for point in _POINTS]
            for name in names
        ],
    )
    yield "In Adam's units, each weight's gradient divided by the root of its second moment:"
    yield _table(
        ["recipe", *(f"{point}: projection | cosine" for point in _POINTS)],
        [[_title(name), *(_both(at[name, point, usual]["in_adams_units"]) for point in _POINTS)] for name in names],
    )
    yield "At the middle, by where the layers are. Shares of ‖delta‖²: " + ", ".join(
        f"{_GROUPS[group]} {share:.0%}" for group, share in shares.items()
    )
    yield _table(
        ["recipe", *(f"{title}: projection | cosine" for title in _GROUPS.values())],
        [[_title(name), *(_both(at[name, "middle", usual]["groups"][group]) for group in _GROUPS)] for name in names],
    )
    rhos = sorted({row["rho"] for row in rows})
    perturbing = [name for name in names if all((name, "middle", rho) in at for rho in rhos)]
    if len(rhos) == 1 or not perturbing:
        return
    yield "At the middle, by radius:"
    yield _table(
        ["recipe", *(f"{rho:g}: projection | cosine" for rho in rhos)],
        [[_title(name), *(_both(at[name, "middle", rho]["all"]) for rho in rhos)] for name in perturbing],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    flat = " | ".join(header)
    num_columns = flat.count("|") + 1
    return "\n".join([f"| {flat} |", "|---" * num_columns + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def _both(found: Mapping[str, float]) -> str:
    return f"{_shown(found['projection'])} | {_shown(found['cosine'])}"


def _shown(number: float | None) -> str:
    return "" if number is None or math.isnan(number) else f"{number:.2f}"


def _title(name: str) -> str:
    return f"`{name}`: {CANDIDATES[name].title}"
