"""How the ratio to AdamW goes with the share of active layers, their number, the ranks and the window."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measure import Effort, Measured, ratio, ratio_range, run_together
from benchmarks.modes import ADAMW_MODE, EXACT, Mode
from benchmarks.setup import Setup

BASE = Setup(hidden=160, vocabulary=1024, batch=4, length=32)

SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)
BLOCKS = (4, 16, 64, 128)
WORLD_SIZES = (1, 2, 4)
WINDOWS = (1, 2, 8)


def sweep_all(base: Setup, effort: Effort, *, short: bool = False) -> dict[str, Any]:
    """Every sweep, as JSON. `short` takes the two ends of each."""
    shares, blocks, worlds, windows = (
        (values[0], values[-1]) if short else values for values in (SHARES, BLOCKS, WORLD_SIZES, WINDOWS)
    )
    if base.device == "cuda":
        worlds = tuple(size for size in worlds if size <= torch.cuda.device_count())
    in_one_run = {
        "blocks": [(num, dataclasses.replace(base, blocks=num, hidden=_width(base, num))) for num in blocks],
        "window": [(n, dataclasses.replace(base, accumulation=n, batch=max(1, base.batch // 4))) for n in windows],
    }
    points = [point for points in in_one_run.values() for point in points]
    found = iter(_against_adamw(points, effort))
    return {
        "about": base.describe(),
        "active": _by_share(base, shares, effort),
        **{name: [next(found) for _ in points] for name, points in in_one_run.items()},
        "world_size": [
            _against_adamw([(size, dataclasses.replace(base, world_size=size))], effort)[0] for size in worlds
        ],
    }


def _by_share(base: Setup, shares: Sequence[float], effort: Effort) -> list[dict[str, Any]]:
    modes = [Mode(name=f"{share:g}", knobs={"selector": "uniform", "active_layers": share}) for share in shares]
    (((adamw, *found), weights),) = run_together([base], (ADAMW_MODE, *modes), effort)
    return [_ratios(share, one, adamw, base, weights) for share, one in zip(shares, found, strict=True)]


def _against_adamw(points: Sequence[tuple[int, Setup]], effort: Effort) -> list[dict[str, Any]]:
    """SL-SAM and AdamW on each setup; all of them on as many ranks."""
    found = run_together([setup for _, setup in points], (ADAMW_MODE, EXACT), effort)
    return [
        _ratios(value, slsam, adamw, setup, weights)
        for (value, setup), ((adamw, slsam), weights) in zip(points, found, strict=True)
    ]


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
