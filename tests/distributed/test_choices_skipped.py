"""Every choice passes over steps that meet a number that is not finite."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slsam_ds import StepResult
from slsam_ds.directions import DIRECTIONS
from slsam_ds.protocol import ALWAYS
from tests.distributed.choices import CASES, WORLD_SIZE, Case, take
from tests.distributed.test_faults import spoil
from tests.distributed.training import ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, ALSO_ZERO3, Training, slow
from tests.ranks import run_on_ranks

ENGINES = [slow("local"), slow("fsdp2"), ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3, *ALSO_OFFLOADED]
NUM_BAD = 2


def with_bad_steps(case: Case) -> tuple[Case, int]:
    """Two more steps in the middle, which perturb and update all arms; and the number of the first of them."""
    every_arm = tuple(range(4 if "other_parameters" in case.slsam else 6))
    half = len(case.choices) // 2
    bad = [(every_arm, every_arm)] * NUM_BAD
    return replace(case, choices=[*case.choices[:half], *bad, *case.choices[half:]]), half + 1


Kept = tuple[dict[str, Any], list[dict[str, Tensor]]]


def kept(training: Training) -> Kept:
    """What is kept from one step to the next, less the number of steps: SL-SAM's state, and copies of tensors."""
    slsam = training.slsam
    state = slsam.state_dict()
    del state["step"], state["skipped_in_a_row"]
    arms = [*range(len(slsam.layers)), *([ALWAYS] if slsam.layers.always else [])]
    steppeds = dict.fromkeys(piece.stepped for piece in slsam.engine.pieces(arms))
    of_optimizer = [
        {key: torch.as_tensor(value).clone() for key, value in slsam.engine.optimizer.state.get(stepped, {}).items()}
        for stepped in steppeds
    ]
    return state, [training.weights(), training.live_weights(), *of_optimizer]


def is_same(one: Kept, other: Kept) -> bool:
    return one[0] == other[0] and all(
        mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
        for mine, its in zip(one[1], other[1], strict=True)
    )


def take_bad(training: Training, case: Case, step: int, *, during: str) -> StepResult:
    """A step in which the first loss of a pass is NaN on one rank."""
    perturbed, updated = case.choices[step - 1]

    def act(loss: Tensor) -> Tensor:
        return loss * float("nan") if training.rank == 1 else loss

    at_weights = case.accumulation
    if case.slsam.get("ascent_fraction", 1.0) * case.accumulation < 1:  # samples run apart from the window
        at_weights += 1
    call = 1 if during == "first pass" else at_weights + 1
    result: StepResult = spoil(training.step, training.window(step), call, act, perturbed=perturbed, updated=updated)
    return result


def skip(engine: str, dtype: torch.dtype, names: Sequence[str]) -> dict[str, list[str]]:
    """By case: what is not as it would be, had the bad steps not been."""
    mistakes = {}
    for name in names:
        case, first_bad = with_bad_steps(CASES[name])
        setup, length = case.setup(engine, dtype=dtype), len(case.choices)
        training, without = Training(setup, total_steps=length), Training(setup, total_steps=length)
        has_ascent = DIRECTIONS[case.slsam.get("ascent_source", "current")].needs_pass
        mistakes[name] = wrong = []
        sq_norms: list[float] = []
        for step in range(1, length + 1):
            if first_bad <= step < first_bad + NUM_BAD:
                before = kept(training)
                two_passes = has_ascent and case.ascends(step, sq_norms)
                during = "second pass" if two_passes and step > first_bad else "first pass"
                bad = take_bad(training, case, step, during=during)
                if not bad.skipped or bad.bad_numbers is None:
                    wrong.append(f"step {step} is not skipped")
                elif bad.bad_numbers.during != ("ascent" if two_passes and during == "first pass" else "descent"):
                    wrong.append(f"step {step}: {bad.bad_numbers}, not in the {during}")
                if not is_same(kept(training), before):
                    wrong.append(f"step {step} has changed something")
                without.slsam.progress = replace(without.slsam.progress, step=step)
            else:
                result, wanted = take(training, case, step), take(without, case, step)
                if result != wanted:
                    wrong.append(f"step {step} reports {result}, not {wanted}")
                sq_norms.append(result.sq_norm)
        for each in (training, without):
            each.slsam.unpack_masks()
        if not is_same(kept(training), kept(without)):
            wrong.append("the end is another")
    return mistakes


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_choice_skips_bad_steps(engine: str, dtype: torch.dtype) -> None:
    """Two in a row, with a NaN on one rank alone: one in the first forward of the ascent, one in that of the descent.

    Nothing that is kept changes in them. All goes on as in a run that never had them, but counts them as steps: what
    depends on a step's number (schedules, random directions, masks' age and draws, rounding noise) passes over theirs.
    """
    nothing: dict[str, list[str]] = {name: [] for name in CASES}
    assert run_on_ranks(WORLD_SIZE, skip, engine, dtype, list(CASES), timeout=480) == [nothing] * WORLD_SIZE
