"""The layers with the largest gradients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slsam_ds.bandit import FixedCount


class TopK(FixedCount):
    """The k arms whose gradient norm was largest when last seen; arms never seen come first, lowest index first."""

    kind = "top_k"

    def __init__(self, num_arms: int, k: int) -> None:
        super().__init__(num_arms, k)
        self._norms: list[float | None] = [None] * num_arms

    def probabilities(self) -> Tensor:
        """1 for the arms of the next sample, 0 for the others. Shape (L,), float64."""
        chosen = self.sample(1)
        return torch.tensor([float(arm in chosen) for arm in range(self.num_arms)], dtype=torch.float64)

    def sample(self, step: int) -> tuple[int, ...]:
        ranks = [-math.inf if norm is None else -norm for norm in self._norms]
        return tuple(sorted(sorted(range(self.num_arms), key=ranks.__getitem__)[: self.k]))

    def observe(self, norms: Mapping[int, float]) -> None:
        for arm, norm in norms.items():
            if not (0 <= arm < self.num_arms and 0 <= norm < math.inf):
                raise ValueError(f"norms={dict(norms)}: give finite norms ≥ 0 of arms from 0 to {self.num_arms - 1}")
        for arm, norm in norms.items():
            self._norms[arm] = float(norm)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._norms = list(state["norms"])
