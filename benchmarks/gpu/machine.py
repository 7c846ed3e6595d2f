"""Versions, card and memory."""

import os
import platform
import shutil
from importlib import metadata

import torch

from benchmarks.gpu.job import Job

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "triton")


def run(job: Job) -> None:
    """A row for the software, one for the machine, and one for each card."""
    job.add(python=platform.python_version(), **{name: _version(name) for name in _PACKAGES})
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    cuda = torch.version.cuda or "none"
    job.add(
        system=f"{platform.system()} {platform.machine()}",
        cores=cores,
        memory_gb=memory,
        cuda=cuda,
        nvcc=shutil.which("nvcc") or "none",
    )
    if job.device == "cuda":
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            version = f"{card.major}.{card.minor}"
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
            job.add(card=card.name, memory_gb=card.total_memory / 1e9, capability=version, nccl=nccl)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
