"""How a run is laid out: what the formulas for memory and traffic start from."""

from dataclasses import dataclass, replace
from typing import Literal

from slsam_ds.choices import read_choice
from slsam_ds.combinations import COMBINATIONS
from slsam_ds.config import SLSAMConfig
from slsam_ds.directions import DIRECTIONS
from slsam_ds.estimate.counting import Counted
from slsam_ds.estimate.draws import Draw
from slsam_ds.model.micro_batches import ascent_part, is_whole
from slsam_ds.pricing.cost import Workload
from slsam_ds.schedules import make_schedule

EngineName = Literal["zero0", "zero1", "zero2", "zero3", "fsdp2"]
Precision = Literal["fp32", "bf16", "fp16"]

FP32 = 4
"""Bytes of a number."""

_MANY_STEPS = 10**6  # of a run whose length is not known: what a schedule rounds then does not show


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetup:
    """The run.

    Attributes:
        engine: Whose formulas.
        world_size: Ranks.
        num_micro_batches: Of a window: the gradient accumulation steps.
        precision: Of the weights as forward reads them.
        offload_optimizer: Masters and moments are on the host.
        offload_parameters: So are ZeRO-3's shards of the weights.
        reuse_distance: ZeRO-3 keeps gathered what it reads again within so many weights
            (`stage3_max_reuse_distance`, or `stage3_max_live_parameters` where that is smaller).
    """

    engine: EngineName
    world_size: int = 1
    num_micro_batches: int = 1
    precision: Precision = "bf16"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reuse_distance: int = 10**9

    @property
    def width(self) -> int:
        """Bytes of a weight as forward reads it, and of its gradient as it travels."""
        return FP32 if self.precision == "fp32" else 2

    @property
    def whole_weights(self) -> bool:
        """Every rank holds them."""
        return self.engine in ("zero0", "zero1", "zero2")


