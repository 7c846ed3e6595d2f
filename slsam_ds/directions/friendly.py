"""Climb along what is new in the gradient: its running mean is left out."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from slsam_ds.directions.direction import Direction
from slsam_ds.directions.kept import KeptVector
from slsam_ds.gradient import Gradient
from slsam_ds.protocol import Engine, Shard
from slsam_ds.tally import local_sq_norms

STATE_KEY = "slsam_mean_gradient"
_DECAY = 0.9


class Friendly(Direction):
    """g - m, where m is the running mean of the ascent gradients before: m ← 0.9 m + 0.1 g, at first m = g.

    The first ascent of a layer climbs along g. The mean is kept in bf16, and moves with the layers that a step both
    perturbs and updates.

    Reference: Li et al. 2024 (Friendly SAM), with the constants of their code.
    """

    for_all_ranks: ClassVar[bool] = True
    needs_pass: ClassVar[bool] = True
    is_gradient: ClassVar[bool] = True
    kept: ClassVar[Mapping[str, torch.dtype]] = {STATE_KEY: torch.bfloat16}

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._mean = KeptVector(engine, STATE_KEY)
        self._updated: set[torch.Tensor] = set()

    def climb(self, arms: tuple[int, ...], ascent: Gradient | None, *, seed: int) -> Gradient | None:
        assert ascent is not None
        engine = self._engine
        shards = []
        for shard in ascent.shards:
            piece, gradient = shard.piece, shard.gradient.float() / ascent.loss_scale
            if self._mean.has(piece):
                mean = self._mean.get(piece).to(gradient.device).float()
                shards.append(Shard(piece, gradient - mean))
                self._mean.put(piece, torch.lerp(mean, gradient, 1 - _DECAY))
            else:
                shards.append(Shard(piece, gradient))
                self._mean.put(piece, gradient)
        local = local_sq_norms(shards, ascent.arms, rank=engine.ranks.rank, device=engine.device)
        return Gradient(ascent.arms, shards, engine.ranks.all_reduce(local))

    def observe(self, descent: Gradient, sq_norms: Mapping[int, float]) -> None:
        self._updated = {shard.piece.stepped for shard in descent.shards}

    def start(self) -> None:
        self._mean.start()

    def keep(self, *, ascent_is_finite: bool) -> None:
        if ascent_is_finite:
            self._mean.keep(self._updated)
