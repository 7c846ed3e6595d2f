"""How long the parts of a step take on the device, without waiting for it in between."""

import contextlib
import time
from collections import defaultdict
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
        self._spans: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._started = self._stopped = self._moment()

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Within, the time counts as this part's, too."""
        started = self._moment()
        yield
        self._spans[name].append((started, self._moment()))

    def stop(self) -> None:
        """The last part has been handed to the device. Read the times when the host has waited for it."""
        self._stopped = self._moment()

    def seconds(self, name: str | None = None) -> float:
        """Of one part, as often as it ran; None: from the start to `stop`."""
        spans = [(self._started, self._stopped)] if name is None else self._spans[name]
        return sum(self._between(*span) for span in spans)


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks a moment, and the seconds between two."""
    if device.type == "cpu":
        return time.perf_counter, lambda start, end: end - start

    def mark() -> Any:
        event = torch.get_device_module(device).Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda start, end: start.elapsed_time(end) / 1000
