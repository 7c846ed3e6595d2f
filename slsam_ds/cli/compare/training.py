"""One training: started by DeepSpeed's launcher, watched through the files that it writes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from slsam_ds.cli.compare.method import Method
from slsam_ds.cli.rendezvous import free_port, free_shared_memory
from slsam_ds.records.files import EVALUATIONS_FILE, LAYERS_FILE, SETTINGS_FILE, STEPS_FILE, read_settings

LOG_FILE = "train.log"
_POLL = 0.5  # seconds
_SECONDS_BETWEEN_LINES = 60
_TAIL = 15  # lines of the log that a failure without a sentence shows


class TrainingFailedError(Exception):
    """The training ended with an error. The message is for the user.

    Attributes:
        exit_code: The launcher's.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train(
    method: Method, folder: Path, flags: Sequence[str], *, num_accelerators: int | None, verbose: bool = False
) -> float:
    """Train, and wait for the end.

    Args:
        method: By which knobs.
        folder: Its `--output_dir`; the records of an earlier run in it are deleted.
        flags: Of the training, for every method.
        num_accelerators: Ranks; None: as many as the launcher finds.
        verbose: The training's own output goes to the terminal, in place of a progress bar.

    Returns:
        Seconds, from the launcher's start to its end.

    Raises:
        TrainingFailedError: It did not end well.
        KeyboardInterrupt: It was stopped; no process of it is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LAYERS_FILE, STEPS_FILE, SETTINGS_FILE, EVALUATIONS_FILE):
        (folder / name).unlink(missing_ok=True)
    port = free_port()
    command = _command(method, folder, flags, num_accelerators, port)
    started = time.monotonic()
    log = folder / LOG_FILE
    with log.open("wb") as output:
        kept = None if verbose else output
        # In a group of its own: Ctrl-C reaches us alone, who end all of it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=kept, stderr=kept, start_new_session=True)
        try:
            code = process.wait() if verbose else _watch(process, method.name, folder)
        finally:
            _end(process, port)
    if code != 0:
        raise TrainingFailedError(_reason(method, log, verbose=verbose), code)
    return time.monotonic() - started


def _command(method: Method, folder: Path, flags: Sequence[str], num_accelerators: int | None, port: int) -> list[str]:
    """What README.md shows, as `deepspeed --module slsam_ds.train`, which works without the repository too."""
    ranks = [] if num_accelerators is None else ["--num_accelerators", str(num_accelerators)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *ranks, "--master_port", str(port)]
    knobs = ["--slsam", *method.assignments] if method.assignments else []
    return [*launcher, "--module", "slsam_ds.train", *flags, "--output_dir", str(folder), "--measure", "True", *knobs]


def _watch(process: subprocess.Popen[bytes], name: str, folder: Path) -> int:
    """Show how far the run has come until it ends: by a bar in a terminal, elsewhere by a line a minute."""
    in_terminal = sys.stderr.isatty()
    told = time.monotonic()
    with tqdm(desc=f"{name}: starting", unit="step", disable=not in_terminal, dynamic_ncols=True, leave=False) as bar:
        while (code := process.poll()) is None:
            settings, done = read_settings(folder), _num_lines(folder / STEPS_FILE)
            total = settings.get("total_steps")
            if total is not None:
                bar.total = total
                doing = "held-out loss" if done in (0, total) else "training"
                bar.set_description(f"{name}: {doing}", refresh=False)
            bar.n = done
            bar.refresh()
            if not in_terminal and time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                print(f"  step {done} of {total or '?'}", flush=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
    return code


def _num_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _end(process: subprocess.Popen[bytes], port: int) -> None:
    """Nothing of it stays: the launcher, its ranks, and the shared memory that killed ranks leave."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    free_shared_memory(port=str(port))


def _reason(method: Method, log: Path, *, verbose: bool) -> str:
    """Why it failed: the sentences that it ended with, or where to look."""
    if verbose:
        return f"error: {method.name}: the training failed"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    sentences = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
    if sentences:
        return "\n".join(sentences)
    return "\n".join([*lines[-_TAIL:], f"error: {method.name}: the training failed; all that it said is in {log}"])
