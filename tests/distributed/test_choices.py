"""Who is perturbed, who is updated, where to climb, when, and what the update descends along: against the reference.

Starting ranks takes longer than training on them, so each engine trains every case in the same processes.
"""

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from slsam_ds import SLSAMConfig, StepResult
from slsam_ds.combinations import COMBINATIONS
from slsam_ds.directions import DIRECTIONS
from slsam_ds.masks import MASKS
from slsam_ds.metrics import METRICS
from slsam_ds.protocol import ALWAYS
from slsam_ds.schedules import SCHEDULES
from tests.distributed.training import ADAMW, ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, Setup, Training, max_error, slow
from tests.models import arms_of_llama, window
from tests.ranks import run_on_ranks
from tests.reference import Reference

ENGINES = ["local", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED]
WORLD_SIZE = 2
TOLERANCE = 1e-6  # as in test_reference.py

Arms = tuple[int, ...]
ALL: Arms = (0, 1, 2, 3, 4, 5)
APART: Sequence[tuple[Arms, Arms]] = (
    ((4,), ALL),  # one above the others: nothing below it may be left out of the descent
    (ALL, (4,)),
    ((1, 2), (1, 2, 3)),  # P inside U
    ((1, 2, 3), (2,)),  # U inside P
    ((4, 5), (2, 3)),  # P above U
    ((2,), (4,)),  # P below U
    ((3, 5), (2, 4)),  # disjoint
    ((3,), (3,)),
    ((5,), (0,)),
    ((0,), (5,)),
)
"""Perturbed and updated arms, step by step."""


@dataclass(frozen=True)
class Case:
    """A few steps of training.

    Attributes:
        slsam: Knobs.
        choices: Perturbed and updated arms of each step.
        accumulation: Micro-batches per window.
        clip: Largest gradient norm; 0: any.
    """

    slsam: Mapping[str, Any] = field(default_factory=dict)
    choices: Sequence[tuple[Arms, Arms]] = APART
    accumulation: int = 1
    clip: float = 0.0

    def setup(self, engine: str) -> Setup:
        return Setup(engine=engine, accumulation=self.accumulation, clip=self.clip, slsam=self.slsam)

    def ascends(self, step: int, sq_norms: Sequence[float]) -> bool:
        """Whether a step climbs, given the squared norms of the gradients of those before."""
        match self.slsam.get("ascend_when", "always"):
            case {"every": period}:
                return step % period == 1 % period
            case {"last": share}:
                return step > (1 - share) * len(self.choices)
            case {"probability": chance}:
                key = hashlib.blake2b(f"slsam schedule 0 {step}".encode(), digest_size=16).digest()
                return random.Random(int.from_bytes(key, "big")).random() < chance
            case {"norm_above": threshold}:
                mean = variance = 0.0
                for sq_norm in sq_norms:
                    mean = 0.9 * mean + 0.1 * sq_norm
                    variance = 0.9 * variance + 0.1 * (sq_norm - mean) ** 2
                return not sq_norms or sq_norms[-1] >= mean + threshold * variance**0.5
        return True


AGAIN: Sequence[tuple[Arms, Arms]] = [
    ((1, 2), (1, 2)),
    ((1, 2, 3), (1, 2, 3)),
    ((2, 3), (2,)),
    ((2,), (1, 2)),
    ((0, 2), (2, 5)),
]
"""The same arms again, which have something to remember by then."""
FEW = APART[:5]
CASES: Mapping[str, Case] = {
    "apart": Case(),
    "apart, in a longer window": Case(accumulation=3),
    "apart, every block run": Case(slsam={"prefix_reuse": False}, choices=FEW),
    "previous": Case(slsam={"ascent_source": "previous"}, choices=FEW),
    "momentum": Case(slsam={"ascent_source": "momentum", "offload_state": True}, choices=FEW, accumulation=2),
    "renormalised": Case(slsam={"descend_along": "renormalised"}, choices=FEW[:2]),
    "renormalised and clipped": Case(slsam={"descend_along": "renormalised", "rho": 0.2}, clip=0.5, choices=FEW),
    "mixed": Case(slsam={"descend_along": {"mixed": 0.7}, "rho": 0.2}, clip=0.5, choices=FEW, accumulation=2),
    "corrected": Case(
        slsam={"descend_along": {"corrected": 0.7}, "ascent_fraction": 0.5, "rho": 0.2}, accumulation=2, choices=FEW
    ),
    "corrected and clipped, every second step": Case(
        slsam={"descend_along": {"corrected": 1.5}, "ascent_fraction": 1 / 3, "ascend_when": {"every": 2}},
        accumulation=3,
        clip=0.5,
        choices=FEW[:4],
    ),
    "adaptive": Case(slsam={"metric": "adaptive", "rho": 1.0}, choices=FEW),
    "preconditioned": Case(slsam={"metric": "preconditioned", "rho": 0.01}, choices=AGAIN),
    "by layer": Case(slsam={"metric": "by_layer"}, choices=FEW),
    "friendly": Case(slsam={"ascent_source": "friendly", "offload_state": True}, choices=AGAIN, accumulation=2),
    "friendly and adaptive": Case(slsam={"ascent_source": "friendly", "metric": "adaptive"}, choices=AGAIN),
    "fisher": Case(slsam={"mask": "fisher", "mask_every": 2}, choices=AGAIN, accumulation=2),
    "fisher and adaptive": Case(
        slsam={"mask": "fisher", "mask_every": 1, "mask_density": 0.2, "metric": "adaptive", "rho": 1.0}, choices=AGAIN
    ),
    "fisher, previous": Case(slsam={"mask": "fisher", "ascent_source": "previous", "mask_every": 1}, choices=AGAIN),
    "dynamic": Case(slsam={"mask": "dynamic", "mask_every": 2, "offload_state": True}, choices=[*AGAIN, (ALL, (3,))]),
    "dynamic, most elements": Case(slsam={"mask": "dynamic", "mask_every": 1, "mask_density": 0.9}, choices=AGAIN),
    "the last steps": Case(slsam={"ascend_when": {"last": 0.4}}, choices=FEW),
    "steps drawn at random": Case(slsam={"ascend_when": {"probability": 0.5}}, choices=FEW),
    "every second step": Case(slsam={"ascend_when": {"every": 2}}, choices=FEW[:4]),
    "after steep steps": Case(slsam={"ascend_when": {"norm_above": 1.5}, "selector": "all"}, choices=[(ALL, ALL)] * 6),
    "random": Case(slsam={"ascent_source": "random"}, choices=FEW, accumulation=2),
    "always": Case(slsam={"other_parameters": "always"}, choices=[((0, 2), (1,)), ((3,), (0, 1)), ((0,), (3,))]),
}