@dataclass(frozen=True, slots=True)
class StepUse:
    """A step as a configuration runs it in a setup: on the draws of which its quantities depend."""

    counted: Counted
    setup: RunSetup
    config: SLSAMConfig

    @property
    def ascent_share(self) -> float:
        """Share of the run's steps that climb."""
        return make_schedule(self.config.ascend_when, total_steps=_MANY_STEPS).share if self.config.rho > 0 else 0.0

    def without_ascent(self) -> "StepUse":
        """The step as it is where the schedule does not let it climb."""
        return replace(self, config=replace(self.config, rho=0.0, mask=None))

    @property
    def workload(self) -> Workload:
        """In shares of the window, of a step that climbs."""
        reuses = self.config.prefix_reuse is not False
        return Workload.of(self.config, self.setup.num_micro_batches, reuses_prefix=reuses)

    @property
    def num_kept_bytes(self) -> float:
        """Bytes per trained weight that the ascent direction keeps beside the optimizer's moments, and the mask."""
        if self.config.rho == 0:
            return 0.0
        of_mask = 0.0 if self.config.mask is None else 1 / 8  # a bit
        return sum(dtype.itemsize for dtype in DIRECTIONS[self.config.ascent_source].kept.values()) + of_mask

    @property
    def num_ascents(self) -> int:
        """Micro-batches of the ascent."""
        if self.workload.ascent == 0:
            return 0
        if self.config.descends_on_part:
            return self.setup.num_micro_batches + (self.num_descents if self._part_is_apart else 0)
        of_each = self.config.ascent_scope == "micro_batch"
        return ascent_part(self.config.ascent_fraction, self.setup.num_micro_batches, of_each=of_each)[0]

    @property
    def num_descents(self) -> int:
        """Micro-batches of the descent."""
        if self.config.descends_on_part:
            return ascent_part(self.config.ascent_fraction, self.setup.num_micro_batches, of_each=False)[0]
        return self.setup.num_micro_batches

    @property
    def _part_is_apart(self) -> bool:
        """What the descent takes is run by itself: samples, no whole micro-batches."""
        share = ascent_part(self.config.ascent_fraction, self.setup.num_micro_batches, of_each=False)[1]
        return not is_whole(share)

    @property
    def most_between_reductions(self) -> int:
        """Micro-batches whose gradients add up before they are reduced."""
        num = self.setup.num_micro_batches
        if not self.config.descends_on_part or self._part_is_apart:
            return num
        return max(self.num_descents, num - self.num_descents)

    @property
    def num_reductions(self) -> int:
        """Of the ascent's gradients: of each part by itself, where the descent takes one of them."""
        return 0 if self.num_ascents == 0 or self.config.ascent_scope != "global" else 1 + self.config.descends_on_part

    @property
    def publishes(self) -> bool:
        """Perturbed shards travel to where forward reads them."""
        return self.config.rho > 0 and self.config.ascent_scope == "global"

    def updated(self, sample: Draw) -> Draw:
        """The arms that a sample updates."""
        return sample.spread(self.config.update)

    def perturbed(self, sample: Draw) -> Draw:
        """And those that it perturbs, in a step that climbs.

        Raises:
            ValueError: These are normalisation layers, and there are none.
        """
        if self.config.perturb == "norm_layers" and not self.counted.norm_layers:
            raise ValueError('slsam.perturb="norm_layers": the model trains no weights of normalisation layers')
        return sample.spread(self.config.perturb, self.counted.norm_layers)

    def ascended(self, sample: Draw) -> Draw | None:
        """And those whose gradient the ascent finds; None: there is no ascent pass."""
        if self.num_ascents == 0:
            return None
        perturbed, reads = self.perturbed(sample), read_choice(self.config.descend_along, COMBINATIONS)[0].reads_ascent
        return perturbed.joined(self.updated(sample)) if reads else perturbed

    def touched(self, sample: Draw) -> Draw:
        """And all whose gradient either pass finds."""
        ascended, updated = self.ascended(sample), self.updated(sample)
        return updated.joined(ascended) if ascended is not None else updated

    def price(self, sample: Draw) -> float:
        """FLOPs of the step, AdamW's being 1."""
        costs, ascended, updated = self.counted.costs, self.ascended(sample), self.updated(sample)

        def forward_backward(arms: Draw) -> float:
            return costs.forward + costs.backward_above[arms.lowest] + arms.total(costs.weight_gradient)

        if ascended is None:
            return forward_backward(updated)
        workload, below = self.workload, costs.forward_below[min(ascended.lowest, updated.lowest)]
        both = workload.ascent * forward_backward(ascended) + workload.descent * forward_backward(updated)
        return both - workload.reused * below

    def weights(self, arms: Draw) -> float:
        """Weights of some arms, and of what takes part in every step."""
        return arms.total(self.counted.numels) + self.counted.always

    def above(self, draw: Draw) -> int:
        """Weights of the blocks from the lowest arm up."""
        return sum(self.counted.blocks[self._first_block(draw) :])

    def untouched_above(self, draw: Draw, touched: Draw) -> float:
        """Of these the weights of blocks of which nothing is touched."""
        first = self._first_block(draw)
        frozen = [1.0 if depth >= first else 0.0 for depth in range(len(self.counted.blocks))]
        for depth, inside, chance in zip(self.counted.depths, self.counted.in_blocks, touched.included, strict=True):
            if inside:
                frozen[depth] *= 1 - chance
        return sum(chance * numel for chance, numel in zip(frozen, self.counted.blocks, strict=True))

    def outside_below(self, draw: Draw) -> int:
        """Weights outside of the blocks, below the lowest arm: embeddings, which no backward reads."""
        below = zip(self.counted.numels[: draw.lowest], self.counted.in_blocks[: draw.lowest], strict=True)
        return sum(numel for numel, in_block in below if not in_block)

    def up(self, draw: Draw) -> int:
        """Weights of the blocks that backward goes through."""
        return sum(self.counted.blocks[self.counted.depths[draw.lowest] if self.counted.ends else 0 :])

    def reuses_prefix(self, draw: Draw) -> bool:
        """The descent starts above the blocks below the lowest arm, of micro-batches that the ascent has taken."""
        return self.workload.reused > 0 and self.counted.depths[draw.lowest] >= 2 and self.counted.ends

    def _first_block(self, draw: Draw) -> int:
        return 0 if self.counted.always else self.counted.depths[draw.lowest]

    def forward(self, draw: Draw) -> float:
        """Weights that the forwards of a descent read, on average over its micro-batches."""
        below = self.counted.total - self.counted.outside - self.up(draw)
        reused = self.workload.reused / self.workload.descent  # shares of the window
        return self.counted.total - (reused * below if self.reuses_prefix(draw) else 0.0)
