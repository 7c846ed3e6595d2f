"""Time, FLOP/s and memory of AdamW, dense SAM and recipes on one model, in rounds."""

import dataclasses
import statistics

from benchmarks.comparison import LARGE
from benchmarks.gpu.job import Job
from benchmarks.measure import Effort, Measured, ratio, ratio_range, run_together
from benchmarks.modes import ADAMW_MODE, DENSE_SAM, Mode
from benchmarks.setup import Setup
from slsam_ds.recipes import PRESETS

_MODES = (
    ADAMW_MODE,
    DENSE_SAM,
    *(Mode(name=name, knobs=PRESETS[name]) for name in ("adamw_price", "depth_price", "single_pass", "paper")),
)
_TOY = Setup(blocks=6, hidden=128, vocabulary=512, length=32, dtype="bfloat16")
_SHARE = 0.5
"""Of the time, for rounds: what comes before and after takes as long."""


def run(job: Job) -> None:
    """A row for each mode. All are in memory at once: on one card, without an engine, 6 bytes a weight each."""
    engine = "local" if job.ranks == 1 else "zero2"
    setup = dataclasses.replace(_TOY if job.toy else LARGE, engine=engine, world_size=job.ranks)
    effort = Effort(
        rounds=4 if job.toy else 60,
        warmup=2,
        counted=1 if job.toy else 3,
        seconds=_SHARE * job.left,
        timeout=job.seconds_to_live,
    )
    ((found, weights),) = run_together([setup], _MODES, effort)
    job.add(setup=setup.describe(), weights=weights, rounds=len(found[0].seconds))
    for one in found:
        job.add(**_row(one, found[0]))


def _row(one: Measured, adamw: Measured) -> dict[str, object]:
    low, middle, high = statistics.quantiles(one.seconds, n=4)
    least, most = ratio_range(one.seconds, adamw.seconds)
    flops = statistics.mean(adamw.flops) * statistics.mean(one.prices)
    held = one.weights + one.optimizer
    return {
        "mode": one.mode,
        "median_seconds": middle,
        "quartiles": [low, high],
        "time_to_adamw": ratio(one.seconds, adamw.seconds),
        "in_9_of_10_draws": [least, most],
        "flops_to_adamw": statistics.mean(one.prices),
        "tflop_per_second": flops / statistics.mean(one.seconds) / 1e12,
        "held_gb": held / 1e9,
        "peak_gb": (held + max(one.peak)) / 1e9,
    }
