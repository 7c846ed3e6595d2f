"""What a rank holds in a step: one formula for each engine."""

from dataclasses import dataclass

from slsam_ds.choices import read_choice
from slsam_ds.combinations import COMBINATIONS
from slsam_ds.estimate.counting import Counted
from slsam_ds.estimate.draws import Draw
from slsam_ds.estimate.sharding import FP32, RunSetup, StepUse
from slsam_ds.estimate.traffic import kept_fsdp2, kept_zero3
from slsam_ds.model.prefix import MAX_BYTES

_MOMENTS = 2 * FP32  # Adam's two


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on a rank's device, each at its peak, and on its host.

    Attributes:
        weights: Weights or shards of them, including what is gathered at the same time.
        kept: For the descent: weights to restore, hidden states to start from, gradients that its own is mixed with,
            and what stays gathered.
        gradients: Of the pass that finds more.
        optimizer: Master weights, moments and previous gradients, once every layer has been sampled.
        activations: Of one micro-batch, in the pass that saves more.
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


def memory(step: StepUse, draw: Draw) -> Memory:
    """What a rank holds when its step has this draw."""
    setup, counted = step.setup, step.counted
    updated, ascended, part = step.updated(draw), step.ascended(draw), 1 / setup.world_size
    passes = [updated] if ascended is None else [updated, ascended]
    restored = step.weights(step.perturbed(draw)) if step.config.rho > 0 else 0.0
    weight_part = 1.0 if setup.whole_weights else part
    width = FP32 if setup.engine == "fsdp2" else setup.width  # fully_shard casts float32 shards when it gathers them
    shards = counted.total * width * weight_part
    optimizer, on_host = _optimizer(step, updated)
    weights = shards
    if setup.offload_parameters:
        weights, on_host = 0.0, on_host + shards
    return Memory(
        weights=weights + _gathered_at_once(setup, counted),
        kept=restored * width * weight_part + _kept(step, draw) + _mixed(step, draw),
        gradients=_gradients(step, max(map(step.weights, passes)), step.weights(step.touched(draw)), width),
        optimizer=optimizer,
        activations=max(counted.activations.mean(arms) for arms in passes),
        host=on_host,
    )


def _gathered_at_once(setup: RunSetup, counted: Counted) -> float:
    """Bytes of whole weights beside the shards."""
    match setup.engine:
        case "zero3":
            return min(counted.total, setup.reuse_distance / 2) * setup.width
        case "fsdp2":  # a block, the next one, and what is around them
            return (counted.outside + sum(sorted(counted.blocks)[-2:])) * setup.width
        case _:
            return 0.0


def _kept(step: StepUse, draw: Draw) -> float:
    """Bytes of what the ascent leaves for the descent."""
    setup, counted = step.setup, step.counted
    num_kept = min(step.num_ascents, step.num_descents)
    hidden = num_kept * counted.hidden if step.reuses_prefix(step.touched(draw)) else 0
    stays = 0.0
    if setup.engine == "zero3":  # some of it is among what is gathered at once anyway
        room = counted.total - min(counted.total, setup.reuse_distance / 2)
        stays = min(room, kept_zero3(step, draw)) * setup.width
    elif setup.engine == "fsdp2":
        stays = kept_fsdp2(step, draw) * setup.width
    return min(MAX_BYTES, hidden) + stays


def _mixed(step: StepUse, draw: Draw) -> float:
    """Bytes of what the descent's gradient will be mixed with, where it is; and at x, of the part that it takes."""
    (combination, argument), ascended = read_choice(step.config.descend_along, COMBINATIONS), step.ascended(draw)
    if ascended is None or not (combination.takes_part or combination(argument).share_of_ascent):
        return 0.0
    weights = step.weights(step.updated(draw)) + combination.takes_part * step.weights(ascended)
    width = FP32 if step.setup.engine == "fsdp2" else step.setup.width
    is_whole = step.setup.engine == "zero0" or step.config.ascent_scope != "global"
    return weights * width * (1.0 if is_whole else 1 / step.setup.world_size)


def _gradients(step: StepUse, trained: float, touched: float, width: int) -> float:
    """Bytes: whole where the window's gradients wait for its end, else what they are reduced into."""
    setup, part = step.setup, 1 / step.setup.world_size
    if setup.whole_weights:
        return trained * width
    waiting = trained * setup.width if step.most_between_reductions > 1 else 0.0
    if setup.engine == "fsdp2":
        return trained * width * part + waiting
    # ZeRO-3 has room for the shards of what either pass finds; where the optimizer is offloaded, all is on the host.
    return waiting + (0.0 if setup.offload_optimizer else touched * width * part)


def _optimizer(step: StepUse, updated: Draw) -> tuple[float, float]:
    """Bytes on the device and on the host."""
    setup, trained = step.setup, step.counted.trained
    part = 1.0 if setup.engine == "zero0" else 1 / setup.world_size
    # ZeRO keeps masters also of float32 weights; FSDP2's shards are masters themselves.
    has_masters = setup.engine in ("zero1", "zero2", "zero3") or (setup.engine == "zero0" and setup.precision != "fp32")
    masters = trained * FP32 * part if has_masters else 0.0
    waiting = trained * (_MOMENTS + step.num_kept_bytes) * part
    if setup.offload_optimizer:  # with the gradients that DeepSpeed steps there
        return 0.0, masters + waiting + trained * FP32 * part
    if step.config.offload_state:
        # The optimizer steps layer by layer, and has the moments of one at a time.
        one_layer = max(updated.largest(step.counted.numels), step.counted.always)
        fetched_masters = step.weights(updated) * FP32 if has_masters else 0.0
        return (one_layer * _MOMENTS + fetched_masters) * part, masters + waiting
    return masters + waiting, 0.0


def stock_gradients(whole: int, *, bucket: int, world_size: int) -> int:
    """Bytes of gradients that ZeRO-2 and ZeRO-3 hold at least in a step without SL-SAM.

    Backward fills a bucket, reduces it, and keeps this rank's share.

    Args:
        whole: Of all gradients.
        bucket: That are reduced at once.
        world_size: Ranks.
    """
    return max(min(whole, bucket), whole // world_size)
