"""Tiny models and data that every test shares."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 64
NUM_BLOCKS = 4


def tiny_llama(
    *, num_blocks: int = NUM_BLOCKS, hidden: int = 32, seed: int = 0, dropout: float = 0.0, tied: bool = False
) -> LlamaForCausalLM:
    """A Llama of a few thousand parameters per block, float32, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        attention_dropout=dropout,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.train()
    return model


class TinyDecoder(nn.Module):
    """What an engine sees of a language model, and little more: blocks between embeddings and a head, and a loss.

    A fifth of a Llama's operations; modules are called as Llama's are. Positions do not see each other.
    """

    def __init__(self, num_blocks: int, hidden: int, tied: bool) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, hidden)
        self.model.layers = nn.ModuleList(_Block(hidden) for _ in range(num_blocks))
        self.model.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        hidden = self.model.embed_tokens(input_ids)
        for block in self.model.layers:
            hidden = block(hidden)
        logits = self.lm_head(self.model.norm(hidden))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class _Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.mlp = _Projections(hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.norm(hidden))


class _Projections(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.up_proj(hidden)))


def tiny_decoder(*, num_blocks: int = NUM_BLOCKS, hidden: int = 32, seed: int = 0, tied: bool = False) -> TinyDecoder:
    """As `tiny_llama`, where what the blocks compute does not matter."""
    torch.manual_seed(seed)
    return TinyDecoder(num_blocks, hidden, tied).train()


def micro_batch(step: int, rank: int, index: int, *, batch_size: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Random tokens, different for every step, rank and micro-batch of the window."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * rank + index + 1)
    tokens = torch.randint(0, VOCABULARY, (batch_size, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def loss_in_autocast(model: Any, batch: Any) -> torch.Tensor:
    """As a Trainer with `bf16=True` computes it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: torch.Tensor = model(**batch).loss
    return loss


def window(step: int, rank: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of one optimizer step on one rank."""
    return [micro_batch(step, rank, index) for index in range(accumulation)]


def arms_of_llama(model: torch.nn.Module) -> list[list[str]]:
    """Parameter names of the arms as the contract numbers them, told from the names alone."""
    names = [name for name, _ in model.named_parameters()]
    blocks = sorted({int(name.split(".")[2]) for name in names if name.startswith("model.layers.")})
    arms = [[name for name in names if name.startswith("model.embed_tokens")]]
    arms += [[name for name in names if name.startswith(f"model.layers.{block}.")] for block in blocks]
    arms.append([name for name in names if name.startswith(("model.norm", "lm_head"))])
    return arms


SAMPLES: Sequence[Sequence[int]] = ([0], [5], [2, 3], range(6), [1, 4], [3], [0, 5], [2], [1, 2, 4], [4])
"""Ten forced samples over the six arms of `tiny_llama`: lowest, highest, one, several, all."""
