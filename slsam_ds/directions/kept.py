"""Vectors that a direction keeps beside the optimizer's moments, from one step to the next."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from slsam_ds.model.state_home import at_home
from slsam_ds.protocol import Engine, Piece, Shard


class KeptVector:
    """One vector over the weights, in bf16: a direction needs no more digits.

    What a step finds is pending until `keep`: an optimizer that finds state of a layer takes its moments for made, and
    the step may yet be skipped.

    Args:
        engine: Where the weights and the optimizer's state are.
        key: Its name in the optimizer's state.
    """

    def __init__(self, engine: Engine, key: str) -> None:
        self._engine, self._key = engine, key
        self._pending: dict[Tensor, Tensor] = {}

    def start(self) -> None:
        """A step has found something: what an earlier one has left pending is dropped."""
        self._pending = {}

    def put(self, piece: Piece, values: Tensor) -> None:
        """The new elements of a piece; pending."""
        if piece.stepped not in self._pending:
            self._pending[piece.stepped] = torch.zeros_like(piece.stepped.detach(), dtype=torch.bfloat16)
        piece.part_of(self._pending[piece.stepped]).copy_(values)

    def keep(self, only: Collection[Tensor] | None = None) -> None:
        """What is pending counts from here on.

        Args:
            only: Of these stepped tensors; None: of all.
        """
        for stepped, values in self._pending.items():
            if only is None or stepped in only:
                self._engine.optimizer.state[stepped][self._key] = at_home(values, self._engine.optimizer_state_home)
        self._pending = {}

    def has(self, piece: Piece) -> bool:
        """Whether something is kept of it."""
        return self._key in self._engine.optimizer.state.get(piece.stepped, {})

    def get(self, piece: Piece) -> Tensor:
        """What is kept of it. bf16, 1-D, wherever the state waits."""
        state = self._engine.optimizer.state[piece.stepped]
        # Optimizers load all they remember in the dtype of what they step.
        state[self._key] = state[self._key].to(torch.bfloat16)
        return piece.part_of(state[self._key])

    def shards(self, pieces: Iterable[Piece]) -> list[Shard]:
        """What is kept of all of these."""
        return [Shard(piece, self.get(piece)) for piece in pieces]
