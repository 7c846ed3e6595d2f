"""The gradient of a pass, or whatever else a step climbs along."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from slsam_ds.protocol import Shard


@dataclass(frozen=True, slots=True)
class Gradient:
    """One vector over the weights of some arms, this rank's shards of it. The host has not read its numbers yet.

    Attributes:
        arms: Those that `sq_norms` is about, ascending.
        shards: Of these arms, `loss_scale` times too large.
        sq_norms: Squared L2 norm by arm, not scaled: over all ranks, or over this one where the ascent is local.
            Shape (len(arms),), float64, on the engine's device.
        loss_scale: See `Engine.loss_scale`.
    """

    arms: tuple[int, ...]
    shards: list[Shard]
    sq_norms: Tensor
    loss_scale: float = 1.0

    def restricted(self, arms: Collection[int]) -> "Gradient":
        """The part of it that belongs to these arms."""
        places = [place for place, arm in enumerate(self.arms) if arm in arms]
        if len(places) == len(self.arms):
            return self
        return Gradient(
            tuple(self.arms[place] for place in places),
            [shard for shard in self.shards if shard.piece.arm in arms],
            torch.stack([self.sq_norms[place] for place in places]),  # an index from the host would wait for the device
            self.loss_scale,
        )
