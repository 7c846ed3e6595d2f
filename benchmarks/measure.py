"""Steps of several modes in turn, in the same processes: first on the clock, then once more with everything counted."""

import contextlib
import copy
import gc
import logging
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.modes import LossFunction, Mode, Ours, Step, Training, build, num_weights, optimizer_bytes
from benchmarks.prices import count_costs
from benchmarks.setup import Setup, Window
from slsam_ds.cli.metering import Memory, num_bytes
from slsam_ds.model.micro_batches import model_loss
from slsam_ds.pricing.cost import CostModel
from slsam_ds.records.traffic import Traffic
from tests.ranks import run_on_ranks


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        warmup: Steps of each mode before.
        rounds: Steps of each mode on the clock.
        counted: Steps of each mode with bytes, FLOPs and memory counted, off the clock.
        bytes_only: Count nothing but bytes, which is quick.
        seconds: After which no further round begins; the second one always does. None: all of them do.
        seed: Of the order within rounds.
        timeout: Seconds for all of it.
    """

    rounds: int
    warmup: int = 2
    counted: int = 0
    bytes_only: bool = False
    seconds: float | None = None
    seed: int = 0
    timeout: float = 3600


@dataclass(kw_only=True)
class Measured:
    """What one mode took on the first rank. Lists have an entry per step; bytes are this rank's.

    Attributes:
        mode: Its name.
        seconds: Of the steps on the clock, between barriers.
        prices: Their FLOPs by the price list, AdamW's being 1.
        ascent_seconds: Of `seconds`, as the step reports it.
        descent_seconds: Likewise.
        losses: Over all ranks, at the weights or, with an ascent, at the perturbed weights.
        flops: Of the counted steps, on this rank.
        counted_flops: The same in FLOPs of AdamW's.
        counted_prices: What the price list says of those.
        activations: What a micro-batch's forward saves for backward. Bytes.
        gradients: Held at the end of a backward or after reduction. Bytes.
        peak: Highest memory within a step, above what is held between steps. Bytes.
        reduce: Sent into reductions. Bytes.
        gather: Received by gathers. Bytes.
        weights: As forward reads them. Bytes.
        optimizer: State and master weights. Bytes.
    """

    mode: str
    seconds: list[float] = field(default_factory=list)
    prices: list[float] = field(default_factory=list)
    ascent_seconds: list[float] = field(default_factory=list)
    descent_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    counted_flops: list[float] = field(default_factory=list)
    counted_prices: list[float] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    reduce: list[int] = field(default_factory=list)
    gather: list[int] = field(default_factory=list)
    weights: int = 0
    optimizer: int = 0


def run_together(setups: Sequence[Setup], modes: Sequence[Mode], effort: Effort) -> list[tuple[list[Measured], int]]:
    """Measure modes together on each setup, one setup after the other, in the same ranks.

    Returns:
        For each setup, what the modes took on the first rank, and the number of weights.
    """
    ranks, device = setups[0].world_size, setups[0].device
    found: list[Any] = run_on_ranks(ranks, _measure_each, setups, modes, effort, timeout=effort.timeout, device=device)
    return list(found[0])


def _measure_each(setups: Sequence[Setup], modes: Sequence[Mode], effort: Effort) -> list[tuple[list[Measured], int]]:
    found = []
    for setup in setups:
        found.append(measure(setup, modes, effort))
        gc.unfreeze()
        gc.collect()  # engines hold on to themselves
    return found


def measure(setup: Setup, modes: Sequence[Mode], effort: Effort) -> tuple[list[Measured], int]:
    """Runs on every rank. At least one mode must be SL-SAM's: its engine counts the prices."""
    model, data = setup.build()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    weights = num_weights(model)
    trainings = {mode.name: build(mode, copy.deepcopy(model), setup) for mode in modes}
    del model
    found = {mode.name: Measured(mode=mode.name) for mode in modes}
    costs = count_prices(trainings, data(0))
    order = random.Random(effort.seed)
    last = effort.warmup + effort.rounds
    started = time.monotonic()
    for number in range(1, last + 1):
        if effort.seconds is not None and number > effort.warmup + 2 and _is_over(started + effort.seconds, setup):
            last = number - 1
            break
        window = data(number)
        # In another order each time, the same on all ranks: nobody always runs in the wake of the same neighbour.
        for name in order.sample(list(trainings), len(trainings)):
            seconds, step = timed_step(trainings[name], window, setup)
            if number > effort.warmup:
                one = found[name]
                one.seconds.append(seconds)
                one.prices.append(trainings[name].price(costs[name], window, step))
                one.ascent_seconds.append(step.ascent_seconds)
                one.descent_seconds.append(step.descent_seconds)
                one.losses.append(float(step.loss))
        if number == effort.warmup:  # what exists now stays: do not look through it for garbage in somebody's step
            gc.collect()
            gc.freeze()
    for number in range(last + 1, last + effort.counted + 1):
        window = data(number)
        if effort.bytes_only:
            for name, training in trainings.items():
                count_bytes(training, window, found[name])
            continue
        adamw = 0.0
        for name, training in trainings.items():  # the first is AdamW
            flops, step = counted_step(training, window, setup, found[name])
            adamw = adamw or flops
            found[name].flops.append(flops)
            found[name].counted_flops.append(flops / adamw)
            found[name].counted_prices.append(training.price(costs[name], window, step))
    for name, training in trainings.items():
        found[name].weights = num_bytes(training.model.parameters())
        found[name].optimizer = optimizer_bytes(training)
        found[name].losses = _mean_over_ranks(found[name].losses, setup)  # stock loops know their rank's own
    return list(found.values()), weights


