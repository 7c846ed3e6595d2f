"""Measured modes next to what they were measured together with: the ratios of the report."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Measured, ratio, ratio_range
from benchmarks.modes import ADAMW_MODE, DENSE_SAM, Mode


@dataclass(frozen=True, kw_only=True)
class Row:
    """A mode, and AdamW and dense SAM of the same run."""

    one: Measured
    adamw: Measured
    dense: Measured

    @property
    def time(self) -> float:
        """Of a step, AdamW's being 1."""
        return ratio(self.one.seconds, self.adamw.seconds)

    @property
    def time_range(self) -> tuple[float, float]:
        """Where `time` lies in nine of ten draws of the rounds."""
        return ratio_range(self.one.seconds, self.adamw.seconds)

    @property
    def time_to_dense(self) -> float:
        """Of a step, dense SAM's being 1."""
        return ratio(self.one.seconds, self.dense.seconds)

    @property
    def flops(self) -> float:
        """Of the steps on the clock, by the price list, AdamW's being 1."""
        return statistics.mean(self.one.prices)

    @property
    def excess(self) -> float:
        """How far the clock is above the FLOPs: 1 where every FLOP takes as long as AdamW's."""
        return self.time / self.flops

    @property
    def deviation(self) -> float | None:
        """Largest difference between a step's price and its counted FLOPs."""
        pairs = zip(self.one.counted_flops, self.one.counted_prices, strict=True)
        return max((abs(counted - price) for counted, price in pairs), default=None)

    def held(self, measured: Measured) -> int:
        """Saved activations and gradients of the step in which they were most. Bytes."""
        return max(map(sum, zip(measured.activations, measured.gradients, strict=True)))

    def sent(self, measured: Measured) -> float:
        """Bytes of a step, mean over the counted ones."""
        return statistics.mean(map(sum, zip(measured.reduce, measured.gather, strict=True)))

    @property
    def sent_to_adamw(self) -> float:
        """Bytes of a step, AdamW's being 1; NaN on one rank, which sends nothing."""
        return self.sent(self.one) / (self.sent(self.adamw) or math.nan)

    @property
    def sent_to_dense(self) -> float:
        """Bytes of a step, dense SAM's being 1; NaN on one rank."""
        return self.sent(self.one) / (self.sent(self.dense) or math.nan)


def rows(comparison: Mapping[str, Any]) -> Iterator[Row]:
    """Of what `compare` returned; the references come once, from the first group."""
    seen = set()
    for group in comparison["groups"]:
        found = {entry["mode"]: Measured(**entry) for entry in group}
        for name, one in found.items():
            if name not in seen:
                seen.add(name)
                yield Row(one=one, adamw=found[ADAMW_MODE.name], dense=found[DENSE_SAM.name])


def row(comparison: Mapping[str, Any] | None, mode: Mode) -> Row | None:
    """The row of a mode; None where it was not measured."""
    return next((one for one in rows(comparison or {"groups": []}) if one.one.mode == mode.name), None)
