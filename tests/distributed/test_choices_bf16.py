"""Every choice in bf16: against a reference that rounds where the engine rounds."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slsam_ds import StepResult
from tests.distributed.choices import CASES, WORLD_SIZE, Case, assert_reported, follow_step, make_reference
from tests.distributed.test_fsdp2_bf16 import MIXED
from tests.distributed.training import (
    ALSO_OFFLOADED,
    ALSO_ZERO0,
    ALSO_ZERO1,
    ALSO_ZERO3,
    Setup,
    Training,
    max_error,
    slow,
)
from tests.ranks import run_on_ranks
from tests.rounding_reference import MixedReference, RoundingReference

ENGINES = [slow("fsdp2"), ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3, *ALSO_OFFLOADED]
WITH_FLOAT32_GRADIENTS = ("fsdp2", "zero2_offload", "zero3_offload")
TOLERANCE = 1e-6  # of masters. Found: 6e-8, where the last bit of a factor decides how gradients are rounded; else 0

Weights = dict[str, Tensor]
Steps = Sequence[tuple[StepResult, Weights, Weights]]


def setup_of(case: Case, engine: str) -> Setup:
    """FSDP2 has weights of float32, and casts what it gathers."""
    return case.setup(engine, fsdp=MIXED) if engine == "fsdp2" else case.setup(engine, dtype=torch.bfloat16)


def train(engine: str, names: Sequence[str]) -> dict[str, tuple[Weights, Steps]]:
    """By case: the masters in the end; and of each step what it reports, its perturbed weights, and those after it."""
    found = {}
    for name in names:
        case = CASES[name]
        training = Training(setup_of(case, engine), total_steps=len(case.choices))
        steps = []
        for step, (perturbed, updated) in enumerate(case.choices, start=1):
            result, seen = training.step_seen(step, perturbed=perturbed, updated=updated)
            steps.append((result, seen, training.live_weights()))
        found[name] = training.weights(), steps
    return found


def judge(engine: str, name: str, masters: Weights, steps: Steps) -> None:
    case = CASES[name]
    reference = make_reference(
        case,
        setup_of(case, engine),
        MixedReference if engine == "fsdp2" else RoundingReference,
        world_size=WORLD_SIZE,
        held_in=torch.float32 if engine in WITH_FLOAT32_GRADIENTS else torch.bfloat16,
    )
    reported: list[dict[str, Any]] = []
    for step, (result, perturbed, live) in enumerate(steps, start=1):
        reported.append(follow_step(reference, case, step, reported, perturbed=perturbed, live=live))
        assert_reported(result, reported[-1], case, step, projection=reference.projection)
    assert max_error(masters, reference.masters) <= TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_every_choice_follows_the_reference_that_rounds(engine: str) -> None:
    first, second = run_on_ranks(WORLD_SIZE, train, engine, list(CASES))
    for name, (masters, steps) in first.items():
        judge(engine, name, masters, steps)
        theirs, their_steps = second[name]
        assert max_error(masters, theirs) == 0.0
        for (_, *mine), (_, *its) in zip(steps, their_steps, strict=True):
            assert all(max_error(one, other) == 0.0 for one, other in zip(mine, its, strict=True)), name
