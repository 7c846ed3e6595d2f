"""Climb along the optimizer's first moment: single-pass SAM that remembers nothing of its own."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from slsam_ds.directions.direction import Direction
from slsam_ds.gradient import Gradient
from slsam_ds.protocol import Engine, Shard
from slsam_ds.tally import local_sq_norms


class Momentum(Direction):
    """Adam's running mean of gradients, or SGD's momentum buffer, read from the optimizer's state.

    An arm that the optimizer has never stepped has no moment yet and is not perturbed. The moment has the sign of the
    gradient: uphill.

    Raises:
        ValueError: The optimizer keeps no first moment.

    Compare Becker, Altrock, Risse 2024 (Momentum-SAM).
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._key = _key_of_first_moment(engine.optimizer)

    def climb(self, arms: tuple[int, ...], ascent: Gradient | None, *, seed: int) -> Gradient | None:
        engine = self._engine
        shards = list(self._moments(arms))
        local = local_sq_norms(shards, arms, rank=engine.ranks.rank, device=engine.device)
        return Gradient(arms, shards, engine.ranks.all_reduce(local))

    def _moments(self, arms: tuple[int, ...]) -> Iterator[Shard]:
        state = self._engine.optimizer.state
        for piece in self._engine.pieces(arms):
            moment = state.get(piece.stepped, {}).get(self._key)
            if isinstance(moment, Tensor):
                yield Shard(piece, piece.part_of(moment))


def _key_of_first_moment(optimizer: Any) -> str:
    """Where the optimizer's state holds it: as torch's, DeepSpeed's and Apex's Adam and SGD call it."""
    groups = optimizer.param_groups
    if all("betas" in group for group in groups):
        return "exp_avg"
    if all(group.get("momentum", 0) for group in groups):
        return "momentum_buffer"
    raise ValueError(
        f'slsam.ascent_source="momentum": {type(optimizer).__name__} keeps no running mean of gradients; use Adam, '
        'AdamW or SGD with momentum, or ascent_source="previous"'
    )
