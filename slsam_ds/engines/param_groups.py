"""Parameter groups by arm: so that an optimizer, a scheduler and a sharded engine can tell the layers apart."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from slsam_ds.layers import LayerMap, split_param_groups

# Per-group lists that schedulers of torch and DeepSpeed keep beside the optimizer's groups.
_PER_GROUP_SCHEDULER_LISTS = (
    "base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "delta_lrs", "base_momentums", "max_momentums",
)  # fmt: skip


def regroup(optimizer: torch.optim.Optimizer, layer_map: LayerMap, lr_scheduler: Any = None) -> None:
    """Split the optimizer's groups so that none mixes arms; its state and hyperparameters stay.

    Args:
        optimizer: Changed in place. Doing it twice changes nothing.
        layer_map: The arms.
        lr_scheduler: A scheduler already built on the optimizer; its per-group lists are split alike.

    Raises:
        ValueError: A scheduler hangs on the optimizer but was not given, so that it would drive the wrong groups.
    """
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
