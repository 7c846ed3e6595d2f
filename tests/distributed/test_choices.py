"""Who is perturbed, who is updated, where to climb, when, and what the update descends along: against the reference.

Starting ranks takes longer than training on them, so each engine trains every case in the same processes.
"""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from slsam_ds import SLSAMConfig, StepResult
from slsam_ds.protocol import ALWAYS
from tests.distributed.choices import CASES, EVERY_KNOB, WORLD_SIZE, assert_reported, follow_step, make_reference
from tests.distributed.training import ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, Setup, Training, max_error, slow
from tests.ranks import run_on_ranks

ENGINES = ["local", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED]
TOLERANCE = 1e-6  # as in test_reference.py


@pytest.mark.parametrize("knob", EVERY_KNOB)
def test_every_member_has_a_case(knob: str) -> None:
    """A new direction, metric, combination or schedule comes with a plain reference, or this fails."""
    default = getattr(SLSAMConfig(), knob)
    values = [case.slsam.get(knob, default) for case in CASES.values()]
    values = [value for value in values if value is not None]
    assert {value if isinstance(value, str) else next(iter(value)) for value in values} == set(EVERY_KNOB[knob])


@functools.cache
def expected(name: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The same training in one process, without the package."""
    case = CASES[name]
    reference = make_reference(case, case.setup("local"))
    results: list[dict[str, Any]] = []
    for step in range(1, len(case.choices) + 1):
        results.append(follow_step(reference, case, step, results))
    return {name: parameter.detach().clone() for name, parameter in reference.model.named_parameters()}, results


def train(engine: str, names: Sequence[str]) -> dict[str, tuple[dict[str, Tensor], list[StepResult]]]:
    found = {}
    for name in names:
        case = CASES[name]
        training = Training(case.setup(engine), total_steps=len(case.choices))
        results = []
        for step, (perturbed, updated) in enumerate(case.choices, start=1):
            before = training.live_weights()
            results.append(training.step(training.window(step), perturbed=perturbed, updated=updated))
            after = training.live_weights()
            assert all(parameter.grad is None for parameter in training.model.parameters())
            for arm in training.slsam.layers:
                for parameter, _ in arm.parameters if arm.index not in updated else ():
                    assert torch.equal(before[parameter], after[parameter]), (name, step, parameter)
        found[name] = training.weights(), results
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_every_choice_follows_the_reference(engine: str) -> None:
    per_rank = run_on_ranks(WORLD_SIZE, train, engine, list(CASES))
    for found in per_rank:
        for name, (weights, results) in found.items():
            wanted, reported = expected(name)
            assert max_error(weights, wanted) <= TOLERANCE, name
            assert max_error(weights, per_rank[0][name][0]) == 0.0, name
            for step, (result, reference) in enumerate(zip(results, reported, strict=True), start=1):
                assert_reported(result, reference, CASES[name], step)


def misplaced(setup: Setup) -> tuple[int, int]:
    """How many elements an engine numbers otherwise than the model has them; how many more than there are."""
    training = Training(setup)
    slsam, weights = training.slsam, training.weights()
    layers = slsam.layers
    names = [name for layer in layers for name, _ in layer.parameters] + [name for name, _ in layers.always]
    flat = torch.cat([weights[name].flatten() for name in names])
    arms = [*range(len(layers)), *([ALWAYS] if layers.always else [])]
    counts = torch.zeros(2, dtype=torch.int64)
    for piece in slsam.engine.pieces(arms):
        runs = slsam.engine.runs(piece)
        for run in runs:
            here = piece.master[run.start : run.start + run.numel].float()
            counts[0] += int((here != flat[run.number : run.number + run.numel]).sum())
        counts[1] += sum(run.numel for run in runs) if piece.owner == training.rank else 0
    mistakes, counted = slsam.engine.ranks.all_reduce(counts).tolist()
    return mistakes, counted - len(flat)


@pytest.mark.parametrize("num_ranks", [slow(2), 3])
@pytest.mark.parametrize(
    "engine", [slow("local"), "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", slow("zero3"), *ALSO_OFFLOADED]
)
def test_every_engine_gives_the_elements_the_same_numbers(engine: str, num_ranks: int) -> None:
    for other_parameters in ("arms", "always"):
        setup = Setup(engine=engine, slsam={"other_parameters": other_parameters})
        assert run_on_ranks(num_ranks, misplaced, setup) == [(0, 0)] * num_ranks


def columns(parameter: Tensor) -> Shard | None:
    """Where `fully_shard` cuts it."""
    return Shard(1) if parameter.ndim == 2 else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"fsdp": {"shard_placement_fn": columns}}, {"replicas": 2}], ids=["columns", "replicas"]
)
def test_numbers_of_shards_that_are_columns_or_replicas(settings: dict[str, Any]) -> None:
    assert run_on_ranks(4, misplaced, Setup(engine="fsdp2", **settings)) == [(0, 0)] * 4


@pytest.mark.slow
def test_numbers_of_partitions_in_another_order() -> None:
    deepspeed = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    assert run_on_ranks(3, misplaced, Setup(engine="zero2", deepspeed=deepspeed)) == [(0, 0)] * 3
