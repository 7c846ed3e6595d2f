"""Long tasks for small models: a thousand steps and more in half a minute, in the regimes where SAM may help or harm.

Few samples seen many times, wrong labels, and much data seen once: of text and of images. Each starts from weights
pretrained on other data (`starts`).
"""

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.evidence import letters
from benchmarks.evidence.corpus import Part
from benchmarks.evidence.starts import decoder_shape, decoder_weights, encoded, kept, padded, pretrained, sentences
from benchmarks.evidence.tasks import VERBS, Batch, Data, Sample, Task
from benchmarks.evidence.transformer import Shape, SmallTransformer

_PARTS: tuple[Part, ...] = ("train", "validation", "test")
_RATES = (3e-4, 1e-3, 3e-3)
_OLD_DIGITS = range(5)
"""What the reader of digits is pretrained on; it is trained on the others."""
_OLD_LETTERS, _NEW_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abdeghnqrt"
"""The same for letters."""
_NUM_OLD = 8000
"""Pictures that the reader of letters is pretrained on."""


def _prose(libraries: Sequence[str], num_train: int) -> Data:
    """Sentences about functions of libraries that the decoder has not read about; the next token is predicted."""
    rows: dict[Part, list[Sample]] = {part: [] for part in _PARTS}
    for one in sentences():
        if one.library in libraries:
            rows[one.part].append({"ids": encoded(one.sentence)})

    def collate(samples: list[Any]) -> Batch:
        ids = [sample["ids"] for sample in samples]
        return {"inputs": padded(ids), "labels": padded(ids, with_=-100)}

    most = {"train": num_train, "validation": 300, "test": 600}
    parts = {part: _shuffled(rows[part])[: most[part]] for part in _PARTS}
    return _data(parts, collate, decoder_shape(), decoder_weights())


def _verbs(noise: float) -> Data:
    """With which verb does the name of a function begin that is said to do this? Some training labels are wrong."""
    most: Mapping[Part, int] = {"train": 80, "validation": 40, "test": 80}
    rows: dict[tuple[Part, int], list[Sample]] = {(part, label): [] for part in _PARTS for label in range(len(VERBS))}
    for one in sentences():
        verb = one.name.lstrip("_").split("_")[0]
        if verb in VERBS and len(rows[one.part, VERBS.index(verb)]) < most[one.part]:
            rows[one.part, VERBS.index(verb)].append({"ids": encoded(one.sentence), "label": VERBS.index(verb)})
    parts = {part: _shuffled([row for label in range(len(VERBS)) for row in rows[part, label]]) for part in _PARTS}
    parts["train"] = _with_wrong_labels(parts["train"], noise, len(VERBS))

    def collate(samples: list[Any]) -> Batch:
        return {
            "inputs": padded([sample["ids"] for sample in samples]),
            "labels": torch.tensor([sample["label"] for sample in samples]),
        }

    return _data(parts, collate, decoder_shape(len(VERBS)), decoder_weights())


def _digits(num_train: int, noise: float) -> Data:
    """scikit-learn's digits from 5 to 9, for a vision transformer that has learned 0 to 4."""
    samples = [sample for sample in _all_digits() if sample["label"] not in _OLD_DIGITS]
    samples = _shuffled([{**sample, "label": sample["label"] - len(_OLD_DIGITS)} for sample in samples])
    parts: dict[Part, list[Sample]] = {
        "test": samples[:400],
        "validation": samples[400:570],
        "train": _with_wrong_labels(samples[570 : 570 + num_train], noise, 5),
    }
    return _data(parts, _patches, _DIGITS, _digit_weights())


def _letters(num_train: int, noise: float) -> Data:
    """Ten small letters, for a vision transformer that has learned digits and capital letters."""
    samples = _pictured(_NEW_LETTERS, 400 + 1000 + num_train, seed=1)
    parts: dict[Part, list[Sample]] = {
        "validation": samples[:400],
        "test": samples[400:1400],
        "train": _with_wrong_labels(samples[1400:], noise, len(_NEW_LETTERS)),
    }
    return _data(parts, _patches, _letters_shape(_NEW_LETTERS), _letter_weights())


def _data(parts: Mapping[Part, Sequence[Sample]], collate: Any, shape: Shape, weights: Mapping[str, Tensor]) -> Data:
    def build_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = SmallTransformer(shape)
        is_new = shape.answers == "once"
        old = {name: tensor for name, tensor in weights.items() if not (is_new and name.startswith("head."))}
        model.load_state_dict(old, strict=not is_new)
        return model

    return Data(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        collate=collate,
        build_model=build_model,
    )


