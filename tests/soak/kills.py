"""Ranks that are killed at random moments: what is lost, and whether the run ends as if nothing had happened.

A timer of the kernel kills one rank, wherever it is: making the engine, in a pass, in a collective, between two files
of a checkpoint. The launcher's part, ending the others and starting anew, is done here. Checkpoints are frequent, so
that many kills hit one.
"""

import json
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.training import Setup, Training
from tests.ranks import RankFailedError, run_on_ranks
from tests.soak.digests import digest

NUM_STEPS = 24
SAVE_EVERY = 3
WORLD_SIZE = 2


def count_kills(engine: str, wanted: int, *, seed: int = 0) -> dict[str, int]:
    """Kill ranks of one engine until `wanted` kills have hit a run, each run going on until it is done.

    Returns:
        kills: That hit.
        runs: That were finished in spite of them.
        resumes: Restarts that loaded a checkpoint.
        lost_steps: Steps that a checkpoint had been reported for, and that such a restart did not find.
        different: Finished runs that did not end bit-identical to one that was left alone.
    """
    setup = Setup(engine=engine, slsam={"active_layers": 2})
    chance = random.Random(f"{engine} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        expected = run_on_ranks(WORLD_SIZE, train, setup, folder, None, 0.0)[0]
        duration = time.monotonic() - started
    found = {"kills": 0, "runs": 0, "resumes": 0, "lost_steps": 0, "different": 0}
    while found["kills"] < wanted:
        with tempfile.TemporaryDirectory() as folder:
            num_kills, ended = _run(setup, folder, chance, duration, wanted - found["kills"])
            resumed = [note for note in _notes(folder) if "loaded" in note]
        found["kills"] += num_kills
        found["runs"] += 1
        found["resumes"] += len(resumed)
        found["lost_steps"] += sum(max(0, note["reported"] - note["loaded"]) for note in resumed)
        found["different"] += ended != expected
    return found


def _run(setup: Setup, folder: str, chance: random.Random, duration: float, wanted: int) -> tuple[int, str]:
    """One run to its end, killed as often as chance will have it: how often that was, and what it ended with."""
    num_kills = 0
    while True:
        victim = chance.randrange(WORLD_SIZE) if num_kills < wanted else None
        try:
            return num_kills, run_on_ranks(WORLD_SIZE, train, setup, folder, victim, chance.uniform(0.0, duration))[0]
        except RankFailedError as error:
            if victim is None or not tells_of_a_kill(error):
                raise
            num_kills += 1


def die_after(seconds: float) -> None:
    """Let this process be ended there and then, wherever it is, as SIGKILL would."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))


def tells_of_a_kill(error: RankFailedError) -> bool:
    """Whether it is the victim's end, or what another rank said when it noticed; all else is a fault of ours."""
    return any(sign in str(error) for sign in ("died without a word", "onnection", "gloo"))


def train(setup: Setup, folder: str, victim: int | None, delay: float) -> str:
    """On every rank: load what is there, train to the end, save now and then; what all of it comes to."""
    if victim == dist.get_rank():
        die_after(delay)
    training = Training(setup)
    owner: Any = training.engine or training.slsam
    checkpoint = folder if training.engine else f"{folder}/checkpoint"
    reported = max((note.get("saved", 0) for note in _notes(folder)), default=0)
    if reported:
        owner.load_checkpoint(checkpoint)
        _note(training, folder, {"loaded": training.slsam.num_steps, "reported": reported})
    while training.slsam.num_steps < NUM_STEPS:
        training.step(training.window(training.slsam.num_steps + 1))
        if training.slsam.num_steps % SAVE_EVERY == 0:
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