def count_prices(trainings: dict[str, Training], window: Window) -> dict[str, CostModel]:
    """What samples cost on this model and these data, by mode; counted once for modes that have the same arms."""
    ours = {name: training for name, training in trainings.items() if isinstance(training, Ours)}
    arms = {name: tuple(layer.name for layer in training.slsam.layers) for name, training in ours.items()}
    of_arms: dict[tuple[str, ...], CostModel] = {}
    for name, training in ours.items():
        if arms[name] not in of_arms:
            of_arms[arms[name]] = count_costs(training.slsam, window[0])
    first = next(iter(of_arms.values()))  # whatever the arms are, together they cost the same
    return {name: of_arms[arms[name]] if name in arms else first for name in trainings}


def timed_step(
    training: Training, window: Window, setup: Setup, loss_fn: LossFunction = model_loss
) -> tuple[float, Step]:
    """Seconds from all ranks being ready to all being done."""
    _settle(setup)
    started = time.perf_counter()
    step = training.step(window, loss_fn)
    _settle(setup)
    return time.perf_counter() - started, step


def count_bytes(training: Training, window: Window, found: Measured, loss_fn: LossFunction = model_loss) -> Step:
    """What a step sends goes to `found`."""
    with Traffic() as traffic:
        step = training.step(window, loss_fn)
    found.reduce.append(traffic.bytes["reduce"])
    found.gather.append(traffic.bytes["gather"])
    return step


def counted_step(training: Training, window: Window, setup: Setup, found: Measured) -> tuple[float, Step]:
    """FLOPs of a step, on this rank; what it keeps and sends goes to `found`."""
    memory = Memory(training.model, training.slsam.engine if isinstance(training, Ours) else None)
    watched = memory.watch() if isinstance(training, Ours) else contextlib.nullcontext()
    with Peak(setup) as peak, FlopCounterMode(display=False) as flops, watched:
        step = count_bytes(training, window, found, memory.watching(model_loss))
    found.activations.append(memory.peak["activations"])
    found.gradients.append(training.gradient_bytes() or memory.peak["gradients"])
    found.peak.append(peak.bytes)
    return float(flops.get_total_flops()), step


class Peak:
    """Within, how far memory rises: by the allocator's count on a GPU, by the profiler's events on the CPU."""

    def __init__(self, setup: Setup) -> None:
        self._on_gpu = setup.device == "cuda"
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self.bytes = 0

    def __enter__(self) -> "Peak":
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._profile.__exit__(*exception)
        assert self._profile.profiler is not None
        events = self._profile.profiler.kineto_results.events()
        level = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            level += event.nbytes()
            self.bytes = max(self.bytes, level)


def _is_over(deadline: float, setup: Setup) -> bool:
    """On the first rank's clock, so that all ranks stop together."""
    over = torch.tensor(time.monotonic() > deadline, dtype=torch.uint8, device=setup.device)
    dist.broadcast(over, 0)
    return bool(over)


def _mean_over_ranks(values: Sequence[float], setup: Setup) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=setup.device)
    dist.all_reduce(total)
    return [float(value) for value in total / setup.world_size]


def _settle(setup: Setup) -> None:
    """Wait for this rank's GPU, then for the other ranks."""
    if setup.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    if setup.device == "cuda":
        torch.cuda.synchronize()


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Of means: what a run pays. Layers are drawn anew each step, and a median would favour the cheap draws."""
    return statistics.mean(one) / statistics.mean(other)


def ratio_range(one: Sequence[float], other: Sequence[float], *, num_draws: int = 2000) -> tuple[float, float]:
    """Where the ratio of means lies in 9 of 10 runs, by drawing rounds again with replacement (paired)."""
    draw = random.Random(0)
    rounds = list(zip(one, other, strict=True))
    found = []
    for _ in range(num_draws):
        chosen = draw.choices(rounds, k=len(rounds))
        found.append(sum(pair[0] for pair in chosen) / sum(pair[1] for pair in chosen))
    low, *_, high = statistics.quantiles(found, n=20)
    return low, high
