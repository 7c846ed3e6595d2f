"""Which parameters form which arm: found from the model's structure, numbered in forward order.

Pure: knows torch modules only. No framework, no ranks, no weights are read.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.config import Granularity, OtherParameters, SLSAMConfig
from slsam_ds.model.compiled import check_not_compiled
from slsam_ds.model.forward_order import used_before
from slsam_ds.protocol import ALWAYS
from slsam_ds.sentences import did_you_mean
from slsam_ds.shards import whole_shape

NamedParameter = tuple[str, nn.Parameter]
Arms = tuple[list[tuple[str, int, list[NamedParameter]]], list[NamedParameter]]  # name, depth; and what is in none

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5  # in a warning
_COMPARABLE = 0.1  # a second stack above this share of the largest one's parameters makes the model ambiguous


@dataclass(frozen=True, slots=True)
class Layer:
    """One arm.

    Attributes:
        index: The arm's number.
        name: Module path of the block, the pattern it was asked for by, or "before PATH" / "after PATH" of the blocks;
            of an arm that is one tensor, the parameter's name.
        parameters: Its trainable parameters with their names, in model order. Never empty.
        depth: How many blocks, from the first, run before anything of it is used; 0 where that is not known.
    """

    index: int
    name: str
    parameters: tuple[NamedParameter, ...]
    depth: int = 0

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
        stack: The container of the blocks; None where the arms were named by patterns.
        passed: Number of weights, over all ranks, that a pass multiplies with and that are in no arm, such as those
            under LoRA's adapters: before the blocks, in each block, and after them. Empty where the arms were named by
            patterns.
    """

    layers: tuple[Layer, ...]
    always: tuple[NamedParameter, ...]
    frozen: tuple[NamedParameter, ...]
    stack: nn.Module | None = None
    passed: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of weights of each arm, over all ranks."""
        return tuple(layer.numel for layer in self.layers)

    def numels_of_all(self) -> dict[int, int]:
        """Number of weights by arm, over all ranks; also of what is always trained."""
        always = {ALWAYS: sum(_numel(parameter) for _, parameter in self.always)} if self.always else {}
        return {**dict(enumerate(self.numels)), **always}

    def numbers(self) -> dict[nn.Parameter, int]:
        """Number of the first weight of each trained parameter, over all ranks.

        All weights are counted from 0: arm by arm, an arm's parameters in their order, what is always trained last.
        """
        named = [*(each for layer in self.layers for each in layer.parameters), *self.always]
        starts = itertools.accumulate((_numel(parameter) for _, parameter in named), initial=0)
        return {parameter: start for (_, parameter), start in zip(named, starts, strict=False)}

    @property
    def outside_blocks(self) -> tuple[bool, ...]:
        """By arm: whether it is around the blocks, not one of them. Only where there is a stack."""
        assert self.stack is not None
        inside = {id(parameter) for parameter in self.stack.parameters()}
        return tuple(id(layer.parameters[0][1]) not in inside for layer in self.layers)

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

    def outline(self) -> list[list[Any]]:
        """Name and number of weights of each arm: enough to say where two maps differ."""
        return [[layer.name, layer.numel] for layer in self.layers]

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ where `describe()` differs: to compare ranks and checkpoints."""
        return hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()[:16]


