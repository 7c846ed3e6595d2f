"""Runs that end before they are done: what is lost, and whether they end at last as if nothing had happened.

A timer of the kernel kills one rank, wherever it is: making the engine, in a pass, in a collective, between two files
of a checkpoint. Or a checkpoint's files do not fit on the disk, for which the kernel's limit of a file's size stands
in. The launcher's part, ending the other ranks and starting anew, is done here. Checkpoints are frequent, so that many
kills hit one.
"""

import json
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch.distributed as dist

from slsam_ds.engines.deepspeed.operator_locks import abandoned_locks
from tests.distributed.training import Setup, Training
from tests.ranks import RankFailedError, run_on_ranks
from tests.soak.digests import digest

NUM_STEPS = 24
SAVE_EVERY = 3
WORLD_SIZE = 2


class Ending(Protocol):
    """What ends a run early.

    Attributes:
        signs: What ranks say of it; all else that ends a run is a fault of ours.
    """

    signs: ClassVar[tuple[str, ...]]

    def strike(self, num_saves: int) -> None:
        """Called on every rank as it starts, with 0, and before each checkpoint, with its number since then."""
        ...


@dataclass(frozen=True)
class Kill:
    """A rank ends, wherever it is after so many seconds, as by SIGKILL: by an alarm that it does not catch."""

    rank: int
    delay: float

    signs: ClassVar = ("died without a word", "onnection", "gloo")

    def strike(self, num_saves: int) -> None:
        if num_saves == 0 and self.rank == dist.get_rank():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(self.delay, 1e-3))


@dataclass(frozen=True)
class FullDisk:
    """From this checkpoint on no file grows beyond so many bytes."""

    room: int
    num_saves: int

    signs: ClassVar = (
        "File too large",
        "PytorchStreamWriter failed",
        "unexpected pos",
        "iostream error",
        "onnection",
        "gloo",
    )

    def strike(self, num_saves: int) -> None:
        if num_saves == self.num_saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.RLIM_INFINITY))


def a_kill(chance: random.Random, duration: float) -> Kill:
    """Of a random rank, at a random moment of a run that lasts so long."""
    return Kill(chance.randrange(WORLD_SIZE), chance.uniform(0.0, duration))


def a_full_disk(chance: random.Random, duration: float) -> FullDisk:
    """At one of a run's first checkpoints: with room for nothing, for everything, or for some of the files."""
    return FullDisk(int(2 ** chance.uniform(6, 18)), chance.randint(1, 4))


def count_endings(
    engine: str, wanted: int, ending: Callable[[random.Random, float], Ending], *, seed: int = 0
) -> dict[str, int]:
    """End runs of one engine early until that has happened so often, each run being started again until it is done.

    Returns:
        kills: Runs that were ended.
        runs: That were finished in spite of them.
        resumes: Restarts that loaded a checkpoint.
        lost_steps: Steps that a checkpoint had been reported for, and that such a restart did not find.
        different: Finished runs that did not end bit-identical to one that was left alone.
    """
    setup = Setup(engine=engine, slsam={"active_layers": 2})
    chance = random.Random(f"{engine} {seed}")
    durations = []
    for _ in range(2):  # the first run also starts the fork server, and may build an operator
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            expected = run_on_ranks(WORLD_SIZE, train, setup, folder, None)[0]
            durations.append(time.monotonic() - started)
    duration = min(durations)
    found = {"kills": 0, "runs": 0, "resumes": 0, "lost_steps": 0, "different": 0}
    while found["kills"] < wanted:
        with tempfile.TemporaryDirectory() as folder:
            endings = (ending(chance, duration) for _ in range(wanted - found["kills"]))
            num_kills, ended = _run(setup, folder, endings)
            resumed = [note for note in _notes(folder) if "loaded" in note]
        found["kills"] += num_kills
        found["runs"] += 1
        found["resumes"] += len(resumed)
        found["lost_steps"] += sum(max(0, note["reported"] - note["loaded"]) for note in resumed)
        found["different"] += ended != expected
    return found


def _run(setup: Setup, folder: str, endings: Iterator[Ending]) -> tuple[int, str]:
    """One run to its end, in spite of what strikes it: how often that ended it, and what it came to."""
    num_ended = 0
    while True:
        ending = next(endings, None)
        try:
            return num_ended, run_on_ranks(WORLD_SIZE, train, setup, folder, ending)[0]
        except RankFailedError as error:
            if ending is None or not any(sign in str(error) for sign in ending.signs):
                raise
            num_ended += 1
            for lock in abandoned_locks():  # as a person would who reads the warning
                lock.unlink()


def train(setup: Setup, folder: str, ending: Ending | None) -> str:
    """On every rank: load what is there, train to the end, save now and then; what all of it comes to."""
    if ending is not None:
        ending.strike(0)
    training = Training(setup)
    owner: Any = training.engine or training.slsam
    checkpoint = folder if training.engine else f"{folder}/checkpoint"
    reported = max((note.get("saved", 0) for note in _notes(folder)), default=0)
    if reported:
        owner.load_checkpoint(checkpoint)
        _note(training, folder, {"loaded": training.slsam.num_steps, "reported": reported})
    num_saves = 0
    while training.slsam.num_steps < NUM_STEPS:
        training.step(training.window(training.slsam.num_steps + 1))
        if training.slsam.num_steps % SAVE_EVERY == 0:
            num_saves += 1
            if ending is not None:
                ending.strike(num_saves)
            owner.save_checkpoint(checkpoint)
            _note(training, folder, {"saved": training.slsam.num_steps})
    return digest(training)


def _note(training: Training, folder: str, note: dict[str, int]) -> None:
    if training.rank == 0:
        with Path(folder, "notes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def _notes(folder: str) -> list[dict[str, int]]:
    path = Path(folder, "notes.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
