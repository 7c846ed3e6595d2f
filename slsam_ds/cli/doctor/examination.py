"""A run before it starts: its DeepSpeed configuration, its model, what a step costs, and whether it fits here.

Everything is asked of those who will have to do with it: the engines' own checks, and `slsam estimate`.
"""

from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator

from slsam_ds.cli.doctor.finding import Finding
from slsam_ds.cli.doctor.machine import Machine
from slsam_ds.cli.estimate import Estimate, make_estimate
from slsam_ds.cli.estimate_arguments import read_setup
from slsam_ds.cli.refusal import UsageError, refusals
from slsam_ds.cli.weightless import read_model_config
from slsam_ds.engines import fsdp2
from slsam_ds.engines.deepspeed.config import read_config
from slsam_ds.engines.deepspeed.operators import find_operator, needed_operators
from slsam_ds.estimate.sharding import RunSetup

_GIGA = 1e9
_SPARE = 1.1
"""What a step holds is not all: buffers, libraries and fragmentation take about a tenth more."""


def check_files(given: Any) -> None:
    """Refuse what is not there, or is no configuration at all.

    Raises:
        UsageError: `--deepspeed` or `--model` cannot be read.
    """
    if given.deepspeed is not None:
        with refusals(ValueError):
            read_config(given.deepspeed)
    if given.model is not None:
        read_model_config(given.model)


def run_findings(given: Any, machine: Machine) -> list[Finding]:
    """What there is to say about the run that the flags describe; nothing where they describe none."""
    if not (given.model or given.deepspeed or given.fsdp or given.slsam) and given.zero is None:
        return []
    given.world_size = given.world_size or machine.num_devices
    try:
        setup, config, section = read_setup(given)
        if setup.engine == "fsdp2":
            fsdp2.check_version()
    except (UsageError, ValueError) as error:
        return [Finding("problem", str(error))]
    name = f"{given.deepspeed}: " if given.deepspeed else ""
    knobs = "its slsam block and --slsam" if given.deepspeed else "--slsam"
    layers = f"budget {config.budget:g}" if config.budget is not None else f"active_layers {config.active_layers}"
    findings = [
        Finding("ok", f"{name}{_engine(setup)} in {setup.precision} is supported"),
        Finding("ok", f"SL-SAM's settings from {knobs}: selector {config.selector}, rho {config.rho:g}, {layers}"),
        *_precision(setup, machine),
        *_operators(given, machine),
    ]
    if given.model is None:
        return findings
    try:
        estimate = make_estimate(given, setup, config, section)
    except UsageError as error:
        return [*findings, Finding("problem", str(error))]
    return [*findings, Finding("ok", estimate.model), _price(estimate), *_memory(estimate, machine)]


def _engine(setup: RunSetup) -> str:
    return "FSDP2" if setup.engine == "fsdp2" else f"ZeRO-{setup.engine[-1]}"


def _precision(setup: RunSetup, machine: Machine) -> Iterator[Finding]:
    supported = {
        "fp32": lambda: True,
        "bf16": get_accelerator().is_bf16_supported,
        "fp16": get_accelerator().is_fp16_supported,
    }
    if not supported[setup.precision]():
        others = " or ".join(name for name, ask in supported.items() if name != setup.precision and ask())
        yield Finding("problem", f"{setup.precision}: not supported by {machine.kind} here", f"use {others}")


def _operators(given: Any, machine: Machine) -> Iterator[Finding]:
    """Operators of DeepSpeed that this configuration asks for, beside those that every run loads."""
    if given.deepspeed is None:
        return
    config, _ = read_config(given.deepspeed)
    known = {operator.name for operator in machine.needed}
    for name in needed_operators(config):
        operator = find_operator(name, machine.missing_tools)
        if operator.state == "cannot be built" and operator.name not in known:
            what = f"{given.deepspeed}: needs DeepSpeed's operator {operator.name}, which cannot be built"
            yield Finding("problem", f"{what} ({operator.reason})", "see above for what is missing")


def _price(estimate: Estimate) -> Finding:
    _, dense, ours = estimate.modes
    price = ours.price
    apart = f", {price.lowest:.2f} to {price.highest:.2f} by sample" if price.lowest < price.highest else ""
    what = f"a step computes {price.mean:.2f} of AdamW's FLOPs{apart} (dense SAM {dense.price.mean:.2f})"
    dear = price.mean > 1.05 and estimate.config.budget is None
    return Finding("ok", what, "for AdamW's price, --slsam preset=adamw_price" if dear else "")


def _memory(estimate: Estimate, machine: Machine) -> Iterator[Finding]:
    """What the step that takes most holds, against what there is."""
    adamw, _, ours = estimate.modes
    device, host = (ours.memory[kind].highest for kind in ("total", "host"))
    what = f"{estimate.run}: {device / _GIGA:.3g} GB on each rank (AdamW {adamw.memory['total'].highest / _GIGA:.3g})"
    if host:
        what += f", {host / _GIGA:.3g} GB of its host"
    num_local = min(estimate.setup.world_size, machine.num_devices)
    if machine.devices:
        on_device = device * _SPARE <= machine.memory or not machine.memory  # not known
        enough = on_device and host * num_local * _SPARE <= machine.host_memory
        has = f"a device has {machine.memory / _GIGA:.0f} GB, the host {machine.host_memory / _GIGA:.0f} GB"
    else:
        enough = (device + host) * num_local * _SPARE <= machine.host_memory
        has = f"the host has {machine.host_memory / _GIGA:.0f} GB"
    if enough:
        yield Finding("ok", what)
        return
    ways = ["more ranks (--world_size)"]
    ways += [] if estimate.setup.engine in ("zero3", "fsdp2") else ["a higher ZeRO stage"]
    ways += [] if estimate.setup.offload_optimizer or not machine.devices else ["offload_optimizer"]
    yield Finding("problem", f"{what}, and {has}", f"try {', '.join([*ways, '--gradient_checkpointing'])}")
