"""AdamW, dense SAM and SL-SAM side by side: the same machine in three configurations."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from slsam_ds.config import SLSAMConfig
from slsam_ds.estimate.counting import Counted
from slsam_ds.estimate.draws import Draw, Draws, find_draws
from slsam_ds.estimate.memory import Memory, memory
from slsam_ds.estimate.sharding import RunSetup, StepUse
from slsam_ds.estimate.traffic import gathered, reduced

MEMORY_KINDS = (*(field.name for field in dataclasses.fields(Memory)), "total")


@dataclass(frozen=True, slots=True)
class Spread:
    """Lowest, mean and highest value over the samples of a mode."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """What a step takes on each rank.

    Attributes:
        name: Of the mode.
        num_active: Expected number of layers per step that are updated.
        num_perturbed: And that are perturbed, in a step that climbs.
        price: FLOPs, AdamW's being 1.
        flops: FLOPs of the window, forward and backward.
        memory: Bytes by kind, and in all.
        reduced: Bytes of gradients that are reduced.
        gathered: Bytes of weights that are gathered.
    """

    name: str
    num_active: float
    num_perturbed: float
    price: Spread
    flops: Spread
    memory: dict[str, Spread]
    reduced: Spread
    gathered: Spread


def compare(counted: Counted, setup: RunSetup, config: SLSAMConfig) -> list[Mode]:
    """AdamW and dense SAM on the parameters that SL-SAM trains, and SL-SAM.

    Raises:
        ValueError: More layers per step than there are, or a budget that cannot be met.
    """
    everything = SLSAMConfig(selector="all", rho=config.rho or SLSAMConfig().rho, prefix_reuse=config.prefix_reuse)
    modes = {"AdamW": dataclasses.replace(everything, rho=0.0), "dense SAM": everything, "SL-SAM": config}
    return [_take(name, StepUse(counted, setup, knobs)) for name, knobs in modes.items()]


def _take(name: str, step: StepUse) -> Mode:
    counted, setup, share = step.counted, step.setup, step.ascent_share
    expected = counted.costs.prices(step.workload.thinned(share))
    draws = find_draws(step.config, counted.numels, expected)
    # What is held is at its peak in a step that climbs. What is computed and sent is a mean over all steps.
    kinds = [(share, step), (1 - share, step.without_ascent())]
    kinds = [(weight, kind) for weight, kind in kinds if weight > 0]

    def spent(quantity: Callable[[StepUse, Draw], float], factor: float = 1.0) -> Spread:
        spreads = [(weight, _spread(draws, partial(quantity, kind))) for weight, kind in kinds]
        return Spread(
            factor * math.fsum(weight * spread.mean for weight, spread in spreads),
            factor * min(spread.lowest for _, spread in spreads),
            factor * max(spread.highest for _, spread in spreads),
        )

    def held(kind: str) -> Spread:
        return _spread(draws, lambda draw: getattr(memory(step, draw), kind))

    return Mode(
        name=name,
        num_active=draws.mean(lambda draw: sum(step.updated(draw).included)),
        num_perturbed=draws.mean(lambda draw: sum(step.perturbed(draw).included)) if share else 0.0,
        price=spent(StepUse.price),
        flops=spent(StepUse.price, counted.flops * setup.num_micro_batches),
        memory={kind: held(kind) for kind in MEMORY_KINDS},
        reduced=spent(reduced),
        gathered=spent(gathered),
    )


def _spread(draws: Draws, quantity: Callable[[Draw], float]) -> Spread:
    return Spread(draws.mean(quantity), *draws.range(quantity))
