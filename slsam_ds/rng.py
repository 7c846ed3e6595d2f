"""Random state of a rank, so that the descent draws the dropout masks of the ascent, and a resumed run its own."""

import copy
import functools
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RandomState:
    """Random state of a rank.

    Attributes:
        device: The accelerator, or the CPU.
        cpu_state: Of torch on the CPU.
        device_state: Of torch on the accelerator.
        others: Put back the state of Python's and numpy's global generators, by which models draw masks too, and of
            those that were handed in. Not saved.
    """

    device: torch.device
    cpu_state: Tensor
    device_state: Tensor | None
    others: tuple[Callable[[], object], ...] = ()

    @classmethod
    def capture(cls, device: torch.device, generators: Iterable[Any] = ()) -> Self:
        """The state now. Nothing is drawn.

        Args:
            device: The accelerator, or the CPU.
            generators: Further ones, as `generators_in` finds them.
        """
        device_state = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        numpy: Any = sys.modules.get("numpy")  # who has not imported it draws nothing from it
        everywhere = [random] if numpy is None else [random, numpy.random]
        others = tuple(_rewinder(generator) for generator in (*everywhere, *generators))
        return cls(device, torch.get_rng_state(), device_state, others)

    def replay(self) -> None:
        """Go back to the captured state: what is drawn from here on was drawn before."""
        torch.set_rng_state(self.cpu_state)
        if self.device_state is not None:
            torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
        for rewind in self.others:
            rewind()

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


def generators_in(model: nn.Module) -> Iterator[Any]:
    """Generators of random numbers, of torch, Python or numpy, that are attributes of the model's modules."""
    for module in model.modules():
        for value in vars(module).values():
            if _draws(type(value)):  # type: ignore[arg-type]  # a type can be hashed
                yield value


@functools.cache  # by type: a large model has tens of thousands of attributes, of a few types
def _draws(kind: Any) -> bool:
    numpy: Any = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return issubclass(kind, (torch.Generator, random.Random, *of_numpy))


def _rewinder(generator: Any) -> Callable[[], object]:
    """A function that brings the generator back to where it is now. A module of functions counts as one, too."""
    for read, write in (("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(generator, read):
            state = getattr(generator, read)()
            return lambda: getattr(generator, write)(state)
    bits, state = generator.bit_generator, copy.deepcopy(generator.bit_generator.state)
    return lambda: setattr(bits, "state", state)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"slsam_random_state_{rank}.safetensors"


def reseed(*key: int) -> None:
    """Begin the random numbers of this process anew, at a place that is a pure function of `key`."""
    torch.manual_seed(seed_of(*key))


def random_bits(numbers: Tensor, key: int) -> Tensor:
    """30 random bits for each number: a pure function of it and of `key`, so that it is the same on any rank.

    The mixing function of SplitMix64 (Steele, Lea, Flood 2014), whose arithmetic is that of 64 bits without a sign.

    Args:
        numbers: int64, any shape.
        key: Below 2^63.

    Returns:
        int64, of the same shape, in [0, 2^30).
    """
    mixed: Tensor = numbers + key
    mixed = (mixed ^ _shifted(mixed, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    mixed = (mixed ^ _shifted(mixed, 27)) * (0x94D049BB133111EB - 2**64)
    return (mixed ^ _shifted(mixed, 31)) & (2**30 - 1)


def _shifted(values: Tensor, count: int) -> Tensor:
    """To the right, filled up with zeros: torch's own fills up with the sign."""
    return values.bitwise_right_shift(count).bitwise_and(2 ** (64 - count) - 1)


def seed_of(*key: int) -> int:
    """A seed that is a pure function of `key`, without a pattern."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
