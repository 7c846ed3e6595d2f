"""Communication shrinks with the sampled layers."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from slsam_ds.records.traffic import Traffic
from tests.distributed.training import ALSO_ZERO1, LlamaSetup, Setup, Training, slow
from tests.ranks import run_on_ranks

EQUAL_LAYERS = {"other_parameters": "freeze"}  # the four blocks of the model are the arms
TOLERANCE = 0.02  # statistics and the agreement check are a few numbers per step, whatever the layers' size


def bytes_of_a_step(setup: Setup, sample: list[int]) -> dict[str, int]:
    training = Training(setup)
    training.follow([sample])  # DeepSpeed gathers and links a few things at the first step only
    with Traffic() as traffic:
        training.follow([sample])
    return dict(traffic.bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", [ALSO_ZERO1, "zero2"])
def test_a_quarter_of_the_layers_takes_a_quarter_of_the_bytes(engine: str, dtype: torch.dtype) -> None:
    setup = Setup(engine=engine, dtype=dtype, model={"hidden": 64}, slsam=EQUAL_LAYERS)
    one, *_ = run_on_ranks(2, bytes_of_a_step, setup, [2])
    whole, *_ = run_on_ranks(2, bytes_of_a_step, setup, [0, 1, 2, 3])
    assert one["reduce"] / whole["reduce"] == pytest.approx(0.25, rel=TOLERANCE)
    assert one["gather"] / whole["gather"] == pytest.approx(0.25, rel=TOLERANCE)


@pytest.mark.parametrize("engine", ["local", ALSO_ZERO1, "zero2"])
def test_a_longer_window_reduces_no_more(engine: str) -> None:
    per_length = [
        run_on_ranks(2, bytes_of_a_step, Setup(engine=engine, accumulation=length, slsam=EQUAL_LAYERS), [1, 3])[0]
        for length in (1, 3)
    ]
    assert per_length[0] == pytest.approx(per_length[1], rel=TOLERANCE)


NUMBERS_OF_A_PERTURBATION = 5
"""The loss at the weights, three numbers about what arrived and their count, in float64, with the norms' all-reduce."""


CORRECTED = {"descend_along": {"corrected": 1.0}, "ascent_fraction": 0.25}


@pytest.mark.parametrize(
    "knobs", [{"ascent_scope": "rank"}, {"ascent_scope": "micro_batch"}, {"ascent_scope": "rank", **CORRECTED}]
)
@pytest.mark.parametrize("engine", [slow("local"), ALSO_ZERO1, "zero2"])
def test_a_local_ascent_sends_nothing(engine: str, knobs: dict[str, Any]) -> None:
    setup = Setup(engine=engine, accumulation=2, slsam={**EQUAL_LAYERS, **knobs})
    flat = Setup(engine=engine, accumulation=2, slsam={**EQUAL_LAYERS, "rho": 0.0})
    local, none = (run_on_ranks(2, bytes_of_a_step, each, [1])[0] for each in (setup, flat))
    assert local.get("gather") == none.get("gather")
    assert local["reduce"] == none["reduce"] + NUMBERS_OF_A_PERTURBATION * 8


@pytest.mark.parametrize("engine", ["local", ALSO_ZERO1, "zero2", "zero3"])
def test_without_radius_the_gradient_is_reduced_once(engine: str) -> None:
    setup = Setup(engine=engine, model={"hidden": 64}, slsam=EQUAL_LAYERS)
    flat = Setup(engine=engine, model={"hidden": 64}, slsam={**EQUAL_LAYERS, "rho": 0.0})
    two_passes, *_ = run_on_ranks(2, bytes_of_a_step, setup, [1])
    one_pass, *_ = run_on_ranks(2, bytes_of_a_step, flat, [1])
    assert one_pass["reduce"] / two_passes["reduce"] == pytest.approx(0.5, rel=TOLERANCE)


def bytes_of_steps(setup: Setup, samples: list[list[int]], learning: int) -> Counter[str]:
    """What a step sends once DeepSpeed has learned the order of fetches, on average."""
    training = Training(setup)
    training.follow([[depth] for depth in range(len(training.slsam.layers))])  # each is tried once, by two more runs
    training.follow(samples[:learning])
    with Traffic() as traffic:
        training.follow(samples[learning:])
    return Counter({kind: total // (len(samples) - learning) for kind, total in traffic.bytes.items()})


SHARDED = {
    "everything gathered once": ({}, 0.43),
    "gathered again for backward": ({"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}, 0.65),
    "some of it gathered again": ({"stage3_max_reuse_distance": 250_000}, 0.55),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_zero3_gathers_and_reduces_less(name: str) -> None:
    """A fifth of the layers, drawn at random, against dense SAM: how much less is what the settings let stay."""
    section, share = SHARDED[name]
    settings = Setup(engine="zero3").zero_optimization(stage3_param_persistence_threshold=0, **section)
    setup = LlamaSetup(
        engine="zero3",
        deepspeed={"zero_optimization": settings},
        model={"num_blocks": 10, "hidden": 64},
        slsam=EQUAL_LAYERS,
    )
    drawn = random.Random(1)
    samples = [sorted(drawn.sample(range(10), 2)) for _ in range(60)]
    sparse, *_ = run_on_ranks(2, bytes_of_steps, setup, samples, 40)
    dense, *_ = run_on_ranks(2, bytes_of_steps, setup, [list(range(10))] * 6, 3)
    assert sparse["reduce"] / dense["reduce"] == pytest.approx(0.2, rel=TOLERANCE)
    assert sparse.total() / dense.total() <= share


def test_zero3_reduces_once_per_window() -> None:
    one, three = (
        run_on_ranks(2, bytes_of_a_step, Setup(engine="zero3", accumulation=length, slsam=EQUAL_LAYERS), [1, 3])[0]
        for length in (1, 3)
    )
    assert one["reduce"] == pytest.approx(three["reduce"], rel=TOLERANCE)


def traffic_of_blocks(setup: Setup, blocks: list[int]) -> tuple[dict[str, int], int]:
    """Of a step on these blocks, whatever the arms are: bytes by kind, and collectives."""
    training = Training(setup)
    wanted = tuple(f"model.layers.{block}." for block in blocks)
    arms = [arm.index for arm in training.slsam.layers if all(name.startswith(wanted) for name, _ in arm.parameters)]
    training.follow([arms])
    with Traffic() as traffic:
        training.follow([arms])
    return dict(traffic.bytes), sum(traffic.calls.values())


@pytest.mark.parametrize("engine", ["local", "fsdp2", ALSO_ZERO1, "zero2", "zero3"])
def test_tensors_travel_in_as_few_calls_as_blocks(engine: str) -> None:
    by_block, by_tensor = (
        run_on_ranks(
            2, traffic_of_blocks, Setup(engine=engine, model={"hidden": 64}, slsam={"granularity": name}), [1, 3]
        )
        for name in ("block", "tensor")
    )
    assert by_tensor[0][1] == by_block[0][1]
    assert by_tensor[0][0] == pytest.approx(by_block[0][0], rel=TOLERANCE)
