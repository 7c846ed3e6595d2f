"""Checkpoints of what a torch optimizer steps, by `torch.distributed.checkpoint`: any number of ranks loads them.

It takes for granted that the optimizer has state of every parameter or of none: it fails to load what was saved with
state of some, and makes up a step that was never taken where it is told to load that all the same. So layers that were
never updated are saved with the state that their first step would begin with.
"""

import io
import pickle
from collections.abc import Collection, Mapping
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

from slsam_ds.model.param_groups import settings_of
from slsam_ds.model.state_home import send_home
from slsam_ds.state.enums import enum_member

_NO_DATA = "is neither a tensor nor plain data, and loading it may run code: resume from another checkpoint"
_IN_INDEX = {  # besides dtypes; torch 2.13
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
}  # fmt: skip


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write all weights, and the optimizer's settings and state; every rank its share.

    Args:
        folder: Created where missing.
        model: Plain or sharded by FSDP2.
        optimizer: Its state is complete, see `complete_state`.
    """
    dcp.save(_content(model, optimizer), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What `save` wrote, into an optimizer whose state is complete, too.

    Raises:
        ValueError: It holds objects that `save` does not write.
    """
    content = _content(model, optimizer)
    _check_index(folder / ".metadata")
    dcp.load(
        content, storage_reader=dcp.FileSystemReader(folder), planner=_Planner(), no_dist=not dist.is_initialized()
    )
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, optimizer, content["optimizer"])


def _content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


class _Planner(dcp.DefaultLoadPlanner):
    """Loads values that are no tensors, learning rates and the like, without running what a pickle may hold."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{read_item.dest_index.fqn} {_NO_DATA}") from None
        value.seek(0)
        super().load_bytes(read_item, value)


def _check_index(path: Path) -> None:
    """Refuse a checkpoint's index, a pickle, that would run anything when `torch.distributed.checkpoint` loads it."""
    try:
        with path.open("rb") as file:
            _IndexUnpickler(file).load()
    except Exception as error:  # a damaged pickle may end in any
        raise ValueError(f"{path}: cannot be loaded ({error})") from None


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if module == "torch" or (module, name) in _IN_INDEX:
            found = super().find_class(module, name)
            if (module, name) in _IN_INDEX or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} {_NO_DATA}")


def complete_state(
    optimizer: torch.optim.Optimizer,
    *,
    also: Mapping[str, torch.dtype] | None = None,
    home: torch.device | None = None,
) -> None:
    """Give parameters that the optimizer has no state of the one that their first step begins with: zeros, no step.

    Group by group: never are there gradients of more than one, nor, where state waits elsewhere, its moments.

    Args:
        optimizer: Nothing has a gradient.
        also: What the state holds besides, in the parameter's shape: key and dtype.
        home: Where state waits; None: where its parameters are.
    """
    for group in list(optimizer.param_groups):
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        missing = [parameter for parameter in trained if not optimizer.state.get(parameter)]
        if missing:
            _step_at_no_rate(optimizer, group, missing)
        for parameter in missing:
            _start_anew(optimizer.state[parameter])
        for parameter in trained:
            state = optimizer.state[parameter]
            for key, dtype in (also or {}).items():
                if key not in state:
                    state[key] = torch.zeros_like(parameter.detach(), dtype=dtype)
        send_home(optimizer, home)


def _start_anew(state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            value.zero_()
        elif key == "step":
            state[key] = type(value)(0)


def _step_at_no_rate(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Collection[nn.Parameter]
) -> None:
    """Only the optimizer itself knows what its state looks like; without rate, decay and gradient no weight changes."""
    whole = list(optimizer.param_groups)
    rates = {key: group[key] for key in ("lr", "weight_decay") if group.get(key) is not None}  # None: its own
    given = settings_of(group) | rates
    try:
        optimizer.param_groups[:] = [group]
        group.update({key: rate * 0.0 for key, rate in rates.items()})
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        optimizer.param_groups[:] = whole
        group.update(given)  # some count their steps there
        for parameter in parameters:
            parameter.grad = None
