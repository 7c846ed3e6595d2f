"""`python -m benchmarks.peers`: other packages' methods beside ours, from the same start.

Writes docs/benchmarks/peers.md. One process and one device, which is what the peers are made for. They come with
`pip install -e ".[peers]"`.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Peak
from benchmarks.results import describe_machine
from benchmarks.setup import Setup
from slsam_ds import SLSAM
from tests.ranks import run_on_ranks

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "peers.md"
SETUP = Setup(blocks=8, hidden=256, vocabulary=4096, batch=4, length=64, world_size=1)
STEPS_PER_BLOCK = 3
NUM_WARMUP, NUM_STEPS = 4, STEPS_PER_BLOCK * SETUP.blocks - 1
# A larger eps than Adam's own: a smaller one makes moves of ±lr out of rounding where a gradient is nearly zero.
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.01}

Step = Callable[[int, dict[str, Tensor]], None]
Make = Callable[[nn.Module], Step]


@dataclass(frozen=True, slots=True)
class Pair:
    """A method as a peer has it, and as we have it.

    Attributes:
        name: Of the method.
        peer: The package and its class.
        knobs: Ours.
        theirs: Makes their step.
        ours: Makes ours.
        note: Why trajectories are as far apart as they are.
    """

    name: str
    peer: str
    knobs: Mapping[str, Any]
    theirs: Make
    ours: Make
    note: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a pair took.

    Attributes:
        apart: Largest difference of any weight after all steps.
        moved: Largest move of any weight.
        seconds: Of theirs, and of ours, step by step.
        peaks: Bytes above what is held between steps: theirs, ours.
    """

    apart: float
    moved: float
    seconds: tuple[Sequence[float], Sequence[float]]
    peaks: tuple[int, int]


def by_closure(kind: str, **settings: Any) -> Make:
    """A peer of `pytorch_optimizer`, which calls a closure for its second pass."""

    def make(model: nn.Module) -> Step:
        import pytorch_optimizer

        optimizer = getattr(pytorch_optimizer, kind)(model.parameters(), torch.optim.AdamW, **settings, **ADAMW)

        def step(number: int, batch: dict[str, Tensor]) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = model(**batch).loss
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            closure()
            optimizer.step(closure)

        return step

    return make


