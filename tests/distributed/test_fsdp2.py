"""FSDP2: where shards live, what people combine it with, what is refused."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)

from slsam_ds import SLSAM
from tests.distributed.training import (
    ADAMW,
    LlamaSetup,
    Setup,
    Training,
    follow_reference,
    follow_samples,
    max_error,
    slow,
)
from tests.models import SAMPLES, tiny_llama, window
from tests.ranks import run_on_ranks
from tests.reference import Reference

TOLERANCE = 1e-6  # as in test_reference.py
MIXED = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


def test_hybrid_sharding_counts_every_element_once() -> None:
    setup = LlamaSetup(engine="fsdp2", replicas=2, accumulation=2)
    expected, reported = follow_reference(setup, 4, SAMPLES)
    for weights, results in run_on_ranks(4, follow_samples, setup):
        assert max_error(weights, expected) <= TOLERANCE
        for result, reference in zip(results, reported, strict=True):
            assert result.grad_norms == pytest.approx(reference["grad_norms"], rel=1e-4)
            assert result.perturbation_norm == pytest.approx(0.05, rel=1e-3)
            assert result.perturbation_projection == pytest.approx(1.0, abs=1e-3)


def follow_with_shard_sizes(setup: Setup) -> tuple[dict[str, Tensor], list[int]]:
    training = Training(setup)
    training.follow(SAMPLES)
    return training.weights(), [parameter.to_local().numel() for parameter in training.model.parameters()]


def test_a_rank_may_hold_nothing_of_a_parameter() -> None:
    setup = LlamaSetup(engine="fsdp2", model={"hidden": 8}, accumulation=2)
    expected, _ = follow_reference(setup, 3, SAMPLES)
    per_rank = run_on_ranks(3, follow_with_shard_sizes, setup)
    assert 0 in per_rank[2][1]
    assert all(max_error(weights, expected) <= TOLERANCE for weights, _ in per_rank)


def test_tied_embeddings() -> None:
    setup = LlamaSetup(engine="fsdp2", model={"tied": True}, accumulation=2)
    expected, _ = follow_reference(setup, 2, SAMPLES)
    assert all(max_error(weights, expected) <= TOLERANCE for weights, _ in run_on_ranks(2, follow_samples, setup))


@dataclass(frozen=True, kw_only=True)
class Checkpointed(LlamaSetup):
    """With gradient checkpointing, switched on as transformers' Trainer does."""

    reentrant: bool

    def build_model(self) -> nn.Module:
        model: Any = super().build_model()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": self.reentrant})
        if self.reentrant:
            model.enable_input_require_grads()
        return model


@pytest.mark.parametrize("fsdp", [{}, MIXED], ids=["float32", "mixed precision"])
@pytest.mark.parametrize("reentrant", [slow(False), True])
def test_gradient_checkpointing(reentrant: bool, fsdp: dict[str, Any]) -> None:
    setup = Checkpointed(engine="fsdp2", reentrant=reentrant, accumulation=2, fsdp=fsdp)
    if fsdp:  # the same arithmetic as without checkpoints, but for the order in which gradients add up
        expected, _ = run_on_ranks(2, follow_samples, LlamaSetup(engine="fsdp2", accumulation=2, fsdp=fsdp))[0]
    else:
        expected, _ = follow_reference(LlamaSetup(engine="fsdp2", accumulation=2), 2, SAMPLES)
    for weights, _ in run_on_ranks(2, follow_samples, setup):
        assert max_error(weights, expected) <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class LowRank(LlamaSetup):
    """LoRA adapters on a frozen base; there are no arms but the blocks."""

    blocks: ClassVar[str] = "base_model.model.model.layers"

    def build_model(self) -> nn.Module:
        torch.manual_seed(3)
        return get_peft_model(super().build_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_lora() -> None:
    samples = [[0], [3], [1, 2], range(4), [2]]
    setup = LowRank(engine="fsdp2", accumulation=2)
    model = setup.build_model()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    arms = [[name for name in names if f".layers.{block}." in name] for block in range(4)]
    reference = Reference(model, arms, **ADAMW)
    for step, sample in enumerate(samples, start=1):
        reference.step(list(sample), window(step, 0, 2) + window(step, 1, 2))
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for weights, _ in run_on_ranks(2, follow_samples, setup, samples):
        assert max_error(weights, expected) <= TOLERANCE


def follow_without_the_head(setup: Setup) -> dict[str, Tensor]:
    """The second rank's loss does not depend on the head."""
    training = Training(setup)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        output = model(**batch, output_hidden_states=True)
        return output.loss if training.rank == 0 else output.hidden_states[-1].square().mean()

    for step in (1, 2):
        training.step(training.window(step), loss_fn=loss_fn, active=[4, 5])
    return training.weights()


def test_a_rank_whose_data_skips_a_parameter_takes_part() -> None:
    expected = run_on_ranks(2, follow_without_the_head, LlamaSetup(engine="local"))[0]
    for weights in run_on_ranks(2, follow_without_the_head, LlamaSetup(engine="fsdp2")):
        assert max_error(weights, expected) <= TOLERANCE


def refused(kind: str) -> str:
    model = tiny_llama()
    options: dict[str, Any] = {}
    if kind == "fsdp1":
        wrapped: nn.Module = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif kind == "blocks only":
        for block in model.model.layers:
            fully_shard(block)
        wrapped = model
    else:
        if kind == "fp16":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.float16)
        elif kind == "offload":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        elif kind == "ignored":
            options["ignored_params"] = {model.lm_head.weight}
        wrapped = fully_shard(model, **options)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the callers match the message)
        SLSAM(wrapped, torch.optim.AdamW(wrapped.parameters()))
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("fsdp1", "fully_shard (FSDP2) instead"),
        ("blocks only", "4 modules went through fully_shard side by side; apply it to the whole model too"),
        ("fp16", "forward reads it as torch.float16; use float32 or bfloat16"),
        ("offload", "leave offload_policy out"),
        ("ignored", "lm_head.weight: not sharded by fully_shard"),
    ],
)
def test_what_is_not_supported_is_refused_at_once(kind: str, advice: str) -> None:
    assert advice in run_on_ranks(2, refused, kind)[0]
