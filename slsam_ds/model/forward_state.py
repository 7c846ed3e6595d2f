"""What a forward finds and changes besides the weights: random numbers and buffers.

Both passes of a step must find the same, and a step must leave behind what one pass does: the draws of one, and the
buffers (running statistics, power iterations, code books) of one.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.rng import RandomState, generators_in


class ForwardState:
    """The state of a model's forwards on this rank.

    Which buffers change is found out, not asked: by their values when the first pass has run, later by the version
    counters of their tensors. So a model whose forward changes none has nothing copied. torch's batch norm writes into
    its running statistics without counting it, but counts its batches: the buffers of a module go together.

    Args:
        model: The module that is trained, or the engine around it.
        device: Where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._changing: set[nn.Module] | None = None  # None: no pass has run yet
        self._generators: list[Any] = []

    def random(self) -> RandomState:
        """Where the random numbers are."""
        return RandomState.capture(self._device, self._generators)

    def capture(self) -> "Snapshot":
        """What a forward would find now."""
        self._generators = list(generators_in(self._model))  # a forward may make one
        return Snapshot(self.random(), self._buffers())

    @contextlib.contextmanager
    def second_pass(self, before_first: "Snapshot | None", *, counts: bool) -> Iterator[None]:
        """Within, forwards find what those of the first pass, which has just run, did.

        Args:
            before_first: Captured before it; None: there was none, and this one is as it is.
            counts: Buffers are afterwards as this pass leaves them, which takes all samples where the first took a part
                of them; or as the first pass left them, at the weights themselves.
        """
        if before_first is None:
            yield
            return
        self._note_changes(before_first.buffers)
        after_first = self._buffers()
        before_first.replay()
        try:
            yield
        finally:
            if not counts:
                after_first.put_back()

    def _buffers(self) -> "_Buffers":
        slots = [
            (module, name, tensor)
            for module in self._model.modules()
            for name, tensor in module._buffers.items()
            if tensor is not None and not tensor.is_meta and not tensor.is_inference()  # these do not change
        ]
        changing = self._changing
        return _Buffers(
            [(module, name, tensor, tensor._version) for module, name, tensor in slots],
            [(*slot, slot[2].clone()) for slot in slots if changing is None or slot[0] in changing],
        )

    def _note_changes(self, before: "_Buffers") -> None:
        """Note which modules' buffers the first pass has changed."""
        if self._changing is None:
            self._changing = {
                module
                for module, name, tensor, values in before.copies
                if module._buffers.get(name) is not tensor or not torch.equal(tensor, values)
            }
        self._changing |= {
            module
            for module, name, tensor, version in before.versions
            if module._buffers.get(name) is not tensor or tensor._version != version
        }


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a forward would have found at some time."""

    random_state: RandomState
    buffers: "_Buffers"

    def replay(self) -> None:
        """Let the next forward find it."""
        self.random_state.replay()
        self.buffers.put_back()


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Buffers by module and name: all with the version of their tensor, and those known to change with their values."""

    versions: list[tuple[nn.Module, str, Tensor, int]]
    copies: list[tuple[nn.Module, str, Tensor, Tensor]]

    @torch.no_grad()
    def put_back(self) -> None:
        """The very tensors, with the values that they had."""
        for module, name, tensor, values in self.copies:
            module._buffers[name] = tensor
            tensor.copy_(values)
