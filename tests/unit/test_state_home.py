"""Optimizer state that waits elsewhere between the steps that need it."""

from typing import Any

import pytest
import torch

from slsam_ds.engines.torch_checkpoint import complete_state
from slsam_ds.model import state_home
from slsam_ds.model.param_groups import stepped_parameters
from slsam_ds.model.state_home import by_group, load_at_home

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


def give_gradients(optimizer: torch.optim.Optimizer, *arms: int) -> list[torch.Tensor]:
    """To these arms' parameters, which are returned: they will be stepped."""
    stepped = stepped_parameters(optimizer, arms)
    for parameter in stepped:
        parameter.grad = torch.zeros_like(parameter)
    return stepped


def test_state_is_fetched_group_by_group() -> None:
    optimizer = make_optimizer()
    give_gradients(optimizer, 0, 1)
    found = []

    def step() -> None:
        found.append(places(optimizer))
        for group in optimizer.param_groups:  # meta has no data to bring back
            optimizer.state[group["params"][0]] = {"step": torch.tensor(2.0), "exp_avg": torch.full((3,), 7.0)}

    by_group(optimizer, step, home=CPU)()
    first, second = found
    assert first == [["cpu", "meta", "meta"], ["cpu"] * 3]  # the step counter stays where it was
    assert second == [["cpu"] * 2, ["cpu", "meta", "meta"]]
    assert places(optimizer) == [["cpu"] * 2] * 2
    assert [group["arm"] for group in optimizer.param_groups] == [0, 1]


def test_only_the_state_of_what_is_stepped_is_fetched() -> None:
    optimizer = make_optimizer()
    (parameter,) = give_gradients(optimizer, 1)
    found = []

    def step() -> None:
        found.append(places(optimizer))
        optimizer.state[parameter] = {}  # meta has no data to bring back

    by_group(optimizer, step, home=CPU)()
    assert found == [[["cpu"] * 3, ["cpu", "meta", "meta"]]]


def test_new_state_goes_home_also_when_the_step_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(state_home, "place", lambda tensor, device: moved.append(tensor) or tensor)
    optimizer = make_optimizer()
    (parameter,) = give_gradients(optimizer, 1)
    optimizer.state.pop(parameter)

    def step() -> None:
        optimizer.state[parameter] = {"exp_avg": torch.zeros(3)}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        by_group(optimizer, step, home=CPU)()
    assert moved == [optimizer.state[parameter]["exp_avg"]]
    assert len(optimizer.param_groups) == 2


def test_without_a_home_nothing_moves() -> None:
    optimizer = make_optimizer()
    assert by_group(optimizer, optimizer.step, home=None) == optimizer.step
    assert places(optimizer) == [["cpu"] * 3] * 2


def test_what_is_written_comes_back_into_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others hold on to them: DeepSpeed's links of ZeRO-1 and ZeRO-2."""
    monkeypatch.setattr(state_home, "place", lambda tensor, device: tensor.clone())
    optimizer = make_optimizer()
    state = optimizer.state[give_gradients(optimizer, 1)[0]]
    before = dict(state)

    def step() -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name] is not before[name]
            state[name].fill_(7.0)

    by_group(optimizer, step, home=CPU)()
    assert all(state[name] is before[name] for name in before)
    assert before["exp_avg"].tolist() == [7.0] * 3


def test_what_an_optimizer_does_not_read_is_not_fetched() -> None:
    optimizer = make_optimizer()
    (parameter,) = give_gradients(optimizer, 1)
    optimizer.state[parameter] = {"slsam_previous_gradient": torch.zeros(3)}
    found: list[list[str]] = []
    by_group(optimizer, lambda: found.extend(places(optimizer)), home=CPU)()
    assert found[1] == ["cpu"]


def test_loaded_state_never_leaves_its_home() -> None:
    optimizer = make_optimizer()
    state = optimizer.state_dict()
    load_at_home(optimizer, CPU)
    optimizer.load_state_dict(state)
    assert places(optimizer) == [["cpu"] * 3] * 2
    loaded = next(iter(optimizer.state.values()))
    assert loaded["exp_avg_sq"].tolist() == [1.0] * 3
    assert loaded["step"] == 1.0


def test_without_a_home_loaded_state_goes_where_torch_puts_it() -> None:
    optimizer = make_optimizer()
    state = optimizer.state_dict()
    load_at_home(optimizer, None)
    optimizer.load_state_dict(state)
    assert places(optimizer) == [["cpu", "meta", "meta"]] * 2


def test_state_is_completed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never are there gradients, or state that is not at home, of more than one."""
    at_home: list[torch.Tensor] = []
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "arm": arm} for arm, parameter in enumerate(parameters)], lr=0.1
    )
    together: list[int] = []

    def place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not any(tensor is each for each in at_home):
            at_home.append(tensor)
        return tensor

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        moments = [each for state in optimizer.state.values() for each in state.values() if each.dim() > 0]
        away = sum(all(each is not other for other in at_home) for each in moments)
        together.append(sum(parameter.grad is not None for parameter in parameters) + away)

    monkeypatch.setattr(state_home, "place", place)
    optimizer.register_step_pre_hook(look)
    complete_state(optimizer, also={"kept": torch.bfloat16}, home=CPU)
    assert together == [1] * 4
    assert all(parameter.tolist() == [1.0] * 3 and parameter.grad is None for parameter in parameters)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 4
    for state in optimizer.state.values():
        assert state["step"] == 0
        assert state["exp_avg"].tolist() == state["exp_avg_sq"].tolist() == [0.0] * 3
        assert state["kept"].dtype == torch.bfloat16
