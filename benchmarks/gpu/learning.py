"""The demo's model learns docstrings by several methods, step by step in turn: held-out loss at equal steps.

One learning rate and one seed for all: it shows that training works on a card in bfloat16, and little of which method
is better. docs/evidence has the studies.
"""

import dataclasses
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.evidence.held_out import score
from benchmarks.evidence.tasks import TASKS, Batch, Data, docstrings
from benchmarks.evidence.training import batches, rate_at, training_batches
from benchmarks.gpu.job import Job
from benchmarks.measure import timed_step
from benchmarks.modes import ADAMW_MODE, DENSE_SAM, Mode, Training, build
from benchmarks.setup import Setup
from slsam_ds.cli.demo import find_model
from slsam_ds.cli.refusal import UsageError
from slsam_ds.recipes import PRESETS

_MODES = (ADAMW_MODE, DENSE_SAM, *(Mode(name=name, knobs=PRESETS[name]) for name in ("depth_price", "single_pass")))
_RATE = 1e-4
_MOST_STEPS, _TOY_STEPS, _TOY_BLOCKS = 1000, 4, 3
_NUM_WARMUP = 3
_NUM_POINTS = 5
_SHARE = 0.85
"""Of the time that is left after the first steps, for the others."""


def run(job: Job) -> None:
    """Rows with held-out losses; or one that says what is missing."""
    try:
        find_model()
    except UsageError as error:
        job.add(left_out=str(error))
        return
    job.on_ranks(train, job)


def train(job: Job) -> None:
    """Runs on every rank."""
    task = dataclasses.replace(TASKS["docstrings"], batch=4 if job.toy else 16)
    data = docstrings(num_train=64 if job.toy else 4000)
    setup = Setup(device=job.device, engine="zero2", dtype="bfloat16", world_size=job.ranks, batch=task.batch)
    trainings = {mode.name: build(mode, _model(data, job), setup) for mode in _MODES}
    # Each rank has batches of its own, and all methods the same.
    windows = ([_placed(batch, setup)] for batch in training_batches(task, data, seed=dist.get_rank()))
    held_out = [_placed(batch, setup) for batch in batches(data, data.test[:8] if job.toy else data.test)]
    seconds = dict.fromkeys(trainings, 0.0)
    steps = _TOY_STEPS if job.toy else _MOST_STEPS
    stops: set[int] = set()
    for number, window in enumerate(windows, start=1):
        started = time.monotonic()
        for name, training in trainings.items():
            _set_rate(training, rate_at(number - 1, steps))
            seconds[name] += timed_step(training, window, setup)[0]
        if number == _NUM_WARMUP:  # now it is known what a step takes
            steps = _steps_that_fit(steps, time.monotonic() - started, job, setup)
            stops = {max(number, round(steps * point / _NUM_POINTS)) for point in range(1, _NUM_POINTS + 1)}
        if number in stops and dist.get_rank() == 0:
            for name, training in trainings.items():
                loss = score(training.model, held_out, predicts_tokens=True).loss
                job.add(step=number, of=steps, method=name, held_out_loss=loss, seconds=seconds[name])
        if number >= max(steps, _NUM_WARMUP):
            return


def _model(data: Data, job: Job) -> nn.Module:
    model: Any = data.build_model(0)
    model.set_attn_implementation("sdpa")
    if job.toy:
        model.model.layers = model.model.layers[:_TOY_BLOCKS]
        model.config.num_hidden_layers = _TOY_BLOCKS
    module: nn.Module = model.to(torch.bfloat16).train()
    return module


def _steps_that_fit(steps: int, seconds: float, job: Job, setup: Setup) -> int:
    """On the first rank's clock. `seconds`: of a step of every method."""
    left = _SHARE * (job.ends - time.monotonic())
    fitting = torch.tensor(min(steps, _NUM_WARMUP + int(left / seconds)), device=setup.device)
    dist.broadcast(fitting, 0)
    return max(_NUM_WARMUP + 1, int(fitting))


def _set_rate(training: Training, share: float) -> None:
    for group in training.optimizer.param_groups:
        group["lr"] = share * _RATE


def _placed(batch: Batch, setup: Setup) -> Batch:
    return {name: tensor.to(setup.device) for name, tensor in batch.items()}
