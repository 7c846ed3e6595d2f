"""A run as its folder tells it: the history of its steps, its settings, and its held-out losses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsam_ds.records.files import LAYERS_FILE, read_settings
from slsam_ds.report.history import RunHistory, read_history

TRAINER_STATE_FILE = "trainer_state.json"
"""What a Trainer writes when it is done; its log holds the evaluations."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One run.

    Attributes:
        name: What to call it.
        history: Its steps.
        settings: As `slsam_ds.records.files.write_settings` wrote them; empty where nobody did.
        held_out: Held-out losses: step and loss.
    """

    name: str
    history: RunHistory
    settings: Mapping[str, Any]
    held_out: tuple[tuple[int, float], ...]

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
        held_out=_held_out(folder),
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


def _held_out(folder: Path) -> tuple[tuple[int, float], ...]:
    """What a Trainer's log says. A log that is older than the layers is an earlier run's in the same folder."""
    path = folder / TRAINER_STATE_FILE
    try:
        if path.stat().st_mtime < (folder / LAYERS_FILE).stat().st_mtime:
            return ()
        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        # Two at one step, where an evaluation follows the last of those that training made, are the same number.
        found = {int(entry["step"]): float(entry["eval_loss"]) for entry in log if "eval_loss" in entry}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()
    return tuple(sorted(found.items()))
