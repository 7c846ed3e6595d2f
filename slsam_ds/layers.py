"""Which parameters form which arm: found from the model's structure, numbered in forward order.

Pure: knows torch modules only. No framework, no ranks, no weights are read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slsam_ds.config import OtherParameters
from slsam_ds.protocol import ALWAYS

NamedParameter = tuple[str, nn.Parameter]
Arms = tuple[list[tuple[str, list[NamedParameter]]], list[NamedParameter]]  # named arms, and what is in none

_COMPARABLE = 0.1  # a second stack above this share of the largest one's parameters makes the model ambiguous


@dataclass(frozen=True, slots=True)
class Layer:
    """One arm.

    Attributes:
        index: The arm's number.
        name: Module path of the block, the pattern it was asked for by, or "before PATH" / "after PATH" of the blocks.
        parameters: Its trainable parameters with their names, in model order. Never empty.
    """

    index: int
    name: str
    parameters: tuple[NamedParameter, ...]

    @property
    def numel(self) -> int:
        """Number of weights over all ranks, also where parameters are sharded."""
        return sum(_numel(parameter) for _, parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Every trainable parameter, in exactly one place.

    Attributes:
        layers: The arms, in forward order.
        always: Trained in every step.
        frozen: Trainable, but never trained by SL-SAM.
    """

    layers: tuple[Layer, ...]
    always: tuple[NamedParameter, ...]
    frozen: tuple[NamedParameter, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def describe(self) -> list[dict[str, Any]]:
        """The arms as JSON-serialisable records: the contents of `slsam_layers.json`."""
        return [
            {
                "index": layer.index,
                "name": layer.name,
                "numel": layer.numel,
                "parameters": [name for name, _ in layer.parameters],
            }
            for layer in self.layers
        ]

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ where `describe()` differs: to compare ranks and checkpoints."""
        return hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()[:16]


def find_layers(
    model: nn.Module, *, other_parameters: OtherParameters = "arms", patterns: Sequence[str] | None = None
) -> LayerMap:
    """Find the arms of a model; changes nothing about it, nor about the random state.

    Only parameters that require gradients now take part. An arm left without any is dropped and the numbers stay
    compact: with LoRA there are no arms for embeddings and head. A tied parameter belongs to the place that uses it
    first.

    Args:
        model: Any module, wrapped by PEFT or sharded by FSDP2 as well.
        other_parameters: What becomes of those outside the blocks (or outside `patterns`): "arms" gives one arm before
            and one after the blocks (with `patterns`: as "freeze"), "always" and "freeze" no arm.
        patterns: One arm each, in this order: a module path, or a regular expression that fully matches parameter
            names. None: the model's blocks.

    Raises:
        ValueError: No stack of blocks or several comparable ones, a pattern that matches nothing trainable, a
            parameter matched by two patterns, or no arm at all.
    """
    if patterns is None:
        arms, others = _arms_by_structure(model, with_others=other_parameters == "arms")
    else:
        arms, others = _arms_by_pattern(model, patterns)
    filled = [(name, tuple(parameters)) for name, parameters in arms if parameters]
    if not filled:
        raise ValueError(
            f"no layer of {type(model).__name__} has a trainable parameter: unfreeze some, or set slsam.layers"
        )
    layers = tuple(Layer(index, name, parameters) for index, (name, parameters) in enumerate(filled))
    if other_parameters == "always":
        return LayerMap(layers, always=tuple(others), frozen=())
    return LayerMap(layers, always=(), frozen=tuple(others))


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


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor where it partitions


def _arms_by_pattern(model: nn.Module, patterns: Sequence[str]) -> Arms:
    aliases = list(model.named_parameters(remove_duplicate=False))  # a tied parameter answers to all its names
    modules = dict(model.named_modules(remove_duplicate=False))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    taken: dict[int, str] = {}
    arms = []
    for pattern in patterns:
        if pattern in modules:
            matched = {id(parameter) for parameter in modules[pattern].parameters()}
        else:
            matched = {id(parameter) for name, parameter in aliases if re.fullmatch(pattern, name)}
        arm = [(name, parameter) for name, parameter in trainable if id(parameter) in matched]
        if not arm:
            raise ValueError(f"slsam.layers: {pattern!r} matches no trainable parameter of {type(model).__name__}")
        for name, parameter in arm:
            if id(parameter) in taken:
                raise ValueError(f"slsam.layers: {name!r} is matched by {taken[id(parameter)]!r} and by {pattern!r}")
            taken[id(parameter)] = pattern
        arms.append((pattern, arm))
    return arms, [(name, parameter) for name, parameter in trainable if id(parameter) not in taken]


def _arms_by_structure(model: nn.Module, *, with_others: bool) -> Arms:
    path, stack = _find_stack(model)
    blocks = list(stack.named_children())
    before = _used_before(model, path, [block for _, block in blocks])
    block_of: dict[int, int] = {}
    for index, (_, block) in enumerate(blocks):
        for parameter in block.parameters():
            block_of.setdefault(id(parameter), index)
    names = [f"before {path}", *(f"{path}.{name}" if path else name for name, _ in blocks), f"after {path}"]
    places: list[list[NamedParameter]] = [[] for _ in names]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = 0 if id(parameter) in before else 1 + block_of.get(id(parameter), len(blocks))
            places[place].append((name, parameter))
    if with_others:
        return list(zip(names, places, strict=True)), []
    return list(zip(names[1:-1], places[1:-1], strict=True)), places[0] + places[-1]


def _find_stack(model: nn.Module) -> tuple[str, nn.Module]:
    """The outermost container of repeated blocks that holds the most parameters, with its path."""
    found = [(sum(map(_numel, stack.parameters())), path, stack) for path, stack in _outermost_stacks(model, "")]
    found = sorted((entry for entry in found if entry[0]), key=lambda entry: -entry[0])
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no stack of repeated blocks (nn.ModuleList or nn.Sequential): "
            "name its layers in slsam.layers"
        )
    threshold = _COMPARABLE * found[0][0]
    rivals = [f"{path} ({numel:,} parameters)" for numel, path, _ in found if numel > threshold]
    if len(rivals) > 1:
        raise ValueError(
            f"{type(model).__name__} has several comparable stacks of blocks, {' and '.join(rivals)}: "
            "name its layers in slsam.layers"
        )
    return found[0][1:]


def _outermost_stacks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if _is_stack(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost_stacks(child, f"{path}.{name}" if path else name)


def _is_stack(module: nn.Module) -> bool:
    classes = [type(child) for child in module.children()]
    if isinstance(module, nn.ModuleList):  # blocks of hybrid models are of two classes or more
        return len(set(classes)) < len(classes)
    return isinstance(module, nn.Sequential) and len(classes) > 1 and len(set(classes)) == 1


def _used_before(model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> set[int]:
    """Ids of the parameters that also live outside the blocks and are used before the first of them."""
    prefix = f"{path}." if path else ""
    aliases = model.named_parameters(remove_duplicate=False)
    registered = [(name.startswith(prefix), id(parameter)) for name, parameter in aliases]
    first = next(position for position, (inside, _) in enumerate(registered) if inside)
    early = {parameter for _, parameter in registered[:first]}
    traced = _trace_uses(model, blocks)
    # Registration order is only the fallback, for what the trace did not see: OPT registers its final norm first.
    return {parameter for inside, parameter in registered if not inside and traced.get(parameter, parameter in early)}


def _trace_uses(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, bool]:
    """Whether parameters (by id) are first used before the blocks, for all that a run of the model uses.

    What runs is a weightless copy: the model's own hooks must not fire (FSDP2 would gather) and a forward may leave
    traces in its modules. Empty where the model cannot be run up to its blocks.
    """
    runnable = next(filter(_takes_known_inputs, model.modules()), None)
    if runnable is None:
        return {}
    uses: dict[int, bool] = {}
    reached: list[nn.Module] = []
    copies: dict[int, nn.Module] = {}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _NoValues():
            copy = _weightless_copy(runnable, lambda parameter: uses.setdefault(parameter, not reached), copies)
            for block in blocks:
                copies[id(block)].register_forward_pre_hook(lambda block, _: reached.append(block))
            copy(**_example_inputs(runnable))
    except Exception:  # anything at all may fail in a stranger's forward on meta tensors
        for parameter in runnable.parameters():  # in the blocks, for want of a meta kernel: the rest is used later
            uses.setdefault(id(parameter), False)
    return uses if reached else {}


def _takes_known_inputs(module: nn.Module) -> bool:
    # Of torch.compile's and DDP's wrappers, the model within: the first has no forward of its own, the second no input.
    return hasattr(module, "main_input_name") and type(module).forward is not nn.Module.forward


def _example_inputs(model: nn.Module) -> dict[str, Tensor]:
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.empty(1, 4, dtype=torch.long, device="meta")}
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {str(model.main_input_name): torch.empty(1, config.num_channels, height, width, device="meta")}


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
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")


class _NoValues(TorchFunctionMode):
    """Answers questions about values, which meta tensors do not have: masks ask, and either answer will do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.__contains__, Tensor.item) and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))
