"""What the host does in a step, by the profiler: operators, kernels launched, and how often it waits for the card."""

import contextlib
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.job import Job
from benchmarks.measure import timed_step
from benchmarks.modes import ADAMW_MODE, DENSE_SAM, EXACT, PREVIOUS, Training, build
from benchmarks.setup import Setup
from slsam_ds.model.micro_batches import model_loss

_TOY = Setup(blocks=4, hidden=64, vocabulary=256, batch=2, length=16, dtype="bfloat16")
_SETUP = Setup(device="cuda", blocks=16, hidden=1024, vocabulary=32_000, batch=2, length=512, dtype="bfloat16")
_MODES = (ADAMW_MODE, DENSE_SAM, EXACT, PREVIOUS)
_NUM_WARMUP = 3
_STEP = "a step"
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def run(job: Job) -> None:
    """A row for each engine and mode.

    `reads` are numbers that Python took of tensors, of Adam's step counters on the host, too; only `waits` cost time.
    """
    setup = dataclasses.replace(_TOY if job.toy else _SETUP, world_size=job.ranks)
    engines = job.engines("local", "zero2", "fsdp2", "zero3")
    job.on_ranks(count_each, job, [dataclasses.replace(setup, engine=engine) for engine in engines])


def count_each(job: Job, setups: Sequence[Setup]) -> None:
    """Runs on every rank."""
    for setup in setups:
        for mode in _MODES:
            model, data = setup.build()
            training = build(mode, model, setup)
            seconds = [timed_step(training, data(number), setup)[0] for number in range(_NUM_WARMUP)]
            found = _count(lambda: training.step(data(_NUM_WARMUP), model_loss), setup)  # noqa: B023 (called at once)
            if setup.device == "cuda":
                found["warned_waits"] = _warned(training, data(_NUM_WARMUP + 1))
            if dist.get_rank() == 0:
                job.add(engine=setup.engine, mode=mode.name, **found, seconds=statistics.median(seconds))


def _count(step: Callable[[], Any], setup: Setup) -> dict[str, int]:
    """What was called between the beginning of the step and its end, on whatever thread."""
    on_card = setup.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities, acc_events=True) as profiled:
        with record_function(_STEP):
            step()
        if on_card:
            torch.cuda.synchronize()
    events = profiled.events() or []
    whole = next(e.time_range for e in events if e.name == _STEP and e.device_type == DeviceType.CPU)
    names = [
        e.name for e in events if whole.start <= e.time_range.start <= whole.end and e.device_type == DeviceType.CPU
    ]
    found = {
        "operators": sum(name.startswith("aten::") for name in names),
        "reads": names.count("aten::_local_scalar_dense"),
    }
    if on_card:
        found |= {"launches": sum(name in _LAUNCHES for name in names), "waits": sum(name in _WAITS for name in names)}
    return found


def _warned(training: Training, window: Any) -> int:
    """How often torch itself warns that an operator waits."""
    with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        training.step(window, model_loss)
    return sum("synchronizing CUDA" in str(warning.message) for warning in caught)
