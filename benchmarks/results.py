"""Results on disk: one JSON file a section, written when the section is done, with where and how it was measured."""

import datetime
import json
import os
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "deepspeed", "transformers")


def save(folder: Path, section: str, found: dict[str, Any], *, arguments: list[str], seconds: float) -> None:
    """Write a section's results, in place of earlier ones."""
    result = {
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe_machine(),
        "seconds": round(seconds),
        "found": found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(result), indent=1)
    temporary = folder / f"{section}.json.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / f"{section}.json")


def load(folder: Path, section: str) -> dict[str, Any] | None:
    """What `save` wrote; None where the section was never measured."""
    path = folder / f"{section}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def describe_machine() -> str:
    """Processor, GPUs and versions, in a line."""
    parts = [f"{_processor()}, {_num_cores()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    parts.append(f"Python {platform.python_version()}")
    return ", ".join([*parts, *(f"{name} {metadata.version(name)}" for name in LIBRARIES)])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rounded(value: Any) -> Any:
    """Six digits will do, and keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