def find_layers(
    model: nn.Module,
    *,
    other_parameters: OtherParameters = "arms",
    patterns: Sequence[str] | None = None,
    granularity: Granularity = "block",
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
        granularity: "tensor" makes an arm of every parameter tensor of what would be an arm, in the order of the
            model, with the depth of its block.

    Raises:
        ValueError: No stack of blocks or several comparable ones, a pattern that matches nothing trainable, a
            parameter matched by two patterns, or no arm at all.
    """
    stack, before = None, set[int]()
    if patterns is None:
        path, stack = _find_stack(model)
        before = _before_blocks(model, path, list(stack.children()))
        arms, others = _arms_by_structure(model, path, stack, before, with_others=other_parameters == "arms")
    else:
        arms, others = _arms_by_pattern(model, patterns)
    if granularity == "tensor":
        arms = [(name, depth, [(name, tensor)]) for _, depth, tensors in arms for name, tensor in tensors]
    filled = [(name, tuple(parameters), depth) for name, depth, parameters in arms if parameters]
    if not filled:
        raise ValueError(
            f"no layer of {type(model).__name__} has a trainable parameter: unfreeze some, or set slsam.layers"
        )
    layers = tuple(Layer(index, *arm) for index, arm in enumerate(filled))
    in_arms = {id(parameter) for layer in layers for _, parameter in layer.parameters}
    passed = () if stack is None else _passed(model, stack, before, in_arms)
    if other_parameters == "always":
        return LayerMap(layers, always=tuple(others), frozen=(), stack=stack, passed=passed)
    return LayerMap(layers, always=(), frozen=tuple(others), stack=stack, passed=passed)


def map_layers(model: nn.Module, config: SLSAMConfig, optimizer: torch.optim.Optimizer | None = None) -> LayerMap:
    """Find the arms and freeze what SL-SAM will never train.

    Args:
        model: The module, not yet wrapped.
        config: Says how layers are found and what becomes of the other parameters.
        optimizer: Where given, parameters it does not hold are frozen: nothing would ever update them.

    Raises:
        ValueError: As `find_layers`; or several arms are in one compiled graph.
    """
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in held)
    layer_map = find_layers(
        model,
        other_parameters=config.other_parameters,
        patterns=config.layers,
        granularity=config.granularity,
    )
    check_not_compiled(model, [[parameter for _, parameter in layer.parameters] for layer in layer_map])
    for _, parameter in layer_map.frozen:
        parameter.requires_grad_(False)
    if layer_map.frozen and config.layers is not None and config.other_parameters == "arms":
        names = [name for name, _ in layer_map.frozen]
        logger.warning(
            "slsam.layers leaves out %d parameters, which are now frozen: %s%s. To train them in every step, set "
            'slsam.other_parameters="always"; to freeze them without this warning, "freeze"',
            len(names),
            ", ".join(names[:_NAMES_SHOWN]),
            ", ..." if len(names) > _NAMES_SHOWN else "",
        )
    return layer_map


def norm_layers(model: nn.Module, layer_map: LayerMap) -> tuple[int, ...]:
    """The arms that hold nothing but weights of normalisation layers, ascending: what a class is called tells."""
    inside = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    return tuple(layer.index for layer in layer_map if inside.issuperset(id(tensor) for _, tensor in layer.parameters))


def _numel(parameter: Tensor) -> int:
    return whole_shape(parameter).numel()


def _arms_by_pattern(model: nn.Module, patterns: Sequence[str]) -> Arms:
    aliases = list(model.named_parameters(remove_duplicate=False))  # a tied parameter answers to all its names
    modules = dict(model.named_modules(remove_duplicate=False))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    taken: dict[int, str] = {}
    arms = []
    for pattern in patterns:
        if pattern in modules:
            if _is_stack(modules[pattern]):
                logger.warning(
                    "slsam.layers: %r is a stack of %d blocks, which become one layer; to make each a layer, name them "
                    '("%s.0", ...), or set slsam.layers=null',
                    pattern,
                    len(list(modules[pattern].children())),
                    pattern,
                )
            matched = {id(parameter) for parameter in modules[pattern].parameters()}
        else:
            matched = {id(parameter) for name, parameter in aliases if re.fullmatch(pattern, name)}
        arm = [(name, parameter) for name, parameter in trainable if id(parameter) in matched]
        if not arm:
            paths = [name.split(".") for name, _ in trainable]
            names = dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1))
            hint = did_you_mean(pattern, names, "name modules, or write regular expressions of parameters' whole names")
            raise ValueError(
                f"slsam.layers: {pattern!r} matches no trainable parameter of {type(model).__name__}; {hint}"
            )
        for name, parameter in arm:
            if id(parameter) in taken:
                raise ValueError(f"slsam.layers: {name!r} is matched by {taken[id(parameter)]!r} and by {pattern!r}")
            taken[id(parameter)] = pattern
        arms.append((pattern, 0, arm))
    return arms, [(name, parameter) for name, parameter in trainable if id(parameter) not in taken]


def _arms_by_structure(
    model: nn.Module, path: str, stack: nn.Module, before: Collection[int], *, with_others: bool
) -> Arms:
    blocks = list(stack.named_children())
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
    depths = [0, *range(len(blocks) + 1)]
    arms = list(zip(names, depths, places, strict=True))
    return (arms, []) if with_others else (arms[1:-1], places[0] + places[-1])


def _passed(model: nn.Module, stack: nn.Module, before: Collection[int], in_arms: Collection[int]) -> tuple[int, ...]:
    """As `LayerMap.passed`. A lookup multiplies with nothing; a head that shares its weights does."""
    lookups = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    numels = [0] * (len(list(stack.children())) + 2)
    counted = set(in_arms)
    for place, holder in [*enumerate(stack.children(), start=1), (-1, model)]:
        for owner in holder.modules():
            for parameter in owner.parameters(recurse=False):
                if id(parameter) in counted or len(whole_shape(parameter)) < 2 or isinstance(owner, nn.Embedding):
                    continue
                counted.add(id(parameter))
                is_before = id(parameter) in before and id(parameter) not in lookups
                numels[0 if is_before else place] += _numel(parameter)
    return tuple(numels)


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


def _before_blocks(model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> set[int]:
    """Ids of the parameters that also live outside the blocks and are used before the first of them."""
    prefix = f"{path}." if path else ""
    aliases = model.named_parameters(remove_duplicate=False)
    registered = [(name.startswith(prefix), id(parameter)) for name, parameter in aliases]
    first = next(position for position, (inside, _) in enumerate(registered) if inside)
    early = {parameter for _, parameter in registered[:first]}
    traced = used_before(model, blocks)
    # Registration order is only the fallback, for what the trace did not see: OPT registers its final norm first.
    return {parameter for inside, parameter in registered if not inside and traced.get(parameter, parameter in early)}
