"""Under autocast, what forward reads is a rounded copy: the perturbation arrives there, and no stale copy is read."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slsam_ds import SLSAM, SLSAMConfig, StepResult
from tests.models import arms_of_llama, loss_in_autocast, tiny_llama, window

RHO = 0.002  # per weight, far below half a unit in the last place of most


def autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def from_checkpoint() -> nn.Module:
    """Float32 weights that were stored as bfloat16: the step that rounding takes is half a unit everywhere."""
    return tiny_llama(hidden=64).bfloat16().float()


def make(model: nn.Module, **settings: Any) -> SLSAM:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return SLSAM(model, optimizer, SLSAMConfig(rho=RHO, active_layers=2, **settings))


def as_read(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Copies of weights as products read them; norms are not multiplied with, and embeddings are looked up."""
    read = {}
    for name in names:
        weight = model.get_parameter(name).detach().clone()
        read[name] = weight.bfloat16().float() if "proj" in name or "lm_head" in name else weight
    return read


@pytest.mark.parametrize("scope", ["global", "rank", "micro_batch"])
@pytest.mark.parametrize(("rounding", "least", "most"), [("stochastic", 0.95, 1.05), ("nearest", 0.0, 0.8)])
def test_the_perturbation_arrives_in_what_forward_reads(rounding: str, least: float, most: float, scope: str) -> None:
    model, (batch,) = from_checkpoint(), window(1, 0, 1)
    names = [name for arm in (2, 3) for name in arms_of_llama(model)[arm]]
    gradients = torch.autograd.grad(loss_in_autocast(model, batch), [model.get_parameter(name) for name in names])
    norm = torch.sqrt(sum(gradient.double().square().sum() for gradient in gradients))
    readings = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        readings.append(as_read(model, names))
        return loss_in_autocast(model, batch)

    result = make(model, rounding=rounding, ascent_scope=scope).step([batch], loss_fn, active=[2, 3])
    at_weights, above = readings
    along = sum(
        ((above[name] - at_weights[name]).double() * gradient).sum() * RHO / norm
        for name, gradient in zip(names, gradients, strict=True)
    )
    projection = along.item() / RHO**2
    assert least < projection < most
    assert result.perturbation_projection == pytest.approx(projection, abs=1e-3)


def test_what_is_not_rounded_moves_in_float32() -> None:
    model, seen = from_checkpoint(), []
    slsam = make(model)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        return loss_in_autocast(model, batch)

    slsam.step(window(1, 0, 1), loss_fn, active=[0, 2])
    for name in (*arms_of_llama(model)[0], *arms_of_llama(model)[2]):
        on_grid = torch.equal(seen[1][name], seen[1][name].bfloat16().float())
        assert on_grid == ("proj" in name), name


def test_without_autocast_nothing_is_rounded() -> None:
    model = from_checkpoint()
    slsam = make(model)
    slsam.step(window(1, 0, 1), loss_in_autocast, active=[2])
    assert slsam.engine.pieces([2])[0].read_dtype == torch.bfloat16
    result = slsam.step(window(2, 0, 1), active=[2])
    assert slsam.engine.pieces([2])[0].read_dtype is None
    assert result.perturbation_projection == pytest.approx(1.0, abs=1e-6)


def two_steps(around: contextlib.AbstractContextManager[Any], loss_fn: Any) -> list[StepResult]:
    slsam = make(from_checkpoint())
    with around:
        return [slsam.step(window(step, 0, 2), loss_fn, active=[2, 3]) for step in (1, 2)]


def test_autocast_around_the_step_keeps_no_weights_from_before_they_moved() -> None:
    inside, outside = two_steps(contextlib.nullcontext(), loss_in_autocast), two_steps(autocast(), None)
    for one, other in zip(inside, outside, strict=True):
        assert one.loss > one.ascent_loss
        assert (one.ascent_loss, one.loss, one.grad_norms) == (other.ascent_loss, other.loss, other.grad_norms)


def loss_in_float16(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        loss: Tensor = model(**batch).loss
    return loss


def test_float16_is_refused_for_there_is_no_scaler() -> None:
    """On an accelerator, autocast means it unless told otherwise."""
    model = from_checkpoint()
    slsam = make(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"float16.* give it dtype=torch\.bfloat16") as refused:
        slsam.step(window(1, 0, 1), loss_in_float16, active=[2])
    assert "\n" not in str(refused.value)
    assert all(map(torch.equal, before, model.parameters()))
    assert not slsam.step(window(1, 0, 1), loss_in_autocast, active=[2]).skipped
    with torch.no_grad():
        assert loss_in_float16(model, window(1, 0, 1)[0]).isfinite()  # an evaluation is nobody's business