EVERY_KNOB = {
    "ascent_source": DIRECTIONS,
    "metric": METRICS,
    "descend_along": COMBINATIONS,
    "ascend_when": SCHEDULES,
    "mask": MASKS,
}
"""Knobs whose values are members, each a file of its own."""


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
    torch.set_num_threads(1)
    model = case.setup("local").build_model()
    reference = Reference(
        model,
        arms_of_llama(model),
        rho=case.slsam.get("rho", 0.05),
        clip=case.clip,
        direction=case.slsam.get("ascent_source", "current"),
        metric=case.slsam.get("metric", "euclidean"),
        descend_along=case.slsam.get("descend_along", "perturbed"),
        mask=case.slsam.get("mask"),
        mask_density=case.slsam.get("mask_density", 0.5),
        mask_every=case.slsam.get("mask_every", 100),
        total_steps=len(case.choices),
        **ADAMW,
    )
    results: list[dict[str, Any]] = []
    for step, choice in enumerate(case.choices, start=1):
        perturbed, updated = (arms_there(arms, case) for arms in choice)
        ascends = case.ascends(step, [result["sq_norm"] for result in results])
        windows = [window(step, rank, case.accumulation) for rank in range(WORLD_SIZE)]
        batches = [batch for each in windows for batch in each]
        num_descended = round(case.slsam.get("ascent_fraction", 1.0) * case.accumulation) if ascends else None
        descended = [batch for each in windows for batch in each[:num_descended]]
        result = reference.step(perturbed, batches, updated=updated, ascends=ascends, descended=descended)
        results.append({**result, "ascends": ascends})
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, results


def arms_there(arms: Arms, case: Case) -> list[int]:
    """The reference's arms: embeddings and head are two of them, and always take part where they are no arms here."""
    return [0, *(arm + 1 for arm in arms), 5] if "other_parameters" in case.slsam else list(arms)


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
            case, (wanted, reported) = CASES[name], expected(name)
            assert max_error(weights, wanted) <= TOLERANCE, name
            assert max_error(weights, per_rank[0][name][0]) == 0.0, name
            for step, (result, reference) in enumerate(zip(results, reported, strict=True), start=1):
                perturbed, updated = case.choices[step - 1]
                climbs = reference["ascends"]
                assert result.active == updated
                assert result.perturbed == (perturbed if climbs else ())
                assert result.rho == (case.slsam.get("rho", 0.05) if climbs else 0.0)
                assert result.mask_density == (pytest.approx(reference["mask_density"]) if climbs else None)
                assert result.loss == pytest.approx(reference["loss"], abs=1e-5), (name, step)
                offset = 1 if "other_parameters" in case.slsam else 0
                there = {arm: reference["grad_norms"][arm + offset] for arm in updated}
                assert result.grad_norms == pytest.approx(there, rel=1e-4)
                if climbs and case.slsam.get("ascent_source") not in ("previous", "momentum", "random"):
                    assert result.ascent_loss == pytest.approx(reference["ascent_loss"], abs=1e-5)
                    if case.slsam.get("metric") != "preconditioned" or result.perturbation_projection is not None:
                        assert result.perturbation_projection == pytest.approx(1.0, abs=1e-3)
                else:
                    assert result.ascent_loss is None


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
@pytest.mark.parametrize("settings", [{"fsdp": {"shard_placement_fn": columns}}, {"replicas": 2}], ids=str)
def test_numbers_of_shards_that_are_columns_or_replicas(settings: dict[str, Any]) -> None:
    assert run_on_ranks(4, misplaced, Setup(engine="fsdp2", **settings)) == [(0, 0)] * 4


@pytest.mark.slow
def test_numbers_of_partitions_in_another_order() -> None:
    deepspeed = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    assert run_on_ranks(3, misplaced, Setup(engine="zero2", deepspeed=deepspeed)) == [(0, 0)] * 3
