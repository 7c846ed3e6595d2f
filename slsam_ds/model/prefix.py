"""The blocks below the lowest active layer: they compute the same in both passes, so the descent need not run them.

Nothing below the lowest active layer changes between the passes, and the random state is replayed. The ascent keeps the
hidden state that the last of these blocks put out; in the descent a stand-in hands it on, bit for bit, and the blocks
below are not run, nor, where they are sharded, gathered.

That is right where nothing else of what these blocks do is read by the blocks above, by the loss or by a hook. No list
of models says so: before the first descent above so many blocks it is tried (`slsam_ds.trial`). What a loss begins to
look at only later is noticed by `_Watch`, or it is not a number.
"""

import contextlib
import functools
import weakref
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slsam_ds.model.forward_state import ForwardState
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.nests import map_tensors, tensors_in
from slsam_ds.protocol import ALWAYS
from slsam_ds.rng import RandomState

# Hidden states kept for one window take at most this much; micro-batches beyond run all their blocks again.
MAX_BYTES = 2**30


class PrefixNotReusableError(RuntimeError):
    """The descent ran the blocks otherwise than the ascent did."""


class Prefix:
    """The blocks that both passes of a step have in common.

    Args:
        stack: The container of the blocks; its entries are swapped while `reused`.
        depth: How many of them, from the first; at least 2.
        state: Knows where the random numbers are.
        max_bytes: Limit on what is kept.

    Attributes:
        depth: How many blocks they are.
        trial: Whether a descent above them finds what one over all blocks does; None: not known yet.
        watched: Something else than the next block holds on to what one of these blocks computed (hidden states for a
            loss, attention maps, router logits): then they are run again after all.
        handed_on: A descent has started above the blocks.
    """

    def __init__(self, stack: nn.Module, depth: int, state: ForwardState, *, max_bytes: int = MAX_BYTES) -> None:
        self._stack, self.depth, self._state = stack, depth, state
        self._bytes_left = max_bytes
        # One entry per call of the model: a loss may run it more than once on a micro-batch.
        self._kept: defaultdict[int, list[_Kept]] = defaultdict(list)
        self.trial: bool | None = None
        self.watched = self.handed_on = False

    @classmethod
    def below(cls, layer_map: LayerMap, arms: Collection[int], state: ForwardState) -> "Prefix | None":
        """The blocks below all these arms; None where there are none, or so few that nobody would notice."""
        if layer_map.stack is None or ALWAYS in arms or not arms:
            return None
        depth = min(layer_map[arm].depth for arm in arms)
        # Whether the first block's output is held on to shows when the third runs: see _Watch.
        enough = depth >= 2 and len(list(layer_map.stack.children())) >= 3
        return cls(layer_map.stack, depth, state) if enough else None

    @contextlib.contextmanager
    def kept(self, micro_batch: int) -> Iterator[None]:
        """Within, the model's runs leave behind what the blocks put out."""

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            tensors = list(tensors_in(output))
            if not tensors:  # then there is nothing that could be told to be intact
                return
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if num_bytes > self._bytes_left:  # then none of this micro-batch: calls are handed out in their order
                self._kept[micro_batch].clear()
                self._bytes_left = 0
            else:
                self._bytes_left -= num_bytes
                kept = _Kept(output, self._state.random(), [tensor._version for tensor in tensors])
                self._kept[micro_batch].append(kept)

        blocks = list(self._stack.children())
        watch = _Watch(blocks, self.depth)
        handle = blocks[self.depth - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            watch.remove()
            self.watched |= watch.alarmed

    def reusable(self, micro_batch: int) -> bool:
        """Whether what the blocks put out was kept and may be handed on. Local: ranks may differ in it."""
        kept = self._kept.get(micro_batch)
        return bool(kept) and not self.watched and all(call.intact for call in kept or ())

    def forget(self, micro_batch: int) -> None:
        """Run the blocks on this micro-batch again."""
        self._kept.pop(micro_batch, None)

    def forget_all(self) -> None:
        """Run the blocks again on every micro-batch, and on those that are still to come."""
        self._kept.clear()
        self._bytes_left = 0

    @contextlib.contextmanager
    def reused(self, micro_batch: int) -> Iterator[None]:
        """Within, the model's runs on this micro-batch start above the blocks, if what they put out was kept."""
        reusable = self.reusable(micro_batch)
        self.handed_on |= reusable
        try:
            with self.tried(micro_batch) if reusable else contextlib.nullcontext():
                yield
        finally:
            self.forget(micro_batch)

    @contextlib.contextmanager
    def tried(self, micro_batch: int) -> Iterator[None]:
        """As `reused`, of what may be handed on; and it stays kept."""
        calls = _Calls(self._kept[micro_batch])
        blocks = dict(list(self._stack._modules.items())[: self.depth])
        for number, (name, block) in enumerate(blocks.items(), start=1):
            self._stack._modules[name] = _StandIn(block, calls, last=number == self.depth)
        try:
            yield
        finally:
            self._stack._modules.update(blocks)


class _Watch:
    """Notices who holds on to what blocks compute, by whether it is still there when nothing should need it any more.

    Of a block that is frozen and saves nothing for backward, the output is gone once the next block has run, and what
    its own modules put out is gone when it has run itself. transformers, asked for hidden states, attention maps or
    router logits, keeps them by forward hooks on these modules, which a block that is not run would not call.
    """

    def __init__(self, blocks: Sequence[nn.Module], depth: int) -> None:
        self.alarmed = False
        self._outputs: dict[int, list[weakref.ref[Tensor]]] = {}
        self._inside: list[weakref.ref[Tensor]] = []
        self._handles = [
            blocks[index].register_forward_hook(functools.partial(self._block_ran, index)) for index in range(depth)
        ]
        if depth < len(blocks):
            self._handles.append(blocks[depth].register_forward_pre_hook(lambda *_: self._check(depth - 2)))
        for block in (blocks[0], blocks[depth - 1]):
            inner = (module for module in block.modules() if module is not block)
            self._handles += [module.register_forward_hook(self._module_ran) for module in inner]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _module_ran(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside += [weakref.ref(tensor) for tensor in tensors_in(output)]

    def _block_ran(self, index: int, block: nn.Module, inputs: Any, output: Any) -> None:
        given = {id(tensor) for tensor in tensors_in(inputs)}
        own = {id(tensor) for tensor in tensors_in(output)} | given
        self.alarmed |= any((tensor := inside()) is not None and id(tensor) not in own for inside in self._inside)
        self._inside.clear()
        # What it was given and hands through, as the lengths of packed sequences, others hold on to.
        computed = (tensor for tensor in tensors_in(output) if id(tensor) not in given)
        self._outputs[index] = [weakref.ref(tensor) for tensor in computed]
        self._check(index - 2)

    def _check(self, index: int) -> None:
        self.alarmed |= any(output() is not None for output in self._outputs.pop(index, ()))


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the blocks put out in one call of the model, and the random state right after."""

    output: Any
    random_state: RandomState
    versions: list[int]

    @property
    def intact(self) -> bool:
        """Whether nothing has written into the output since: the block above may work in place."""
        return [tensor._version for tensor in tensors_in(self.output)] == self.versions


class _Calls:
    """The calls of one micro-batch, handed out in their order."""

    def __init__(self, kept: Sequence[_Kept]) -> None:
        self._kept = deque(kept)

    def poison(self) -> Any:
        """Shaped like a block's output, and NaN: who looks at it spoils the loss, instead of passing unnoticed."""
        return map_tensors(self._next().output, _not_a_number)

    def take(self) -> Any:
        """The output of the last block, with the random state as it was then."""
        call = self._next()
        self._kept.popleft()
        call.random_state.replay()
        return map_tensors(call.output, _cut_off)

    def _next(self) -> _Kept:
        if not self._kept:
            raise PrefixNotReusableError(
                "the loss ran the model more often in the descent pass than in the ascent pass: set "
                "slsam.prefix_reuse=false"
            )
        return self._kept[0]


class _StandIn(nn.Module):
    """In place of a block: answers for its attributes, which models ask for, and does not run it."""

    def __init__(self, block: Any, calls: _Calls, *, last: bool) -> None:
        super().__init__()
        vars(self).update(_block=[block], _calls=calls, _last=last)  # in a list: it must not become a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._calls.take() if self._last else self._calls.poison()


def _cut_off(tensor: Tensor) -> Tensor:
    # Reentrant checkpointing above asks for an input that requires gradients, where the user has made it so.
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _not_a_number(tensor: Tensor) -> Tensor:
    return tensor.new_full((), float("nan")).expand(tensor.shape) if tensor.is_floating_point() else tensor