def by_block(model: nn.Module) -> Step:
    """BAdam: one block at a time, from the lowest up."""
    from badam import BlockOptimizer

    base = torch.optim.AdamW(model.parameters(), **ADAMW)
    named = list(model.named_parameters())
    # It switches after it has taken so many steps.
    optimizer = BlockOptimizer(base, named, switch_block_every=STEPS_PER_BLOCK, switch_mode="ascending", verbose=0)

    def step(number: int, batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_us(knobs: Mapping[str, Any], active: Callable[[int], list[int]] | None = None) -> Make:
    """Ours."""

    def make(model: nn.Module) -> Step:
        slsam = SLSAM(model, torch.optim.AdamW(model.parameters(), **ADAMW), knobs)

        def step(number: int, batch: dict[str, Tensor]) -> None:
            slsam.step([batch], active=active(number) if active is not None else None)

        return step

    return make


def _sam(name: str, kind: str, theirs: Mapping[str, Any], knobs: Mapping[str, Any], note: str = "") -> Pair:
    peer = ", ".join([f"pytorch_optimizer `{kind}`", *(f"{key}={value}" for key, value in theirs.items())])
    return Pair(name, peer, knobs, by_closure(kind, **theirs), by_us(knobs), note)


_LAYERWISE = {"selector": "cyclic", "active_layers": 1, "rho": 0.0, "other_parameters": "freeze"}
PAIRS: Sequence[Pair] = (
    _sam("SAM", "SAM", {"rho": 0.05}, {"preset": "sam", "rho": 0.05}),
    _sam("ASAM", "SAM", {"rho": 0.5, "adaptive": True}, {"preset": "asam", "rho": 0.5}),
    _sam(
        "Friendly SAM",
        "FriendlySAM",
        {"rho": 0.05},
        {"preset": "friendly_sam", "rho": 0.05},
        "the running mean is kept in bf16 here",
    ),
    _sam(
        "LookSAM, and its nearest",
        "LookSAM",
        {"rho": 0.05, "k": 5, "alpha": 0.7},
        {"preset": "every_fifth", "rho": 0.05},
        "another formula: LookSAM adds what it has kept of the last ascent in the steps between, and its closure runs "
        "the model twice in these too",
    ),
    Pair(
        "BAdam, one pass over the blocks",
        "badam `BlockOptimizer`, ascending",
        _LAYERWISE,
        by_block,
        by_us(
            _LAYERWISE, lambda number: [(number + 1) // STEPS_PER_BLOCK % SETUP.blocks]
        ),  # its first block has a step less
        "a second pass differs: it forgets Adam's moments when it leaves a block",
    ),
)


def compare(pairs: Sequence[str]) -> list[Found]:
    """Runs on the only rank."""
    torch.set_num_threads(1)
    model, data = SETUP.build()
    return [_compare(pair, model, data) for pair in PAIRS if pair.name in pairs]


def _compare(pair: Pair, model: nn.Module, data: Callable[[int], Any]) -> Found:
    both = [copy.deepcopy(model) for _ in range(2)]
    steps = [pair.theirs(both[0]), pair.ours(both[1])]
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(NUM_STEPS):
        (batch,) = data(number)
        for place in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            steps[place](number, batch)
            if number >= NUM_WARMUP:
                seconds[place].append(time.perf_counter() - started)
    apart, moved = _largest(both[0], both[1]), _largest(both[0], model)
    peaks = []
    for step in steps:
        (batch,) = data(NUM_STEPS)
        with Peak(SETUP) as peak:
            step(NUM_STEPS, batch)
        peaks.append(peak.bytes)
    return Found(apart, moved, seconds, (peaks[0], peaks[1]))


def _largest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((first - second).abs().max().item() for first, second in pairs)


def _row(pair: Pair, found: Found) -> str:
    ratios = sorted(ours / theirs for theirs, ours in zip(*found.seconds, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in found.peaks)
    knobs = ", ".join(f"{key}: {value}" for key, value in pair.knobs.items())
    cells = [pair.name, pair.peer, f"`{knobs}`", f"{found.apart:.1e}", f"{found.moved:.1e}"]
    return f"| {' | '.join([*cells, f'{middle:.2f} ({low:.2f}-{high:.2f})', peaks, pair.note])} |"


def main() -> None:
    """Write the page."""
    # Each in a process of its own: packages change what they find (BAdam switches gradients off).
    found = [run_on_ranks(1, compare, [pair.name], timeout=900)[0][0] for pair in PAIRS]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("pytorch_optimizer", "badam"))
    rows = "\n".join(_row(pair, each) for pair, each in zip(PAIRS, found, strict=True))
    facts = {"blocks": SETUP.blocks, "width": SETUP.hidden, "steps": NUM_STEPS, "machine": describe_machine()}
    PAGE.write_text(_PAGE.format(**facts, versions=versions, rows=rows), encoding="utf-8")


_PAGE = """# Peers

Written by `python -m benchmarks.peers`; do not edit. What other packages do on one device beside ours, from the same
weights on the same batches: a random Llama of {blocks} layers of width {width}, 4 x 64 tokens, float32, one thread.
{steps} steps of both in turn; AdamW with eps 1e-4 underneath. {machine}; {versions}.

"Apart" is the largest difference of any weight between theirs and ours after all steps, "moved" the largest distance
of any weight from its start. Time is ours over theirs, step by step: the median and the quartiles. Memory is the peak
within a step above what is held between steps, in MiB: theirs / ours.

| method | peer | ours | apart | moved | time, ours / theirs | peak | note |
|---|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
