"""How much of the perturbation arrives in bfloat16: its projection on what was asked for, 1 being all of it."""

import dataclasses
import statistics
from collections.abc import Sequence

import torch.distributed as dist

from benchmarks.gpu.job import FailedError, Job
from benchmarks.modes import Ours, num_weights
from benchmarks.setup import Setup
from slsam_ds.model.micro_batches import model_loss

_TOY = Setup(blocks=4, hidden=128, vocabulary=512, batch=2, length=32, dtype="bfloat16")
_SETUP = Setup(device="cuda", blocks=8, hidden=2048, vocabulary=32_000, batch=2, length=512, dtype="bfloat16")
_NUM_STEPS = 3
_ALLOWED = 0.05
"""Of a mean over steps: the noise of rounding along one direction is less, even for a few hundred thousand weights."""


def run(job: Job) -> None:
    """A row for each engine and way of rounding. With "nearest" most of it is lost, which is the reason for noise.

    Raises:
        FailedError: Not all has arrived of what was rounded stochastically.
    """
    setup = dataclasses.replace(_TOY if job.toy else _SETUP, world_size=job.ranks)
    setups = [dataclasses.replace(setup, engine=engine) for engine in ("local", "zero2", "zero3")]
    found = job.on_ranks(measure_each, job, setups)[0]
    if any(abs(projection - 1) > _ALLOWED for projection in found):
        raise FailedError(f"the projection is not 1 with stochastic rounding: {found}")


def measure_each(job: Job, setups: Sequence[Setup]) -> list[float]:
    """Runs on every rank. For each setup, the mean projection with stochastic rounding."""
    return [[_measure(job, setup, rounding) for rounding in ("nearest", "stochastic")][-1] for setup in setups]


def _measure(job: Job, setup: Setup, rounding: str) -> float:
    model, data = setup.build()
    weights = num_weights(model)
    training = Ours(model, setup, {"selector": "all", "rounding": rounding})
    steps = [training.step(data(number), model_loss) for number in range(1, _NUM_STEPS + 1)]
    results = [step.result for step in steps if step.result is not None]
    projection = statistics.mean(result.perturbation_projection or 0.0 for result in results)
    norm = statistics.mean(result.perturbation_norm or 0.0 for result in results) / setup.rho
    if dist.get_rank() == 0:
        job.add(engine=setup.engine, rounding=rounding, weights=weights, projection=projection, norm_to_rho=norm)
    return projection
