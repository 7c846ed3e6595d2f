"""Whether every rank holds whole weights, and what follows from it for the ascent."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slsam_ds.engines.ranks import ProcessGroupRanks
from slsam_ds.protocol import Piece, Shard


class Replicated:
    """Every rank holds whole weights: it can climb along the gradient of its own data, and send nothing for it."""

    replicated = True

    ranks: ProcessGroupRanks
    _apart = False
    """Within `local_gradients`: backward leaves its gradients on the parameters and that is all."""

    def _active_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Arm and parameter of all that is active."""
        raise NotImplementedError

    @contextlib.contextmanager
    def local_gradients(self) -> Iterator[list[Shard]]:
        """See `Engine.local_gradients`."""
        active = list(self._active_parameters())
        gathered = [parameter.grad for _, parameter in active]
        for _, parameter in active:
            parameter.grad = None
        shards: list[Shard] = []
        self._apart = True
        try:
            yield shards
            for arm, parameter in active:
                weight = parameter.detach().view(-1)
                piece = Piece(arm, weight, weight, parameter, owner=self.ranks.rank)
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                shards.append(Shard(piece, gradient.view(-1)))
        finally:
            self._apart = False
            for (_, parameter), windows_own in zip(active, gathered, strict=True):
                parameter.grad = windows_own


class Sharded:
    """A rank holds shards only: a gradient is known to nobody before it was reduced."""

    replicated = False

    def local_gradients(self) -> Any:
        """Not asked for: `SLSAM` refuses a local `ascent_scope` here."""
        raise AssertionError("local gradients of sharded weights")
