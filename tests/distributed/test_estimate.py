"""What is estimated from a model without weights is what real steps take."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from slsam_ds.cli.weightless import WeightlessEngine
from slsam_ds.config import SLSAMConfig
from slsam_ds.estimate.activations import SavedActivations
from slsam_ds.estimate.counting import Counted, count
from slsam_ds.estimate.draws import Draw
from slsam_ds.estimate.memory import memory
from slsam_ds.estimate.sharding import RunSetup, StepUse
from slsam_ds.estimate.traffic import gathered, reduced
from slsam_ds.model.layers import map_layers
from slsam_ds.records.traffic import Traffic
from tests.distributed.training import LlamaSetup, Setup, Training, slow
from tests.models import micro_batch, tiny_llama
from tests.ranks import run_on_ranks

WORLD_SIZE = 2
NUM_LEARNING = 3  # DeepSpeed gathers a few things at the first step only, and learns in which order


def counted_of(setup: Setup) -> Counted:
    """From a model without weights, with the micro-batches of `tests.models`."""
    with torch.device("meta"):
        model = tiny_llama(**setup.model).to(setup.dtype)
    shape = micro_batch(1, 0, 0)["input_ids"].shape
    tokens = torch.empty(shape, dtype=torch.long, device="meta")
    layers = map_layers(model, SLSAMConfig(**setup.slsam))
    return count(
        WeightlessEngine(model, layers),
        model,
        layers,
        lambda: model(input_ids=tokens, labels=tokens).loss,
        keeps_inputs=setup.engine == "zero3",
        checkpoint=None,
    )


def step_use(setup: Setup, counted: Counted) -> StepUse:
    run = RunSetup(
        engine=setup.engine,
        world_size=WORLD_SIZE,
        num_micro_batches=setup.accumulation,
        precision="bf16" if setup.dtype == torch.bfloat16 else "fp32",
    )
    return StepUse(counted, run, SLSAMConfig(**setup.slsam))


def estimate(setup: Setup, counted: Counted, sample: Sequence[int]) -> dict[str, float]:
    step, draw = step_use(setup, counted), Draw.of(sample, len(counted.numels))
    held = memory(step, draw)
    return {
        "flops": step.price(draw) * counted.flops * setup.accumulation,
        "activations": held.activations,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "reduce": reduced(step, draw),
        "gather": gathered(step, draw),
    }


Arms = tuple[int, ...]


def spread(setup: Setup, counted: Counted, sample: Sequence[int]) -> tuple[Arms, Arms]:
    """The perturbed and the updated arms."""
    step, draw = step_use(setup, counted), Draw.of(sample, len(counted.numels))
    perturbed, updated = (
        tuple(arm for arm, chance in enumerate(arms.included) if chance)
        for arms in (step.perturbed(draw), step.updated(draw))
    )
    return perturbed, updated


def measure(setup: Setup, choices: Sequence[tuple[Arms, Arms]]) -> list[dict[str, float]]:
    """The same of real steps, choice by choice."""
    training = Training(setup)
    training.follow([range(len(training.slsam.layers))])  # from here on there is optimizer state of every layer
    return [measure_step(training, *choice) for choice in choices]


def measure_step(training: Training, perturbed: Arms, updated: Arms) -> dict[str, float]:
    for step in range(1, NUM_LEARNING + 1):
        training.step(training.window(step), perturbed=perturbed, updated=updated)
    found: dict[str, float] = {"activations": 0.0, "gradients": 0.0}
    engine = training.slsam.engine

    def loss(model: Any, batch: Any) -> Tensor:
        note_gradients()  # of the window's micro-batches before this one
        saved = SavedActivations()
        with saved.watch():
            value: Tensor = model(**batch).loss
        found["activations"] = max(found["activations"], saved.num_bytes)
        return value

    def note_gradients() -> None:
        found["gradients"] = max(found["gradients"], gradient_bytes(training))

    def reduce() -> Any:
        note_gradients()
        return type(engine).reduce(engine)

    engine.reduce = reduce
    try:
        with Traffic() as traffic, FlopCounterMode(display=False) as counter:
            training.step(training.window(1), perturbed=perturbed, updated=updated, loss_fn=loss)
    finally:
        del engine.reduce
    return {
        **found,
        "flops": counter.get_total_flops(),
        "optimizer": optimizer_bytes(training),
        "reduce": traffic.bytes["reduce"],
        "gather": traffic.bytes["gather"],
    }


def gradient_bytes(training: Training) -> int:
    gradients = [local(each.grad) for each in training.model.parameters() if each.grad is not None]
    if training.setup.engine == "zero3":
        zero = training.engine.optimizer
        gradients += [zero.grad_partitions_flat_buffer]
        gradients += zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()
    return sum(map(num_bytes, gradients))


def optimizer_bytes(training: Training) -> int:
    masters: Sequence[Tensor] = ()
    inner = training.optimizer
    if training.engine is not None:
        zero = training.engine.optimizer
        name = "fp32_partitioned_groups_flat" if training.setup.engine == "zero3" else "single_partition_of_fp32_groups"
        masters, inner = getattr(zero, name), zero.optimizer
    state = [each for values in inner.state.values() for each in values.values() if each.dim() > 0]
    return sum(num_bytes(local(tensor)) for tensor in [*masters, *state])


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# A step's few statistics travel beside tens of kilobytes; ZeRO pads groups; small weights stay gathered under ZeRO-3.
TOLERANCES = {"reduce": 0.02, "gather": 0.01, "optimizer": 0.002}
EXACTLY = 1e-6
MODEL = {"num_blocks": 6, "hidden": 64}
APART: Sequence[dict[str, str]] = (
    {"update": "all"},
    {"perturb": "all"},
    {"perturb": "above", "descend_along": "renormalised"},
    {"update": "above", "update_scale": "none"},
)
"""Knobs with which perturbed and updated arms differ."""
CORRECTED = {"descend_along": {"corrected": 1.0}, "ascent_fraction": 0.5}
SAMPLES: Sequence[Sequence[int]] = ([3, 5], [0, 4], [7], range(8))


@pytest.mark.parametrize(
    "setup",
    [
        LlamaSetup(engine="zero2", model=MODEL),
        slow(LlamaSetup(engine="zero2", model=MODEL, dtype=torch.bfloat16, accumulation=2)),
        slow(LlamaSetup(engine="zero3", model=MODEL)),
        slow(LlamaSetup(engine="zero3", model=MODEL, accumulation=2)),
        slow(LlamaSetup(engine="fsdp2", model=MODEL)),
        slow(LlamaSetup(engine="fsdp2", model=MODEL, accumulation=2)),
        *[
            slow(LlamaSetup(engine=engine, model=MODEL, slsam=knobs))
            for engine in ("zero2", "zero3", "fsdp2")
            for knobs in APART
        ],
        *[
            slow(LlamaSetup(engine=engine, model=MODEL, accumulation=2, slsam=CORRECTED))
            for engine in ("zero2", "zero3", "fsdp2")
        ],
    ],
    ids=lambda setup: "-".join(
        [setup.engine, str(setup.dtype), str(setup.accumulation), *map(str, setup.slsam.values())]
    ),
)
def test_real_steps_take_what_was_estimated(setup: Setup) -> None:
    counted = counted_of(setup)
    choices = [spread(setup, counted, sample) for sample in SAMPLES]
    for sample, found in zip(SAMPLES, run_on_ranks(WORLD_SIZE, measure, setup, choices)[0], strict=True):
        expected = estimate(setup, counted, sample)
        if setup.engine == "fsdp2" and setup.accumulation > 1:
            del expected["gradients"]  # FSDP2 keeps them to itself until they are reduced
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=TOLERANCES.get(name, EXACTLY)), (list(sample), name)
