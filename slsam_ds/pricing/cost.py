"""What a sample costs: FLOPs of a step, relative to a step of AdamW on the same parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.micro_batches import ascent_part, num_kept


@dataclass(frozen=True, slots=True)
class PriceList:
    """What a sample costs: what its lowest arm decides, and what each arm in it adds. A step of AdamW is 1.

    Attributes:
        base: By arm, if it is the lowest.
        share: By arm, if it is in the sample.
    """

    base: tuple[float, ...]
    share: tuple[float, ...]

    def of(self, sample: Sequence[int]) -> float:
        """The price of a step on these arms."""
        return self.base[min(sample)] + sum(self.share[arm] for arm in sample)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """FLOPs of the parts of a step, AdamW's whole step being 1. Arms are in forward order.

    Backward runs from the loss down to the lowest active arm and computes weight gradients of the active arms alone.

    Attributes:
        forward: A forward of the whole model.
        forward_below: By arm: the blocks below it, which a descent that reuses the prefix does not run.
        backward_above: By arm: what backward computes on its way down to it, less the arms' weight gradients.
        weight_gradient: By arm: its weight gradients.
    """

    forward: float
    forward_below: tuple[float, ...]
    backward_above: tuple[float, ...]
    weight_gradient: tuple[float, ...]

    def prices(self, passes: "Passes") -> PriceList:
        """What samples cost in steps of these passes."""
        both = passes.ascent + 1
        base = [
            both * (self.forward + above) - passes.reused * below
            for above, below in zip(self.backward_above, self.forward_below, strict=True)
        ]
        return PriceList(tuple(base), tuple(both * gradient for gradient in self.weight_gradient))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` and JSON have made of it."""
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What a step runs, in shares of the window.

    Attributes:
        ascent: What the ascent runs on: 1 for two full passes, 0 for a single one.
        reused: For how much of it the descent starts above the prefix.
    """

    ascent: float
    reused: float

    @classmethod
    def of(
        cls, config: SLSAMConfig, num_micro_batches: int, num_samples: int | None = None, *, reuses_prefix: bool
    ) -> "Passes":
        """What the configuration asks for.

        Args:
            config: The knobs.
            num_micro_batches: Of a window.
            num_samples: Of a micro-batch; the ascent takes whole ones. 0: it cannot be divided; None: any share of it
                can be had.
            reuses_prefix: Whether the descent may start above the prefix: of micro-batches that the ascent took whole.
        """
        if config.rho == 0 or config.ascent_source == "previous":
            return cls(ascent=0.0, reused=0.0)
        of_each = config.ascent_scope == "micro_batch"
        num, share = ascent_part(config.ascent_fraction, num_micro_batches, of_each=of_each)
        if num_samples is not None:
            share = num_kept(share, num_samples) / num_samples if num_samples > 0 else 1.0
        whole = math.isclose(share, 1.0)
        ascent = num * share / num_micro_batches
        return cls(ascent=ascent, reused=ascent if reuses_prefix and whole else 0.0)
