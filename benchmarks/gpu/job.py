"""What a part of the run is given."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.distributed.fsdp import FSDPModule

from benchmarks.gpu.records import Records
from tests.ranks import run_on_ranks

_START = 20.0  # seconds in which ranks import what they need


class FailedError(AssertionError):
    """A part ran, and what it found is not as it should be."""


def has_fsdp2() -> bool:
    """Whether torch is new enough for our engine on it."""
    return hasattr(FSDPModule, "reset_iter_state")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Where a part runs, and for how long.

    Attributes:
        part: Its name.
        device: "cpu": at toy size.
        ranks: How many.
        ends: When it should be done, by `time.monotonic`, which all processes of a machine share. Seconds.
        dies: When its ranks are ended. Likewise.
        records: Where rows go; ranks write their own, so that what they had found is there when they are ended.
    """

    part: str
    device: Literal["cpu", "cuda"]
    ranks: int
    ends: float
    dies: float
    records: Records

    @property
    def toy(self) -> bool:
        """Sizes that show no more than that everything runs."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds until the part should be done, less those in which ranks start."""
        return max(0.0, self.ends - time.monotonic() - _START)

    @property
    def seconds_to_live(self) -> float:
        """Until the part's ranks are ended."""
        return max(1.0, self.dies - time.monotonic())

    def engines(self, *names: str) -> Sequence[str]:
        """Those of the engines that there are here, with a row for each that is left out."""
        missing: dict[str, str] = {}
        if not has_fsdp2():
            missing["fsdp2"] = "needs torch 2.13"
        if self.ranks > 1:
            missing["local"] = "AdamW's gradients would stay apart on several ranks"
        for name in missing.keys() & set(names):
            self.add(engine=name, left_out=missing[name])
        return [name for name in names if name not in missing]

    def add(self, **found: Any) -> None:
        """A row of this part."""
        self.records.add(self.part, **found)

    def on_ranks(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function on every rank of a fresh process group; what each returned.

        Raises:
            RankFailedError: One raised, or was not done in time.
        """
        return run_on_ranks(self.ranks, function, *args, timeout=self.seconds_to_live, device=self.device)
