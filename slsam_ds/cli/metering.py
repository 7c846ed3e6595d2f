"""What each step sends and holds on the first rank, counted while the step runs: `--measure`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slsam_ds.estimate.activations import SavedActivations
from slsam_ds.estimate.memory import stock_gradients
from slsam_ds.integrations.huggingface import SLSAMTrainer
from slsam_ds.plan import StepResult
from slsam_ds.protocol import Engine
from slsam_ds.records.traffic import Traffic

_BUCKET = 500_000_000  # DeepSpeed's default of reduce_bucket_size, in elements


class Memory:
    """Largest number of bytes that gradients and saved activations took on this rank, at the moments they peak.

    Activations: what autograd keeps of one micro-batch's forward, each storage once, weights left out. Gradients: what
    parameters and reduced shards hold when a backward has ended.

    Args:
        model: The model.
        engine: What reduces its gradients; None: gradients are not counted.
    """

    def __init__(self, model: nn.Module, engine: Engine | None) -> None:
        self._model, self._engine = model, engine
        self.peak = {"gradients": 0, "activations": 0}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within, the gradients of steps are counted."""
        engine: Any = self._engine
        stock_reduce = engine.reduce

        def reduce() -> Any:
            self._note("gradients", num_bytes(p.grad for p in self._model.parameters() if p.grad is not None))
            shards = stock_reduce()
            self._note("gradients", num_bytes(shard.gradient for shard in shards))
            return shards

        engine.reduce = reduce
        try:
            yield
        finally:
            del engine.reduce

    def watching(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The same forward, with what it saves counted."""

        def computing(*args: Any, **kwargs: Any) -> Any:
            saved = SavedActivations()
            with saved.watch():
                computed = compute(*args, **kwargs)
            self._note("activations", saved.num_bytes)
            return computed

        return computing

    def _note(self, what: str, held: int) -> None:
        self.peak[what] = max(self.peak[what], held)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """What this rank holds of them."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


class MeteredTrainer(SLSAMTrainer):
    """Adds to each step's record, on the first rank, what the step sent and held there, and how many steps there are.

    With every layer updated and a radius of zero the step is the base optimizer's, and its gradients are counted as
    the engine without SL-SAM holds them: DeepSpeed reduces them bucket by bucket while backward runs.
    """

    _traffic: Traffic | None = None
    _memory: Memory | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own."""
        if not self.is_world_process_zero() or self.slsam is None:
            return super().training_step(*args, **kwargs)
        self._memory = Memory(self.model, self.slsam.engine)
        try:
            with Traffic() as self._traffic, self._memory.watch():
                return super().training_step(*args, **kwargs)
        finally:
            self._memory = self._traffic = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own."""
        compute: Callable[..., Any] = super().compute_loss
        return (self._memory.watching(compute) if self._memory is not None else compute)(*args, **kwargs)

    def step_record(self, result: StepResult) -> dict[str, Any]:
        """The trainer's own, and what was counted."""
        record = super().step_record(result)
        if self._traffic is None or self._memory is None:
            return record
        return record | {
            "reduced_bytes": self._traffic.bytes["reduce"],
            "gathered_bytes": self._traffic.bytes["gather"],
            "gradient_bytes": self._gradient_bytes(self._memory.peak["gradients"]),
            "activation_bytes": self._memory.peak["activations"],
        }

    def _gradient_bytes(self, held: int) -> int:
        config, plugin = self.slsam_config, getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or config.selector != "all" or config.rho > 0 or plugin.zero_stage not in (2, 3):
            return held
        dtype = next((p.dtype for p in self.model.parameters() if p.requires_grad), torch.float32)
        bucket = plugin.deepspeed_config["zero_optimization"].get("reduce_bucket_size", _BUCKET)
        bucket = _BUCKET if bucket == "auto" else int(bucket)
        whole = sum(self.layer_map.numels_of_all().values()) * dtype.itemsize
        return stock_gradients(whole, bucket=bucket * dtype.itemsize, world_size=self.args.world_size)
