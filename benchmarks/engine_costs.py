"""What a step costs on each engine: bytes sent, gradients held, activations kept, against all layers active.

Two ranks on this machine; counted, not timed, so that it says the same everywhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from slsam_ds.accounting import SavedActivations
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
    found = {}
    for engine in engines:
        # A model this small would stay gathered whole: of a real one, the norms do.
        zero = {"stage": 3, "stage3_param_persistence_threshold": 1000}
        deepspeed = {"zero_optimization": zero} if engine == "zero3" else {}
        found[engine] = [
            run_on_ranks(2, _count, Setup(engine=engine, model=model, slsam=knobs, deepspeed=deepspeed), steps)[0]
            for knobs in (
                {"other_parameters": "freeze", "selector": "uniform", "active_layers": active},
                {"other_parameters": "freeze", "selector": "all"},
            )
        ]
    return {"blocks": blocks, "hidden": hidden, "active": active, "steps": steps, "engines": found}


def _count(setup: Setup, num_steps: int) -> dict[str, float]:
    """Bytes per step, mean over steps for what travels, peak for what is held. Runs on every rank."""
    training = Training(setup)
    memory = Memory(training)
    training.step(training.window(1))  # the first step sets things up
    with Traffic() as traffic, memory.watch():
        for step in range(2, num_steps + 2):
            training.step(training.window(step), loss_fn=memory.loss)
    return {kind: traffic.bytes[kind] / num_steps for kind in ("reduce", "gather")} | memory.peak
