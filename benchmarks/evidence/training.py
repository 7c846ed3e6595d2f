"""One run: a task trained by a method at a learning rate from a seed, and what came of it."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.evidence.held_out import losses, score, sharpness
from benchmarks.evidence.methods import Method
from benchmarks.evidence.selectors import AROUND
from benchmarks.evidence.tasks import Batch, Data, Sample, Task
from benchmarks.prices import count_costs
from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.pricing.cost import PriceList

_WARM_UP = 0.1
_MAX_GRAD_NORM = 1.0
_NUM_POINTS = 4  # of the validation curve
_HELD_OUT_BATCH = 32
_SHARPNESS_RHO = 0.05


def run(
    task: Task,
    method: Method,
    *,
    learning_rate: float,
    seed: int,
    steps: int,
    knobs: Mapping[str, Any] | None = None,
    on_test: bool = False,
) -> dict[str, Any]:
    """Train and judge.

    Args:
        task: What to train.
        method: How.
        learning_rate: Peak; it rises over the first tenth of the steps and falls to zero over the rest.
        seed: Of the data's order, of dropout, of what is new in the model and of the selection.
        steps: How many.
        knobs: Of `slsam` or of `AROUND`, in place of the method's.
        on_test: Judge by test data, sharpness included; else by validation data alone.

    Returns:
        For a line of JSON: what is to be known of the run, `seconds` of the steps alone among it.
    """
    data = task.load()
    model = data.build_model(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    knobs = {"seed": seed, **method.knobs, **(knobs or {})}
    around = {name: knobs.pop(name) for name in AROUND if name in knobs}
    config = SLSAMConfig(**knobs)
    slsam = SLSAM(model, optimizer, config, total_steps=steps, max_grad_norm=_MAX_GRAD_NORM)
    for name, value in around.items():
        slsam.policy.selector = AROUND[name](slsam.selector, value)
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, steps))
    model.train()
    found = _train(task, data, slsam, schedule, steps=steps, seed=seed)
    return {**found, **_judge(task, data, model)} if on_test else found


def _train(task: Task, data: Data, slsam: SLSAM, schedule: LambdaLR, *, steps: int, seed: int) -> dict[str, Any]:
    """All steps, on the clock, and the validation data now and then, off it."""
    validation = batches(data, data.validation)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with _precision(task):
            return losses(model, batch, predicts_tokens=task.predicts_tokens)[0].mean()

    stops = {max(1, round(steps * point / _NUM_POINTS)) for point in range(1, _NUM_POINTS + 1)}
    prices: PriceList | None = None
    paid, seconds, updates, curve = 0.0, 0.0, [0] * len(slsam.layers), []
    for step, batch in zip(range(1, steps + 1), training_batches(task, data, seed), strict=False):
        prices = prices or count_costs(slsam, batch).prices(slsam.workload([batch]))
        started = time.perf_counter()
        result = slsam.step([batch], loss_fn)
        schedule.step()
        seconds += time.perf_counter() - started
        paid += prices.of(result.active)
        for arm in result.active:
            updates[arm] += 1
        if step in stops:
            with _precision(task):
                found = score(slsam.model, validation, predicts_tokens=task.predicts_tokens)
            curve.append({"step": step, "seconds": seconds, **dataclasses.asdict(found)})
    return {"steps": steps, "price": paid / steps, "seconds": seconds, "updates": updates, "validation": curve}


def _judge(task: Task, data: Data, model: nn.Module) -> dict[str, Any]:
    """By test data. Sharpness always in float32: in bfloat16 a small rise is lost in rounding."""
    with _precision(task):
        found = score(model, batches(data, data.test), predicts_tokens=task.predicts_tokens)
    some = batches(data, data.test[: task.sharpness_samples])
    climbed = sharpness(model, some, predicts_tokens=task.predicts_tokens, rho=_SHARPNESS_RHO)
    return {"test": dataclasses.asdict(found), "sharpness": dataclasses.asdict(climbed)}


def _precision(task: Task) -> contextlib.AbstractContextManager[Any]:
    """What forward runs in, as a Trainer with `bf16=True` does it."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.in_bfloat16)


def training_batches(task: Task, data: Data, seed: int) -> Iterator[Batch]:
    """Batches of epoch after epoch, each in an order of its own; without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.train), generator=generator).tolist()
        for start in range(0, len(order) - task.batch + 1, task.batch):
            yield _collated(data, [data.train[index] for index in order[start : start + task.batch]])


def batches(data: Data, samples: Sequence[Sample], size: int = _HELD_OUT_BATCH) -> list[Batch]:
    """All samples, alike ones together: little padding."""
    by_length = sorted(samples, key=lambda sample: len(sample.get("input_ids", sample.get("ids", ()))))
    starts = range(0, len(by_length), size)
    return [_collated(data, by_length[start : start + size]) for start in starts]


def _collated(data: Data, samples: Sequence[Sample]) -> Batch:
    collated: Mapping[str, Tensor] = data.collate([dict(sample) for sample in samples])
    return dict(collated)


def rate_at(step: int, steps: int) -> float:
    """Of the peak: up in a line, and down in a line."""
    warm_up = math.ceil(_WARM_UP * steps)
    return (step + 1) / warm_up if step < warm_up else max(0.0, (steps - step) / (steps - warm_up))
