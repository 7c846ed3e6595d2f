"""The elements on which the loss depends most, by the empirical Fisher information: SSAM-F."""

from typing import ClassVar

import torch
from torch import Tensor

from slsam_ds.masks.mask import Mask, magnitude
from slsam_ds.masks.selection import Choose, Largest, Parts


class Fisher(Mask):
    """m is 1 for the share `density` of the elements with the largest g², g being what the step climbs along.

    The Fisher information of an element is the mean of squared gradients. The authors add up those of 1,024 single
    samples, each with a pass of its own; nothing is paid for here, and the one gradient is that of the step: over its
    whole window and all ranks, reduced already, so that it is the same on every engine. One squared mean counts what
    the samples have in common, where the mean of squares counts their noise too.

    Until an arm has a mask, all of it moves (in the authors' code nothing does; their first mask comes with the first
    step). Of equal g², in layers that got no gradient for instance, the elements that come first in the model move.

    Reference: Mi et al. 2022; SSAMF in their code.
    """

    asks_for_gradient: ClassVar[bool] = True

    def first(self, numbers: Tensor) -> Tensor:
        return numbers >= 0

    def choose(self, step: int, parts: Parts, count: int, numel: int) -> Choose:
        wanted = torch.full((), count, dtype=torch.int64, device=self._engine.device)
        return Largest(self._engine, parts, lambda part: magnitude(part.gradient), wanted, numel=self._total_numel)
