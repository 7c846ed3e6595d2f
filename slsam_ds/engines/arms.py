"""Which arms gradients flow to: switched by `requires_grad`, the same way in every engine."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

import torch
from torch import nn

from slsam_ds.model.state_home import WaitingMasters
from slsam_ds.protocol import Piece


class SwitchesArms(ABC):
    """The begin of a step and of its passes, and its end: see `Engine`."""

    _all_arms: frozenset[int]
    """Every arm of the engine; set at construction, when all of them are trainable."""

    _ascended: Collection[int] = ()
    _updated: Collection[int] = ()
    _active: frozenset[int]
    """Arms that are trainable now."""

    optimizer_state_home: torch.device | None = None
    _masters = WaitingMasters((), torch.device("cpu"))

    def keep_state_at(self, home: torch.device | None) -> None:
        self.optimizer_state_home = home
        if home is not None:
            masters = {piece.stepped for piece in self.pieces(self._all_arms) if not _is_read(piece)}
            self._masters = WaitingMasters(masters, home)

    @abstractmethod
    def pieces(self, arms: Collection[int]) -> list[Piece]:
        """See `Engine.pieces`."""

    def begin_step(self, ascended: Collection[int], updated: Collection[int]) -> None:
        self._ascended, self._updated = ascended, updated
        self.discard()

    def begin_ascent(self) -> None:
        self._switch_to(self._ascended)

    def begin_descent(self) -> None:
        self._switch_to(self._updated)

    def end_step(self) -> None:
        self._switch_to(self._all_arms)

    @abstractmethod
    def discard(self) -> None:
        """See `Engine.discard`."""

    @abstractmethod
    def _parameters_of(self, arms: Iterable[int]) -> Iterable[nn.Parameter]:
        """What these arms train."""

    def _start_with(self, arms: Iterable[int]) -> None:
        """These are all arms there are, and all trainable."""
        self._all_arms = self._active = frozenset(arms)

    def _switch_to(self, arms: Iterable[int]) -> None:
        wanted = frozenset(arms)
        for arm in wanted ^ self._active:
            for parameter in self._parameters_of([arm]):
                parameter.requires_grad_(arm in wanted)
        self._active = wanted


def _is_read(piece: Piece) -> bool:
    """Whether the optimizer steps the very weights that forward reads."""
    return piece.master.untyped_storage().data_ptr() == piece.weight.untyped_storage().data_ptr()
