"""Blocks that hand each other more than the hidden state: both passes run all of them, or find the same above some."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    JambaConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    RwkvConfig,
)

from slsam_ds import SLSAM, SLSAMConfig, StepResult
from tests.models import window

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}
SAME_KINDS = ["sliding_attention", "full_attention"] * 3
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    # The last layers attend to keys and values of the last layer of their kind that has its own.
    "gemma 3n": lambda: Gemma3nTextConfig(
        **SMALL, head_dim=8, num_kv_shared_layers=2, layer_types=SAME_KINDS, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 6,
        sliding_window=8,
    ),
    "gemma 4": lambda: transformers.Gemma4TextConfig(
        **SMALL, head_dim=8, global_head_dim=8, num_kv_shared_layers=2, layer_types=SAME_KINDS, sliding_window=8,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
    ),
    "qwen 2 moe": lambda: Qwen2MoeConfig(
        **SMALL, **EXPERTS, shared_expert_intermediate_size=32, router_aux_loss_coef=0.1
    ),
    # Nothing of a router in the first block, nor in the last below most samples.
    "qwen 3 moe": lambda: Qwen3MoeConfig(
        **SMALL, **EXPERTS, head_dim=8, mlp_only_layers=[0, 2, 3], router_aux_loss_coef=0.1
    ),
    "jamba": lambda: JambaConfig(
        **SMALL, num_experts=4, output_router_logits=True, router_aux_loss_coef=0.1, use_mamba_kernels=False,
        attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4,
    ),
    "rwkv": lambda: RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=6, attention_hidden_size=32, context_length=64
    ),
}  # fmt: skip
if not hasattr(transformers, "Gemma4TextConfig"):  # transformers is older than the model
    del CONFIGS["gemma 4"]


def from_config(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").train()
    return model


class Blocks(nn.Module):
    """Blocks in a row, as a user writes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden).tanh()
        return hidden.square().mean()


class Penalised(Blocks):
    """A forward hook within the blocks collects what the loss adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: list[Tensor] = []
        self.blocks[1].register_forward_hook(lambda block, inputs, output: self.collected.append(output.square().sum()))

    def forward(self, hidden: Tensor) -> Tensor:
        loss = super().forward(hidden)
        loss = loss + torch.stack(self.collected).sum() if self.collected else loss
        self.collected.clear()
        return loss


class Stale(Blocks):
    """A higher block reads what a lower one left behind: where that does not run, it is another micro-batch's."""

    gate = 1.0

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_parameter("gate", nn.Parameter(torch.tensor(self.gate)))
        self.blocks[1].register_forward_hook(lambda block, inputs, output: vars(self).update(memory=2 * output))

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            hidden = block(hidden).tanh()
            hidden = hidden + block.gate * self.memory if index == 4 else hidden
        return hidden.square().mean()


class Gated(Stale):
    """What is read from below counts nothing at first."""

    gate = 0.0


class Counting(Blocks):
    """No tensor at all: how many blocks have run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[int] = []
        for block in self.blocks:
            block.register_forward_hook(lambda *_: self.ran.append(1))

    def forward(self, hidden: Tensor) -> Tensor:
        self.ran.clear()
        return super().forward(hidden) * len(self.ran)


class Raising(Blocks):
    """A higher block asks for what a lower one puts into a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: dict[str, Tensor] = {}
        self.blocks[1].register_forward_hook(lambda block, inputs, output: self.shared.update(keys=2 * output))

    def forward(self, hidden: Tensor) -> Tensor:
        loss = super().forward(hidden)
        return loss + self.shared.pop("keys").square().mean()


def numbers(step: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, 4, generator=generator) for _ in range(length)]


HAND_MADE = [Penalised, Stale, Gated, Counting, Raising]
# With embeddings before the blocks and a head after them, arm i + 1 is block i.
SAMPLES = ([4, 6], [6], [5], [3], [7], [5, 6], [2])


def steps(
    make: Callable[[], nn.Module], data: Callable[[int], Sequence[Any]], samples: Sequence[Sequence[int]], **knobs: Any
) -> tuple[list[StepResult], nn.Module, SLSAM]:
    model = make()
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4), SLSAMConfig(rho=0.05, **knobs))
    torch.manual_seed(1)
    loss_fn = None if hasattr(model, "config") else (lambda model, batch: model(batch))
    results = [slsam.step(data(step), loss_fn, active=sample) for step, sample in enumerate(samples, start=1)]
    return results, model, slsam


def assert_alike(make: Callable[[], nn.Module], data: Callable[[int], Any], samples: Any, scope: str) -> SLSAM:
    whole, expected, _ = steps(make, data, samples, prefix_reuse=False, ascent_scope=scope)
    found, model, slsam = steps(make, data, samples, ascent_scope=scope)
    for one, other in zip(found, whole, strict=True):
        assert not one.skipped
        assert one.ascent_loss == pytest.approx(other.ascent_loss, abs=1e-6)
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
        assert one.grad_norms == pytest.approx(other.grad_norms, rel=1e-6)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    return slsam


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_transformers(name: str) -> None:
    assert_alike(lambda: from_config(name), lambda step: window(step, 0, 2), SAMPLES, "global")


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
@pytest.mark.parametrize("make", HAND_MADE)
def test_models_of_ones_own(make: Callable[[], nn.Module], scope: str) -> None:
    # An odd step has one micro-batch, where what is left behind is right; the next has two.
    assert_alike(make, lambda step: numbers(step, 2 - step % 2), [[5], [5], [4], [4], [3, 5], [5]], scope)
