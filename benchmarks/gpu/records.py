"""What was found so far: a line of JSON for each row, and a page of all rows, both written as they come."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import rounded

_LINES, _PAGE = "results.jsonl", "report.md"
_OF_LINE = ("part", "traceback")  # what is no column


@dataclass(frozen=True, slots=True)
class Records:
    """Of one folder. Any process may write, one at a time.

    Attributes:
        folder: Where the files are.
    """

    folder: Path

    def forget(self, parts: Collection[str]) -> None:
        """Drop what earlier runs found in these parts, which are made again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in self.rows() if row["part"] not in parts]
        (self.folder / _LINES).write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")

    def add(self, part: str, *, traceback: str = "", **found: Any) -> None:
        """Print a row and write it to both files.

        Args:
            part: Where it belongs.
            traceback: Of what failed; goes to the files alone.
            **found: By column.
        """
        row = rounded({"part": part, **found})
        print(f"{part}: {', '.join(f'{name} {_cell(value)}' for name, value in list(row.items())[1:])}", flush=True)
        with (self.folder / _LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "traceback": traceback} if traceback else row) + "\n")
        page = "# On a card\n\nWritten by `python -m benchmarks.gpu`; do not edit.\n" + "".join(self._sections())
        (self.folder / _PAGE).write_text(page, encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """All of them, in the order in which they were found."""
        path = self.folder / _LINES
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def _sections(self) -> list[str]:
        """Of each part: a table of neighbours with the same columns, and a line where there is but one."""
        found = self.rows()
        sections = []
        for part in dict.fromkeys(row["part"] for row in found):
            sections.append(f"\n## {part}\n")
            header: list[str] = []
            for row in (row for row in found if row["part"] == part):
                columns = [name for name in row if name not in _OF_LINE]
                cells = [_cell(row[name]) for name in columns]
                if len(columns) == 1:
                    sections.append(f"\n{columns[0].replace('_', ' ').capitalize()}: {cells[0]}\n")
                    columns = []
                else:
                    if columns != header:
                        sections.append(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
                    sections.append(f"| {' | '.join(cells)} |\n")
                if row.get("traceback"):
                    sections.append(f"\n```\n{row['traceback'].strip()}\n```\n")
                    columns = []
                header = columns
        return sections


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return "yes" if value is True else "NO" if value is False else str(value)
