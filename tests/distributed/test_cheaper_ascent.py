"""An ascent on a part of the window, and none at all: every engine follows the single-process reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slsam_ds import StepResult
from tests.distributed.training import (
    ADAMW,
    ALSO_OFFLOADED,
    ALSO_ZERO0,
    ALSO_ZERO1,
    ALSO_ZERO3,
    Setup,
    follow_samples,
    max_error,
    slow,
)
from tests.models import SAMPLES, arms_of_llama, window
from tests.ranks import run_on_ranks
from tests.reference import Reference

ENGINES = ["local", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED]
TOLERANCE = 1e-6  # as against the reference elsewhere

Batch = Mapping[str, Tensor]


def first_sample(batch: Batch) -> Batch:
    return {name: tensor[:1] for name, tensor in batch.items()}


def climb_on(batches: Sequence[Batch], accumulation: int, fraction: float) -> list[Batch]:
    """What each rank climbs on, said once more: these micro-batches have two samples."""
    if (accumulation, fraction) == (1, 0.5):
        return [first_sample(batch) for batch in batches]
    num = {(4, 0.25): 1, (3, 0.5): 2}[accumulation, fraction]
    return [batch for index, batch in enumerate(batches) if index % accumulation < num]


def follow_reference(setup: Setup, world_size: int = 2) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    torch.set_num_threads(1)
    model = setup.build_model()
    direction = setup.slsam.get("ascent_source", "current")
    reference = Reference(model, arms_of_llama(model), rho=0.05, direction=direction, **ADAMW)
    results = []
    for step, sample in enumerate(SAMPLES, start=1):
        batches = [batch for rank in range(world_size) for batch in window(step, rank, setup.accumulation)]
        climbed = (
            None if direction == "previous" else [climb_on(batches, setup.accumulation, setup.slsam["ascent_fraction"])]
        )
        results.append(reference.step(list(sample), batches, climbed=climbed))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, results


def judge(setup: Setup) -> list[StepResult]:
    expected, reported = follow_reference(setup)
    per_rank = run_on_ranks(2, follow_samples, setup)
    for weights, results in per_rank:
        assert max_error(weights, expected) <= TOLERANCE
        for result, reference in zip(results, reported, strict=True):
            assert result.loss == pytest.approx(reference["loss"], abs=1e-5)
            if result.ascent_loss is not None:
                assert result.ascent_loss == pytest.approx(reference["ascent_loss"], abs=1e-5)
    return per_rank[0][1]


@pytest.mark.parametrize(("accumulation", "fraction"), [slow(1, 0.5), slow(4, 0.25), (3, 0.5)])
@pytest.mark.parametrize("engine", ENGINES)
def test_ascent_on_a_fraction_of_the_window(engine: str, accumulation: int, fraction: float) -> None:
    setup = Setup(engine=engine, accumulation=accumulation, slsam={"ascent_fraction": fraction})
    results = judge(setup)
    assert all(result.perturbation_norm == pytest.approx(0.05, rel=1e-3) for result in results)


@pytest.mark.parametrize("scope", ["rank", "micro_batch"])
def test_a_fraction_of_what_climbs_by_itself(scope: str) -> None:
    """Half of each micro-batch, whichever way the window is divided."""
    setup = Setup(engine="local", accumulation=1, slsam={"ascent_fraction": 0.5, "ascent_scope": scope})
    model = setup.build_model()
    reference = Reference(model, arms_of_llama(model), rho=0.05, **ADAMW)
    for step, sample in enumerate(SAMPLES, start=1):
        batches = [batch for rank in range(2) for batch in window(step, rank, 1)]
        reference.step(
            list(sample),
            batches,
            parts=[[batch] for batch in batches],
            climbed=[[first_sample(batch)] for batch in batches],
        )
    weights, _ = run_on_ranks(2, follow_samples, setup)[0]
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert max_error(weights, expected) <= TOLERANCE


@pytest.mark.parametrize("accumulation", [slow(1), 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_climbing_along_the_previous_gradient_takes_one_pass(engine: str, accumulation: int) -> None:
    setup = Setup(engine=engine, accumulation=accumulation, slsam={"ascent_source": "previous"})
    results = judge(setup)
    assert all(result.ascent_loss is None for result in results)
    seen: set[int] = set()
    for sample, result in zip(SAMPLES, results, strict=True):
        expected = 0.05 if seen & set(sample) else 0.0  # a layer is not perturbed the first time
        assert result.perturbation_norm == pytest.approx(expected, rel=0.01)
        seen |= set(sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["zero2", ALSO_ZERO3])
def test_the_previous_gradient_in_true_units_whatever_the_precision(engine: str, dtype: torch.dtype) -> None:
    setup = Setup(engine=engine, dtype=dtype, slsam={"ascent_source": "previous", "offload_state": True})
    _, results = run_on_ranks(2, follow_samples, setup)[0]
    projections = [result.perturbation_projection for result in results if result.perturbation_projection is not None]
    assert len(projections) == 7
    assert sum(projections) / len(projections) == pytest.approx(1.0, abs=0.1)  # noise of rounding, in a tiny model
