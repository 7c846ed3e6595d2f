"""Every preset trains on every engine."""

import math
from typing import Any

import pytest

from slsam_ds.recipes import PRESETS
from tests.distributed.training import ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, Setup, Training
from tests.models import window
from tests.ranks import run_on_ranks

NUM_STEPS = 4


def train(engine: str) -> dict[str, list[Any]]:
    found = {}
    for name, knobs in PRESETS.items():
        # Six arms and their two ranks: a budget that asks for AdamW's price of so small a model can be met.
        training = Training(Setup(engine=engine, slsam=dict(knobs), accumulation=2), total_steps=NUM_STEPS)
        results = [training.step(window(step, training.rank, 2)) for step in range(1, NUM_STEPS + 1)]
        assert all(math.isfinite(result.loss) and not result.skipped for result in results), name
        found[name] = [(result.active, result.perturbed, result.rho, result.loss) for result in results]
    return found


@pytest.mark.parametrize("engine", ["local", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_every_preset_trains(engine: str) -> None:
    per_rank = run_on_ranks(2, train, engine)
    assert per_rank[0] == per_rank[1]
    found = per_rank[0]
    everything = tuple(range(6))
    assert all(active == everything for name in ("sam", "asam", "friendly_sam") for active, *_ in found[name])
    for active, perturbed, *_ in found["sam_on"]:
        assert len(active) > len(perturbed) == 5  # a norm in each block, and the last one
    for active, perturbed, *_ in found["layerwise_penalty"]:
        assert (active, len(perturbed)) == (everything, 1)
    for active, perturbed, *_ in found["depth_price"]:
        assert active == perturbed == everything[active[0] :]
    assert [bool(rho) for *_, rho, _ in found["every_fifth"]] == [True, False, False, False]
    assert [bool(rho) for *_, rho, _ in found["late"]] == [False, False, True, True]
    assert all(rho == 0 and not perturbed for _, perturbed, rho, _ in found["layers_at_random"])
