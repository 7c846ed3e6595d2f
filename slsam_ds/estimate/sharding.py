"""Where the bytes are, and which of them travel: one formula for each engine.

Payload as the engines hand it to the collectives: a reduction counts what goes in, a gathering what comes out. A few
numbers per step for statistics and agreement are left out, and padding too.
"""

import math
from dataclasses import dataclass
from typing import Literal

from slsam_ds.config import SLSAMConfig
from slsam_ds.cost import Passes
from slsam_ds.estimate.counting import Counted
from slsam_ds.estimate.draws import Draw

EngineName = Literal["zero0", "zero1", "zero2", "zero3", "fsdp2"]
Precision = Literal["fp32", "bf16", "fp16"]

_FP32 = 4
_MOMENTS = 2 * _FP32  # Adam's two
_PREVIOUS = 2  # `PreviousGradients` are bf16
_MAX_PREFIX = 2**30  # bytes, as `Prefix` has it
_MAX_KEPT_FSDP2 = 2**30  # bytes, as `FSDP2Engine` has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
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
        return _FP32 if self.precision == "fp32" else 2

    @property
    def whole_weights(self) -> bool:
        """Every rank holds them."""
        return self.engine in ("zero0", "zero1", "zero2")


@dataclass(frozen=True, slots=True)
class Step:
    """A step as a configuration runs it in a setup: on the draws of which its quantities depend."""

    counted: Counted
    setup: Setup
    config: SLSAMConfig

    @property
    def passes(self) -> Passes:
        """In shares of the window."""
        reuses = self.config.prefix_reuse is not False
        return Passes.of(self.config, self.setup.num_micro_batches, reuses_prefix=reuses)

    @property
    def num_ascents(self) -> int:
        """Micro-batches of the ascent."""
        wanted = self.passes.ascent * self.setup.num_micro_batches
        whole = self.config.ascent_scope == "micro_batch" and wanted > 0
        return self.setup.num_micro_batches if whole else math.ceil(wanted - 1e-9)

    @property
    def publishes(self) -> bool:
        """Perturbed shards travel to where forward reads them."""
        return self.config.rho > 0 and self.config.ascent_scope == "global"

    def sampled(self, draw: Draw) -> float:
        """Weights that are trained."""
        return draw.total(self.counted.numels) + self.counted.always

    def up(self, draw: Draw) -> int:
        """Weights of the blocks that backward goes through."""
        return sum(self.counted.blocks[0 if self.counted.always else self.counted.depths[draw.lowest] :])

    def reuses_prefix(self, draw: Draw) -> bool:
        """The descent starts above the blocks below the lowest arm, of micro-batches that the ascent has taken."""
        return self.passes.reused > 0 and self.counted.depths[draw.lowest] >= 2 and not self.counted.always

    def forward(self, draw: Draw) -> float:
        """Weights that the forwards of a descent read, on average over its micro-batches."""
        below = self.counted.total - self.counted.outside - self.up(draw)
        return self.counted.total - (self.passes.reused * below if self.reuses_prefix(draw) else 0.0)


def reduced(step: Step, draw: Draw) -> float:
    """Bytes of gradients that a rank hands over in a step: once for each pass, whatever the window."""
    num_passes = 1 + (step.num_ascents > 0 and step.config.ascent_scope == "global")
    return num_passes * step.sampled(draw) * step.setup.width


def gathered(step: Step, draw: Draw) -> float:
    """Bytes of weights that a rank receives in a step."""
    match step.setup.engine:
        case "zero0":
            return 0.0  # every rank perturbs and steps its own whole copy
        case "zero1" | "zero2":
            weights = _gathered_zero12(step, draw)
        case "zero3":
            weights = _gathered_zero3(step, draw)
        case "fsdp2":
            weights = _gathered_fsdp2(step, draw)
    return weights * step.setup.width


def _gathered_zero12(step: Step, draw: Draw) -> float:
    """The sample: after it was perturbed, and after it was stepped."""
    return (1 + step.publishes) * step.sampled(draw)


def _gathered_zero3(step: Step, draw: Draw) -> float:
    """Once per micro-batch and pass, what is too far from its backward once more; what is kept, once per step."""
    kept, num_ascents, num_descents = _kept_zero3(step, draw), step.num_ascents, step.setup.num_micro_batches
    again = max(0.0, step.up(draw) - step.setup.reuse_distance / 2 - kept)
    ascents = num_ascents * (step.counted.total - kept + again)
    descents = num_descents * (step.forward(draw) - kept + again)
    return ascents + descents + kept


def _kept_zero3(step: Step, draw: Draw) -> float:
    """Weights that stay gathered from the ascent to the descent: what it reads and neither trains, within a limit."""
    if step.num_ascents == 0:
        return 0.0
    unchanged = step.up(draw) + step.counted.outside - step.sampled(draw)
    return min(step.setup.reuse_distance / 2, unchanged)


