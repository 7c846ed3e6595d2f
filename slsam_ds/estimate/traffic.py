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
    weights, ascended = step.weights(step.updated(draw)), step.ascended(draw)
    if ascended is not None:
        weights += step.num_reductions * step.weights(ascended)
    return weights * step.setup.width


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
    """What was perturbed, and then what was stepped."""
    published = step.weights(step.perturbed(draw)) if step.publishes else 0.0
    return published + step.weights(step.updated(draw))


def _gathered_zero3(step: StepUse, draw: Draw) -> float:
    """Once per micro-batch and pass, what is too far from its backward once more; what is kept, once per step."""
    kept, ascended, num_descents = kept_zero3(step, draw), step.ascended(draw), step.num_descents

    def again(arms: Draw) -> float:
        return max(0.0, step.up(arms) - step.setup.reuse_distance / 2 - kept)

    gathered = kept + num_descents * (step.forward(step.touched(draw)) - kept + again(step.updated(draw)))
    if ascended is not None:
        gathered += step.num_ascents * (step.counted.total - kept + again(ascended))
    return gathered


def kept_zero3(step: StepUse, draw: Draw) -> float:
    """Weights that stay gathered from one backward to the next: what it reads and nobody trains, within a limit."""
    ascended = step.ascended(draw)
    if ascended is None:
        return 0.0
    read = step.above(ascended) + step.counted.outside - step.outside_below(ascended)
    return min(step.setup.reuse_distance / 2, max(0.0, read - step.weights(step.touched(draw))))


def _gathered_fsdp2(step: StepUse, draw: Draw) -> float:
    """Blocks for every forward and for every backward that reaches them, what is around them once for both.

    What is kept is gathered once per step.
    """
    (blocks, around), ascended = _kept_fsdp2(step, draw), step.ascended(draw)
    descent = step.forward(step.touched(draw)) + step.up(step.updated(draw)) - 2 * blocks - around
    gathered = step.num_descents * descent + blocks + around
    if ascended is not None:
        gathered += step.num_ascents * (step.counted.total + step.up(ascended) - 2 * blocks - around)
    return gathered


def kept_fsdp2(step: StepUse, draw: Draw) -> float:
    """Weights that stay gathered likewise, to the end of the step: of modules of which nothing is sampled."""
    return sum(_kept_fsdp2(step, draw))


def _kept_fsdp2(step: StepUse, draw: Draw) -> tuple[float, float]:
    """Those of blocks, and of what is around them, within a limit; the blocks come first."""
    counted, ascended, touched = step.counted, step.ascended(draw), step.touched(draw)
    if ascended is None:
        return 0.0, 0.0
    around = [chance for chance, inside in zip(touched.included, counted.in_blocks, strict=True) if not inside]
    frozen_around = 0.0 if counted.always else math.prod(1 - chance for chance in around)
    room = MAX_KEPT_BYTES / step.setup.width
    blocks = min(room, step.untouched_above(ascended, touched))
    return blocks, min(room - blocks, frozen_around * counted.outside)
