"""What trains past SL-SAM's step is refused; what else a loop calls is not."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from slsam_ds import SLSAM
from tests.models import micro_batch, tiny_llama, window

Made = tuple[torch.nn.Module, torch.optim.Optimizer, SLSAM]


def make(make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> Made:
    model = tiny_llama()
    optimizer = make_optimizer(model.parameters(), lr=1e-3)
    return model, optimizer, SLSAM(model, optimizer, {"rho": 0.05})


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_on_gradients_of_ones_own_is_refused(make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model, optimizer, slsam = make(make_optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(**micro_batch(1, 0, 0)).loss.backward()
    with pytest.raises(RuntimeError, match=r"slsam\.step\(window\)"):
        optimizer.step()
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, was)
    assert not optimizer.state
    assert slsam.step(window(1, 0, 2)).step == 1  # and ours goes on


def test_so_is_one_during_a_warm_up_from_no_rate_at_all() -> None:
    model, optimizer, _ = make()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    model(**micro_batch(1, 0, 0)).loss.backward()
    with pytest.raises(RuntimeError, match="outside of SL-SAM's step"):
        optimizer.step()


def test_so_is_one_with_a_closure() -> None:
    _, optimizer, _ = make()
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(RuntimeError, match="outside of SL-SAM's step"):
            call()


@pytest.mark.parametrize(("given", "kind"), [(micro_batch(1, 0, 0), "dict"), (lambda: 0.0, "function")])
def test_what_is_no_list_of_micro_batches_is_refused(given: Any, kind: str) -> None:
    _, _, slsam = make()
    with pytest.raises(TypeError, match=rf"^window: got a {kind}, expected a list of micro-batches, for example step"):
        slsam.step(given)
    assert slsam.step(window(1, 0, 1)).step == 1


def test_a_scheduler_built_afterwards_drives_the_step() -> None:
    _, optimizer, slsam = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(1, 3):
        slsam.step(window(step, 0, 1))
        optimizer.step()  # of a loop that SL-SAM has left nothing to do, like the Trainer's
        optimizer.zero_grad()
        scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3 / 3}


class Counting(torch.optim.SGD):
    """Keeps in its groups what it has done, as schedule-free optimizers do."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["num_steps"] = group.get("num_steps", 0) + 1
            group["rate"].mul_(0.5)


def test_the_trainers_step_after_ours_is_not_counted() -> None:
    _, optimizer, slsam = make(Counting)
    for group in optimizer.param_groups:
        group["rate"] = torch.ones(())
    for step in range(1, 4):
        slsam.step(window(step, 0, 1), active=range(6))
        optimizer.step()
    assert {group["num_steps"] for group in optimizer.param_groups} == {3}
    assert {group["rate"].item() for group in optimizer.param_groups} == {0.125}


def test_an_optimizer_that_has_no_step_is_refused() -> None:
    class Fused(torch.optim.Optimizer):
        """As LOMO's: it updates weights in hooks."""

        def __init__(self, parameters: Iterable[torch.Tensor], lr: float) -> None:
            super().__init__(parameters, {"lr": lr})

    with pytest.raises(ValueError, match="Fused: updates weights while gradients"):
        make(Fused)


def test_two_around_one_optimizer_both_step() -> None:
    model, optimizer, slsam = make()
    other = SLSAM(model, optimizer, {"rho": 0.01})
    assert [each.step(window(1, 0, 1)).skipped for each in (slsam, other)] == [False, False]


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_checkpoints_of_torch_make_state_and_load(
    make_optimizer: Callable[..., torch.optim.Optimizer], tmp_path: Path
) -> None:
    model, optimizer, slsam = make(make_optimizer)
    slsam.step(window(1, 0, 1), active=range(6))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    new_model, new_optimizer, _ = make(make_optimizer)
    state = {"optimizer": get_optimizer_state_dict(new_model, new_optimizer)}  # makes some first
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(new_model, new_optimizer, state["optimizer"])
    pairs = zip(model.parameters(), new_model.parameters(), strict=True)
    for parameter, new in pairs:
        for key, value in optimizer.state.get(parameter, {}).items():
            assert value is None or torch.equal(new_optimizer.state[new][key], value)
