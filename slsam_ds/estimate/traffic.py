"""What travels in a step: one formula for each engine.

Payload as the engines hand it to the collectives: a reduction counts what goes in, a gathering what comes out. A few
numbers per step for statistics and agreement are left out, and padding too. ZeRO-3 has learned its order of fetches.
"""

import math

from slsam_ds.estimate.draws import Draw
from slsam_ds.estimate.sharding import StepUse
from slsam_ds.protocol import MAX_KEPT_BYTES


def reduced(step: StepUse, draw: Draw) -> float:
    """Bytes of gradients that a rank hands over in a step: once for each pass, whatever the window."""
    num_passes = 1 + (step.num_ascents > 0 and step.config.ascent_scope == "global")
    return num_passes * step.sampled(draw) * step.setup.width


def gathered(step: StepUse, draw: Draw) -> float:
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


def _gathered_zero12(step: StepUse, draw: Draw) -> float:
    """The sample: after it was perturbed, and after it was stepped."""
    return (1 + step.publishes) * step.sampled(draw)


def _gathered_zero3(step: StepUse, draw: Draw) -> float:
    """Once per micro-batch and pass, what is too far from its backward once more; what is kept, once per step."""
    kept, num_ascents, num_descents = kept_zero3(step, draw), step.num_ascents, step.setup.num_micro_batches
    again = max(0.0, step.up(draw) - step.setup.reuse_distance / 2 - kept)
    ascents = num_ascents * (step.counted.total - kept + again)
    descents = num_descents * (step.forward(draw) - kept + again)
    return ascents + descents + kept


def kept_zero3(step: StepUse, draw: Draw) -> float:
    """Weights that stay gathered from one backward to the next: what it reads and nobody trains, within a limit."""
    if step.num_ascents == 0:
        return 0.0
    unchanged = step.above(draw) + step.counted.outside - step.outside_below(draw) - step.sampled(draw)
    return min(step.setup.reuse_distance / 2, unchanged)


def _gathered_fsdp2(step: StepUse, draw: Draw) -> float:
    """Blocks for every forward and for every backward that reaches them, what is around them once for both.

    What is kept is gathered once per step.
    """
    num_ascents, num_descents = step.num_ascents, step.setup.num_micro_batches
    blocks, around = _kept_fsdp2(step, draw)
    ascents = num_ascents * (step.counted.total + step.up(draw) - 2 * blocks - around)
    descents = num_descents * (step.forward(draw) + step.up(draw) - 2 * blocks - around)
    return ascents + descents + blocks + around


def kept_fsdp2(step: StepUse, draw: Draw) -> float:
    """Weights that stay gathered likewise, to the end of the step: of modules of which nothing is sampled."""
    return sum(_kept_fsdp2(step, draw))


def _kept_fsdp2(step: StepUse, draw: Draw) -> tuple[float, float]:
    """Those of blocks, and of what is around them, within a limit; the blocks come first."""
    if step.num_ascents == 0:
        return 0.0, 0.0
    counted = step.counted
    by_arm = [
        counted.blocks[depth] if inside else 0 for depth, inside in zip(counted.depths, counted.in_blocks, strict=True)
    ]
    around = [chance for chance, inside in zip(draw.included, counted.in_blocks, strict=True) if not inside]
    frozen_around = 0.0 if counted.always else math.prod(1 - chance for chance in around)
    room = MAX_KEPT_BYTES / step.setup.width
    blocks = min(room, step.above(draw) - draw.total(by_arm))
    return blocks, min(room - blocks, frozen_around * counted.outside)
