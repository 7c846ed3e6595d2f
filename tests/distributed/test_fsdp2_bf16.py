"""FSDP2 in bf16: float32 shards that are cast when gathered, or a bf16 model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from slsam_ds import SLSAM, StepResult
from tests.distributed.test_bf16 import follow_bf16, judge
from tests.distributed.test_frozen import changes
from tests.distributed.training import LlamaSetup, Setup, Training, follow_samples, max_error, slow
from tests.models import SAMPLES, arms_of_llama, loss_in_autocast, tiny_llama, window
from tests.ranks import run_on_ranks
from tests.rounding_reference import MixedReference

MIXED = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize(("world_size", "accumulation"), [slow(1, 1), slow(2, 1), (2, 3)])
def test_mixed_precision_follows_its_reference(world_size: int, accumulation: int, rounding: str) -> None:
    setup = Setup(engine="fsdp2", fsdp=MIXED, accumulation=accumulation, slsam={"rounding": rounding})
    judge(setup, world_size, MixedReference)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "setup",
    [Setup(engine="fsdp2", fsdp=MIXED), Setup(engine="fsdp2", dtype=torch.bfloat16)],
    ids=["mixed precision", "bf16 model"],
)
def test_the_perturbation_reaches_what_forward_reads(setup: Setup, world_size: int) -> None:
    setup = replace(setup, model={"hidden": 64}, slsam={"rho": 0.005})
    per_rank = run_on_ranks(world_size, follow_samples, setup)
    weights, results = per_rank[0]
    assert all(max_error(weights, other) == 0.0 for other, _ in per_rank)
    for result in results:  # rounding noise: one standard deviation of the projection is about 0.015
        assert result.perturbation_projection == pytest.approx(1.0, abs=0.03)
        assert result.perturbation_norm > 1.02 * 0.005


def step_in_autocast(setup: Setup) -> tuple[Tensor, StepResult]:
    """The perturbed weights of a product, as this rank reads them, and what was measured."""
    training, read = Training(setup), []
    projection = training.model.get_submodule("model.layers.2.mlp.up_proj")
    projection.register_forward_hook(lambda module, inputs, output: read.append(module.weight.detach().clone()))

    result = training.step(training.window(1), loss_fn=loss_in_autocast, active=[3])
    at_weights, *_, above = read  # between them: whether the descent may start above the blocks below is tried
    assert not torch.equal(at_weights, above)
    return above, result


def test_autocast_around_float32_shards_reads_the_whole_perturbation() -> None:
    setup = Setup(engine="fsdp2", model={"hidden": 64}, slsam={"rho": 0.005})
    for above, result in run_on_ranks(2, step_in_autocast, setup):
        assert torch.equal(above, above.bfloat16().float())
        assert result.perturbation_projection == pytest.approx(1.0, abs=0.03)
        assert result.perturbation_norm > 1.02 * 0.005  # with the rounding noise


def test_perturbed_float32_shards_are_what_their_cast_makes_of_them() -> None:
    _, _, perturbed, _ = run_on_ranks(2, follow_bf16, LlamaSetup(engine="fsdp2", fsdp=MIXED))[0]
    arms = arms_of_llama(tiny_llama())
    for sample, weights in zip(SAMPLES, perturbed, strict=True):
        active = [weights[name] for arm in sample for name in arms[arm]]
        assert all(torch.equal(weight, weight.to(torch.bfloat16).float()) for weight in active)


def test_replicas_of_a_shard_draw_the_same_rounding_noise() -> None:
    first, *others = run_on_ranks(4, follow_bf16, Setup(engine="fsdp2", replicas=2, fsdp=MIXED))
    for live, _, perturbed, _ in others:
        for mine, its in zip([*live, *perturbed], [*first[0], *first[2]], strict=True):
            assert max_error(mine, its) == 0.0


def test_frozen_layers_stay_as_they_are() -> None:
    for seen in run_on_ranks(2, changes, Setup(engine="fsdp2", fsdp=MIXED, clip=1.0, accumulation=2)):
        for sample, unchanged in zip(SAMPLES, seen, strict=True):
            assert unchanged == {arm: arm not in sample for arm in range(6)}


def step_after_a_frozen_forward() -> StepResult:
    model = tiny_llama()
    Setup(engine="fsdp2", fsdp=MIXED).shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model.requires_grad_(False)
    with torch.no_grad():
        model(**window(1, 0, 1)[0])
    model.reshard()
    model.requires_grad_(True)
    return SLSAM(model, optimizer).step(window(1, 0, 1))


def test_layers_frozen_at_the_first_forward_can_be_sampled() -> None:
    assert not run_on_ranks(2, step_after_a_frozen_forward)[0].skipped
