"""The ways to train that are compared, all behind one `step`: stock AdamW, dense SAM twice, and SL-SAM's settings."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import slsam_ds
from benchmarks.setup import Setup, Window
from benchmarks.two_call_sam import TwoCallSAM
from slsam_ds.cli.metering import num_bytes
from slsam_ds.estimate.memory import stock_gradients
from slsam_ds.pricing.cost import CostModel, Workload

LossFunction = Callable[[Any, Any], Tensor]

ADAMW = {"lr": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to train.

    Attributes:
        name: In tables.
        kind: "stock": the engine without us; "two_call": `TwoCallSAM` under DistributedDataParallel; "slsam".
        knobs: Of `slsam`, beside `active_layers` and `rho`.
    """

    name: str
    kind: Literal["stock", "two_call", "slsam"] = "slsam"
    knobs: Mapping[str, Any] = field(default_factory=dict)


ADAMW_MODE = Mode(name="AdamW", kind="stock")
OVERHEAD = Mode(name="AdamW by slsam_ds (rho 0, all layers)", knobs={"selector": "all", "rho": 0.0})
DENSE_SAM = Mode(name="dense SAM", knobs={"selector": "all"})
TWO_CALLS = Mode(name="dense SAM, two calls, torch DDP", kind="two_call")
LISA = Mode(name="LISA-like (uniform, rho 0)", knobs={"selector": "uniform", "rho": 0.0})
EXACT = Mode(name="SL-SAM, uniform", knobs={"selector": "uniform"})
FRACTION = Mode(name="SL-SAM, ascent_fraction 0.25", knobs={"selector": "uniform", "ascent_fraction": 0.25})
PREVIOUS = Mode(name="SL-SAM, ascent_source previous", knobs={"selector": "uniform", "ascent_source": "previous"})
BANDIT = Mode(name="SL-SAM, bandit")
BUDGET = Mode(name="SL-SAM, budget 1.0", knobs={"budget": 1.0})

MODES = (ADAMW_MODE, DENSE_SAM, OVERHEAD, TWO_CALLS, LISA, EXACT, FRACTION, PREVIOUS, BANDIT, BUDGET)
FINE_TUNING = (
    Mode(name="SL-SAM, bandit"),
    Mode(name="SL-SAM, bandit, ascent_fraction 0.25", knobs={"ascent_fraction": 0.25}),
    Mode(name="SL-SAM, bandit, ascent_source previous", knobs={"ascent_source": "previous"}),
    BUDGET,
)
REFERENCES = (ADAMW_MODE, DENSE_SAM)
"""What the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step did. `active` is None where all arms took part; seconds are 0 where there is no such pass.

    `result` is what SL-SAM reported.
    """

    loss: Tensor | float
    active: tuple[int, ...] | None = None
    ascent_seconds: float = 0.0
    descent_seconds: float = 0.0
    result: slsam_ds.StepResult | None = None


class Training(Protocol):
    """A model being trained in one mode.

    Attributes:
        model: The module with the weights.
        optimizer: The torch optimizer that holds the state, within whatever wraps it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, window: Window, loss_fn: LossFunction) -> Step:
        """One optimizer step."""
        ...

    def price(self, costs: CostModel, window: Window, step: Step) -> float:
        """FLOPs of a step by the price list; AdamW's are 1."""
        ...

    def gradient_bytes(self) -> int | None:
        """Gradients that this rank holds at most; None: `Memory` sees them."""
        ...


def build(mode: Mode, model: nn.Module, setup: Setup) -> Training:
    """Put a model into its mode; the model is taken over."""
    model = model.to(setup.device)
    match mode.kind:
        case "two_call":
            return TwoCalls(model, setup)
        case "stock":
            return Stock(model, setup)
        case "slsam":
            return Ours(model, setup, mode.knobs)


class Stock:
    """AdamW on the engine as it comes: DeepSpeed's loop, or torch's over a module, sharded or whole."""

    def __init__(self, model: nn.Module, setup: Setup) -> None:
        self.model, self._setup = model, setup
        self._config = setup.deepspeed_config(num_weights(model))
        self._gradient_bytes = num_bytes(model.parameters())  # before they are sharded
        self._engine: Any = None
        if setup.engine == "fsdp2":
            shard(model, setup)
        self.optimizer = optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        if setup.engine.startswith("zero"):
            self._engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._config)
            self.optimizer = getattr(zero, "optimizer", zero)

    def step(self, window: Window, loss_fn: LossFunction) -> Step:
        total: Tensor | float = 0.0
        for micro_batch in window:
            loss = loss_fn(self._engine or self.model, micro_batch)
            total = total + loss.detach() / len(window)
            if self._engine is not None:
                self._engine.backward(loss)
                self._engine.step()
            else:
                (loss / len(window)).backward()
        if self._engine is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return Step(loss=total)

    def price(self, costs: CostModel, window: Window, step: Step) -> float:
        return _price_of_all(costs, Workload(ascent=0.0, reused=0.0))

    def gradient_bytes(self) -> int:
        """Whole gradients until they are reduced, in ZeRO-2 and 3 a bucket at a time; then this rank's shards."""
        whole = self._gradient_bytes
        if self._setup.engine in ("local", "zero0", "zero1"):
            return whole
        bucket = self._config["zero_optimization"].get("reduce_bucket_size", whole) * self._setup.torch_dtype.itemsize
        return stock_gradients(whole, bucket=bucket, world_size=self._setup.world_size)


