"""All modes side by side: the same model, data, engine, processes and rounds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Effort, run_together
from benchmarks.modes import ADAMW_MODE, DENSE_SAM, EXACT, MODES, REFERENCES, Mode
from benchmarks.setup import Setup

SMALL = Setup()
"""Two ranks on two cores: steps of a second or two, in which matrix products weigh more than what travels."""
LARGE = Setup(
    device="cuda",
    dtype="bfloat16",
    world_size=1,
    blocks=22,
    hidden=2048,
    intermediate=5632,
    vocabulary=32_000,
    batch=4,
    length=2048,
)
"""1.2 billion weights, as TinyLlama's but without shared key and value heads: 20 GB a mode on one rank."""
PRESETS = {"small": SMALL, "large": LARGE}

DOCSTRINGS = Setup(task="docstrings", blocks=30, hidden=576, batch=2, length=192, dtype="bfloat16")
"""The demo's: the pretrained SmolLM2-135M in bf16, two samples of up to 192 tokens on each of two ranks."""


def compare(setup: Setup, modes: Sequence[Mode], effort: Effort, *, together: int = len(MODES)) -> dict[str, Any]:
    """Measure every mode, next to the references.

    Args:
        setup: What is trained.
        modes: The references among them or not: they always run.
        effort: How long.
        together: At most this many modes, references included, are in memory at once; each such group is a run of its
            own, with its own references.

    Returns:
        For JSON: the setup, the number of weights, and the groups, each a list of `Measured`.
    """
    others = [mode for mode in modes if mode not in REFERENCES]
    size = max(1, together - len(REFERENCES))
    groups, weights = [], 0
    for start in range(0, max(1, len(others)), size):
        ((found, weights),) = run_together([setup], (*REFERENCES, *others[start : start + size]), effort)
        groups.append([dataclasses.asdict(one) for one in found])
    return {"setup": dataclasses.asdict(setup), "about": setup.describe(), "weights": weights, "groups": groups}


def count_traffic(setup: Setup, engines: Sequence[str], *, warmup: int, steps: int) -> dict[str, Any]:
    """Bytes on the sharded engines: they depend on the shares of the layers alone, so the model is made smaller.

    Args:
        setup: Whose layers to take, at half their width and with half the vocabulary.
        engines: On which.
        warmup: Steps before. ZeRO-3 learns the order of its fetches anew for every lowest layer; until it has, it
            gathers more.
        steps: Steps counted.
    """
    halves = {"hidden": setup.hidden // 2, "vocabulary": setup.vocabulary // 2}
    if setup.intermediate is not None:
        halves["intermediate"] = setup.intermediate // 2
    small = dataclasses.replace(setup, batch=1, length=16, accumulation=1, **halves)
    effort = Effort(rounds=0, warmup=warmup, counted=steps, bytes_only=True)
    return {
        engine: compare(dataclasses.replace(small, engine=engine), (ADAMW_MODE, DENSE_SAM, EXACT), effort)
        for engine in engines
    }
