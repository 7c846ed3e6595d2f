"""What every mask has."""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from slsam_ds.gradient import Gradient
from slsam_ds.masks.bits import KeptBits
from slsam_ds.masks.selection import Choose, Part, Parts
from slsam_ds.numbering import numbers_of
from slsam_ds.protocol import Engine, Piece, Shard
from slsam_ds.shards import local_elements

logger = logging.getLogger(__name__)

MASK_KEY = "slsam_mask"

# So many elements are looked at at once: on the CPU, within its caches.
_PART_NUMEL = 2**22
_PART_NUMEL_ON_CPU = 2**18


class Mask(ABC):
    """Says which elements of the perturbed arms move: ε = ρ m T² g / ‖T g‖, where m is 1 or 0 for each element.

    The norm is that of all elements, as in the authors' code: a masked perturbation is shorter than ρ.

    m is found anew in a step that perturbs an arm whose mask is `every` steps old, or which has none. It is then found
    of all arms that the step perturbs, which share the elements that move; it counts from the next step on. Refreshing
    in given steps only, whoever is perturbed there, would leave layers that are sampled seldom without a mask for long.

    All elements are told apart by their number in the model, so that the mask is the same whatever the sharding.

    Args:
        engine: Where the weights and their shards are.
        numels: Weights of each arm, over all ranks.
        density: Share of the elements that move, in (0, 1].
        every: Steps after which a mask is renewed.
        seed: Of what is drawn.
        total_steps: Length of the run; None: unknown.

    Attributes:
        kept: What lies in the optimizer's state while a checkpoint is saved or loaded: see `Direction.kept`.
        asks_for_gradient: Whether the direction must be a gradient: see `Direction.is_gradient`.

    Reference: Mi et al. 2022 (arXiv 2210.05177), 2023 (2306.17504), and their code.
    """

    kept: ClassVar[Mapping[str, torch.dtype]] = {MASK_KEY: torch.uint8}
    asks_for_gradient: ClassVar[bool] = False

    def __init__(
        self,
        engine: Engine,
        numels: Mapping[int, int],
        *,
        density: float,
        every: int,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        self._engine, self._numels = engine, numels
        self._density, self._every = density, every
        self._total_numel = sum(numels.values())
        self._bits = KeptBits(engine, MASK_KEY)
        self._found_in: dict[int, int] = {}  # of each arm that has a mask: the step that found it
        self._pending: tuple[int, tuple[int, ...]] | None = None  # a step, and the arms whose mask it has found

    @abstractmethod
    def first(self, numbers: Tensor) -> Tensor:
        """Which elements move as long as there is no mask of their arm. Padding does not.

        Args:
            numbers: Of the elements; -1 for padding. 1-D, int64.

        Returns:
            Of the same length, bool.
        """

    @abstractmethod
    def choose(self, step: int, parts: Parts, count: int, numel: int) -> Choose:
        """The elements that move from the next step on. Every rank calls it in the same steps.

        Args:
            step: The step's number, from 1.
            parts: This rank's share of the arms.
            count: How many elements are to move, over all ranks.
            numel: Of so many.
        """

    def moves(self, piece: Piece, device: torch.device) -> Tensor:
        """Which of a piece's elements move now. 1-D, bool, on that device."""
        stretches = _stretches(piece.weight.numel(), device)
        return torch.cat([self._moves(piece, start, stop, device) for start, stop in stretches])

    def numel(self, arms: Iterable[int]) -> int:
        """Weights of these arms, over all ranks."""
        return sum(self._numels[arm] for arm in arms)

    def refresh(self, step: int, gradient: Gradient) -> None:
        """Find the masks of these arms anew where one of them is due. They are pending until `keep`.

        Args:
            step: The step's number, from 1.
            gradient: What the perturbed arms climb along.
        """
        self._pending = None
        if not any(self._is_due(arm, step) for arm in gradient.arms):
            return
        self._bits.start()
        numel = self.numel(gradient.arms)
        by_stepped: dict[Tensor, list[Shard]] = {}
        for shard in gradient.shards:
            by_stepped.setdefault(shard.piece.stepped, []).append(shard)
        chosen = self.choose(step, lambda: self._parts(gradient.shards), max(1, round(self._density * numel)), numel)
        for stepped, shards in by_stepped.items():
            device = shards[0].gradient.device
            bits = torch.zeros(_local_numel(stepped), dtype=torch.bool, device=device)
            for part in self._parts(shards):
                bits[part.start : part.start + part.numbers.numel()] = chosen(part)
            self._bits.put(stepped, bits)
        self._pending = step, gradient.arms

    def keep(self, step: int) -> None:
        """The optimizer has taken this step: what it has found counts from here on."""
        if self._pending is not None and self._pending[0] == step:
            self._bits.keep()
            self._found_in.update(dict.fromkeys(self._pending[1], step))
        self._pending = None

    def claims(self) -> Any:
        """What of its state the ranks must agree on; anything with a `repr`."""
        return sorted(self._found_in.items())

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint holds besides `kept`, as JSON-serialisable values."""
        return {str(arm): step for arm, step in self._found_in.items()}

    def load_state_dict(self, state: Mapping[str, int] | None) -> None:
        """Continue from `state_dict`; None: from a run without a mask."""
        self._found_in = {int(arm): step for arm, step in (state or {}).items()}

    def unpack(self) -> None:
        """Before a checkpoint: put the masks where whatever saves the optimizer's state takes them along."""
        self._bits.unpack()

    def pack(self, pieces: Iterable[Piece]) -> None:
        """After a checkpoint was saved or loaded: take them out again.

        Args:
            pieces: All of the model's.
        """
        arm_of = {piece.stepped: piece.arm for piece in pieces}
        lacking = self._bits.pack({stepped for stepped, arm in arm_of.items() if arm in self._found_in})
        lost = {arm_of[stepped] for stepped in lacking}
        if lost:
            logger.warning(
                "the masks of %d layers were not loaded with the optimizer's state: they are computed again", len(lost)
            )
        self._found_in = {arm: step for arm, step in self._found_in.items() if arm not in lost}

    def _is_due(self, arm: int, step: int) -> bool:
        return arm not in self._found_in or step - self._found_in[arm] >= self._every

    def _parts(self, shards: Iterable[Shard]) -> Iterator[Part]:
        rank = self._engine.ranks.rank
        for piece, gradient in ((shard.piece, shard.gradient) for shard in shards):
            for start, stop in _stretches(gradient.numel(), gradient.device):
                yield Part(
                    start=piece.offset + start,
                    gradient=gradient[start:stop],
                    numbers=numbers_of(self._engine, piece, start, stop, gradient.device),
                    moves=functools.partial(self._moves, piece, start, stop, gradient.device),
                    counted=piece.owner == rank,
                )

    def _moves(self, piece: Piece, start: int, stop: int, device: torch.device) -> Tensor:
        bits = self._bits.get(piece, start, stop, device)
        return bits if bits is not None else self.first(numbers_of(self._engine, piece, start, stop, device))


def magnitude(gradient: Tensor) -> Tensor:
    """Keys in the order of the absolute values: the bits of a float32 without its sign. int64 in [0, 2^31).

    Squares have the same order, but those of small gradients are zero in float32.
    """
    return gradient.float().abs().view(torch.int32).long()


def _stretches(numel: int, device: torch.device) -> list[tuple[int, int]]:
    """Where each of the parts of so many elements begins and ends; one of none is whole."""
    size = _PART_NUMEL_ON_CPU if device.type == "cpu" else _PART_NUMEL
    return [(start, min(start + size, numel)) for start in range(0, max(numel, 1), size)]


def _local_numel(stepped: Tensor) -> int:
    return local_elements(stepped.detach()).numel()
