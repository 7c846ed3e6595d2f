"""Checkpoints of what a torch optimizer steps, by `torch.distributed.checkpoint`: any number of ranks loads them.

It takes for granted that the optimizer has state of every parameter or of none: it fails to load what was saved with
state of some, and makes up a step that was never taken where it is told to load that all the same. So layers that were
never updated are saved with the state that their first step would begin with.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write all weights, and the optimizer's settings and state; every rank its share.

    Args:
        folder: Created where missing.
        model: Plain or sharded by FSDP2.
        optimizer: Its state is complete, see `complete_state`.
    """
    dcp.save(_content(model, optimizer), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What `save` wrote, into an optimizer whose state is complete, too."""
    content = _content(model, optimizer)
    dcp.load(content, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, optimizer, content["optimizer"])


def _content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def complete_state(optimizer: torch.optim.Optimizer, *, also: Collection[str] = ()) -> None:
    """Give parameters that the optimizer has no state of the one that their first step begins with: zeros, no step.

    Args:
        optimizer: Nothing has a gradient.
        also: What the state holds besides, in bf16 and in the parameter's shape.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    missing = [parameter for parameter in trained if not optimizer.state.get(parameter)]
    _step_at_no_rate(optimizer, missing)
    for parameter in missing:
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                value.zero_()
            elif key == "step":
                optimizer.state[parameter][key] = type(value)(0)
    for parameter in trained:
        for key in also:
            if key not in optimizer.state[parameter]:
                optimizer.state[parameter][key] = torch.zeros_like(parameter.detach(), dtype=torch.bfloat16)


def _step_at_no_rate(optimizer: torch.optim.Optimizer, parameters: Collection[nn.Parameter]) -> None:
    """Only the optimizer itself knows what its state looks like; at a learning rate of 0 it changes no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        if parameters:
            optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter in parameters:
            parameter.grad = None
