"""The machine: what computes, how ranks talk, what builds DeepSpeed's operators, and what the environment says."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from slsam_ds.cli.doctor.finding import Finding
from slsam_ds.engines.deepspeed.operator_locks import abandoned_locks
from slsam_ds.engines.deepspeed.operators import (
    CPU_ADAM,
    FUSED_ADAM,
    Operator,
    find_operator,
    missing_tools,
    needed_operators,
)

_DRIVER = Path("/proc/driver/nvidia/version")
_PROPERTIES = "get_device_properties"  # of an accelerator's module in torch, where it tells them
_GIGA = 1e9
_LITTLE_SHARED_MEMORY = 512 * 1024**2  # what DeepSpeed's ds_report warns below


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is.

    Attributes:
        kind: What ranks compute on, as torch names it: "cuda", "cpu", ...
        devices: Names of the accelerators.
        memory: Bytes of each accelerator, 0 where it does not tell; of the host where there is none.
        host_memory: Bytes.
        num_cores: That this process may use.
        torch_build: torch's version.
        torch_cuda: The CUDA that torch was built for, where it was.
        has_driver: NVIDIA's is loaded.
        backend: By which ranks on such devices talk.
        has_backend: torch was built with it.
        nccl: Its version, where it is the backend.
        shared_memory: Bytes of /dev/shm; None: there is none.
        needed: Operators that any run under DeepSpeed loads here.
        others: Operators that some runs load.
        missing_tools: What is not here of what a build of operators needs.
        locks: Abandoned ones.
        environment: Its variables.
    """

    kind: str
    devices: Sequence[str]
    memory: int
    host_memory: int
    num_cores: int
    torch_build: str
    torch_cuda: str | None
    has_driver: bool
    backend: str
    has_backend: bool
    nccl: str
    shared_memory: int | None
    needed: Sequence[Operator]
    others: Sequence[Operator]
    missing_tools: Sequence[str]
    locks: Sequence[Path]
    environment: Mapping[str, str]

    @property
    def num_devices(self) -> int:
        """Ranks that have something to compute on: an accelerator each, or the CPU."""
        return len(self.devices) or 1


def look_around() -> Machine:
    """This machine."""
    kind = get_accelerator().device_name().partition(":")[0]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names, memory = ([], host) if kind == "cpu" else _accelerators(kind)
    backend = _backend_for(kind) if dist.is_available() else "gloo"
    missing = missing_tools()
    needed = needed_operators(None)
    return Machine(
        kind=kind,
        devices=names,
        memory=memory,
        host_memory=host,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch_build=torch.__version__,
        torch_cuda=torch.version.cuda,
        has_driver=_DRIVER.exists(),
        backend=backend,
        has_backend=dist.is_available() and dist.is_backend_available(backend),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" and dist.is_nccl_available() else "",
        shared_memory=_size_of("/dev/shm"),
        needed=[find_operator(name, missing) for name in needed],
        others=[find_operator(name, missing) for name in (FUSED_ADAM, CPU_ADAM)],
        missing_tools=missing,
        locks=abandoned_locks(),
        environment=dict(os.environ),
    )


def machine_findings(machine: Machine) -> list[Finding]:
    """What there is to say about it."""
    return [
        _computes_on(machine),
        _talks_by(machine),
        *_operators(machine),
        *map(_lock, machine.locks),
        *_shared_memory(machine),
        _threads(machine),
    ]