class TwoCalls:
    """Dense SAM by `TwoCallSAM`, replicated over the ranks by torch."""

    def __init__(self, model: nn.Module, setup: Setup) -> None:
        self.model = model
        self._sam = TwoCallSAM(model.parameters(), rho=setup.rho, **ADAMW)
        self.optimizer = self._sam.base
        self._replicated = nn.parallel.DistributedDataParallel(model) if setup.world_size > 1 else model

    def step(self, window: Window, loss_fn: LossFunction) -> Step:
        self._pass(window, loss_fn)
        self._sam.first_step()
        loss = self._pass(window, loss_fn)
        self._sam.second_step()
        return Step(loss=loss)

    def _pass(self, window: Window, loss_fn: LossFunction) -> Tensor | float:
        total: Tensor | float = 0.0
        for number, micro_batch in enumerate(window, start=1):
            waits = number < len(window) and isinstance(self._replicated, nn.parallel.DistributedDataParallel)
            with self._replicated.no_sync() if waits else contextlib.nullcontext():
                loss = loss_fn(self._replicated, micro_batch) / len(window)
                loss.backward()
            total = total + loss.detach()
        return total

    def price(self, costs: CostModel, window: Window, step: Step) -> float:
        return _price_of_all(costs, Workload(ascent=1.0, reused=0.0))

    def gradient_bytes(self) -> int:
        return num_bytes(self.model.parameters())


class Ours:
    """A setting of SL-SAM."""

    def __init__(self, model: nn.Module, setup: Setup, knobs: Mapping[str, Any]) -> None:
        self.model = model
        config = slsam_ds.SLSAMConfig(**{"active_layers": setup.active, "rho": setup.rho, **knobs})
        deepspeed_config = setup.deepspeed_config(num_weights(model))
        if setup.engine == "fsdp2":
            shard(model, setup)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        if not setup.engine.startswith("zero"):
            self.slsam = slsam_ds.SLSAM(model, optimizer, config)
            self.optimizer, self._step = optimizer, self.slsam.step
        else:
            engine, zero, *_ = slsam_ds.initialize(
                model=model, optimizer=optimizer, config=deepspeed_config, slsam=config
            )
            self.slsam, self._step = engine.slsam, engine.train_step
            self.optimizer = getattr(zero, "optimizer", zero)

    def step(self, window: Window, loss_fn: LossFunction, active: Sequence[int] | None = None) -> Step:
        """As every mode's; `active` forces the sample."""
        result = self._step(window, loss_fn, active)
        return Step(
            loss=result.loss,
            active=result.active,
            ascent_seconds=result.ascent_seconds,
            descent_seconds=result.descent_seconds,
            result=result,
        )

    def price(self, costs: CostModel, window: Window, step: Step) -> float:
        assert step.active is not None
        return costs.prices(self.slsam.workload(window)).of(step.active)

    def gradient_bytes(self) -> None:
        return None


def num_weights(model: nn.Module) -> int:
    """Of a model that is not sharded yet."""
    return sum(parameter.numel() for parameter in model.parameters())


def shard(model: nn.Module, setup: Setup) -> None:
    """`fully_shard` on each block, then on the whole, as FSDP2's own documentation does it."""
    mesh = init_device_mesh(setup.device, (setup.world_size,))
    for block in model.get_submodule("model.layers"):
        fully_shard(block, mesh=mesh, **setup.shard_policy)
    fully_shard(model, mesh=mesh, **setup.shard_policy)


def optimizer_bytes(training: Training) -> int:
    """What this rank's optimizer holds between steps: its state, and master weights where they are apart."""
    weights = {id(parameter) for parameter in training.model.parameters()}
    held = [p for group in training.optimizer.param_groups for p in group["params"] if id(p) not in weights]
    state = [value for entry in training.optimizer.state.values() for value in entry.values()]
    return num_bytes(held) + num_bytes(value for value in state if isinstance(value, Tensor))


def _price_of_all(costs: CostModel, workload: Workload) -> float:
    return costs.prices(workload).of(range(len(costs.weight_gradient)))
