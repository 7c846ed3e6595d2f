"""Every engine follows the reference of the tests: in float32, and in bfloat16 where it rounds as engines round."""

import traceback
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.job import FailedError, Job
from tests.distributed.test_bf16 import follow_bf16, judged
from tests.distributed.test_fsdp2_bf16 import MIXED
from tests.distributed.training import LlamaSetup, Setup, follow_reference, follow_samples, max_error
from tests.models import SAMPLES
from tests.rounding_reference import MixedReference, RoundingReference

TOLERANCE = 1e-5
"""Of float32 weights. A card adds up in another order than a CPU; real mistakes were 1e-4 and more."""

ON_A_CARD = {"tolerance": 3e-5, "slack": 1e-5}
"""Of masters and of perturbed weights in bfloat16. The last bit of a gradient may be another there, where an engine's
product is not the kernel that the reference's is: 2^-8 of an element of ε, which is below 1e-3 in these models."""

# ZeRO-3 comes last: DeepSpeed exchanges torch's linear function for the whole process.
_ENGINES = ("local", "zero1", "zero2", "fsdp2", "zero3")


def run(job: Job) -> None:
    """A row for each engine and precision.

    Raises:
        FailedError: Some do not follow.
    """
    exactly()
    setups = [setup for engine in job.engines(*_ENGINES) for setup in _setups_of(engine)]
    per_rank = job.on_ranks(follow_each, setups)
    failed = []
    for number, setup in enumerate(setups):
        precision = "float32" if isinstance(setup, LlamaSetup) else "bfloat16"
        error, problem = _judge(job, setup, [followed[number] for followed in per_rank])
        row = {"engine": setup.engine, "precision": precision, "steps": len(SAMPLES), "largest_error": error}
        job.add(**row, follows=not problem, **({"traceback": problem} if problem else {}))
        failed += [f"{setup.engine} in {precision}"] if problem else []
    if failed:
        raise FailedError(f"these do not follow the reference: {', '.join(failed)}")


def _setups_of(engine: str) -> list[Setup]:
    """In float32; and in bfloat16 where there are masters, which a local engine has none of."""
    found: list[Setup] = [LlamaSetup(engine=engine, accumulation=2)]
    if engine != "local":
        low: dict[str, Any] = {"fsdp": MIXED} if engine == "fsdp2" else {"dtype": torch.bfloat16}
        found.append(Setup(engine=engine, accumulation=2, **low))
    return found


def exactly() -> None:
    """Products of float32 in float32, sums of bfloat16 in float32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def follow_each(setups: Sequence[Setup]) -> list[Any]:
    """Runs on every rank. What each setup's training was, or a traceback in its place."""
    exactly()
    found: list[Any] = []
    for setup in setups:
        try:
            found.append(follow_samples(setup) if isinstance(setup, LlamaSetup) else follow_bf16(setup))
        except Exception:
            found.append(traceback.format_exc())
    return found


def _judge(job: Job, setup: Setup, per_rank: Sequence[Any]) -> tuple[float | None, str]:
    """The largest error of a weight, and what is wrong."""
    broken = next((each for each in per_rank if isinstance(each, str)), None)
    if broken is not None:
        return None, broken
    try:
        if isinstance(setup, LlamaSetup):
            expected, _ = follow_reference(setup, job.ranks, SAMPLES)
            error, allowed = max(max_error(weights, expected) for weights, _ in per_rank), TOLERANCE
        else:
            tolerances = {} if job.toy else ON_A_CARD
            kind = MixedReference if setup.engine == "fsdp2" else RoundingReference
            error, allowed = judged(per_rank, setup, kind, **tolerances), tolerances.get("tolerance", 1e-6)
    except AssertionError:
        return None, traceback.format_exc()
    return error, "" if error <= allowed else f"the largest error is {error:.1e}, more than {allowed:.0e}"
