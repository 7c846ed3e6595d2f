"""Counting the FLOPs that a `CostModel` is made of, on the user's own model and loss."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from slsam_ds.model.forward_state import ForwardState
from slsam_ds.model.layers import LayerMap
from slsam_ds.pricing.cost import CostModel
from slsam_ds.protocol import ALWAYS, Engine
from slsam_ds.shards import whole_shape

# Products with a weight, whose weight gradient costs as much again; those inside attention are not among them.
_WEIGHT_PRODUCTS = ("aten.mm", "aten.addmm", "aten.convolution", "aten._convolution")


def calibrate(engine: Engine, model: nn.Module, layers: LayerMap, run: Callable[[], object]) -> CostModel:
    """Count two forward-backwards: down to the lowest arm, and down to one in the middle.

    Nothing is left behind: gradients are dropped, random numbers and buffers put back. Counts are added up over ranks,
    so that all ranks hold the same prices to the bit.

    Args:
        engine: Gets two backwards.
        model: What `run` calls.
        layers: The arms, found in the model's structure.
        run: Forward and backward of one micro-batch, through `engine.backward`.

    Raises:
        ValueError: The model's FLOPs cannot be counted, or its arms have no depth.
    """
    if layers.stack is None:
        raise ValueError("the cost of a step is not known when slsam.layers names the layers: set slsam.layers=null")
    places = _Places(layers)
    begin = ForwardState(model, engine.device).capture()
    middle = len(layers) // 2
    blocks = list(layers.stack.children())
    counted, inputs_require_grad = [], False
    try:
        for arm in (0, middle):
            begin.replay()
            engine.begin_step((), [ALWAYS, arm] if layers.always else [arm])
            engine.begin_descent()
            engine.begin_micro_batch(last=True)
            with requiring_grad(blocks[0]) as found:
                counted.append(_count(model, blocks, run))
            inputs_require_grad = arm > 0 and any(found)
    finally:
        engine.discard()
        engine.end_step()
        begin.replay()
    deepest, in_the_middle = engine.ranks.all_reduce(torch.stack(counted).to(engine.device)).cpu()
    if not bool((deepest[:, 0] > 0)[:-3].all()):
        raise ValueError("the FLOPs of this model cannot be counted: leave slsam.budget and rewards per cost out")
    ends = not (layers.always or inputs_require_grad)
    return places.solve(_Flops.read(deepest), _Flops.read(in_the_middle), middle, ends=ends)


def flop_counter() -> FlopCounterMode:
    """torch's own, with the backward of grouped convolutions put right."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(
    grad_shape: Any, input_shape: Any, weight_shape: Any, *others: Any, out_shape: Any = None
) -> int:
    """Either gradient costs what the forward does. torch (2.13) counts a weight's for every pair of channels, also
    where groups keep them apart: as many times too dear as there are groups.
    """
    *_, transposed, _output_padding, _groups, needed = others  # as `aten.convolution_backward` has them
    return int(conv_flop_count(input_shape, weight_shape, grad_shape, transposed) * sum(needed[:2]))


@contextlib.contextmanager
def requiring_grad(block: nn.Module) -> Iterator[list[bool]]:
    """Within, notes for each run of the block whether its input requires a gradient.

    Where it does though nothing below is active, backward does not end at the lowest active arm: for gradient
    checkpointing, transformers makes the embeddings' output so (`enable_input_require_grads`).
    """
    found: list[bool] = []

    def note(_: nn.Module, inputs: Any, named: Any) -> None:
        found.append(any(isinstance(each, Tensor) and each.requires_grad for each in (*inputs, *named.values())))

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _count(model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], object]) -> Tensor:
    """FLOPs of one run: rows for the blocks, what comes before them, the whole forward, and everything.

    Columns: all, and products with weights alone. Forward's rows leave out what backward runs a second time. Shape
    (len(blocks) + 3, 2), float64.
    """
    counter = flop_counter()
    flops = torch.zeros(len(blocks) + 3, 2, dtype=torch.float64)

    def now() -> Tensor:
        by_operator = counter.get_flop_counts().get("Global", {})
        products = sum(number for operator, number in by_operator.items() if _is_weight_product(operator))
        return torch.tensor([sum(by_operator.values()), products], dtype=torch.float64)

    before, forward, everything = -3, -2, -1
    with counter, contextlib.ExitStack() as hooks:
        hooks.enter_context(_between(model, blocks[0], now, flops[before]))
        hooks.enter_context(_around(model, now, flops[forward]))
        for index, block in enumerate(blocks):
            hooks.enter_context(_around(block, now, flops[index]))
        run()
        flops[everything] = now()
    return flops


