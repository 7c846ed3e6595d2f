"""Climb less where gradients are usually large: in the geometry in which Adam descends."""

from typing import Any

import torch
from torch import Tensor

from slsam_ds.metrics.metric import Stretching
from slsam_ds.protocol import Engine, Shard


class Preconditioned(Stretching):
    """ε = ρ D⁻¹ g / ‖D^(-1/2) g‖ with D = sqrt(v) + eps, v being Adam's second moment, corrected as Adam does.

    A layer that the optimizer has never stepped has no moment yet, and is not perturbed.

    Raises:
        ValueError: The optimizer keeps no second moment.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        groups: Any = engine.optimizer.param_groups
        if not all("betas" in group and "eps" in group for group in groups):
            raise ValueError(
                f'slsam.metric="preconditioned": {type(engine.optimizer).__name__} keeps no second moment; use Adam or '
                'AdamW, or metric="euclidean"'
            )
        self._group_of = {group["arm"]: group for group in groups}

    def stretched(self, shard: Shard) -> Tensor:
        piece, gradient = shard.piece, shard.gradient
        state = self._engine.optimizer.state.get(piece.stepped, {})
        moment = state.get("exp_avg_sq")
        if not isinstance(moment, Tensor):
            return torch.zeros_like(gradient, dtype=torch.float32)
        group = self._group_of[piece.arm]
        begun = 1 - group["betas"][1] ** float(state["step"])
        v = piece.part_of(moment).to(gradient.device)
        return gradient.float() / ((v.float() / begun).sqrt() + group["eps"])
