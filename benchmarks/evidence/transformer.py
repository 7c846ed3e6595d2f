"""One small transformer for all long tasks: reads tokens or patches of an image, answers at every place or once."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

PADDING = 0
"""The token that is none."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What to build.

    Attributes:
        num_inputs: Size of the vocabulary; of a reader of patches, values of a patch.
        num_outputs: Size of the vocabulary, or number of classes.
        length: Most tokens or patches.
        reads: What the input is.
        answers: At every place; or once, from the mean over all places. Of tokens, each sees those before it.
        width: Of a place's vector.
        num_blocks: How deep.
        num_heads: Of the attention.
        dropout: Share of values dropped in training, of the embedding and of what each block adds.
    """

    num_inputs: int
    num_outputs: int
    length: int
    reads: Literal["tokens", "patches"] = "tokens"
    answers: Literal["everywhere", "once"] = "everywhere"
    width: int = 64
    num_blocks: int = 6
    num_heads: int = 4
    dropout: float = 0.0


@dataclass
class Answer:
    """What a forward returns.

    Attributes:
        logits: Shape (samples, places, outputs), or (samples, outputs) where the answer is given once.
    """

    logits: Tensor


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self._num_heads, self._is_causal = shape.num_heads, shape.reads == "tokens"
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, places: Tensor) -> Tensor:
        """`places`: shape (samples, places, width). Padding stands at the end, where no token before it looks."""
        heads = self.query_key_value(self.norm_1(places)).unflatten(-1, (3, self._num_heads, -1)).transpose(1, 3)
        query, key, value = heads.unbind(2)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=self._is_causal)
        places = places + self.dropout(self.mix(attended.transpose(1, 2).flatten(2)))
        added: Tensor = self.down(functional.gelu(self.up(self.norm_2(places))))
        return places + self.dropout(added)


class SmallTransformer(nn.Module):
    """Embedding, blocks, norm and head.

    Args:
        shape: What to build.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        embed = nn.Embedding if shape.reads == "tokens" else nn.Linear
        self.embedding = embed(shape.num_inputs, width)
        self.position = nn.Embedding(shape.length, width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.num_outputs)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor) -> Answer:
        """`inputs`: tokens, shape (samples, places); or patches, shape (samples, places, values)."""
        places = self.dropout(self.embedding(inputs) + self.position.weight[: inputs.shape[1]])
        for block in self.blocks:
            places = block(places)
        places = self.norm(places)
        if self.shape.answers == "once":
            is_text = self.shape.reads == "tokens"
            there = (inputs != PADDING if is_text else inputs.new_ones(inputs.shape[:2])).to(places.dtype)
            places = torch.einsum("sp,spw->sw", there / there.sum(1, keepdim=True), places)
        return Answer(self.head(places))