def _computes_on(machine: Machine) -> Finding:
    if machine.devices:
        first, number = machine.devices[0], len(machine.devices)
        kinds = f"{number} x {first}" if set(machine.devices) == {first} else ", ".join(machine.devices)
        size = f", {machine.memory / _GIGA:.0f} GB each" if machine.memory else ""
        return Finding("ok", f"accelerators: {kinds}{size}")
    host = f"the CPU, {machine.num_cores} cores and {machine.host_memory / _GIGA:.0f} GB"
    if machine.environment.get("DS_ACCELERATOR") == "cpu":
        return Finding("note", f"DS_ACCELERATOR=cpu: ranks compute on {host}", "unset it to use accelerators")
    if machine.has_driver:
        why = (
            f"torch {machine.torch_build} finds no GPU, though NVIDIA's driver is loaded"
            if machine.torch_cuda
            else f"torch {machine.torch_build} is a build for the CPU, and NVIDIA's driver is loaded"
        )
        what = "see whether CUDA_VISIBLE_DEVICES hides it and the driver is new enough"
        remedy = what if machine.torch_cuda else "install a build for CUDA"
        return Finding("problem", why, f"{remedy}, or set DS_ACCELERATOR=cpu to train on the CPU")
    return Finding("note", f"no accelerator: ranks compute on {host}", "enough for trials and small models")


def _talks_by(machine: Machine) -> Finding:
    if not machine.has_backend:
        remedy = "install a build of torch that has it"
        return Finding(
            "problem",
            f"{machine.backend}: this torch lacks the backend by which ranks on {machine.kind} communicate",
            remedy,
        )
    return Finding("ok", f"ranks communicate by {machine.backend} {machine.nccl}".rstrip())


def _operators(machine: Machine) -> Iterator[Finding]:
    """DeepSpeed's operators, and the tools that build them."""
    every = [*machine.needed, *machine.others]
    for state in ("built", "can be built"):
        names = [operator.name for operator in every if operator.state == state]
        if names:
            yield Finding("ok", f"DeepSpeed's operators, {state}: {', '.join(names)}")
    for operator in every:
        if operator.state != "cannot be built":
            continue
        what = f"DeepSpeed's operator {operator.name} cannot be built ({operator.reason})"
        if operator in machine.needed:
            yield Finding("problem", f"{what}, and every run under DeepSpeed loads it here", _way_out(machine))
        else:
            yield Finding("note", f"{what}: only {_USES[operator.name]} needs it", _way_out(machine))


_USES = {"fused_adam": "an optimizer in the DeepSpeed JSON", "cpu_adam": "offload_optimizer"}


def _way_out(machine: Machine) -> str:
    return f"install {' and '.join(machine.missing_tools)}" if machine.missing_tools else ""


def _lock(lock: Path) -> Finding:
    what = f"{lock}: no process on this machine holds this lock, and DeepSpeed would wait for it forever"
    return Finding("problem", what, "remove it, unless another machine is building there")


def _shared_memory(machine: Machine) -> Iterator[Finding]:
    if machine.shared_memory is not None and machine.shared_memory < _LITTLE_SHARED_MEMORY:
        what = f"/dev/shm: {machine.shared_memory / 1e6:.0f} MB, which ranks and data loaders share"
        yield Finding("note", what, "give the container more with --shm-size=1g or --ipc=host")


def _threads(machine: Machine) -> Finding:
    given = machine.environment.get("OMP_NUM_THREADS")
    if given is None:
        what = "OMP_NUM_THREADS: not set; `slsam train` divides the cores among ranks, torchrun gives each rank one"
        return Finding("ok", what)
    if not given.isdecimal() or int(given) == 0:
        return Finding("note", f"OMP_NUM_THREADS={given}: not a number of threads", "set it to cores per rank")
    if int(given) > machine.num_cores:
        what = f"OMP_NUM_THREADS={given}: more threads than the {machine.num_cores} cores that this process may use"
        return Finding("note", what, "set it to cores per rank")
    return Finding("ok", f"OMP_NUM_THREADS={given}")


def _accelerators(kind: str) -> tuple[list[str], int]:
    """Their names, and the bytes of the smallest."""
    number, properties = get_accelerator().device_count(), getattr(torch.get_device_module(kind), _PROPERTIES, None)
    if properties is None:  # of Apple's, for one
        return [kind] * number, 0
    found = [properties(index) for index in range(number)]
    return [str(each.name) for each in found], min((int(each.total_memory) for each in found), default=0)


def _backend_for(kind: str) -> str:
    try:
        return str(dist.get_default_backend_for_device(kind))
    except ValueError:  # torch knows none
        return "gloo"


def _size_of(folder: str) -> int | None:
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_frsize * status.f_blocks
