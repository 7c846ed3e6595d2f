"""What the long tasks start from: texts read once, a vocabulary, and weights pretrained on what no task trains on.

All of it is made of what is installed, and kept in `outputs/`, which is not part of the repository.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.evidence.corpus import LIBRARIES, Documented, documented
from benchmarks.evidence.transformer import PADDING, Shape, SmallTransformer

FOLDER = Path("outputs/evidence-starts")

VOCABULARY = 1024
LENGTH = 32
"""Most tokens of a sentence; what is longer is cut."""

READ_BEFORE = ("datasets", "deepspeed", "matplotlib", "numpy", "sklearn", "stdlib")
"""What the decoder is pretrained on: of these libraries, the files that are for training."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_STEPS, _BATCH, _RATE, _WARM_UP = 1500, 16, 2e-3, 100


@functools.cache
def sentences() -> tuple[Documented, ...]:
    """`corpus.documented`, from disk where the same libraries were read before."""
    path = FOLDER / f"sentences-{_digest(_versions())}.json"
    if not path.is_file():
        _write(path, lambda part: part.write_text(json.dumps([dataclasses.asdict(one) for one in documented()])))
    return tuple(Documented(**row) for row in json.loads(path.read_text()))


@functools.cache
def tokenizer() -> Any:
    """Byte pairs of what the decoder is pretrained on; token 0 is padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<padding>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((one.sentence for one in _read_before()), trainer)
    return made


def encoded(sentence: str) -> list[int]:
    """Its tokens, cut to `LENGTH`."""
    ids: list[int] = tokenizer().encode(sentence).ids
    return ids[:LENGTH]


def padded(rows: Sequence[Sequence[int]], *, with_: int = PADDING) -> Tensor:
    """Rows of tokens as one tensor, filled up at the end. Shape (rows, longest), int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[with_] * (longest - len(row))] for row in rows])


def decoder_shape(num_outputs: int | None = None) -> Shape:
    """The decoder, or with `num_outputs` a classifier with its blocks."""
    classifies = num_outputs is not None
    return Shape(
        num_inputs=VOCABULARY,
        num_outputs=num_outputs or VOCABULARY,
        length=LENGTH,
        answers="once" if classifies else "everywhere",
    )


def decoder_weights() -> dict[str, Tensor]:
    """Of the pretrained decoder."""

    def train() -> dict[str, Tensor]:
        rows = [encoded(one.sentence) for one in _read_before()]
        return pretrained(decoder_shape(), rows, _next_tokens, steps=_STEPS, batch=_BATCH)

    made_of = [_versions(), dataclasses.asdict(decoder_shape()), READ_BEFORE, _STEPS, _BATCH, _RATE]
    return kept("decoder", made_of, train)


def kept(name: str, made_of: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights from disk, or made and kept there.

    Args:
        name: Of the file.
        made_of: Whatever they depend on, as JSON-serialisable values.
        make: Makes them.
    """
    path = FOLDER / f"{name}-{_digest(made_of)}.pt"
    if not path.is_file():
        weights = make()
        _write(path, lambda part: torch.save(weights, part))
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


def pretrained(
    shape: Shape,
    rows: Sequence[Any],
    loss_of: Callable[[SmallTransformer, list[Any]], Tensor],
    *,
    steps: int,
    batch: int,
) -> dict[str, Tensor]:
    """Weights after AdamW has gone over the rows, in an order that a seed gives."""
    torch.manual_seed(0)
    model = SmallTransformer(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, fused=True)
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(rows)).tolist()
        taken, order = order[:batch], order[batch:]
        rate = _RATE * min((step + 1) / _WARM_UP, (steps - step) / (steps - _WARM_UP))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss_of(model, [rows[index] for index in taken]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict()


def _next_tokens(model: SmallTransformer, rows: list[list[int]]) -> Tensor:
    inputs, labels = padded(rows), padded(rows, with_=-100)
    return functional.cross_entropy(model(inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _read_before() -> list[Documented]:
    return [one for one in sentences() if one.library in READ_BEFORE and one.part == "train"]


def _versions() -> dict[str, str]:
    import platform

    found = {name: _DISTRIBUTIONS.get(name, name) for name in LIBRARIES if name != "stdlib"}
    return {"stdlib": platform.python_version(), **{n: importlib.metadata.version(d) for n, d in found.items()}}


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    write(part)
    part.replace(path)
