"""What a step costs on each engine: bytes sent, gradients held, activations kept, against all layers active.

Two ranks on this machine; counted, not timed, so that it says the same everywhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from slsam_ds.estimate.activations import SavedActivations
from tests.distributed.training import Setup, Training
from tests.ranks import run_on_ranks
from tests.traffic import Traffic

ENGINES = ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")
QUANTITIES = ("reduce", "gather", "gradients", "activations")


class Memory:
    """Largest number of bytes that gradients and saved activations took on this rank, at the moments they peak.

    Activations: what autograd keeps of one micro-batch's forward, each storage once, weights left out. Gradients: what
    parameters and reduced shards hold when a backward has ended.
    """

    def __init__(self, training: Any) -> None:
        self._training = training
        self.peak = {"gradients": 0, "activations": 0}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within, steps are measured."""
        engine = self._training.slsam.engine
        stock_reduce = engine.reduce

        def reduce() -> Any:
            self._note("gradients", num_bytes(self._gradients()))
            shards = stock_reduce()
            self._note("gradients", num_bytes(shard.gradient for shard in shards))
            return shards

        engine.reduce = reduce
        try:
            yield
        finally:
            del engine.reduce

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The model's loss, with what its forward saves counted."""
        saved = SavedActivations()
        with saved.watch():
            loss: torch.Tensor = model(**batch).loss
        self._note("activations", saved.num_bytes)
        return loss

    def _gradients(self) -> Iterator[torch.Tensor]:
        for parameter in self._training.model.parameters():
            if parameter.grad is not None:
                yield parameter.grad

    def _note(self, what: str, held: int) -> None:
        self.peak[what] = max(self.peak[what], held)


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What this rank holds of them."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


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
    memory = Memory(training)
    training.step(training.window(1))  # the first step sets things up
    with Traffic() as traffic, memory.watch():
        for step in range(2, num_steps + 2):
            training.step(training.window(step), loss_fn=memory.loss)
    return {kind: traffic.bytes[kind] / num_steps for kind in ("reduce", "gather")} | memory.peak
