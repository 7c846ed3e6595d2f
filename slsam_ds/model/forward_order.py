"""Which parameters a forward uses before it reaches the blocks: found by running a copy without weights.

Pure: knows torch modules only. The model itself is never run, and nothing of it is changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slsam_ds.shards import whole_shape

_USUAL_IMAGE_SIZE = 224  # pixels; convolutional networks take any number


def used_before(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, bool]:
    """Whether parameters are first used before the blocks, for all that a run of the model uses.

    What runs is a weightless copy on meta tensors: the model's own hooks must not fire (FSDP2 would gather) and a
    forward may leave traces in its modules.

    Args:
        model: Any module; only one that says what it takes (`main_input_name`), or holds one that does, can be run.
        blocks: Modules of it, in forward order.

    Returns:
        By id of the parameter. Empty where the model cannot be run up to its blocks; it then tells nothing.
    """
    runnable = next(filter(_takes_known_inputs, model.modules()), None)
    if runnable is None:
        return {}
    uses: dict[int, bool] = {}
    reached: list[nn.Module] = []
    copies: dict[int, nn.Module] = {}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), NoValues():
            copy = _weightless_copy(runnable, lambda parameter: uses.setdefault(parameter, not reached), copies)
            for block in blocks:
                copies[id(block)].register_forward_pre_hook(lambda block, _: reached.append(block))
            copy(**example_inputs(runnable))
    except Exception:  # anything at all may fail in a stranger's forward on meta tensors
        for parameter in runnable.parameters():  # in the blocks, for want of a meta kernel: the rest is used later
            uses.setdefault(id(parameter), False)
    return uses if reached else {}


def _takes_known_inputs(module: nn.Module) -> bool:
    # Of torch.compile's and DDP's wrappers, the model within: the first has no forward of its own, the second no input.
    return hasattr(module, "main_input_name") and type(module).forward is not nn.Module.forward


def example_inputs(model: nn.Module, batch_size: int = 1, length: int = 4) -> dict[str, Tensor]:
    """What the model takes, on meta: tokens, or images, of its own size where it has one.

    Raises:
        ValueError: It takes something else.
    """
    name = str(model.main_input_name)
    if name == "input_ids":
        return {name: torch.empty(batch_size, length, dtype=torch.long, device="meta")}
    if name != "pixel_values":
        raise ValueError(f"{type(model).__name__}: its main input is {name}; supported are input_ids and pixel_values")
    config: Any = model.config
    size = getattr(config, "image_size", _USUAL_IMAGE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    shape = batch_size, getattr(config, "num_channels", 3), height, width
    return {name: torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")}


def _weightless_copy(module: nn.Module, on_use: Callable[[int], object], copies: dict[int, nn.Module]) -> nn.Module:
    """The module tree in evaluation mode, without hooks, on meta tensors. Plain attributes are shared."""
    if id(module) in copies:
        return copies[id(module)]
    copy: nn.Module = object.__new__(type(module))  # FSDP2 overrides __new__
    nn.Module.__init__(copy)
    copies[id(module)] = copy
    # An instance's own forward (Accelerate) or call (nn.Module.compile) would run the original, not the copy.
    fresh = {*vars(copy), "forward", "_compiled_call_impl"}
    vars(copy).update({name: value for name, value in vars(module).items() if name not in fresh})
    vars(copy)["training"] = False
    vars(copy)["_parameters"] = _WatchedParameters(module._parameters, on_use)
    vars(copy)["_buffers"] = {name: _on_meta(buffer) for name, buffer in module._buffers.items()}
    vars(copy)["_modules"] = {
        name: None if child is None else _weightless_copy(child, on_use, copies)
        for name, child in module._modules.items()
    }
    return copy


class _WatchedParameters(dict[str, Tensor | None]):
    """A module's parameters on meta, telling when one is looked up: a forward may use a weight without a call."""

    def __init__(self, parameters: Mapping[str, Tensor | None], on_use: Callable[[int], object]) -> None:
        super().__init__({name: _on_meta(parameter) for name, parameter in parameters.items()})
        self._ids = {name: id(parameter) for name, parameter in parameters.items()}
        self._on_use = on_use

    def __getitem__(self, name: str) -> Tensor | None:
        if name in self._ids:
            self._on_use(self._ids[name])
        return super().__getitem__(name)


def _on_meta(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")


class NoValues(TorchFunctionMode):
    """Answers questions about values, which meta tensors do not have: masks ask, and either answer will do.

    Where all of something is asked for, the answer is yes: no padding, nothing packed, as masks see it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.all, torch.all) and args[0].is_meta and len(args) == 1 and not kwargs:
            return torch.tensor(True)
        if func in (Tensor.__bool__, Tensor.__contains__, Tensor.item) and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))
