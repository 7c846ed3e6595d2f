"""What the user asked for cannot be done: one sentence, printed once, and the same exit code on every rank.

Before training starts, every stage ends with the ranks telling each other how it went (`together`), so that a file
missing on one node stops all nodes instead of leaving them waiting in the first collective.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import DistError

from slsam_ds.cli.rendezvous import free_shared_memory
from slsam_ds.integrations.console import one_line, runs_on_cpu
from slsam_ds.integrations.num_steps import NoStepsError
from slsam_ds.protocol import RanksDisagreeError
from slsam_ds.skipping import BadNumbersError

EXIT_CODE = 2
"""What argparse, and so every command line in Python, returns on a usage error."""


class UsageError(Exception):
    """The message is the sentence to print: on one line, though names in it may hold line breaks."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.splitlines()))


EXIT_CODES: dict[type[Exception], int] = {
    UsageError: EXIT_CODE,
    NoStepsError: EXIT_CODE,
    BadNumbersError: 3,
    RanksDisagreeError: 4,
}
"""Of runs that were refused late, or ended because going on was no use."""

_GRACE = 20.0  # seconds; launchers look after their ranks several times in them

Built = TypeVar("Built")


@contextmanager
def refusals(error: type[Exception] = ValueError, *errors: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn what a library raises on bad settings into a `UsageError`.

    Args:
        error: What counts as a refusal.
        *errors: And what else does.
        prefix: Put before the library's message: the flag and its value.
    """
    try:
        yield
    except UsageError:
        raise
    except (error, *errors) as refusal:
        raise UsageError(prefix + one_line(refusal)) from refusal


def path_of(flag: str, name: str) -> Path:
    """The path of that name, its `~` replaced.

    Args:
        flag: The flag and the name, for messages.
        name: As it was given.

    Raises:
        UsageError: Nothing can be found by such a name; it is too long, for one.
    """
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
    with refusals(ValueError, OSError, prefix=f"{flag}: "):
        path.exists()
    return path


def together(build: Callable[[], Built]) -> Built:
    """Run `build` on this rank; go on only if it went well on all of them.

    Returns:
        What `build` returned.

    Raises:
        SystemExit: On every rank. Code 2 where any rank raised `UsageError`, printed by each node's first rank; code 1
            where any raised something else, a bug, whose traceback is printed by the rank that has it. On one rank
            alone, with a sentence: it cannot reach the others.
    """
    built: Built | None = None
    problem: tuple[str, bool] | None = None
    try:
        built = build()
    except UsageError as error:
        problem = (str(error), True)
    except DistError as error:  # the other ranks cannot be told
        raise _lonely(error) from error
    except Exception:
        problem = (traceback.format_exc(), False)
    state = PartialState(cpu=runs_on_cpu())
    problems: list[tuple[str, bool] | None] = gather_object([problem])
    if not any(problems):
        return built  # type: ignore[return-value]
    if problem is not None and not problem[1]:
        print(problem[0], file=sys.stderr, flush=True)
    if state.is_local_main_process:
        for sentence in _sentences(problems):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
    # A launcher kills every rank as soon as one has ended with an error: nobody leaves before all have printed.
    state.wait_for_everyone()
    raise SystemExit(EXIT_CODE if all(p is None or p[1] for p in problems) else 1)


def run(work: Callable[[], Built]) -> Built:
    """Run training itself, where ranks meet in collectives of their own, and a refusal comes when data are reached.

    Raises:
        SystemExit: Where `work` raised one of `EXIT_CODES`. All ranks raise them (they read the same data, and share
            their statistics): each node's first rank prints, and the others leave it the time to; one that is alone
            with its problem prints too.
    """
    try:
        return work()
    except tuple(EXIT_CODES) as error:
        state = PartialState(cpu=runs_on_cpu())
        tail = ""
        if not state.is_local_main_process:
            time.sleep(_GRACE)  # the launcher ends this rank as soon as another one has ended
            tail = f" (rank {state.process_index} of {state.num_processes})"
        # A data loader's worker wraps what it raised into a traceback.
        sentence = str(error).strip().splitlines()[-1].split("UsageError: ")[-1]
        print(f"\nerror: {sentence}{tail}", file=sys.stderr, flush=True)  # on a line of its own, below the progress bar
        raise SystemExit(EXIT_CODES[type(error)]) from error


def _sentences(problems: list[tuple[str, bool] | None]) -> list[str]:
    """The refusals of all ranks, each once; with the ranks it concerns where it does not concern all."""
    sentences: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None and problem[1]:
            sentences.setdefault(problem[0], []).append(rank)
    return [
        text if len(ranks) == len(problems) else f"{text} (rank {', '.join(map(str, ranks))} of {len(problems)})"
        for text, ranks in sentences.items()
    ]


def join_ranks(*, backend: str | None, timeout: float) -> None:
    """Join the process group, on the CPU.

    `TrainingArguments` would do so too, but passes `--ddp_timeout` on for accelerators only (transformers 5.23): ranks
    would wait half an hour for a node that fell silent.

    Args:
        backend: `--ddp_backend`; None: accelerate's choice.
        timeout: `--ddp_timeout`. Seconds.

    Raises:
        SystemExit: Another rank did not come in time, or is not reached. On this rank alone, with a sentence.
    """
    try:
        PartialState(cpu=True, backend=backend, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:  # what gloo raises; a `DistError` is one too
        raise _lonely(error) from error


def _lonely(error: Exception) -> SystemExit:
    return SystemExit(f"error: no connection to the other ranks: {one_line(error)}")


def leave_ranks() -> None:
    """Leave the process group. Left to the interpreter's exit, some torchrun jobs abort there."""
    if PartialState._shared_state:  # creating the state here would join a group only to leave it
        PartialState().destroy_process_group()
    address, port, rank = (str(os.environ.get(name)) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    free_shared_memory(address=address, port=port, rank=rank)
