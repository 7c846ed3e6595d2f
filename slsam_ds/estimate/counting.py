"""What a model takes, counted on one that has no weights: sizes, FLOPs and activations, by arm and place."""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from slsam_ds.estimate.activations import ActivationBytes, SavedActivations
from slsam_ds.estimate.on_meta import OnMeta
from slsam_ds.model.layers import LayerMap, norm_layers
from slsam_ds.pricing.calibration import calibrate, flop_counter, requiring_grad
from slsam_ds.pricing.cost import CostModel
from slsam_ds.protocol import ALWAYS, Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What one micro-batch takes on one rank.

    Attributes:
        names: Of the arms.
        numels: Weights by arm.
        depths: By arm: how many blocks are below it.
        ends: Backward ends at the lowest active arm, and not before the first block whatever is sampled.
        in_blocks: By arm: whether it is a block, or around them.
        always: Weights trained in every step.
        norm_layers: The arms that are weights of normalisation layers.
        blocks: All weights by block, frozen ones too.
        outside: All weights outside of the blocks.
        costs: Prices of samples, AdamW's step being 1.
        flops: Of forward and backward with everything active: AdamW's step.
        activations: By who is trained: bytes that its forward saves.
        hidden: Bytes of what one block hands to the next.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    depths: tuple[int, ...]
    in_blocks: tuple[bool, ...]
    ends: bool
    always: int
    norm_layers: tuple[int, ...]
    blocks: tuple[int, ...]
    outside: int
    costs: CostModel
    flops: float
    activations: ActivationBytes
    hidden: int

    @property
    def trained(self) -> int:
        """Weights that may ever be trained."""
        return sum(self.numels) + self.always

    @property
    def total(self) -> int:
        """All weights."""
        return sum(self.blocks) + self.outside


def count(
    engine: Engine,
    model: nn.Module,
    layers: LayerMap,
    compute_loss: Callable[[], Tensor],
    *,
    keeps_inputs: bool,
    checkpoint: Callable[[contextlib.AbstractContextManager[Any]], object] | None,
) -> Counted:
    """Run a model on meta tensors, a handful of times.

    Args:
        engine: Of the model.
        model: On meta, in training mode.
        layers: Its arms.
        compute_loss: Forward of one micro-batch.
        keeps_inputs: Linear layers keep their inputs whether they are active or not: ZeRO-3's do.
        checkpoint: Switches gradient checkpointing on; blocks are to run again within the context that it is given,
            for autograd puts such modes aside. None: leave it off.

    Raises:
        ValueError: The model cannot be counted.
    """

    if layers.stack is None:
        raise ValueError("a step cannot be estimated when slsam.layers names the layers: set slsam.layers=null")

    def run() -> None:
        with on_meta:
            engine.backward(compute_loss())

    on_meta = OnMeta(keeps_inputs=False)
    saved = _ActivationCounter(engine, layers, compute_loss, OnMeta(keeps_inputs=keeps_inputs))
    activations = saved.find()
    if checkpoint is not None:
        recomputed = saved.largest_block
        checkpoint(on_meta)
        kept = saved.find()
        activations = replace(kept, base=tuple(base + recomputed for base in kept.base))
    costs = calibrate(engine, model, layers, run)
    engine.end_step()
    with flop_counter() as counter:
        run()
    blocks = tuple(_num_weights(block) for block in layers.stack.children())
    return Counted(
        names=tuple(layer.name for layer in layers),
        numels=layers.numels,
        depths=tuple(layer.depth for layer in layers),
        in_blocks=tuple(not around for around in layers.outside_blocks),
        ends=saved.ends,
        always=sum(parameter.numel() for _, parameter in layers.always),
        norm_layers=norm_layers(model, layers),
        blocks=blocks,
        outside=_num_weights(model) - sum(blocks),
        costs=costs,
        flops=float(counter.get_total_flops()),
        activations=activations,
        hidden=saved.hidden,
    )


