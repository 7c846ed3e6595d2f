"""What a sample costs: FLOPs of a step, relative to a step of AdamW on the same parameters."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.micro_batches import ascent_part, is_whole, num_kept
from slsam_ds.protocol import ALWAYS

_FIRST_REUSED = 2  # blocks below a lowest arm, from which on they are not run again: as `Prefix.below` has it


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

    def price(self, ascended: Collection[int], updated: Collection[int], workload: "Workload") -> float:
        """The price of a step. Parameters that are trained in every step are in no arm and cost nothing here.

        Args:
            ascended: Arms of the ascent pass; empty: there is none.
            updated: Arms of the descent pass.
            workload: What the step runs where it ascends.
        """
        ascended, updated = ([arm for arm in arms if arm != ALWAYS] for arms in (ascended, updated))
        if not ascended:
            return self._pass(updated)
        below = self.forward_below[min(*ascended, *updated)]
        both = workload.ascent * self._pass(ascended) + workload.descent * self._pass(updated)
        return both - workload.reused * below

    def prices(self, workload: "Workload") -> PriceList:
        """What samples that are perturbed and updated cost in steps of this workload."""
        arms, both = range(len(self.weight_gradient)), workload.ascent + workload.descent
        share = tuple(both * self.weight_gradient[arm] for arm in arms)
        return PriceList(tuple(self.price([arm], [arm], workload) - share[arm] for arm in arms), share)

    def _pass(self, arms: Collection[int]) -> float:
        """A forward over the window, and a backward that finds the gradients of these arms."""
        return self.forward + self.backward_above[min(arms)] + math.fsum(self.weight_gradient[arm] for arm in arms)

    @classmethod
    def by_weights(cls, layers: LayerMap) -> Self:
        """Reckoned from numbers of weights, where nothing was counted.

        A weight costs one unit in the forward, one for the gradient of its layer's inputs, and one for its own
        gradient, if it has one. Attention scores are left out, and an embedding that is trained counts like a product
        of matrices. Where parameters are trained in every step, backward goes all the way down.
        """
        numels = layers.numels
        passed = [sum(layers.passed[layer.depth + 1 :]) for layer in layers]  # at each arm and above it
        forward = sum(numels) + sum(layers.passed)
        above = [sum(numels[layer.index :]) + passed[layer.index] for layer in layers]
        adamw = forward + above[0] + sum(numels)
        below = [forward - above[layer.index] if layer.depth >= _FIRST_REUSED else 0 for layer in layers]
        if layers.always:
            above, below = [above[0]] * len(layers), [0] * len(layers)
        return cls(
            forward=forward / adamw,
            forward_below=tuple(flops / adamw for flops in below),
            backward_above=tuple(flops / adamw for flops in above),
            weight_gradient=tuple(numel / adamw for numel in numels),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` and JSON have made of it."""
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a step runs, in shares of the window.

    Attributes:
        ascent: What the ascent runs on: 1 for two full passes, 0 for a single one.
        reused: For how much of it the descent starts above the prefix.
        descent: What the descent runs on, in a step that ascends.
    """

    ascent: float
    reused: float
    descent: float = 1.0

    @classmethod
    def of(
        cls, config: SLSAMConfig, num_micro_batches: int, num_samples: int | None = None, *, reuses_prefix: bool
    ) -> "Workload":
        """What the configuration asks for.

        Args:
            config: The knobs.
            num_micro_batches: Of a window.
            num_samples: Of a micro-batch; the ascent takes whole ones. 0: it cannot be divided; None: any share of it
                can be had.
            reuses_prefix: Whether the descent may start above the prefix: of micro-batches that the ascent took whole.
        """
        if not config.has_ascent_pass:
            return cls(ascent=0.0, reused=0.0)
        of_each = config.ascent_scope == "micro_batch"
        num, share = ascent_part(config.ascent_fraction, num_micro_batches, of_each=of_each)
        takes_samples = not is_whole(share)
        if num_samples is not None:
            share = num_kept(share, num_samples) / num_samples if num_samples > 0 else 1.0
        ascent = num * share / num_micro_batches
        if config.descends_on_part:  # samples are run by themselves; whole micro-batches are those of the window
            once_more = ascent if takes_samples else 0.0
            return cls(ascent=1.0 + once_more, reused=ascent if reuses_prefix else 0.0, descent=ascent)
        return cls(ascent=ascent, reused=ascent if reuses_prefix and is_whole(share) else 0.0)

    def thinned(self, share: float) -> "Workload":
        """The mean over steps of which only a share ascends."""
        descent = 1 - share * (1 - self.descent)
        return Workload(ascent=self.ascent * share, reused=self.reused * share, descent=descent)
