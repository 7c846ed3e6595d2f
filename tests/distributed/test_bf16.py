"""bf16 and fp16: the trajectory of a reference that rounds where the engine rounds; perturbations that arrive whole."""

from collections.abc import Mapping, Sequence

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
from tests.ranks import DEVICE, run_on_ranks
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
    assert judged(per_rank, setup, make) <= 1e-6


def judged(
    per_rank: Sequence[Followed], setup: Setup, make: type[RoundingReference] = RoundingReference, **tolerances: float
) -> float:
    """Ranks agree, and follow the reference, which computes where they did.

    Args:
        per_rank: What each rank returned.
        setup: Of the training.
        make: The reference's class.
        **tolerances: Of the reference, in place of its own.

    Returns:
        The largest error of a master weight in the end.
    """
    live, masters, perturbed, _ = per_rank[0]
    for other in per_rank[1:]:
        for mine, theirs in zip([*live, *perturbed], [*other[0], *other[2]], strict=True):
            assert max_error(mine, theirs) == 0.0
    torch.set_num_threads(1)  # sums in the order of the ranks' own
    world_size = len(per_rank)
    model = setup.build_model().to(DEVICE)
    reference = make(
        model,
        arms_of_llama(model),
        world_size=world_size,
        rounding=setup.slsam.get("rounding", "stochastic"),
        loss_scale=2**LOSS_SCALE_POWER if setup.dtype == torch.float16 else 1,
        **ADAMW,
        **tolerances,
    )
    for step, sample in enumerate(SAMPLES, start=1):
        batches = [on_device(batch) for rank in range(world_size) for batch in window(step, rank, setup.accumulation)]
        seen = {"perturbed": on_device(perturbed[step - 1]), "live": on_device(live[step - 1])}
        reference.follow(list(sample), batches, **seen)
    return max_error(masters, {name: master.cpu() for name, master in reference.masters.items()})


def on_device(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


@pytest.mark.parametrize("engine", [ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_the_perturbation_arrives_whole(engine: str) -> None:
    setup = Setup(engine=engine, dtype=torch.bfloat16, model={"hidden": 64}, slsam={"rho": 0.02})
    *_, projections = run_on_ranks(2, follow_bf16, setup)[0]
    assert sum(projections) / len(projections) == pytest.approx(1.0, abs=0.03)