@contextlib.contextmanager
def _around(module: nn.Module, now: Callable[[], Tensor], sum_up: Tensor) -> Iterator[None]:
    """Within, what the module's forward takes is added to `sum_up`."""
    entered: list[Tensor] = []

    def enter(*_: Any) -> None:
        if not _in_backward():
            entered.append(now())

    def leave(*_: Any) -> None:
        if not _in_backward():
            sum_up.add_(now() - entered.pop())

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _between(outer: nn.Module, inner: nn.Module, now: Callable[[], Tensor], sum_up: Tensor) -> Iterator[None]:
    """Within, what the outer module takes until the inner one starts is added to `sum_up`."""
    entered: list[Tensor] = []

    def enter_inner(*_: Any) -> None:
        if not _in_backward() and entered:
            sum_up.add_(now() - entered.pop())

    handles = [
        outer.register_forward_pre_hook(lambda *_: entered.append(now())),
        inner.register_forward_pre_hook(enter_inner),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_backward() -> bool:
    """Gradient checkpointing runs a block's forward again from there."""
    return torch._C._current_graph_task_id() != -1


def _is_weight_product(operator: Any) -> bool:
    return str(operator).startswith(_WEIGHT_PRODUCTS)


@dataclass(frozen=True, slots=True)
class _Flops:
    """What `_count` counted, by place. Pairs: all, and products with weights alone."""

    blocks: list[tuple[float, float]]
    before: tuple[float, float]
    after: tuple[float, float]
    forward: float
    backward: float

    @classmethod
    def read(cls, flops: Tensor) -> "_Flops":
        *blocks, before, forward, everything = (tuple(row) for row in flops.tolist())
        after = tuple(forward[column] - before[column] - sum(block[column] for block in blocks) for column in (0, 1))
        return cls(blocks, before, after, forward[0], everything[0] - forward[0])

    def blocks_from(self, depth: int) -> float:
        """All FLOPs of the forward of the blocks at this depth and above."""
        return sum(all_of_it for all_of_it, _ in self.blocks[depth:])


class _Places:
    """Where the arms are among the blocks, and which share of the products there is with weights that they train."""

    def __init__(self, layers: LayerMap) -> None:
        assert layers.stack is not None
        self._layers = layers
        self._blocks = list(layers.stack.children())
        self._outside = layers.outside_blocks

    def solve(self, deepest: _Flops, middle: _Flops, middle_arm: int, *, ends: bool) -> CostModel:
        """The price list, from what was counted with the first and with a middle arm active.

        `ends`: backward ends at the lowest active arm.
        """
        layers, arms = self._layers, range(len(self._layers))
        weights = [self._weight_gradient(arm, deepest) for arm in arms]
        if not ends:  # backward goes all the way down, whatever is sampled
            above = [deepest.backward - weights[0]] * len(layers)
        else:
            through, into = self._through_a_block(deepest, middle, middle_arm, weights)
            above = [self._above(arm, deepest, through, into) for arm in arms]
        below = [deepest.blocks_from(0) - deepest.blocks_from(layer.depth) for layer in layers]
        reusable = [layer.depth >= 2 and ends for layer in layers]  # as `Prefix.below` has it
        adamw = deepest.forward + above[0] + sum(weights)
        return CostModel(
            forward=deepest.forward / adamw,
            forward_below=tuple(flops / adamw if reuse else 0.0 for flops, reuse in zip(below, reusable, strict=True)),
            backward_above=tuple(flops / adamw for flops in above),
            weight_gradient=tuple(flops / adamw for flops in weights),
        )

    def _weights(self, arm: int) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._layers[arm].parameters]

    def _is_before(self, arm: int) -> bool:
        return self._outside[arm] and self._layers[arm].depth == 0

    def _is_after(self, arm: int) -> bool:
        return self._outside[arm] and self._layers[arm].depth > 0

    def _above(self, arm: int, counted: _Flops, through: float, into: float) -> float:
        """What backward takes on its way down to this arm, but for weight gradients."""
        if self._is_after(arm):  # a final norm is found through the head
            return 0.0 if all(map(_matrix_numel, self._weights(arm))) else counted.after[0]
        depth = self._layers[arm].depth
        if self._is_before(arm):
            return counted.after[0] + through * counted.blocks_from(0)
        return counted.after[0] + through * counted.blocks_from(depth + 1) + into * counted.blocks[depth][0]

    def _weight_gradient(self, arm: int, counted: _Flops) -> float:
        trained = sum(map(_matrix_numel, self._weights(arm)))
        if self._is_after(arm):
            return counted.after[1] if trained else 0.0
        if self._is_before(arm):  # a lookup has none; a projection of patches has, and so has what the head shares
            last = len(self._layers) - 1
            shared = not (self._is_after(last) and self._weight_gradient(last, counted) > 0)
            return counted.before[1] + (counted.after[1] if shared else 0.0)
        depth = self._layers[arm].depth
        there = sum(_matrix_numel(parameter) for parameter in self._blocks[depth].parameters())
        return counted.blocks[depth][1] * trained / max(there, 1)

    def _through_a_block(
        self, deepest: _Flops, middle: _Flops, middle_arm: int, weights: Sequence[float]
    ) -> tuple[float, float]:
        """Backward per FLOP of a block's forward, weight gradients left out: through it, and into the lowest one.

        The lowest need not find the gradient of its input. What is computed again (checkpointing) is in both.
        """
        depth = self._layers[middle_arm].depth
        spent = deepest.backward - deepest.after[0] - weights[0]
        spent_above = middle.backward - middle.after[0] - weights[middle_arm]
        block, above = middle.blocks[depth][0], middle.blocks_from(depth + 1)
        if self._is_before(0):
            through = spent / deepest.blocks_from(0)
            return through, (spent_above - through * above) / block
        # spent = through * rest + into * first, and spent_above = through * above + into * block
        first, rest = deepest.blocks[0][0], deepest.blocks_from(1)
        determinant = rest * block - above * first
        through = (spent * block - spent_above * first) / determinant
        return through, (rest * spent_above - above * spent) / determinant


def _matrix_numel(parameter: Tensor) -> int:
    shape = whole_shape(parameter)
    return shape.numel() if len(shape) > 1 else 0
