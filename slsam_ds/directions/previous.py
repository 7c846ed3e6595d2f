"""Climb along the gradient that each layer last descended along: single-step SAM, without a pass of its own."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from slsam_ds.directions.direction import Direction
from slsam_ds.directions.kept import KeptVector
from slsam_ds.gradient import Gradient
from slsam_ds.protocol import Engine, Piece
from slsam_ds.tally import upload

logger = logging.getLogger(__name__)

STATE_KEY = "slsam_previous_gradient"


class PreviousGradients(Direction):
    """A layer is not perturbed the first time. The gradients are kept in bf16: a direction needs no more digits.

    Attributes:
        sq_norms: Squared norm over all ranks of each arm's, not scaled; arms without a gradient are missing. They come
            with the all-reduce of the step that found the gradient, so that climbing needs none.
    """

    is_gradient: ClassVar[bool] = True
    kept: ClassVar[Mapping[str, torch.dtype]] = {STATE_KEY: torch.bfloat16}

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.sq_norms: dict[int, float] = {}
        self._kept = KeptVector(engine, STATE_KEY)
        self._pending_sq_norms: dict[int, float] = {}

    @property
    def arms(self) -> tuple[int, ...]:
        """Those that there is a gradient of, ascending."""
        return tuple(sorted(self.sq_norms))

    def climb(self, arms: tuple[int, ...], ascent: Gradient | None, *, seed: int) -> Gradient | None:
        known = tuple(arm for arm in arms if arm in self.sq_norms)
        if not known:
            return None
        sq_norms = upload([self.sq_norms[arm] for arm in known], self._engine.device)
        return Gradient(known, self._kept.shards(self._engine.pieces(known)), sq_norms)

    def observe(self, descent: Gradient, sq_norms: Mapping[int, float]) -> None:
        self._pending_sq_norms = dict(sq_norms)
        self._kept.start()
        for shard in descent.shards:
            scaled = descent.loss_scale != 1
            self._kept.put(shard.piece, shard.gradient / descent.loss_scale if scaled else shard.gradient)

    def keep(self, *, ascent_is_finite: bool) -> None:
        self._kept.keep()
        self.sq_norms.update(self._pending_sq_norms)

    def claims(self) -> Any:
        return self.arms

    def state_dict(self) -> dict[str, float] | None:
        return {str(arm): sq_norm for arm, sq_norm in self.sq_norms.items()}

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        self.sq_norms = {int(arm): sq_norm for arm, sq_norm in (state or {}).items()}

    def forget_lost(self, pieces: Iterable[Piece]) -> None:
        state = self._engine.optimizer.state
        lost = {piece.arm for piece in pieces if STATE_KEY not in state.get(piece.stepped, {})}
        lost &= self.sq_norms.keys()
        if lost:
            logger.warning(
                "the previous gradients of %d layers were not loaded with the optimizer's state: "
                "the next step of each is not perturbed",
                len(lost),
            )
        self.sq_norms = {arm: sq_norm for arm, sq_norm in self.sq_norms.items() if arm not in lost}
