"""Thousands of steps with everything that goes wrong: kills, bad numbers, batches that are passed over."""

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.training import Setup, Training
from tests.ranks import RankFailedError, run_on_ranks
from tests.soak.digests import digest
from tests.soak.early_ends import Kill

WORLD_SIZE = 2
NUM_ARMS = 6
SAVE_EVERY = 50
NUM_KILLS = 10
QUIET_SHARE = 0.4
"""Of the run, at its end: not killed, so that memory and time can be compared within one process."""


def run_long(num_steps: int, *, engine: str = "zero2", seed: int = 0) -> dict[str, float]:
    """A run of so many steps with faults, and the same without.

    Returns:
        steps: Good ones.
        kills: That hit.
        bad_steps: Skipped for a bad number.
        different: 1 where both runs did not end with the same bits.
        growth_mb: Of the process over the quiet stretch, the larger of both ranks.
        slower: Median step of the stretch's last fifth over that of its first.
    """
    setup = Setup(engine=engine, slsam={"check_weights_every": 100})
    chance = random.Random(seed)
    bad = frozenset(chance.sample(range(2, num_steps), max(1, num_steps // 100)))
    total = num_steps + len(bad)
    num_kills = 0
    with tempfile.TemporaryDirectory() as folder:
        pace = 0.05
        while True:
            done = _saved(folder)
            kill = None
            if num_kills < NUM_KILLS:
                end = int(total * (1 - QUIET_SHARE) * (num_kills + 1) / NUM_KILLS)
                delay = max(1.0, (end - done) * pace * chance.uniform(0.5, 1.5))
                kill = Kill(chance.randrange(WORLD_SIZE), delay)
            try:
                ranks = run_on_ranks(WORLD_SIZE, train, setup, folder, total, bad, kill, timeout=7200)
                break
            except RankFailedError as error:
                if kill is None or not any(sign in str(error) for sign in kill.signs):
                    raise
                num_kills += 1
    with tempfile.TemporaryDirectory() as folder:
        clean = run_on_ranks(WORLD_SIZE, train, setup, folder, num_steps, frozenset(), None, timeout=7200)
    return {
        "steps": num_steps,
        "kills": num_kills,
        "bad_steps": len(bad),
        "different": int(ranks[0]["weights"] != clean[0]["weights"]),
        "growth_mb": max(rank["growth_mb"] for rank in ranks),
        "slower": max(rank["slower"] for rank in ranks),
    }


def train(setup: Setup, folder: str, total: int, bad: frozenset[int], kill: Kill | None) -> dict[str, Any]:
    """On every rank: from the last checkpoint to the end. Steps are numbered with the skipped ones."""
    if kill is not None:
        kill.strike(0)
    training = Training(setup)
    slsam, owner = training.slsam, training.engine or training.slsam
    if _saved(folder):
        owner.load_checkpoint(f"{folder}/checkpoint")
    seconds, memory = [], []
    while slsam.num_steps < total:
        step = slsam.num_steps + 1
        good = step - sum(1 for number in bad if number < step)  # which of the good steps it is, or would be
        sample = sorted(random.Random(good).sample(range(NUM_ARMS), 2))
        # Every tenth window of the data is passed over, as a loop would that filters its batches.
        window = training.window(good + good // 9)
        started = time.perf_counter()
        result = training.step(window, loss_fn=_nan_on_rank_1 if step in bad else None, active=sample)
        assert result.skipped == (step in bad)
        if step > total * (1 - QUIET_SHARE):
            seconds.append(time.perf_counter() - started)
            memory.append(_resident_mb())
        if step % SAVE_EVERY == 0:
            owner.save_checkpoint(f"{folder}/checkpoint")
            if training.rank == 0:
                Path(folder, "saved").write_text(str(step))
    fifth = max(1, len(seconds) // 5)
    return {
        "weights": digest(training, state=False),
        "growth_mb": memory[-1] - memory[fifth] if memory else 0.0,
        "slower": statistics.median(seconds[-fifth:]) / statistics.median(seconds[:fifth]) if seconds else 1.0,
    }


def _nan_on_rank_1(model: Any, batch: Any) -> Any:
    loss = model(**batch).loss
    return loss * float("nan") if dist.get_rank() == 1 else loss


def _saved(folder: str) -> int:
    path = Path(folder, "saved")
    return int(path.read_text() or 0) if path.exists() else 0


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1e3
