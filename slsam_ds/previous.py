"""The gradient that each layer last descended along: where single-step SAM climbs, without a pass of its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slsam_ds.protocol import Piece, Shard


@dataclass(frozen=True, slots=True)
class _Remembered:
    """An arm's gradient on this rank, flat, and its squared norm over all ranks."""

    local: Tensor
    global_sq_norm: float


class PreviousGradients:
    """This rank's shards of them, in bf16: a direction needs no more digits.

    Args:
        home: Where they wait; None: where they were made.
    """

    def __init__(self, home: torch.device | None = None) -> None:
        self._home = home
        self._by_arm: dict[int, _Remembered] = {}

    @property
    def arms(self) -> tuple[int, ...]:
        """Those that there is a gradient of, ascending."""
        return tuple(sorted(self._by_arm))

    def remember(self, shards: Iterable[Shard], global_sq_norms: Mapping[int, float], *, loss_scale: float) -> None:
        """Keep a copy of what a descent has reduced.

        Args:
            shards: In the order of their elements.
            global_sq_norms: Of each arm; unscaled.
            loss_scale: The gradients are this many times too large.
        """
        pieces: dict[int, list[Tensor]] = {arm: [] for arm in global_sq_norms}
        for shard in shards:
            pieces[shard.piece.arm].append((shard.gradient / loss_scale).to(torch.bfloat16))
        for arm, gradients in pieces.items():
            local = torch.cat(gradients)
            self._by_arm[arm] = _Remembered(local.to(self._home or local.device), global_sq_norms[arm])

    def recall(self, pieces: Iterable[Piece]) -> tuple[list[Shard], dict[int, float]]:
        """The gradients of these weights, and their squared norms by arm; arms without one are left out.

        Args:
            pieces: Whole arms, in the order of their elements; cut otherwise than they were when remembered, maybe.
        """
        shards = []
        sq_norms: dict[int, float] = {}
        offsets: dict[int, int] = {}
        for piece in pieces:
            remembered = self._by_arm.get(piece.arm)
            if remembered is None:
                continue
            start = offsets.get(piece.arm, 0)
            gradient = remembered.local[start : start + piece.weight.numel()]
            offsets[piece.arm] = start + gradient.numel()
            sq_norms[piece.arm] = remembered.global_sq_norm
            shards.append(Shard(_shortened(piece, gradient.numel()), gradient))
        return shards, sq_norms


def _shortened(piece: Piece, numel: int) -> Piece:
    """Its first elements: a last partition may end in padding, which has no gradient."""
    return Piece(piece.arm, piece.weight[:numel], piece.master[:numel], piece.owner, piece.read_dtype)
