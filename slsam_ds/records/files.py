"""What a run leaves behind for people and programs to read: its layers, steps, settings and evaluations."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slsam_ds.state.replacing import replace_text

LAYERS_FILE = "slsam_layers.json"
STEPS_FILE = "slsam_steps.jsonl"
SETTINGS_FILE = "slsam_settings.json"
EVALUATIONS_FILE = "slsam_evaluations.json"


def write_layers(output_dir: str | Path, layers: Sequence[Mapping[str, Any]]) -> None:
    """Write the arms (index, name, numel, parameter names) as one JSON list."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAYERS_FILE).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")


def write_settings(
    output_dir: str | Path,
    *,
    slsam: Mapping[str, Any],
    training: Mapping[str, Any],
    total_steps: int,
    has_ended: bool,
) -> None:
    """Write what a run was told, as one JSON object.

    Args:
        output_dir: Where the run's other files are.
        slsam: SL-SAM's knobs.
        training: The trainer's settings.
        total_steps: Length of the run.
        has_ended: No step follows.
    """
    settings = {"slsam": slsam, "training": training, "total_steps": total_steps, "has_ended": has_ended}
    # A report may read it at any moment.
    replace_text(Path(output_dir) / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def read_settings(output_dir: str | Path) -> dict[str, Any]:
    """What `write_settings` wrote; empty where there is nothing to be read."""
    try:
        settings = json.loads((Path(output_dir) / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def write_evaluations(output_dir: str | Path, log: Iterable[Mapping[str, Any]]) -> None:
    """Write the evaluations among the entries of a Trainer's log, as one JSON list. Each has its `step`."""
    found = [entry for entry in log if any(name.startswith("eval_") for name in entry)]
    replace_text(Path(output_dir) / EVALUATIONS_FILE, json.dumps(found, indent=1) + "\n")


def read_held_out(output_dir: str | Path) -> list[tuple[int, float]]:
    """Steps and held-out losses (`eval_loss`), ascending; empty where no evaluation was written."""
    try:
        entries = json.loads((Path(output_dir) / EVALUATIONS_FILE).read_text(encoding="utf-8"))
        # Two at one step, where an evaluation follows the last of those that training made, are the same number.
        return sorted({int(each["step"]): float(each["eval_loss"]) for each in entries if "eval_loss" in each}.items())
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


class StepWriter:
    """Appends one JSON line per optimizer step, each flushed, without gap or repeat over a resume.

    Args:
        output_dir: Created where missing.
        first_step: The step written next. Lines of it and later ones, left by a run that went on beyond the
            checkpoint now resumed, are dropped; 1 starts the file anew.
    """

    def __init__(self, output_dir: str | Path, *, first_step: int) -> None:
        path = Path(output_dir) / STEPS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _ascending(read_steps(output_dir), first_step)
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; numbers that JSON cannot hold become null."""
        self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._file.close()


def read_steps(output_dir: str | Path) -> list[dict[str, Any]]:
    """The records written so far; a last line torn by a crash is left out."""
    return list(iterate_steps(output_dir))


def iterate_steps(output_dir: str | Path) -> Iterator[dict[str, Any]]:
    """As `read_steps`, one at a time: a long run of a deep model leaves gigabytes."""
    path = Path(output_dir) / STEPS_FILE
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:  # where a crash tore it there may be any bytes
        for line in lines:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                return


def _ascending(records: Iterable[Any], first_step: int) -> Iterator[Any]:
    """Those of the steps before `first_step`; what is none, or out of order, a damaged disk has left."""
    last = 0
    for record in records:
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int) and last < step < first_step:
            last = step
            yield record


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
