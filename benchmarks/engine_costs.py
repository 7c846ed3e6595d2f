"""What a step costs on each engine: bytes sent, gradients held, activations kept, against all layers active.

Two ranks on this machine; counted, not timed, so that it says the same everywhere.
"""

from collections.abc import Sequence
from typing import Any

from slsam_ds.cli.metering import Memory
from slsam_ds.model.micro_batches import model_loss
from slsam_ds.records.traffic import Traffic
from tests.distributed.training import Setup, Training
from tests.ranks import run_on_ranks

ENGINES = ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")
QUANTITIES = ("reduce", "gather", "gradients", "activations")


def count_engines(engines: Sequence[str], *, blocks: int, hidden: int, active: float, steps: int) -> dict[str, Any]:
    """Every engine with a sample and with all layers: quantity by name, as JSON."""
    model = {"num_blocks": blocks, "hidden": hidden}
    kinds = (
        {"other_parameters": "freeze", "selector": "uniform", "active_layers": active},
        {"other_parameters": "freeze", "selector": "all"},
    )
    # A model this small would stay gathered whole in ZeRO-3: of a real one, the norms do.
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}
    few = min(steps, 4)  # of all layers: those steps are all alike
    found = {}
    # ZeRO-3 has ranks of its own: DeepSpeed exchanges torch's linear function for the whole process.
    for together in ([each for each in engines if each != "zero3"], [each for each in engines if each == "zero3"]):
        setups = [
            (Setup(engine=engine, model=model, slsam=knobs, deepspeed=zero if engine == "zero3" else {}), num)
            for engine in together
            for knobs, num in zip(kinds, (steps, few), strict=True)
        ]
        counted = iter(run_on_ranks(2, _count_each, setups, timeout=1800)[0] if setups else [])
        found |= {engine: [next(counted) for _ in kinds] for engine in together}
    return {
        "blocks": blocks,
        "hidden": hidden,
        "active": active,
        "steps": steps,
        "engines": {engine: found[engine] for engine in engines},
    }


def _count_each(setups: Sequence[tuple[Setup, int]]) -> list[dict[str, float]]:
    return [_count(setup, num_steps) for setup, num_steps in setups]


def _count(setup: Setup, num_steps: int) -> dict[str, float]:
    """Bytes per step, mean over steps for what travels, peak for what is held. Runs on every rank."""
    training = Training(setup)
    memory = Memory(training.model, training.slsam.engine)
    training.step(training.window(1))  # the first step sets things up
    with Traffic() as traffic, memory.watch():
        for step in range(2, num_steps + 2):
            training.step(training.window(step), loss_fn=memory.watching(model_loss))
    return {kind: traffic.bytes[kind] / num_steps for kind in ("reduce", "gather")} | memory.peak
