"""Eight billion weights on one card: a few steps, and what `python -m slsam_ds.estimate` says of them."""

import contextlib
import dataclasses
import io
import json
import tempfile
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist

from benchmarks.gpu.job import Job, has_fsdp2
from benchmarks.measure import Peak, timed_step
from benchmarks.modes import Ours, optimizer_bytes
from benchmarks.setup import Setup
from slsam_ds.cli import estimate
from slsam_ds.cli.metering import num_bytes

_TOY = Setup(
    blocks=8, hidden=128, heads=4, key_value_heads=2, vocabulary=1024, batch=1, length=64, checkpointed=True
)  # fmt: skip
_SETUP = Setup(  # Llama-3.1-8B's shape
    blocks=32, hidden=4096, intermediate=14336, heads=32, key_value_heads=8, vocabulary=128_256, batch=1, length=2048,
    checkpointed=True, device="cuda",
)  # fmt: skip
# By the estimate 65 GB, up to 73; with ZeRO's masters, which stay on the card, 70, up to 76. Optimizers need room, too.
_SHARDED: dict[str, Any] = {"engine": "fsdp2", "dtype": "mixed"}
_WITH_MASTERS: dict[str, Any] = {"engine": "zero2", "dtype": "bfloat16"}
_KNOBS = {"active_layers": 0.2, "offload_state": True}
_NUM_STEPS = 5


def run(job: Job) -> None:
    """A row with the prediction, and one for each step.

    Raises:
        MemoryError: The host has no room for the optimizer's state.
    """
    engine = _SHARDED if has_fsdp2() else _WITH_MASTERS
    setup = dataclasses.replace(_TOY if job.toy else _SETUP, world_size=job.ranks, **engine)
    predicted = predict(setup)
    host, free = predicted["host"]["highest"] * job.ranks, psutil.virtual_memory().available
    job.add(setup=setup.describe(), **{f"{kind}_gb": spread["mean"] / 1e9 for kind, spread in predicted.items()})
    if host > free:
        raise MemoryError(f"optimizer state needs {host / 1e9:.0f} GB on the host, {free / 1e9:.0f} GB are free")
    job.on_ranks(train, job, setup, predicted["total"])


def predict(setup: Setup) -> dict[str, dict[str, float]]:
    """By kind of memory: mean, lowest and highest over samples, in bytes on a rank."""
    flags: list[Any] = ["--fsdp"] if setup.engine == "fsdp2" else ["--zero", setup.engine.removeprefix("zero")]
    flags += ["--gradient_checkpointing", "--json", "--world_size", setup.world_size]
    flags += ["--micro_batch_size", setup.batch, "--sequence_length", setup.length]
    flags += ["--slsam", *(f"{name}={json.dumps(value)}" for name, value in _KNOBS.items())]
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        config = setup.llama_config()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        code = estimate.main(["--model", folder, *map(str, flags)])
    assert code == 0
    memory: dict[str, dict[str, float]] = json.loads(printed.getvalue())["modes"][-1]["memory"]
    return memory


def train(job: Job, setup: Setup, predicted: dict[str, float]) -> None:
    """Runs on every rank."""
    model, data = setup.build()
    training = Ours(model, setup, _KNOBS)
    for number in range(1, _NUM_STEPS + 1):
        window, held = data(number), _held(training, setup)
        with Peak(setup) as peak:
            seconds, step = timed_step(training, window, setup)
        assert step.result is not None
        if dist.get_rank() == 0:
            job.add(
                step=number,
                active=list(step.result.active),
                seconds=seconds,
                loss=step.result.loss,
                projection=step.result.perturbation_projection,
                held_gb=held / 1e9,
                peak_gb=(held + peak.bytes) / 1e9,
                predicted_gb=predicted["mean"] / 1e9,
                predicted_range=[predicted[end] / 1e9 for end in ("lowest", "highest")],
            )


def _held(training: Any, setup: Setup) -> int:
    """Between steps, on the device. Bytes."""
    if setup.device == "cuda":
        return int(torch.cuda.memory_allocated())
    return num_bytes(training.model.parameters()) + optimizer_bytes(training)
