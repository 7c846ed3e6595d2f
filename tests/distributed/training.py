"""A few steps of training on any engine, as its user would set it up; runs on every rank of a test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import slsam_ds
from slsam_ds import SLSAM, SLSAMConfig, StepResult
from tests.models import SAMPLES, arms_of_llama, tiny_decoder, tiny_llama, window
from tests.ranks import DEVICE
from tests.reference import Reference


def slow(*values: Any) -> Any:
    """A case of a test that `make test` leaves to `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


ALSO_ZERO0, ALSO_ZERO1, ALSO_ZERO3 = map(slow, ("zero0", "zero1", "zero3"))
"""Where what differs between engines does not matter: `make test-slow` repeats what `make test` shows for ZeRO-2."""
ALSO_OFFLOADED = [slow("zero2_offload"), slow("zero3_offload")]

LOSS_SCALE_POWER = 12
"""Of the loss scale that float16 begins with."""

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.1}
# A larger eps than Adam's own: a smaller one turns rounding noise into moves of ±lr where a gradient is nearly zero.


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, and inside which engine.

    Attributes:
        engine: "local" (single device or replicated), "fsdp2", "zero0", "zero1", "zero2", "zero3",
            "zero2_offload" (optimizer) or "zero3_offload" (optimizer and parameters, to the CPU).
        accumulation: Micro-batches per window.
        dtype: Of the weights.
        clip: Largest gradient norm; 0: any.
        slsam: Knobs.
        deepspeed: Further DeepSpeed settings.
        fsdp: Further arguments of `fully_shard`.
        replicas: FSDP2 only: how many ranks hold the same shard.
        model: Arguments of `tiny_decoder`.
    """

    engine: str
    accumulation: int = 1
    dtype: torch.dtype = torch.float32
    clip: float = 0.0
    slsam: Mapping[str, Any] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    fsdp: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)

    blocks: ClassVar[str] = "model.layers"

    def build_model(self) -> nn.Module:
        """The model before anything was wrapped; the same on every rank."""
        return tiny_decoder(**self.model).to(self.dtype)

    def shard(self, model: nn.Module) -> None:
        """`fully_shard` on each block, then on the whole, as FSDP2's own documentation does it."""
        num_ranks = torch.distributed.get_world_size()
        if self.replicas == 1:
            mesh = init_device_mesh(DEVICE, (num_ranks,))
        else:
            shape = (self.replicas, num_ranks // self.replicas)
            mesh = init_device_mesh(DEVICE, shape, mesh_dim_names=("replicate", "shard"))
        for block in model.get_submodule(self.blocks):
            fully_shard(block, mesh=mesh, **self.fsdp)
        fully_shard(model, mesh=mesh, **self.fsdp)

    def deepspeed_config(self) -> dict[str, Any]:
        """What a user would write into the JSON."""
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "fp16": {"enabled": self.dtype == torch.float16, "initial_scale_power": LOSS_SCALE_POWER, "hysteresis": 1},
            "zero_optimization": self.zero_optimization(),
            "zero_force_ds_cpu_optimizer": False,  # a torch optimizer will do, where it is offloaded
            "slsam": dict(self.slsam),
            **self.deepspeed,
        }

    def zero_optimization(self, **settings: Any) -> dict[str, Any]:
        """DeepSpeed's section of that name; with stage 3, the norms are small enough to stay gathered."""
        stage = int(self.engine[len("zero")])
        section: dict[str, Any] = {"stage": stage, "overlap_comm": False}
        if stage == 3:
            section["stage3_param_persistence_threshold"] = 100
        if self.engine.endswith("_offload"):
            section["offload_optimizer"] = {"device": "cpu"}
            if stage == 3:
                section["offload_param"] = {"device": "cpu"}
        return section | settings


class LlamaSetup(Setup):
    """A real Llama, where attention, dropout or what else transformers' models do is needed."""

    def build_model(self) -> nn.Module:
        return tiny_llama(**self.model).to(self.dtype)


class Training:
    """A model being trained inside an engine.

    Attributes:
        step: `step(window, loss_fn=None, active=None)`.
        slsam: The SLSAM underneath.
        model: The module with the weights.
        engine: The DeepSpeedEngine, or None.
        optimizer: The torch optimizer, as the user built it.
    """

    def __init__(self, setup: Setup, *, make_optimizer: Callable[..., Any] = torch.optim.AdamW, **kwargs: Any) -> None:
        self.setup = setup
        self.model = setup.build_model().to(DEVICE)
        self.engine: Any = None
        self.step: Callable[..., StepResult]
        if setup.engine == "fsdp2":
            setup.shard(self.model)
        settings = ADAMW if make_optimizer is torch.optim.AdamW else {}
        self.optimizer = optimizer = make_optimizer(self.model.parameters(), **settings)
        if setup.engine in ("local", "fsdp2"):
            config = SLSAMConfig(**setup.slsam)
            total_steps = kwargs.get("total_steps")
            self.slsam = SLSAM(self.model, optimizer, config, max_grad_norm=setup.clip or None, total_steps=total_steps)
            self.step = self.slsam.step
        else:
            if setup.dtype == torch.float16:
                allow_float16_on_the_cpu()
            self.engine, *_ = slsam_ds.initialize(
                model=self.model, optimizer=optimizer, config=setup.deepspeed_config(), **kwargs
            )
            self.slsam, self.step = self.engine.slsam, self.engine.train_step
        self.rank = self.slsam.engine.ranks.rank

    def window(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a step."""
        return window(step, self.rank, self.setup.accumulation)

    def follow(self, samples: Sequence[Sequence[int]]) -> list[StepResult]:
        """One step for each forced sample."""
        return [self.step(self.window(step), active=sample) for step, sample in enumerate(samples, start=1)]

    def step_seen(self, step: int, **forced: Any) -> tuple[StepResult, dict[str, Tensor]]:
        """A step over its window, and the weights that its last forward has read."""
        seen: dict[str, Tensor] = {}

        def loss_fn(model: Any, batch: Any) -> Tensor:
            seen.update(self.live_weights())
            loss: Tensor = model(**batch).loss
            return loss

        return self.step(self.window(step), loss_fn=loss_fn, **forced), seen

    def weights(self) -> dict[str, Tensor]:
        """Every parameter, whole, in full precision where the engine keeps one."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        # DeepSpeed's own reader does not know another order of the parameters.
        reads_masters = self.engine is not None and not self.engine.zero_round_robin_gradients()
        unsharded = getattr(
            self.slsam.engine, "_master_places", {}
        )  # of stage 0 in bf16, which DeepSpeed does not hand out
        for name, parameter in self.model.named_parameters():
            master = safe_get_full_fp32_param(parameter) if reads_masters else None
            if parameter in unsharded:
                stepped, start = unsharded[parameter]
                master = stepped.detach().view(-1)[start : start + parameter.numel()].view_as(parameter)
            found[name] = (whole(parameter) if master is None else master).float().cpu().clone()
        return found

    def live_weights(self) -> dict[str, Tensor]:
        """Every parameter as forward reads it."""
        return {name: whole(parameter).cpu().clone() for name, parameter in self.model.named_parameters()}


def allow_float16_on_the_cpu() -> None:
    """DeepSpeed refuses it there, for its speed; in this process it will not."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its shards, detached."""
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:  # ZeRO-3, and not one that stays gathered
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def follow_samples(
    setup: Setup, samples: Sequence[Sequence[int]] = SAMPLES
) -> tuple[dict[str, Tensor], list[StepResult]]:
    """Train on forced samples; what the weights are in the end and what each step reported."""
    training = Training(setup)
    results = training.follow(samples)
    return training.weights(), results


def follow_reference(
    setup: Setup, world_size: int, samples: Sequence[Sequence[int]], scales: Sequence[Mapping[int, float]] | None = None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The same training in one process, without the package.

    Tests of one training on several engines share what is returned: do not change it.
    """
    without_engine = {"engine": "local", "deepspeed": {}, "fsdp": {}, "replicas": 1}
    key = (type(setup), repr(replace(setup, **without_engine)), world_size, repr(samples), repr(scales))
    if key not in _FOLLOWED:
        _FOLLOWED[key] = _follow_reference(setup, world_size, samples, scales)
    return _FOLLOWED[key]


_FOLLOWED: dict[Any, tuple[dict[str, Tensor], list[dict[str, Any]]]] = {}


def _follow_reference(
    setup: Setup, world_size: int, samples: Sequence[Sequence[int]], scales: Sequence[Mapping[int, float]] | None
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    torch.set_num_threads(1)
    model = setup.build_model()
    reference = Reference(model, arms_of_llama(model), rho=setup.slsam.get("rho", 0.05), clip=setup.clip, **ADAMW)
    results = []
    for index, sample in enumerate(samples):
        batches = [batch for rank in range(world_size) for batch in window(index + 1, rank, setup.accumulation)]
        scale = scales[index] if scales else {}
        size = {"global": len(batches), "rank": setup.accumulation, "micro_batch": 1}[
            setup.slsam.get("ascent_scope", "global")
        ]
        parts = [batches[start : start + size] for start in range(0, len(batches), size)]
        results.append(reference.step(list(sample), batches, lambda arm, scale=scale: scale.get(arm, 1.0), parts))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, results


def max_error(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest absolute difference over all parameters."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)
