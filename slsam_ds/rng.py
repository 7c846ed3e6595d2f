"""Random state of a rank, so that the descent draws the dropout masks of the ascent, and a resumed run its own."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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

    def save(self, folder: Path, rank: int) -> None:
        """Write it into the folder of a checkpoint."""
        states = {"cpu": self.cpu_state}
        if self.device_state is not None:
            states["device"] = self.device_state
        save_file(states, _file(folder, rank))

    @classmethod
    def saved(cls, folder: Path, rank: int, num_ranks: int, device: torch.device) -> Self | None:
        """What `save` wrote; None where it was another number of ranks, or another kind of device.

        Raises:
            ValueError: The file is damaged.
        """
        if not _file(folder, num_ranks - 1).is_file() or _file(folder, num_ranks).is_file():
            return None
        try:
            states = load_file(_file(folder, rank))
        except SafetensorError as error:
            raise ValueError(f"{_file(folder, rank)}: is damaged ({error}): resume from another checkpoint") from None
        if ("device" in states) == (device.type == "cpu"):
            return None
        return cls(device, states["cpu"], states.get("device"))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"slsam_random_state_{rank}.safetensors"


def reseed(*key: int) -> None:
    """Begin the random numbers of this process anew, at a place that is a pure function of `key`."""
    torch.manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """A seed that is a pure function of `key`, without a pattern."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
