"""Random state of a pass, so that the descent pass draws the dropout masks of the ascent pass."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """Random state of the CPU and, where it is another, of the accelerator."""

    device: torch.device
    cpu_state: Tensor
    device_state: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> Self:
        """The state now. Nothing is drawn."""
        device_state = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), device_state)

    def replay(self) -> None:
        """Go back to the captured state: what is drawn from here on was drawn before."""
        torch.set_rng_state(self.cpu_state)
        if self.device_state is not None:
            torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
