"""The compiled operators of DeepSpeed that runs come to need: what for, and whether they are there or can be built.

DeepSpeed builds most when they are first loaded. Even one that is built is loaded by way of ninja and the compiler,
which look whether it is still as its sources are (jit_load in deepspeed/ops/op_builder/builder.py, 0.18.6 to 0.19.8).
"""

import contextlib
import io
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops
from deepspeed.ops.op_builder.builder import CUDAOpBuilder, assert_no_cuda_mismatch
from torch.utils.cpp_extension import get_cxx_compiler

from slsam_ds.engines.deepspeed.config import offload_device
from slsam_ds.engines.deepspeed.operator_locks import operators_folder
from slsam_ds.engines.deepspeed.settings import value_at, without_auto

SHARED_MEMORY, FUSED_ADAM, CPU_ADAM = "ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"


@dataclass(frozen=True, slots=True)
class Operator:
    """One of them.

    Attributes:
        name: DeepSpeed's.
        state: "built", also by whoever made the package; "can be built"; or "cannot be built".
        reason: Why not.
    """

    name: str
    state: str
    reason: str = ""


def missing_tools() -> list[str]:
    """What is not here of what a build needs."""
    compiler = get_cxx_compiler()
    missing = [] if shutil.which(compiler) else [f"a C++ compiler ({compiler})"]
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).parent
        missing.append(f"ninja (PATH lacks {beside})" if (beside / "ninja").exists() else "ninja")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    return missing


def needed_operators(config: Mapping[str, Any] | None) -> list[str]:
    """The builders of the operators that a run loads on this accelerator.

    Args:
        config: DeepSpeed's; None: any run.
    """
    # Its collectives on the CPU, which the first process group loads.
    needed = [SHARED_MEMORY] if get_accelerator().device_name() == "cpu" and sys.platform == "linux" else []
    if config is None:
        return needed
    config = without_auto(config)
    optimizer = str(value_at(config, "optimizer.type")).lower()
    if offload_device(config, "offload_optimizer") != "none":
        needed.append(CPU_ADAM)
    elif optimizer in ("adam", "adamw") and value_at(config, "optimizer.params.torch_adam") is not True:
        needed.append(FUSED_ADAM)
    return needed


def find_operator(builder_name: str, missing: Sequence[str]) -> Operator:
    """The operator of a builder.

    Args:
        builder_name: DeepSpeed's name of the class.
        missing: Tools for a build that are not here.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if type(builder).__name__ in ("NoneType", "NotImplementedBuilder"):  # accelerators say it in different ways
        name = builder_name.removesuffix("Builder")
        return Operator(name, "cannot be built", f"DeepSpeed has none for {get_accelerator().device_name()}")
    if installed_ops.get(builder.name) and accelerator_name == get_accelerator().device_name():
        return Operator(builder.name, "built")
    if missing:
        return Operator(builder.name, "cannot be built", f"not here: {', '.join(missing)}")
    reason = _incompatible(builder)
    if reason is not None:
        return Operator(builder.name, "cannot be built", reason)
    return Operator(builder.name, "built" if _is_built(builder.name) else "can be built")


def _is_built(name: str) -> bool:
    """Whether torch has built it: in its own folder for each Python and accelerator, or where the environment says."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folders = [operators_folder(), *operators_folder().glob(f"{python}_*")]
    return any((folder / name / f"{name}.so").is_file() for folder in folders)


def _incompatible(builder: Any) -> str | None:
    """Why DeepSpeed would not build it; None: it would."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            if not builder.is_compatible(verbose=False):
                said = printed.getvalue().strip() or str(builder.error_log or "")
                return " ".join(said.split()) or "DeepSpeed finds it incompatible"
            if isinstance(builder, CUDAOpBuilder) and get_accelerator().device_name() == "cuda":
                assert_no_cuda_mismatch(builder.name)
        except Exception as error:  # of types that each builder chooses; what fails here fails in the run
            return " ".join(str(error).split()) or type(error).__name__
    return None
