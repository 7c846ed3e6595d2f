"""Which of a Trainer's checkpoints is whole: a run may have died while it saved the last."""

import json
import re
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from slsam_ds.integrations.console import one_line, warn
from slsam_ds.state.files import STATE_FILE, check_files


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was saved to its end; None where there is none. Warns of newer ones."""
    numbers = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if named and folder.is_dir():
            numbers[int(named[1])] = folder
    for number in sorted(numbers, reverse=True):
        try:
            check_complete(numbers[number])
        except ValueError as error:
            warn(f"{error}; looking for an older one")
        else:
            return str(numbers[number])
    return None


def is_stock(folder: str | Path) -> bool:
    """Whether a trainer without SL-SAM has saved the checkpoint: with it, the trainer's state comes after SL-SAM's."""
    return Path(folder, TRAINER_STATE_NAME).is_file() and not Path(folder, STATE_FILE).is_file()


def check_complete(folder: Path) -> int:
    """Refuse a checkpoint that was not saved to its end, or has lost something since.

    Returns:
        After how many steps it was saved.

    Raises:
        ValueError: Saying what it lacks.
    """
    if not is_stock(folder):
        check_files(folder)
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        step = state["global_step"]
        TrainerState(**state)  # as the trainer will read it
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"global_step={step!r}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}: no readable {TRAINER_STATE_NAME} ({one_line(error)})") from None
    return step