_DIGITS = Shape(num_inputs=4, num_outputs=5, length=16, reads="patches", answers="once", width=48)


def _digit_weights() -> dict[str, Tensor]:
    samples = [sample for sample in _all_digits() if sample["label"] in _OLD_DIGITS]
    made_of = [_DIGITS.width, _DIGITS.num_blocks, list(_OLD_DIGITS)]
    return kept("digits", made_of, lambda: pretrained(_DIGITS, samples, _loss_of_patches, steps=400, batch=32))


def _letter_weights() -> dict[str, Tensor]:
    shape = _letters_shape(_OLD_LETTERS)
    made_of = [dataclasses.asdict(shape), _OLD_LETTERS, _NUM_OLD]

    def train() -> dict[str, Tensor]:
        samples = _pictured(_OLD_LETTERS, _NUM_OLD, seed=0)
        return pretrained(shape, samples, _loss_of_patches, steps=2000, batch=32)

    return kept("letters", made_of, train)


def _letters_shape(classes: str) -> Shape:
    return Shape(num_inputs=16, num_outputs=len(classes), length=16, reads="patches", answers="once", width=48)


def _pictured(classes: str, number: int, seed: int) -> list[Sample]:
    pictures, labels = letters.pictures(classes, number, seed)
    cut = letters.patches(pictures, 4)
    return [{"patches": cut[index], "label": int(labels[index])} for index in range(number)]


def _loss_of_patches(model: SmallTransformer, some: list[Any]) -> Tensor:
    batch = _patches(some)
    return functional.cross_entropy(model(batch["inputs"]).logits, batch["labels"])


@functools.cache
def _all_digits() -> tuple[Sample, ...]:
    """Each of 16 patches of 2 x 2 pixels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    patches = letters.patches(torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 8 - 1, 2)
    return tuple({"patches": patches[index], "label": int(labels[index])} for index in range(len(labels)))


def _patches(samples: list[Any]) -> Batch:
    return {
        "inputs": torch.stack([sample["patches"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
    }


def _with_wrong_labels(rows: Sequence[Sample], share: float, num_labels: int) -> list[Sample]:
    """The same in every run: exactly this share of the labels becomes another one."""
    chance = random.Random(1)
    wrong = set(chance.sample(range(len(rows)), round(share * len(rows))))
    return [
        {**row, "label": (row["label"] + chance.randrange(1, num_labels)) % num_labels} if number in wrong else row
        for number, row in enumerate(rows)
    ]


def _shuffled(rows: Sequence[Sample]) -> list[Sample]:
    kept_rows = list(rows)
    random.Random(0).shuffle(kept_rows)
    return kept_rows


def _task(name: str, title: str, load: Any, *, batch: int, predicts_tokens: bool = False) -> Task:
    return Task(
        name=name,
        title=title,
        steps=1000,
        batch=batch,
        learning_rates=_RATES,
        predicts_tokens=predicts_tokens,
        load=functools.cache(load),
    )


LONG_TASKS = {
    task.name: task
    for task in (
        _task(
            "prose_few",
            "a decoder goes on with 400 sentences, 20 epochs",
            lambda: _prose(("torch",), 400),
            batch=8,
            predicts_tokens=True,
        ),
        _task(
            "prose_once",
            "a decoder goes on with sentences seen once",
            lambda: _prose(("torch", "transformers"), 8000),
            batch=8,
            predicts_tokens=True,
        ),
        _task("verbs_20", "which verb, 20 % of labels wrong", lambda: _verbs(0.2), batch=8),
        _task("verbs_40", "which verb, 40 % of labels wrong", lambda: _verbs(0.4), batch=8),
        _task("digits_few", "new digits, 60 samples", lambda: _digits(60, 0.0), batch=8),
        _task("digits_20", "new digits, 20 % of labels wrong", lambda: _digits(320, 0.2), batch=16),
        _task("digits_40", "new digits, 40 % of labels wrong", lambda: _digits(320, 0.4), batch=16),
        _task("letters_few", "new letters, 100 samples", lambda: _letters(100, 0.0), batch=16),
        _task("letters_20", "new letters, 20 % of labels wrong", lambda: _letters(800, 0.2), batch=16),
        _task("letters_40", "new letters, 40 % of labels wrong", lambda: _letters(800, 0.4), batch=16),
        _task("letters_once", "new letters, each seen once", lambda: _letters(16000, 0.0), batch=16),
    )
}
