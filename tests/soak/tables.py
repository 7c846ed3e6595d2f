"""The tables of docs/reliability.md, between the marks that say where they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BEGIN, _END = "<!-- written by make soak -->\n", "<!-- to here -->\n"

_COLUMNS = {
    "kills": {
        "kills": "ranks killed",
        "runs": "runs",
        "resumes": "resumed from a checkpoint",
        "lost_steps": "steps lost beyond the checkpoint",
        "different": "runs with other weights at the end",
    },
    "full_disk": {
        "kills": "saves that did not fit",
        "runs": "runs",
        "resumes": "resumed from a checkpoint",
        "lost_steps": "steps lost beyond the checkpoint",
        "different": "runs with other weights at the end",
    },
    "bad_numbers": {
        "injected": "NaN or Inf injected",
        "skipped": "steps skipped by all ranks",
        "moved": "steps that moved a weight or the bandit",
        "different": "runs with other weights at the end",
    },
    "bad_inputs": {
        "tried": "tried",
        "accepted": "accepted",
        "refused": "rejected with a clear error",
        "broken": "any other result",
    },
    "long_run": {
        "steps": "good steps",
        "kills": "ranks killed",
        "bad_steps": "steps skipped",
        "different": "other weights at the end",
        "growth_mb": "memory growth, MB",
        "slower": "time of the last steps / first steps",
    },
}
_TITLES = {
    "kills": "A rank killed at a random moment",
    "full_disk": "A checkpoint that does not fit on the disk",
    "bad_numbers": "Numbers that are not finite",
    "bad_inputs": "Settings and files that cannot be used",
    "long_run": "A long run with kills, bad numbers and skipped batches",
}


def write_tables(document: Path, found: Mapping[str, Any]) -> None:
    """Put all sections' tables into the document, in place of what is there."""
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    tables = [_table(name, found[name]) for name in _COLUMNS if name in found]
    document.write_text(before + _BEGIN + "\n" + "\n".join(tables) + "\n" + _END + after, encoding="utf-8")


def _table(name: str, section: Mapping[str, Any]) -> str:
    columns = _COLUMNS[name]
    rows = [
        f"**{_TITLES[name]}** ({section['machine']})\n",
        f"| | {' | '.join(columns.values())} |",
        "|---|" + "---|" * len(columns),
    ]
    for row, counts in section["counts"].items():
        cells = [f"{counts[column]:.2f}" if isinstance(counts[column], float) else counts[column] for column in columns]
        rows.append(f"| {row} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"
