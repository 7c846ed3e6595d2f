"""The gradient that each layer last descended along: where single-step SAM climbs, without a pass of its own."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from slsam_ds.config import SLSAMConfig
from slsam_ds.protocol import Engine, Piece, Shard

logger = logging.getLogger(__name__)

STATE_KEY = "slsam_previous_gradient"


def kept_in_optimizer(config: SLSAMConfig) -> list[str]:
    """What the optimizer's state holds besides its own."""
    return [STATE_KEY] if config.ascent_source == "previous" else []


class PreviousGradients:
    """They lie beside the optimizer's moments, in its state, so that whatever saves, loads or reshards those takes them
    along. In bf16: a direction needs no more digits.

    Args:
        engine: Whose `optimizer_state` it is; an optimizer that loads a checkpoint makes another.
        home: Where they wait; None: where the optimizer steps.

    Attributes:
        sq_norms: Squared norm over all ranks of each arm's, unscaled; arms without a gradient are missing.
    """

    def __init__(self, engine: Engine, home: torch.device | None = None) -> None:
        self.sq_norms: dict[int, float] = {}
        self._engine = engine
        self._home = home
        self._pending: dict[Tensor, Tensor] = {}
        self._pending_sq_norms: dict[int, float] = {}

    @property
    def arms(self) -> tuple[int, ...]:
        """Those that there is a gradient of, ascending."""
        return tuple(sorted(self.sq_norms))

    def remember(self, shards: Iterable[Shard], global_sq_norms: Mapping[int, float], *, loss_scale: float) -> None:
        """Copy what a descent has reduced; `keep` puts the copies in place.

        Args:
            shards: With all elements of their arms on this rank.
            global_sq_norms: Of each arm; unscaled.
            loss_scale: The gradients are this many times too large.
        """
        self._pending, self._pending_sq_norms = {}, dict(global_sq_norms)
        for shard in shards:
            piece = shard.piece
            if piece.stepped not in self._pending:
                self._pending[piece.stepped] = torch.zeros_like(piece.stepped.detach(), dtype=torch.bfloat16)
            gradient = shard.gradient if loss_scale == 1 else shard.gradient / loss_scale
            _local(self._pending[piece.stepped])[piece.offset : piece.offset + gradient.numel()].copy_(gradient)

    def keep(self) -> None:
        """The optimizer has stepped: only now, because one that finds state of a layer takes its moments for made."""
        for stepped, gradient in self._pending.items():
            self._engine.optimizer_state[stepped][STATE_KEY] = gradient.to(self._home or gradient.device)
        self.sq_norms.update(self._pending_sq_norms)
        self._pending = {}

    def recall(self, pieces: Iterable[Piece]) -> list[Shard]:
        """The gradients of these weights, all of them of `arms`."""
        shards = []
        for piece in pieces:
            state = self._engine.optimizer_state[piece.stepped]
            # Optimizers load all they remember in the dtype of what they step.
            state[STATE_KEY] = state[STATE_KEY].to(torch.bfloat16)
            end = piece.offset + piece.weight.numel()
            shards.append(Shard(piece, _local(state[STATE_KEY])[piece.offset : end]))
        return shards

    def forget_lost(self, pieces: Iterable[Piece]) -> None:
        """After a resume: forget the arms whose gradients did not come along with the optimizer's state.

        Args:
            pieces: All of them.
        """
        state = self._engine.optimizer_state
        lost = {piece.arm for piece in pieces if STATE_KEY not in state.get(piece.stepped, {})}
        lost &= self.sq_norms.keys()
        if lost:
            logger.warning(
                "the previous gradients of %d layers were not loaded with the optimizer's state: "
                "the next step of each goes unperturbed",
                len(lost),
            )
        self.sq_norms = {arm: norm for arm, norm in self.sq_norms.items() if arm not in lost}


def _local(tensor: Tensor) -> Tensor:
    """This rank's elements, in place, 1-D: FSDP2's tensors hold all ranks', and a shard of their own."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).view(-1)