class _ActivationCounter:
    """Activations by sample, from a few forwards: what a place keeps depends on which of its own arms are active, and
    on whether anything below it is.

    Places: 0 is before the blocks, then one for each block, then what comes after.

    Attributes:
        largest_block: Bytes of the block that keeps most.
        hidden: Bytes of what a block hands on.
        ends: Backward ends at the lowest active arm.
    """

    def __init__(
        self, engine: Engine, layers: LayerMap, compute_loss: Callable[[], Tensor], on_meta: TorchFunctionMode
    ) -> None:
        assert layers.stack is not None
        self._engine, self._layers, self._compute_loss, self._on_meta = engine, layers, compute_loss, on_meta
        self._blocks = list(layers.stack.children())
        self._before = [
            around and layer.depth == 0 for around, layer in zip(layers.outside_blocks, layers, strict=True)
        ]
        self._place = [0 if before else layer.depth + 1 for before, layer in zip(self._before, layers, strict=True)]
        self.largest_block = self.hidden = 0
        self.ends = not layers.always

    def find(self) -> ActivationBytes:
        """By the lowest arm of a sample, and by each arm in it."""
        arms = list(range(len(self._layers)))
        always = [ALWAYS] if self._layers.always else []
        everything = self._count([*arms, *always])
        lowest_only = self._count(always or [0])
        self.largest_block = max(everything[place + 1] for place in range(len(self._blocks)))
        most = {place: float(everything[place] - lowest_only[place]) for place in set(self._place)}
        share = self._shares(always or [0], lowest_only, most)

        def found(base: Sequence[float]) -> ActivationBytes:
            return ActivationBytes(tuple(base), share, tuple(self._place), most)

        if always:
            return found([float(lowest_only.total())] * len(arms))
        # What arm 0 shares with the head (tied embeddings) is active in no other sample.
        passive = lowest_only
        if len(arms) > 1:
            with requiring_grad(self._blocks[0]) as flags:
                second = self._count([1])
            passive = second if self._before[0] else lowest_only
            # Arm 1 is the first block, or above it.
            self.ends = not any(flags)
            if not self.ends:
                rest = float(second.total()) - share[1]
                return found([float(lowest_only.total()) - share[0], *[rest] * (len(arms) - 1)])
        cut = self._count([arm for arm in arms if not self._before[arm]], cut=True)
        cut[1] += cut[0]  # before the blocks nothing is active: the first of them keeps its input by itself
        base = []
        for arm, place in enumerate(self._place):
            if arm == 0:
                base.append(float(lowest_only.total()) - share[0])
            else:
                above = sum(num_bytes for other, num_bytes in passive.items() if other > place)
                base.append(float(cut[place] + above) - most[place])
        return found(base)

    def _shares(self, below: Sequence[int], passive: Counter[int], most: Mapping[int, float]) -> tuple[float, ...]:
        """By arm: what a place saves with it more than without, where `below` is active anyway."""
        arms_of: dict[int, list[int]] = {}
        for arm, place in enumerate(self._place):
            arms_of.setdefault(place, []).append(arm)
        shares, alike = [0.0] * len(self._place), {}
        for place, arms in arms_of.items():
            kind = (place in (0, len(self._blocks) + 1), most[place], *(self._layers[arm].numel for arm in arms))
            if kind not in alike:  # the tensors of one block are counted for all blocks like it
                alike[kind] = (
                    [most[place]]
                    if len(arms) == 1
                    else [float(self._count({*below, arm})[place] - passive[place]) for arm in arms]
                )
            for arm, share in zip(arms, alike[kind], strict=True):
                shares[arm] = share
        return tuple(shares)

    def _count(self, arms: Collection[int], *, cut: bool = False) -> Counter[int]:
        """Bytes by place with these arms active; `cut`: as if nothing below a place were, for all places at once."""
        self._engine.begin_step((), arms)
        self._engine.begin_descent()
        saved = SavedActivations()
        with self._placed(saved, cut=cut), self._on_meta, saved.watch():
            loss = self._compute_loss()
        del loss
        return saved.by_place()

    @contextlib.contextmanager
    def _placed(self, saved: SavedActivations, *, cut: bool) -> Iterator[None]:
        """Within, the count knows where the forward is. A block that is checkpointed keeps its input before it runs."""

        def enter(*_: Any) -> None:
            saved.place = max(saved.place, 1)

        def leave(block: nn.Module, inputs: Any, output: Any) -> Any:
            saved.place += 1
            tensor = output if isinstance(output, Tensor) else output[0]
            self.hidden = tensor.numel() * tensor.element_size()
            return tree_map_only(Tensor, Tensor.detach, output) if cut else output

        handles = [self._blocks[0].register_forward_pre_hook(enter)]
        handles += [block.register_forward_hook(leave) for block in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
