"""A run as its folder tells it: the history of its steps, and its settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsam_ds.records.files import read_settings
from slsam_ds.report.history import RunHistory, read_history


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One run.

    Attributes:
        name: What to call it.
        history: Its steps.
        settings: As `slsam_ds.records.files.write_settings` wrote them; empty where nobody did.
    """

    name: str
    history: RunHistory
    settings: Mapping[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether it is known that no step follows."""
        return bool(self.settings.get("has_ended", False))


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """The run whose files are in a folder, as far as it has come.

    Args:
        folder: Its `--output_dir`.
        name: What to call it; None: by the folder's name.

    Raises:
        RecordsError: There is no such folder, it lacks the files, or they are not what slsam_ds writes.
    """
    folder = Path(folder)
    history = read_history(folder)
    return Run(
        name=name or folder.resolve().name,
        history=history,
        settings=read_settings(folder),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs, each with a name of its own: the folder's, or where two have the same, the whole path.

    Raises:
        RecordsError: As `read_run`.
    """
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
