"""An optimizer's state goes from a stock loop to one with SL-SAM and back, whatever is built or loaded first."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, SequentialLR

from slsam_ds import SLSAM, SLSAMConfig, given_groups
from tests.models import tiny_llama, window

AS_ADAMW = SLSAMConfig(rho=0.0, selector="all")
STEPS, HALF = 6, 3


def two_groups(model: Any) -> torch.optim.Optimizer:
    """As nanoGPT and the Trainer have them, each with parameters of every block."""
    decayed, rest = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-4)


def declining(optimizer: torch.optim.Optimizer) -> Any:
    """Differs between the groups, and nests."""
    rates = LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 0.5 / (1 + step)])
    return SequentialLR(optimizer, [ConstantLR(optimizer, 0.5, 2), rates], [2])


def stock_steps(model: Any, optimizer: Any, scheduler: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        (batch,) = window(step, 0, 1)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def our_steps(slsam: SLSAM, scheduler: Any, first: int, last: int, active: Any = None) -> None:
    for step in range(first, last + 1):
        slsam.step(window(step, 0, 1), active=active)
        scheduler.step()


def weights(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def stock_run() -> tuple[dict[str, Any], list[Tensor]]:
    """What a loop saves half way, and where it ends."""
    model = tiny_llama()
    optimizer = two_groups(model)
    scheduler = declining(optimizer)
    stock_steps(model, optimizer, scheduler, 1, HALF)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    stock_steps(model, optimizer, scheduler, HALF + 1, STEPS)
    return saved, weights(model)


def load_then_build(model: Any, saved: dict[str, Any]) -> tuple[SLSAM, Any]:
    optimizer = two_groups(model)
    scheduler = declining(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    return SLSAM(model, optimizer, AS_ADAMW, lr_scheduler=scheduler), scheduler


def build_then_load(model: Any, saved: dict[str, Any]) -> tuple[SLSAM, Any]:
    optimizer = two_groups(model)
    scheduler = declining(optimizer)
    slsam = SLSAM(model, optimizer, AS_ADAMW, lr_scheduler=scheduler)
    optimizer.load_state_dict(saved["optimizer"])
    with given_groups(optimizer, scheduler):
        scheduler.load_state_dict(saved["scheduler"])
    return slsam, scheduler


@pytest.mark.parametrize("order", [load_then_build, build_then_load])
def test_a_stock_loop_goes_on_to_the_last_bit(order: Callable[..., tuple[SLSAM, Any]]) -> None:
    saved, expected = stock_run()
    model = tiny_llama(seed=1)
    model.load_state_dict(saved["model"])
    slsam, scheduler = order(model, saved)
    our_steps(slsam, scheduler, HALF + 1, STEPS)
    assert all(map(torch.equal, weights(model), expected))
    assert slsam.progress.updates == (1 + STEPS - HALF,) * 6  # what it did before counts as one update


def test_state_that_was_brought_along_outlives_a_checkpoint(tmp_path: Any) -> None:
    """A layer that SL-SAM has not updated yet has moments all the same."""
    saved, _ = stock_run()
    model = tiny_llama()
    slsam, scheduler = load_then_build(model, saved)
    our_steps(slsam, scheduler, 1, 1, active=[0])
    slsam.save_checkpoint(tmp_path)
    slsam.load_checkpoint(tmp_path)
    our_steps(slsam, scheduler, 2, 2, active=[3])
    counts = {int(state["step"]) for state in slsam.engine.optimizer.state.values()}
    assert counts == {HALF, HALF + 1}


def test_a_stock_loop_goes_on_from_ours() -> None:
    """Layers that were never updated have no state, which torch's optimizers take for a beginning."""
    model = tiny_llama()
    optimizer = two_groups(model)
    scheduler = declining(optimizer)
    slsam = SLSAM(model, optimizer, SLSAMConfig(rho=0.0), lr_scheduler=scheduler)
    our_steps(slsam, scheduler, 1, HALF, active=[0, 2])
    with given_groups(optimizer, scheduler):
        saved = copy.deepcopy({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    stock = copy.deepcopy(model)
    for parameter in stock.parameters():
        parameter.requires_grad_(True)
    others = two_groups(stock)
    schedule = declining(others)
    others.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["scheduler"])
    stock_steps(stock, others, schedule, HALF + 1, STEPS)
    our_steps(slsam, scheduler, HALF + 1, STEPS, active=range(6))
    assert all(map(torch.equal, weights(model), weights(stock)))


def test_what_is_never_trained_keeps_its_place() -> None:
    saved, _ = stock_run()
    model = tiny_llama()
    optimizer = two_groups(model)
    SLSAM(model, optimizer, SLSAMConfig(rho=0.0, other_parameters="freeze"))
    optimizer.load_state_dict(saved["optimizer"])
    with given_groups(optimizer):
        found = optimizer.state_dict()
    assert [group["params"] for group in found["param_groups"]] == [
        group["params"] for group in saved["optimizer"]["param_groups"]
    ]
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    blocks = {index for index, name in enumerate(names) if "layers" in name}
    states = saved["optimizer"]["state"]
    assert {index for index in found["state"] if index < len(names)} == blocks
    assert all(torch.equal(found["state"][index]["exp_avg"], states[index]["exp_avg"]) for index in blocks)
    assert set(optimizer.state) == {p for group in optimizer.param_groups for p in group["params"]}


def test_the_state_of_other_groups_is_refused_in_one_sentence() -> None:
    saved, _ = stock_run()
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    SLSAM(model, optimizer, AS_ADAMW)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"is of groups of \[30, 9\] parameters, .* given groups of \[39\]: build it"):
        optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state_dict() == before
    optimizer.load_state_dict(before)  # its own goes through


def test_a_scheduler_that_hangs_on_the_optimizer_must_be_handed_over() -> None:
    model = tiny_llama()
    optimizer = two_groups(model)
    declining(optimizer)
    with pytest.raises(ValueError, match="build the scheduler afterwards, or pass it along as lr_scheduler"):
        SLSAM(model, optimizer, AS_ADAMW)
