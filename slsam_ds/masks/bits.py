"""Masks as they wait from one step to the next: one bit per weight."""

import torch
from torch import Tensor

from slsam_ds.model.state_home import at_home
from slsam_ds.protocol import Engine, Piece
from slsam_ds.shards import local_elements

_STEP = "step"


class KeptBits:
    """A bit for each element that the optimizer steps, 8 of them in a byte.

    Checkpoints cut the optimizer's state anew for other ranks, as the weights are cut; packed bits cannot be cut
    anywhere. So they lie beside the optimizer's state, and for a checkpoint `unpack` puts them into it, a byte each and
    in the shape of the weights; `pack` takes them out again.

    Args:
        engine: Where the weights and the optimizer's state are.
        key: Their name in the optimizer's state.
    """

    def __init__(self, engine: Engine, key: str) -> None:
        self._engine, self._key = engine, key
        self._packed: dict[Tensor, Tensor] = {}
        self._pending: dict[Tensor, Tensor] = {}

    def start(self) -> None:
        """A step has found something: what an earlier one has left pending is dropped."""
        self._pending = {}

    def put(self, stepped: Tensor, bits: Tensor) -> None:
        """The bits of all this rank's elements of what is stepped; pending. bool, 1-D."""
        self._pending[stepped] = at_home(pack(bits), self._engine.optimizer_state_home)

    def keep(self) -> None:
        """What is pending counts from here on."""
        self._packed.update(self._pending)
        self._pending = {}

    def get(self, piece: Piece, start: int, stop: int, device: torch.device) -> Tensor | None:
        """The bits of some of a piece's elements, counted from its first; None: there are none yet. bool, 1-D."""
        packed = self._packed.get(piece.stepped)
        if packed is None:
            return None
        begin, end = piece.offset + start, piece.offset + stop
        return unpack(packed[begin // 8 : -(-end // 8)].to(device))[begin % 8 :][: stop - start]

    def unpack(self) -> None:
        """Put all bits into the optimizer's state, in the shape of what is stepped. uint8, 0 or 1."""
        home = self._engine.optimizer_state_home
        for stepped, packed in self._packed.items():
            whole = torch.zeros_like(stepped.detach(), dtype=torch.uint8)
            there = local_elements(whole)
            there.copy_(unpack(packed)[: there.numel()])
            state = self._engine.optimizer.state[stepped]
            if not state:  # torch's Adam fails to load state that lacks a step counter
                state[_STEP] = torch.zeros(())
            state[self._key] = at_home(whole, home)

    def pack(self, steppeds: set[Tensor]) -> set[Tensor]:
        """Take the bits out of the optimizer's state again, which may have been loaded: they take the place of all.

        Args:
            steppeds: What they are kept of; the state may hold zeros of others.

        Returns:
            Those that the state holds nothing of.
        """
        self._packed, self._pending = {}, {}
        state = self._engine.optimizer.state
        for stepped in list(state):
            # Optimizers load all they remember in the dtype of what they step.
            whole = state[stepped].pop(self._key, None)
            if whole is not None and stepped in steppeds:
                self._packed[stepped] = at_home(pack(local_elements(whole) != 0), self._engine.optimizer_state_home)
            if whole is not None and state[stepped].keys() <= {_STEP}:
                del state[stepped]  # an optimizer takes any state for one that it has begun
        return steppeds - self._packed.keys()


def pack(bits: Tensor) -> Tensor:
    """Eight in a byte, the first one lowest. bool, shape (n,), to uint8, shape (ceil(n / 8),)."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (padded << _places(bits.device)).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The bits of bytes. uint8, shape (n,), to bool, shape (8 n,)."""
    return ((packed.unsqueeze(1) >> _places(packed.device)) & 1).bool().view(-1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
