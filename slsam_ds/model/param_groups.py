"""Parameter groups by arm: so that an optimizer, a scheduler and a sharded engine can tell the layers apart."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.model.layers import LayerMap
from slsam_ds.protocol import ALWAYS

# Per-group lists that schedulers of torch and DeepSpeed keep beside the optimizer's groups.
_PER_GROUP_SCHEDULER_LISTS = (
    "base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "delta_lrs", "base_momentums", "max_momentums",
)  # fmt: skip


def split_param_groups(
    param_groups: Iterable[dict[str, Any] | nn.Parameter], layer_map: LayerMap
) -> list[dict[str, Any]]:
    """Split optimizer groups so that none mixes layers.

    Args:
        param_groups: As torch optimizers take them: groups, or parameters that count as one group.
        layer_map: The arms.

    Returns:
        One group per arm and original group, ordered by arm, none empty. Each keeps the original's keys and tells
        its arm in "arm" (`ALWAYS`, last of all, for what is trained in every step). Parameters that SL-SAM never
        trains are left out.

    Raises:
        ValueError: A parameter that SL-SAM would train is in no group.
    """
    given = list(param_groups)
    groups = [entry for entry in given if isinstance(entry, dict)] or [{"params": given}]
    wanted = [(layer.index, layer.parameters) for layer in layer_map] + [(ALWAYS, layer_map.always)]
    arm_of = {id(parameter): arm for arm, parameters in wanted for _, parameter in parameters}
    split = [piece for group in groups for piece in _split_group(group, arm_of)]
    held = {id(parameter) for piece in split for parameter in piece["params"]}
    missing = [name for _, parameters in wanted for name, parameter in parameters if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameters are in none of the optimizer's groups, first {missing[0]!r}: "
            "add them, or freeze them (requires_grad=False) beforehand"
        )
    return sorted(split, key=lambda piece: len(layer_map) if piece["arm"] == ALWAYS else piece["arm"])


def _split_group(group: dict[str, Any], arm_of: Mapping[int, int]) -> list[dict[str, Any]]:
    parameters = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    positions: dict[int, list[int]] = {}
    for position, parameter in enumerate(parameters):
        if id(parameter) in arm_of:
            positions.setdefault(arm_of[id(parameter)], []).append(position)
    pieces = []
    for arm, chosen in positions.items():
        piece = {**group, "params": [parameters[position] for position in chosen], "arm": arm}
        if "param_names" in group:  # torch keeps it parallel to params
            piece["param_names"] = [group["param_names"][position] for position in chosen]
        pieces.append(piece)
    return pieces


def is_placeholder(optimizer: Any) -> bool:
    """Whether it stands for an optimizer that DeepSpeed will build, such as Accelerate's `DummyOptim`.

    A placeholder has no groups, only `params`: the groups or parameters that DeepSpeed will be given.
    """
    return not hasattr(optimizer, "param_groups")


def regroup(optimizer: Any, layer_map: LayerMap, lr_scheduler: Any = None) -> None:
    """Split the optimizer's groups so that none mixes arms; its state and hyperparameters stay.

    Args:
        optimizer: A torch optimizer, or a placeholder. Changed in place. Doing it twice changes nothing.
        layer_map: The arms.
        lr_scheduler: A scheduler already built on the optimizer; its per-group lists are split alike.

    Raises:
        ValueError: A scheduler hangs on the optimizer but was not given, so that it would drive the wrong groups.
    """
    if is_placeholder(optimizer):
        optimizer.params = split_param_groups(optimizer.params, layer_map)
        return
    old_groups = optimizer.param_groups
    if all("arm" in group for group in old_groups):
        return
    if lr_scheduler is None and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "a learning-rate scheduler was built on the optimizer before slsam_ds split its parameter groups by layer: "
            "build the scheduler afterwards, or pass it along as lr_scheduler"
        )
    group_of = {id(parameter): index for index, group in enumerate(old_groups) for parameter in group["params"]}
    new_groups = split_param_groups(old_groups, layer_map)
    origin = [group_of[id(group["params"][0])] for group in new_groups]
    num_old = len(old_groups)
    optimizer.param_groups[:] = new_groups
    for scheduler in _with_nested(lr_scheduler):
        for name in _PER_GROUP_SCHEDULER_LISTS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == num_old:
                setattr(scheduler, name, [values[index] for index in origin])


def _with_nested(lr_scheduler: Any) -> Iterator[Any]:
    if lr_scheduler is None:
        return
    yield lr_scheduler
    for nested in getattr(lr_scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        yield from _with_nested(nested)


@contextlib.contextmanager
def scaled_learning_rates(param_groups: list[dict[str, Any]], scale: Mapping[int, float]) -> Iterator[None]:
    """Multiply each group's learning rate by its arm's factor, for the duration; schedulers never see it."""
    original = [group["lr"] for group in param_groups]
    for group in param_groups:
        group["lr"] = group["lr"] * scale.get(group["arm"], 1.0)
    try:
        yield
    finally:
        for group, learning_rate in zip(param_groups, original, strict=True):
            group["lr"] = learning_rate


def stepped_parameters(optimizer: torch.optim.Optimizer, arms: Collection[int]) -> list[Tensor]:
    """What the optimizer steps for these arms."""
    return [parameter for group in optimizer.param_groups if group["arm"] in arms for parameter in group["params"]]


@contextlib.contextmanager
def state_fetched(
    optimizer: torch.optim.Optimizer, stepped: Collection[Tensor], *, home: torch.device | None
) -> Iterator[None]:
    """Bring the state of what is stepped to where its parameters are, and all state home afterwards.

    Args:
        optimizer: The torch optimizer that steps.
        stepped: The parameters it will step: a layer's moments come into being with its first step.
        home: Where state waits; None: it stays where it is.
    """
    if home is None:
        yield
        return
    for parameter in stepped:
        _move(optimizer.state.get(parameter, {}), parameter.device)
    try:
        yield
    finally:
        for state in optimizer.state.values():  # all of it: a checkpoint may have been loaded
            _move(state, home)


def _move(state: MutableMapping[str, Any], device: torch.device) -> None:
    for name, value in state.items():
        # Step counters stay: torch keeps them where the kernel that reads them wants them.
        if isinstance(value, Tensor) and value.dim() > 0 and value.device != device:
            state[name] = value.to(device)
