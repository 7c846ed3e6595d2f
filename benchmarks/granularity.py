"""`python -m benchmarks.granularity`: what it costs that every tensor is an arm, into docs/benchmarks/granularity.md.

The same three blocks take part in every step, once as three arms and once as all of their tensors.
"""

import copy
import dataclasses
import statistics
import time
from pathlib import Path

import torch.distributed as dist

from benchmarks.modes import Mode, Ours
from benchmarks.results import describe_machine
from benchmarks.setup import Setup
from slsam_ds.model.micro_batches import model_loss
from slsam_ds.records.traffic import Traffic
from tests.ranks import run_on_ranks

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "granularity.md"
SETUP = Setup(blocks=16, hidden=192, vocabulary=1024, batch=4, length=64)
ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2")
BLOCKS = (1, 6, 11)
NUM_STEPS, NUM_WARMUP = 24, 4
KINDS = ("block", "tensor")
MODES = [Mode(name=kind, knobs={"granularity": kind, "update_scale": "none"}) for kind in KINDS]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """By granularity: seconds of the steps, bytes and collectives of one, arms in all and in the sample."""

    seconds: dict[str, list[float]]
    bytes: dict[str, int]
    calls: dict[str, int]
    arms: dict[str, int]
    active: dict[str, int]


def measure(engine: str) -> Found:
    """Runs on every rank."""
    setup = dataclasses.replace(SETUP, engine=engine)
    model, data = setup.build()
    trainings = {mode.name: Ours(copy.deepcopy(model), setup, mode.knobs) for mode in MODES}
    samples = {kind: _inside_blocks(training) for kind, training in trainings.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(NUM_STEPS):
        window = data(number)
        for kind in KINDS if number % 2 else reversed(KINDS):
            dist.barrier()
            started = time.perf_counter()
            trainings[kind].step(window, model_loss, samples[kind])
            dist.barrier()
            if number >= NUM_WARMUP:
                seconds[kind].append(time.perf_counter() - started)
    traffic = {kind: Traffic() for kind in KINDS}
    for kind, counter in traffic.items():
        with counter:
            trainings[kind].step(data(NUM_STEPS), model_loss, samples[kind])
    return Found(
        seconds,
        {kind: sum(counter.bytes.values()) for kind, counter in traffic.items()},
        {kind: sum(counter.calls.values()) for kind, counter in traffic.items()},
        {kind: len(training.slsam.layers) for kind, training in trainings.items()},
        {kind: len(sample) for kind, sample in samples.items()},
    )


def _inside_blocks(training: Ours) -> list[int]:
    """The arms of the blocks that take part."""
    names = tuple(f"model.layers.{block}." for block in BLOCKS)
    return [layer.index for layer in training.slsam.layers if f"{layer.name}.".startswith(names)]


def _row(engine: str, found: Found) -> str:
    ratios = [tensor / block for block, tensor in zip(found.seconds["block"], found.seconds["tensor"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    arms = f"{found.active['tensor']} of {found.arms['tensor']}"
    sent = f"{found.bytes['tensor'] / found.bytes['block']:.3f}"
    calls = f"{found.calls['tensor']} / {found.calls['block']}"
    return f"| {engine} | {arms} | {middle:.2f} ({low:.2f}-{high:.2f}) | {sent} | {calls} |"


def main() -> None:
    """Write the page."""
    found = {engine: run_on_ranks(SETUP.world_size, measure, engine, timeout=900)[0] for engine in ENGINES}
    rows = "\n".join(_row(engine, each) for engine, each in found.items())
    facts = {"blocks": SETUP.blocks, "width": SETUP.hidden, "ranks": SETUP.world_size, "steps": NUM_STEPS - NUM_WARMUP}
    PAGE.write_text(_PAGE.format(**facts, active=len(BLOCKS), machine=describe_machine(), rows=rows), encoding="utf-8")


_PAGE = """# Tensors as arms

Written by `python -m benchmarks.granularity`; do not edit. With `granularity: tensor` every tensor is an arm. Here the
same {active} of {blocks} blocks take part in every step, once as {active} arms and once as all of their tensors: the
computation is the same. A random Llama of width {width} on {ranks} ranks; {steps} steps of both in turn. {machine}.

Time is tensors over blocks, step by step: the median and the quartiles. Calls are collectives in a step, those for the
step's few numbers among them.

| engine | tensors in the sample | time, tensors / blocks | bytes, tensors / blocks | calls, tensors / blocks |
|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