def _gathered_fsdp2(step: Step, draw: Draw) -> float:
    """Blocks for every forward and for every backward that reaches them, what is around them once for both.

    What is kept after a backward of the ascent, the next forward finds.
    """
    ascents = step.num_ascents * (step.counted.total + step.up(draw) - _kept_fsdp2(step, draw))
    return ascents + step.setup.num_micro_batches * (step.forward(draw) + step.up(draw))


def _kept_fsdp2(step: Step, draw: Draw) -> float:
    """Weights that stay gathered likewise: of modules of which nothing is sampled, within a limit."""
    if step.num_ascents == 0:
        return 0.0
    counted = step.counted
    by_arm = [
        counted.blocks[depth] if inside else 0 for depth, inside in zip(counted.depths, counted.in_blocks, strict=True)
    ]
    around = [chance for chance, inside in zip(draw.included, counted.in_blocks, strict=True) if not inside]
    frozen_around = 0.0 if counted.always else math.prod(1 - chance for chance in around)
    unchanged = step.up(draw) - draw.total(by_arm) + frozen_around * counted.outside
    return min(_MAX_KEPT_FSDP2 / step.setup.width, unchanged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on a rank's device, each at its peak, and on its host.

    Attributes:
        weights: Or shards of them, with what is gathered at once.
        kept: For the descent: weights to restore, hidden states to start from, and what stays gathered.
        gradients: Of the sample.
        optimizer: Masters, moments and previous gradients, once every layer has been sampled.
        activations: Of one micro-batch.
        host: What was offloaded.
    """

    weights: float
    kept: float
    gradients: float
    optimizer: float
    activations: float
    host: float

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.kept + self.gradients + self.optimizer + self.activations


def memory(step: Step, draw: Draw) -> Memory:
    """What a rank holds when its step has this draw."""
    setup, counted = step.setup, step.counted
    sampled, part = step.sampled(draw), 1 / setup.world_size
    weight_part = 1.0 if setup.whole_weights else part
    width = _FP32 if setup.engine == "fsdp2" else setup.width  # fully_shard casts float32 shards when it gathers them
    shards = counted.total * width * weight_part
    optimizer, on_host = _optimizer(step, sampled)
    weights = shards
    if setup.offload_parameters:
        weights, on_host = 0.0, on_host + shards
    return Memory(
        weights=weights + _gathered_at_once(setup, counted),
        kept=(sampled * width * weight_part if step.config.rho > 0 else 0.0) + _kept(step, draw),
        gradients=_gradients(step, sampled, width),
        optimizer=optimizer,
        activations=draw.price(counted.activations),
        host=on_host,
    )


def _gathered_at_once(setup: Setup, counted: Counted) -> float:
    """Bytes of whole weights beside the shards."""
    match setup.engine:
        case "zero3":
            return min(counted.total, setup.reuse_distance / 2) * setup.width
        case "fsdp2":  # a block, the next one, and what is around them
            return (counted.outside + sum(sorted(counted.blocks)[-2:])) * setup.width
        case _:
            return 0.0


def _kept(step: Step, draw: Draw) -> float:
    """Bytes of what the ascent leaves for the descent."""
    setup, counted = step.setup, step.counted
    hidden = step.num_ascents * counted.hidden if step.reuses_prefix(draw) else 0
    stays = 0.0
    if setup.engine == "zero3":  # some of it is among what is gathered at once anyway
        room = counted.total - min(counted.total, setup.reuse_distance / 2)
        stays = min(room, _kept_zero3(step, draw)) * setup.width
    elif setup.engine == "fsdp2":
        stays = _kept_fsdp2(step, draw) * setup.width
    return min(_MAX_PREFIX, hidden) + stays


def _gradients(step: Step, sampled: float, width: int) -> float:
    """Bytes: whole where the window's gradients wait for its end, else what they are reduced into."""
    setup, part = step.setup, 1 / step.setup.world_size
    if setup.whole_weights:
        return sampled * width
    waiting = sampled * setup.width if setup.num_micro_batches > 1 else 0.0
    if setup.engine == "fsdp2":
        return sampled * width * part + waiting
    # ZeRO-3 has one buffer for the shards of everything that is trainable, from the start, where the optimizer is.
    return waiting + (0.0 if setup.offload_optimizer else step.counted.trained * width * part)


def _optimizer(step: Step, sampled: float) -> tuple[float, float]:
    """Bytes on the device and on the host."""
    setup, trained = step.setup, step.counted.trained
    part = 1.0 if setup.engine == "zero0" else 1 / setup.world_size
    # ZeRO keeps masters also of float32 weights; FSDP2's shards are masters themselves.
    has_masters = setup.engine in ("zero1", "zero2", "zero3") or (setup.engine == "zero0" and setup.precision != "fp32")
    masters = trained * _FP32 * part if has_masters else 0.0
    previous = _PREVIOUS if step.config.ascent_source == "previous" and step.config.rho > 0 else 0
    waiting = trained * (_MOMENTS + previous) * part
    if setup.offload_optimizer:  # with the gradients that DeepSpeed steps there
        return 0.0, masters + waiting + trained * _FP32 * part
    if step.config.offload_state:
        return masters + sampled * _MOMENTS * part, waiting
    return masters + waiting, 0.0
