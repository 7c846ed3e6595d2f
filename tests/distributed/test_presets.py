"""Every preset trains on every engine, and passes over a bad step."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slsam_ds.recipes import PRESETS
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
from tests.models import window
from tests.ranks import run_on_ranks

NUM_STEPS, BAD_STEP = 5, 2


def train(engine: str, dtype: torch.dtype) -> dict[str, list[Any]]:
    found = {}
    for name, knobs in PRESETS.items():
        training = Training(Setup(engine=engine, slsam=dict(knobs), accumulation=2, dtype=dtype), total_steps=NUM_STEPS)

        def spoiled(model: Any, batch: Any, rank: int = training.rank) -> Tensor:
            loss: Tensor = model(**batch).loss
            return loss * float("nan") if rank == 1 else loss

        results = []
        for step in range(1, NUM_STEPS + 1):
            before = training.live_weights()
            loss_fn = spoiled if step == BAD_STEP else None
            results.append(training.step(window(step, training.rank, 2), loss_fn=loss_fn))
            assert results[-1].skipped == (step == BAD_STEP), (name, step)
            assert (max_error(training.live_weights(), before) == 0.0) == (step == BAD_STEP), (name, step)
        found[name] = [(result.active, result.perturbed, result.rho, result.loss) for result in results]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
@pytest.mark.parametrize(
    "engine", [slow("local"), slow("fsdp2"), ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3, *ALSO_OFFLOADED]
)
def test_every_preset_trains(engine: str, dtype: torch.dtype) -> None:
    per_rank = run_on_ranks(2, train, engine, dtype)
    found, other = ({name: [step[:3] for step in steps] for name, steps in each.items()} for each in per_rank)
    assert found == other
    everything = tuple(range(6))
    assert all(active == everything for name in ("sam", "asam", "friendly_sam") for active, *_ in found[name])
    for active, perturbed, _ in found["sam_on"]:
        assert len(active) > len(perturbed) == 5  # a norm in each block, and the last one
    for active, perturbed, _ in found["layerwise_penalty"]:
        assert (active, len(perturbed)) == (everything, 1)
    for active, perturbed, _ in found["depth_price"]:
        assert active == perturbed == everything[active[0] :]
    assert [bool(rho) for *_, rho in found["every_fifth"]] == [True, False, False, False, False]
    assert [bool(rho) for *_, rho in found["late"]] == [False, False, False, True, True]
    assert all(rho == 0 and not perturbed for _, perturbed, rho in found["layers_at_random"])
    losses = [step[3] for name in found for place, step in enumerate(per_rank[0][name], 1) if place != BAD_STEP]
    assert all(map(math.isfinite, losses))
