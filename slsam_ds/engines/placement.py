"""Whether every rank holds whole weights, and what follows from it for the two passes."""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from slsam_ds.engines.ranks import ProcessGroupRanks
from slsam_ds.model.layers import LayerMap
from slsam_ds.protocol import ALWAYS, Piece, Run, Shard


class Replicated:
    """Every rank holds whole weights: it can climb along the gradient of its own data, and send nothing for it."""

    replicated = True

    ranks: ProcessGroupRanks
    _gradients_stay_local = False
    """Within `local_gradients`: backward leaves its gradients on the parameters and that is all."""

    def _active_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Arm and parameter of all that is active."""
        raise NotImplementedError

    def _read_dtype(self, parameter: nn.Parameter) -> torch.dtype | None:
        """See `Piece.read_dtype`."""
        raise NotImplementedError

    @contextlib.contextmanager
    def local_gradients(self) -> Iterator[list[Shard]]:
        """See `Engine.local_gradients`."""
        active = list(self._active_parameters())
        gathered = [parameter.grad for _, parameter in active]
        for _, parameter in active:
            parameter.grad = None
        shards: list[Shard] = []
        self._gradients_stay_local = True
        try:
            yield shards
            for arm, parameter in active:
                weight = parameter.detach().view(-1)
                read_dtype = self._read_dtype(parameter)
                piece = Piece(arm, weight, weight, parameter, owner=self.ranks.rank, read_dtype=read_dtype)
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                shards.append(Shard(piece, gradient.view(-1)))
        finally:
            self._gradients_stay_local = False
            for (_, parameter), windows_own in zip(active, gathered, strict=True):
                parameter.grad = windows_own


class Sharded:
    """A rank holds shards only: a gradient is known to nobody before it was reduced, and modules gather weights.

    What is not sampled is the same in both passes. Of that, what the ascent's backward gathered may stay for the
    descent's forward; an engine says how much.
    """

    replicated = False

    def _find_depths(self, model: nn.Module, layer_map: LayerMap) -> None:
        """Note where in the model parameters are, and which arm they belong to."""
        blocks = list(layer_map.stack.children()) if layer_map.stack is not None else []
        self._block_of = {id(each): depth for depth, block in enumerate(blocks) for each in block.parameters()}
        self._depth_of_arm = {layer.index: layer.depth for layer in layer_map} if blocks else {}
        self._arm_of = {id(each): layer.index for layer in layer_map for _, each in layer.parameters}
        self._arm_of |= {id(each): ALWAYS for _, each in layer_map.always}
        last = len(blocks)
        # From the lowest block up: those are gathered last and needed first. What is around the blocks comes then.
        self._upwards = sorted(model.parameters(), key=lambda each: self._block_of.get(id(each), last))

    def _unchanged(self, ascended: Collection[int], updated: Collection[int]) -> Iterator[nn.Parameter]:
        """What neither pass trains, and the descent reads: nothing of the blocks below the lowest arm of both."""
        trained = {*ascended, *updated}
        lowest = min((self._depth_of_arm.get(arm, 0) for arm in trained), default=0)
        for parameter in self._upwards:
            below = self._block_of.get(id(parameter), lowest) < lowest
            if not below and self._arm_of.get(id(parameter)) not in trained:
                yield parameter

    def local_gradients(self) -> Any:
        """Not asked for: `SLSAM` refuses a local `ascent_scope` here."""
        raise AssertionError("local gradients of sharded weights")


def runs_within(runs: Iterable[Run], piece: Piece) -> list[Run]:
    """Those parts of the runs of what is stepped that a piece holds; they start where they do in the piece."""
    begin, end = piece.offset, piece.offset + piece.weight.numel()
    cut = [(run, max(run.start, begin), min(run.start + run.numel, end)) for run in runs]
    return [
        Run(start - begin, run.number + start - run.start, stop - start) for run, start, stop in cut if start < stop
    ]


def as_many_as_fit(sized: Iterable[tuple[Any, int]], room: int) -> list[Any]:
    """The first of these things, up to the one that has no room any more.

    Args:
        sized: Things and their sizes.
        room: For all of them together.
    """
    kept = []
    for thing, size in sized:
        room -= size
        if room < 0:
            break
        kept.append(thing)
    return kept
