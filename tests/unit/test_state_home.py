"""Optimizer state that waits elsewhere between the steps that need it."""

from typing import Any

import pytest
import torch

from slsam_ds.model.param_groups import state_fetched, stepped_parameters

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")  # stands for a GPU: a device of which every machine has one


def make_optimizer() -> torch.optim.Optimizer:
    """Two arms of one parameter each, both stepped once, on a device that is not the CPU."""
    parameters = [torch.nn.Parameter(torch.zeros(3, device=ELSEWHERE)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [parameter], "arm": arm} for arm, parameter in enumerate(parameters)])
    for parameter in parameters:
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.ones(3)}
    return optimizer


def places(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    return [[value.device.type for value in state.values()] for state in optimizer.state.values()]


def test_only_the_state_of_what_is_stepped_is_fetched() -> None:
    optimizer = make_optimizer()
    stepped = stepped_parameters(optimizer, [1])
    with state_fetched(optimizer, stepped, home=CPU):
        assert places(optimizer) == [["cpu"] * 3, ["cpu", "meta", "meta"]]  # the step counter stays where it was
        for parameter in stepped:  # meta has no data to bring back
            optimizer.state[parameter] = {"step": torch.tensor(2.0), "exp_avg": torch.full((3,), 7.0)}
    assert places(optimizer) == [["cpu"] * 3, ["cpu"] * 2]


def test_all_state_goes_home_afterwards_also_when_the_step_raises() -> None:
    optimizer = make_optimizer()
    moved: list[Any] = []

    class Moved(torch.Tensor):
        device = ELSEWHERE

        def to(self, device: Any) -> torch.Tensor:  # type: ignore[override]
            moved.append(device)
            return torch.zeros(3)

    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros(3).as_subclass(Moved)
    with pytest.raises(ZeroDivisionError), state_fetched(optimizer, [], home=CPU):
        raise ZeroDivisionError
    assert moved == [CPU, CPU]


def test_without_a_home_nothing_moves() -> None:
    optimizer = make_optimizer()
    with state_fetched(optimizer, stepped_parameters(optimizer, [0, 1]), home=None):
        assert places(optimizer) == [["cpu"] * 3] * 2
