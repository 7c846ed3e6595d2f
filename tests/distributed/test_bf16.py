"""bf16 and fp16: the trajectory of a reference that rounds where the engine rounds; perturbations that arrive whole."""

import pytest
import torch
from torch import Tensor

from tests.distributed.training import (
    ADAMW,
    ALSO_OFFLOADED,
    ALSO_ZERO0,
    ALSO_ZERO1,
    LOSS_SCALE_POWER,
    Setup,
    Training,
    max_error,
    slow,
)
from tests.models import SAMPLES, arms_of_llama, window
from tests.ranks import run_on_ranks
from tests.rounding_reference import RoundingReference

Followed = tuple[list[dict[str, Tensor]], dict[str, Tensor], list[dict[str, Tensor]], list[float]]


def follow_bf16(setup: Setup) -> Followed:
    """The weights that forward reads after each step, the masters in the end, and each step's perturbed weights."""
    training = Training(setup)
    live, perturbed, projections = [], [], []
    for step, sample in enumerate(SAMPLES, start=1):
        result, seen = training.step_seen(step, active=sample)
        live.append(training.live_weights())
        perturbed.append(seen)
        projections.append(result.perturbation_projection)
    return live, training.weights(), perturbed, projections


@pytest.mark.parametrize("rounding", ["stochastic", slow("nearest")])
@pytest.mark.parametrize(("world_size", "accumulation"), [slow(1, 1), slow(2, 1), (2, 3)])
@pytest.mark.parametrize("engine", [ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_forced_samples(engine: str, world_size: int, accumulation: int, rounding: str) -> None:
    setup = Setup(engine=engine, dtype=torch.bfloat16, accumulation=accumulation, slsam={"rounding": rounding})
    judge(setup, world_size)


@pytest.mark.parametrize("rounding", ["stochastic", slow("nearest")])
@pytest.mark.parametrize(("world_size", "accumulation"), [slow(1, 1), (2, 3)])
@pytest.mark.parametrize("engine", [ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_forced_samples_in_float16(engine: str, world_size: int, accumulation: int, rounding: str) -> None:
    setup = Setup(engine=engine, dtype=torch.float16, accumulation=accumulation, slsam={"rounding": rounding})
    judge(setup, world_size)


def judge(setup: Setup, world_size: int, make: type[RoundingReference] = RoundingReference) -> None:
    """Ranks agree, and follow the reference."""
    per_rank = run_on_ranks(world_size, follow_bf16, setup)
    live, masters, perturbed, _ = per_rank[0]
    for other in per_rank[1:]:
        for mine, theirs in zip([*live, *perturbed], [*other[0], *other[2]], strict=True):
            assert max_error(mine, theirs) == 0.0
    torch.set_num_threads(1)  # sums in the order of the ranks' own
    model = setup.build_model()
    reference = make(
        model,
        arms_of_llama(model),
        world_size=world_size,
        rounding=setup.slsam["rounding"],
        loss_scale=2**LOSS_SCALE_POWER if setup.dtype == torch.float16 else 1,
        **ADAMW,
    )
    for step, sample in enumerate(SAMPLES, start=1):
        batches = [batch for rank in range(world_size) for batch in window(step, rank, setup.accumulation)]
        reference.follow(list(sample), batches, perturbed=perturbed[step - 1], live=live[step - 1])
    assert max_error(masters, reference.masters) <= 1e-6


@pytest.mark.parametrize("engine", [ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_the_perturbation_arrives_whole(engine: str) -> None:
    setup = Setup(engine=engine, dtype=torch.bfloat16, model={"hidden": 64}, slsam={"rho": 0.02})
    *_, projections = run_on_ranks(2, follow_bf16, setup)[0]
    assert sum(projections) / len(projections) == pytest.approx(1.0, abs=0.03)
