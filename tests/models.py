"""Tiny models and data that every test shares."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
