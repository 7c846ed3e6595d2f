"""Parameter groups by arm: so that an optimizer, a scheduler and a sharded engine can tell the layers apart."""

import contextlib
import copy
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.model.given_groups import GIVEN, deal_out, given_of, is_split, split_loaded
from slsam_ds.model.layers import LayerMap
from slsam_ds.protocol import ALWAYS


def split_param_groups(
    param_groups: Iterable[dict[str, Any] | nn.Parameter], layer_map: LayerMap
) -> list[dict[str, Any]]:
    """Split optimizer groups so that none mixes layers.

    Args:
        param_groups: As torch optimizers take them: groups, or parameters that count as one group.
        layer_map: The arms.

    Returns:
        One group per arm and original group, ordered by arm, none empty. Each keeps the original's keys and tells
        its arm in "arm" (`ALWAYS`, last of all, for what is trained in every step), and in "given" where its
        parameters were. Parameters that SL-SAM never trains are left out.

    Raises:
        ValueError: A parameter that SL-SAM would train is in no group.
    """
    given = list(param_groups)
    groups = [entry for entry in given if isinstance(entry, dict)] or [{"params": given}]
    groups = [{**group, "params": _as_list(group["params"])} for group in groups]
    wanted = [(layer.index, layer.parameters) for layer in layer_map] + [(ALWAYS, layer_map.always)]
    arm_of = {id(parameter): arm for arm, parameters in wanted for _, parameter in parameters}
    sizes = tuple(len(group["params"]) for group in groups)
    split = [piece for index, group in enumerate(groups) for piece in _split_group(group, arm_of, index, sizes)]
    held = {id(parameter) for piece in split for parameter in piece["params"]}
    missing = [name for _, parameters in wanted for name, parameter in parameters if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameters are in none of the optimizer's groups, first {missing[0]!r}: "
            "add them, or freeze them (requires_grad=False) beforehand"
        )
    return sorted(split, key=lambda piece: len(layer_map) if piece["arm"] == ALWAYS else piece["arm"])


def _as_list(parameters: Any) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _split_group(
    group: dict[str, Any], arm_of: Mapping[int, int], index: int, sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    parameters = group["params"]
    positions: dict[int, list[int]] = {}
    for position, parameter in enumerate(parameters):
        if id(parameter) in arm_of:
            positions.setdefault(arm_of[id(parameter)], []).append(position)
    pieces = []
    for arm, chosen in positions.items():
        piece = {**group, "params": [parameters[position] for position in chosen], "arm": arm}
        piece[GIVEN] = (index, tuple(chosen), sizes)
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
        ValueError: A scheduler hangs on the optimizer but was not given, so that it would drive the wrong groups; or
            the optimizer has no step.
    """
    if is_placeholder(optimizer):
        optimizer.params = split_param_groups(optimizer.params, layer_map)
        return
    if inspect.unwrap(type(optimizer).step) is inspect.unwrap(torch.optim.Optimizer.step):  # LOMO's
        raise ValueError(
            f"{type(optimizer).__name__}: updates weights while gradients are computed, "
            "which SL-SAM does twice; use another optimizer"
        )
    old_groups = optimizer.param_groups
    if is_split(old_groups):
        return
    if lr_scheduler is None and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "a learning-rate scheduler was built on the optimizer before slsam_ds split its parameter groups by layer: "
            "build the scheduler afterwards, or pass it along as lr_scheduler"
        )
    num_old = len(old_groups)
    optimizer.param_groups[:] = split_param_groups(old_groups, layer_map)
    deal_out(lr_scheduler, [given_of(group).group for group in optimizer.param_groups], num_groups=num_old)
    getattr(optimizer, "optimizer", optimizer).register_load_state_dict_pre_hook(split_loaded)


@contextlib.contextmanager
def scaled_learning_rates(param_groups: list[dict[str, Any]], scale: Mapping[int, float]) -> Iterator[None]:
    """Multiply each group's learning rate by its arm's factor, for the duration; schedulers never see it.

    A rate that is None is the optimizer's own business: see `sets_own_rate`.
    """
    original = [(group, group["lr"]) for group in param_groups if group.get("lr") is not None]
    for group, rate in original:
        group["lr"] = rate * scale.get(group["arm"], 1.0)
    try:
        yield
    finally:
        for group, rate in original:
            group["lr"] = rate


@contextlib.contextmanager
def joined(optimizer: torch.optim.Optimizer, arms: Collection[int], *, across_arms: bool = True) -> Iterator[None]:
    """Within, the optimizer has these arms' groups alone, and those with the same settings are one group.

    Optimizers launch kernels group by group, and an arm may be a single small tensor. What an optimizer writes into a
    joint group is carried back into its members. Where groups are not to be joined `across_arms`, those of an arm are.
    """
    whole = list(optimizer.param_groups)
    members: dict[str, list[dict[str, Any]]] = {}
    for group in whole:
        if group["arm"] in arms:
            settings = repr([(key, value) for key, value in group.items() if key not in _OF_ONE_GROUP])
            members.setdefault(settings if across_arms else f"{group['arm']} {settings}", []).append(group)
    joint = [
        {**groups[0], "params": [parameter for group in groups for parameter in group["params"]]}
        for groups in members.values()
    ]
    optimizer.param_groups[:] = joint
    try:
        yield
    finally:
        for written, groups in zip(joint, members.values(), strict=True):
            for group in groups:
                group.update({key: value for key, value in written.items() if key not in _OF_ONE_GROUP})
        optimizer.param_groups[:] = whole


_OF_ONE_GROUP = ("params", "arm", GIVEN, "param_names")
"""What groups with the same settings differ in."""


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """All of a group but its parameters; copies of what an optimizer could write into."""
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.copy(value)
        for key, value in group.items()
        if key != "params"
    }


def leave_empty_groups(optimizer: torch.optim.Optimizer) -> None:
    """From here on, a step changes nothing of groups without parameters.

    ZeRO-3 steps group after group and empties the others meanwhile. An optimizer that counts its steps in its groups
    would count one for each.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        kept[:] = [(group, settings_of(group)) for group in optimizer.param_groups if not group["params"]]

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, settings in kept:
            group.update(settings)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def sets_own_rate(param_groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the optimizer finds a learning rate of its own, as Adafactor does with `relative_step`."""
    return any(group.get("lr") is None or group.get("relative_step", False) for group in param_groups)


def stepped_parameters(optimizer: torch.optim.Optimizer, arms: Collection[int]) -> list[Tensor]:
    """What the optimizer steps for these arms."""
    return [parameter for group in optimizer.param_groups if group["arm"] in arms for parameter in group["params"]]
