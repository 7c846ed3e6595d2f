"""Dense SAM as people write it around plain torch: an optimizer called twice per step.

After the definition in Foret et al. 2021 (arXiv 2010.01412, algorithm 1), without anything of `slsam_ds`.
"""

from typing import Any

import torch
from torch import Tensor, nn


class TwoCallSAM:
    """Climb with `first_step`, find the gradient again, return and update with `second_step`.

    Args:
        parameters: What to train. Gradients are expected to be averaged over ranks, as DistributedDataParallel does.
        rho: Radius.
        **settings: Of AdamW.
    """

    def __init__(self, parameters: Any, *, rho: float, **settings: Any) -> None:
        self._parameters: list[nn.Parameter] = list(parameters)
        self._rho = rho
        self._kept: list[Tensor] = []
        self.base = torch.optim.AdamW(self._parameters, **settings)

    @torch.no_grad()
    def first_step(self) -> None:
        """From w to w + rho g / |g|, and forget the gradient."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = self._rho / (norm + 1e-12)
        self._kept = [parameter.clone() for parameter in self._parameters]
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Back to w, and from there along the gradient found at w + rho g / |g|."""
        torch._foreach_copy_(self._parameters, self._kept)
        self._kept.clear()
        self.base.step()
        self.base.zero_grad()
