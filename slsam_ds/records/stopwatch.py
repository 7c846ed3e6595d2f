"""How long the parts of a step take on the device, without waiting for it in between."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Stopwatch:
    """Runs from its construction. On an accelerator it measures the device's work, which the host runs ahead of.

    Args:
        device: Whose current stream does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._moment, self._between = _clock(device)
        self._inside: list[tuple[Any, Any]] = []
        self._started = self._stopped = self._moment()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Time within is told apart from the rest."""
        started = self._moment()
        yield
        self._inside.append((started, self._moment()))

    def stop(self) -> None:
        """The last work has been handed to the device."""
        self._stopped = self._moment()

    def seconds(self) -> tuple[float, float]:
        """Within `inside`, and the rest up to `stop`; to be asked when the host has waited for the device."""
        inside = sum(self._between(*span) for span in self._inside)
        return inside, self._between(self._started, self._stopped) - inside


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks a moment, and the seconds between two."""
    if device.type == "cpu":
        return time.perf_counter, lambda start, end: end - start

    def mark() -> Any:
        module = torch.get_device_module(device)
        event = module.Event(enable_timing=True)
        event.record(module.current_stream(device))  # the process may have another device for its current one
        return event

    return mark, lambda start, end: start.elapsed_time(end) / 1000
