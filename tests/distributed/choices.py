"""Trainings that make choices, some for each value of a knob: every engine's tests of them take all.

Each is a few steps of forced samples, and says by its knobs alone what the reference is to do.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from slsam_ds import StepResult
from slsam_ds.combinations import COMBINATIONS
from slsam_ds.directions import DIRECTIONS
from slsam_ds.masks import MASKS
from slsam_ds.metrics import METRICS
from slsam_ds.schedules import SCHEDULES
from tests.distributed.training import ADAMW, Setup, Training
from tests.models import arms_of_llama, window
from tests.reference import Batches, Reference
from tests.rounding_reference import RoundingReference

WORLD_SIZE = 2

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

    def setup(self, engine: str, **kwargs: Any) -> Setup:
        """What is trained. `kwargs`: further arguments of `Setup`."""
        return Setup(engine=engine, accumulation=self.accumulation, clip=self.clip, slsam=self.slsam, **kwargs)

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
    ((3,), (3,)),
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
    "corrected on samples": Case(
        slsam={"descend_along": {"corrected": 0.7}, "ascent_fraction": 0.25, "rho": 0.2}, accumulation=2, choices=FEW
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


def take(training: Training, case: Case, step: int) -> StepResult:
    """A step of a case. What it returns says nothing of how long it took."""
    perturbed, updated = case.choices[step - 1]
    return without_seconds(training.step(training.window(step), perturbed=perturbed, updated=updated))


def without_seconds(result: StepResult) -> StepResult:
    return replace(result, seconds=0.0, ascent_seconds=0.0, descent_seconds=0.0)


def make_reference(case: Case, setup: Setup, make: Callable[..., Reference] = Reference, **kwargs: Any) -> Reference:
    """What is to follow the same training in one process, without the package.

    Args:
        case: What is asked for.
        setup: The same for the engine; its model is built anew.
        make: The reference's class.
        **kwargs: Further arguments of it.
    """
    torch.set_num_threads(1)  # sums in the order of the ranks' own
    model, slsam = setup.build_model(), case.slsam
    return make(
        model,
        arms_of_llama(model),
        rho=slsam.get("rho", 0.05),
        clip=case.clip,
        direction=slsam.get("ascent_source", "current"),
        metric=slsam.get("metric", "euclidean"),
        descend_along=slsam.get("descend_along", "perturbed"),
        mask=slsam.get("mask"),
        mask_density=slsam.get("mask_density", 0.5),
        mask_every=slsam.get("mask_every", 100),
        total_steps=len(case.choices),
        **ADAMW,
        **kwargs,
    )


def follow_step(
    reference: Reference, case: Case, step: int, before: Sequence[Mapping[str, Any]], **given: Any
) -> dict[str, Any]:
    """Let the reference take a step of a case.

    Args:
        reference: Of the case.
        case: Likewise.
        step: From 1.
        before: What the steps before have reported.
        **given: What the engine had, which a reference that rounds goes by.

    Returns:
        What it reports, and whether it ascended.
    """
    perturbed, updated = (arms_there(arms, case) for arms in case.choices[step - 1])
    ascends = case.ascends(step, [result["sq_norm"] for result in before])
    windows = [window(step, rank, case.accumulation) for rank in range(WORLD_SIZE)]
    batches = [batch for each in windows for batch in each]
    fraction = case.slsam.get("ascent_fraction", 1.0) if ascends else 1.0
    descended = [batch for each in windows for batch in first_part(each, fraction)]
    take = reference.follow if isinstance(reference, RoundingReference) else reference.step
    result = take(perturbed, batches, updated=updated, ascends=ascends, descended=descended, **given)
    return {**result, "ascends": ascends}


def first_part(batches: Batches, fraction: float) -> Batches:
    """As few micro-batches as hold that much, whole or the first samples of each."""
    wanted = fraction * len(batches)
    number = math.ceil(wanted - 1e-9)
    if math.isclose(number, wanted):
        return batches[:number]
    return [
        {name: tensor[: max(1, round(wanted / number * len(tensor)))] for name, tensor in batch.items()}
        for batch in batches[:number]
    ]


def arms_there(arms: Arms, case: Case) -> list[int]:
    """The reference's arms: embeddings and head are two of them, and always take part where they are no arms here."""
    return [0, *(arm + 1 for arm in arms), 5] if "other_parameters" in case.slsam else list(arms)


def assert_reported(
    result: StepResult, reference: Mapping[str, Any], case: Case, step: int, *, projection: float | None = 1.0
) -> None:
    """What a step has reported is what the reference's has.

    Args:
        result: The step's.
        reference: The reference's.
        case: What is trained.
        step: From 1.
        projection: Of the perturbation on what was asked for; None: nothing was perturbed.
    """
    perturbed, updated = case.choices[step - 1]
    climbs = reference["ascends"]
    assert result.active == updated
    assert result.perturbed == (perturbed if climbs else ())
    assert result.rho == (case.slsam.get("rho", 0.05) if climbs else 0.0)
    assert result.mask_density == (pytest.approx(reference["mask_density"]) if climbs else None)
    assert result.loss == pytest.approx(reference["loss"], abs=1e-5), step
    offset = 1 if "other_parameters" in case.slsam else 0
    there = {arm: reference["grad_norms"][arm + offset] for arm in updated}
    assert result.grad_norms == pytest.approx(there, rel=1e-4)
    if climbs and case.slsam.get("ascent_source") not in ("previous", "momentum", "random"):
        assert result.ascent_loss == pytest.approx(reference["ascent_loss"], abs=1e-5)
        if case.slsam.get("metric") != "preconditioned":
            assert result.perturbation_projection is not None
    else:
        assert result.ascent_loss is None
    if result.perturbation_projection is not None:
        assert result.perturbation_projection == pytest.approx(projection, abs=1e-3)
