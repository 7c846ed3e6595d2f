"""What a step costs on each engine: bytes sent, gradients held, activations kept, against all layers active.

    python -m benchmarks.engine_costs            # writes the README's table to standard output

Two ranks on this machine; counted, not timed, so that it says the same everywhere.
"""

import argparse
from collections.abc import Iterator
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

    def __init__(self, training: Training) -> None:
        self._training = training
        self.peak = {"gradients": 0, "activations": 0}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within, steps are measured."""
        engine = self._training.slsam.engine
        stock_reduce = engine.reduce

        def reduce() -> Any:
            self._note("gradients", sum(map(_num_bytes, self._gradients())))
            shards = stock_reduce()
            self._note("gradients", sum(_num_bytes(shard.gradient) for shard in shards))
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
                yield _local(parameter.grad)

    def _note(self, what: str, num_bytes: int) -> None:
        self.peak[what] = max(self.peak[what], num_bytes)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure(setup: Setup, num_steps: int) -> dict[str, float]:
    """Bytes per step, mean over steps for what travels, peak for what is held. Runs on every rank."""
    training = Training(setup)
    memory = Memory(training)
    training.step(training.window(1))  # the first step sets things up
    with Traffic() as traffic, memory.watch():
        for step in range(2, num_steps + 2):
            training.step(training.window(step), loss_fn=memory.loss)
    return {kind: traffic.bytes[kind] / num_steps for kind in ("reduce", "gather")} | memory.peak


def main() -> None:
    """Parse, measure every engine with a sample and with all layers, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--blocks", type=int, default=10, help="layers of the model (default: %(default)s)")
    parser.add_argument("--active", type=float, default=0.2, help="share of layers per step (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps to average over (default: %(default)s)")
    arguments = parser.parse_args()
    model = {"num_blocks": arguments.blocks, "hidden": arguments.hidden}
    print(f"| engine | {' | '.join(f'{quantity}, MB (share of dense)' for quantity in QUANTITIES)} | all traffic |")
    print("|---|" + "---|" * (len(QUANTITIES) + 1))
    for engine in arguments.engines:
        # A model this small would stay gathered whole: of a real one, the norms do.
        zero = {"stage": 3, "stage3_param_persistence_threshold": 1000}
        deepspeed = {"zero_optimization": zero} if engine == "zero3" else {}
        found = []
        for knobs in ({"selector": "uniform", "active_layers": arguments.active}, {"selector": "all"}):
            setup = Setup(
                engine=engine, model=model, slsam={"other_parameters": "freeze", **knobs}, deepspeed=deepspeed
            )
            found.append(run_on_ranks(2, measure, setup, arguments.steps)[0])
        sparse, dense = found
        cells = [
            f"{sparse[name] / 1e6:.3g} ({sparse[name] / dense[name]:.2f})" if dense[name] else "none"
            for name in QUANTITIES
        ]
        total = sum(sparse[kind] for kind in ("reduce", "gather")) / sum(dense[kind] for kind in ("reduce", "gather"))
        print(f"| {engine} | {' | '.join(cells)} | {total:.2f} |", flush=True)


if __name__ == "__main__":
    main()
