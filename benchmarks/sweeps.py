"""How the ratio to AdamW goes with the share of active layers, their number, the ranks and the window."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Effort, Measured, ratio, ratio_range, run_together
from benchmarks.modes import ADAMW_MODE, EXACT, Mode
from benchmarks.setup import Setup

BASE = Setup(hidden=192, vocabulary=1024, batch=4, length=128)

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
BLOCKS = (4, 8, 16, 32, 64, 128)
WORLD_SIZES = (1, 2, 3, 4)
WINDOWS = (1, 2, 4, 8)


def sweep_all(base: Setup, effort: Effort, *, short: bool = False) -> dict[str, Any]:
    """Every sweep, as JSON. `short` takes the two ends of each."""
    shares, blocks, worlds, windows = (
        (values[0], values[-1]) if short else values for values in (SHARES, BLOCKS, WORLD_SIZES, WINDOWS)
    )
    if base.device == "cuda":
        import torch

        worlds = tuple(size for size in worlds if size <= torch.cuda.device_count())
    one_by_one = {
        "blocks": [(num, dataclasses.replace(base, blocks=num, hidden=_width(base, num))) for num in blocks],
        "world_size": [(size, dataclasses.replace(base, world_size=size)) for size in worlds],
        "window": [(n, dataclasses.replace(base, accumulation=n, batch=max(1, base.batch // 4))) for n in windows],
    }
    return {
        "about": base.describe(),
        "active": _by_share(base, shares, effort),
        **{name: [_point(value, setup, effort) for value, setup in points] for name, points in one_by_one.items()},
    }


def _by_share(base: Setup, shares: Sequence[float], effort: Effort) -> list[dict[str, Any]]:
    modes = [Mode(name=f"{share:g}", knobs={"selector": "uniform", "active_layers": share}) for share in shares]
    (adamw, *found), weights = run_together(base, (ADAMW_MODE, *modes), effort)
    return [_ratios(share, one, adamw, base, weights) for share, one in zip(shares, found, strict=True)]


def _point(value: int, setup: Setup, effort: Effort) -> dict[str, Any]:
    (adamw, slsam), weights = run_together(setup, (ADAMW_MODE, EXACT), effort)
    return _ratios(value, slsam, adamw, setup, weights)


def _ratios(value: float, one: Measured, adamw: Measured, setup: Setup, weights: int) -> dict[str, Any]:
    low, high = ratio_range(one.seconds, adamw.seconds)
    travels = [(measured.reduce, measured.gather) for measured in (one, adamw)]
    ours, theirs = (sum(map(sum, kinds)) for kinds in travels)
    return {
        "value": value,
        "hidden": setup.hidden,
        "weights": weights,
        "adamw_seconds": sum(adamw.seconds) / len(adamw.seconds),
        "time": ratio(one.seconds, adamw.seconds),
        "time_range": [low, high],
        "flops": sum(one.prices) / len(one.prices),
        "bytes": ours / theirs if theirs else None,  # one rank sends nothing
    }


def _width(base: Setup, num_blocks: int) -> int:
    """The width at which that many blocks hold as many weights, a multiple of 32 (of a head)."""
    return max(32, 32 * round(base.hidden * (base.blocks / num_blocks) ** 0.5 / 32))
