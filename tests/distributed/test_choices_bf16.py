"""Every choice in bf16: against a reference that rounds where the engine rounds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from slsam_ds import StepResult
from tests.distributed.choices import CASES, WORLD_SIZE, Case, assert_reported, follow_step, make_reference
from tests.distributed.training import ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, ALSO_ZERO3, Setup, Training, max_error, slow
from tests.ranks import run_on_ranks
from tests.rounding_reference import MixedReference, RoundingReference

ENGINES = [slow("fsdp2"), ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3, *ALSO_OFFLOADED]
TOLERANCE = 1e-6

Weights = dict[str, Tensor]
Found = dict[str, tuple[Weights, list[tuple[StepResult, Weights, Weights]]]]


def setup_of(case: Case, engine: str) -> Setup:
    if engine == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return case.setup(engine, fsdp={"mp_policy": policy})
    return case.setup(engine, dtype=torch.bfloat16)


def train(engine: str, names: Sequence[str]) -> Found:
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


@pytest.mark.parametrize("engine", ENGINES)
def test_every_choice_follows_the_reference_that_rounds(engine: str) -> None:
    first, *others = run_on_ranks(WORLD_SIZE, train, engine, list(CASES))
    import pickle
    pickle.dump(first, open(f"/tmp/matrix_bf16_{engine}.pkl","wb"))
    for name in CASES:
        judge(engine, name, first[name])


def judge(engine, name, found):
    case = CASES[name]
    setup = setup_of(case, engine)
    masters, steps = found
    in_float32 = engine == "fsdp2" or engine.endswith("_offload")
    make = MixedReference if engine == "fsdp2" else RoundingReference
    reference = make_reference(case, setup, make, world_size=WORLD_SIZE, held_in=torch.float32 if in_float32 else torch.bfloat16)
    reported = []
    for step, (result, perturbed, live) in enumerate(steps, start=1):
        reported.append(follow_step(reference, case, step, reported, perturbed=perturbed, live=live))
        assert_reported(result, reported[-1], case, step, projection=reference.projection)
    print(name, max_error(masters, reference.masters))
