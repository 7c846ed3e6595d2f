"""Ending a run because the machine is wanted elsewhere: finish the step, save, and say so by the exit code."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75
"""`EX_TEMPFAIL` of sysexits.h: nothing is wrong, run it again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm, Kubernetes and launchers send some time before they kill."""


@contextmanager
def stopping_on_signal(request_stop: Callable[[], object]) -> Iterator[None]:
    """Within, the signals call `request_stop`, however often they come: launchers pass on what a group got already.

    Args:
        request_stop: Safe to call between any two lines of Python.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        request_stop()

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
