"""What people switch on in a Trainer means the same with SL-SAM."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from slsam_ds.integrations.huggingface import SLSAMMixin, SLSAMTrainer
from slsam_ds.records.files import read_steps
from tests.distributed.training import slow, whole
from tests.integration.engines import ENGINES
from tests.models import NUM_BLOCKS, VOCABULARY, arms_of_llama, tiny_llama
from tests.ranks import run_on_ranks
from tests.reference import Reference

KNOBS = {"active_layers": 2, "rho": 0.02, "seed": 1}
IGNORED = -100


def sample(index: int) -> dict[str, Any]:
    """Random tokens, of another length than those of the next sample.

    The first has no label, which no loss asks for: transformers before 5.11 divides by the number of all labels.
    """
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, VOCABULARY, (4 + 5 * index % 13,), generator=generator).tolist()
    return {"input_ids": tokens, "labels": [IGNORED, *tokens[1:]]}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad at the end, where a causal model's other tokens do not see it."""
    length = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, filling: int) -> Tensor:
        return torch.tensor([sample[name] + [filling] * (length - len(sample[name])) for sample in samples])

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}


class Seen(TrainerCallback):
    """What a callback sees: events with the number of the step, and the data as they were collated."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.events.append((name, state.global_step, state.epoch, state.num_input_tokens_seen))

        return note


def make(output_dir: str, *, cls: type[Trainer] = SLSAMTrainer, num_samples: int = 32, **kwargs: Any) -> Any:
    """A trainer on a tiny model; keyword arguments that a trainer does not take are training arguments."""
    names = ("model", "slsam", "compute_loss_func", "compute_metrics", "callbacks", "train_dataset", "data_collator")
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    if issubclass(cls, SLSAMMixin):
        given.setdefault("slsam", KNOBS)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **kwargs,
    }
    given.setdefault("model", tiny_llama())
    given.setdefault("train_dataset", [sample(index) for index in range(num_samples)])
    given.setdefault("data_collator", collate)
    args = TrainingArguments(output_dir=output_dir, **settings)
    return cls(args=args, eval_dataset=[sample(100 + index) for index in range(4)], **given)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in second)


# What the loss is, over all tokens of all ranks and micro-batches at once


def shifted(batch: dict[str, Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens that count, and these tokens."""
    labels = batch["labels"][:, 1:]
    return logits[:, :-1].log_softmax(-1)[labels != IGNORED], labels[labels != IGNORED]


def cross_entropy(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return -log_probabilities.gather(1, tokens[:, None]).sum()


def squared(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return log_probabilities.gather(1, tokens[:, None]).square().sum()


def smoothed(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return 0.8 * cross_entropy(log_probabilities, tokens) - 0.2 * log_probabilities.mean(-1).sum()


def squared_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return squared(*shifted({"labels": labels}, outputs.logits)) / num_items_in_batch


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "own": (cross_entropy, {}),
    "clipped": (cross_entropy, {"max_grad_norm": 0.1}),
    "label_smoothing": (smoothed, {"label_smoothing_factor": 0.2}),
    "compute_loss_func": (squared, {"compute_loss_func": squared_loss}),
}


class Recorder(SLSAMTrainer):
    """Keeps the windows."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        window, num_items = super().get_batch_samples(*args, **kwargs)
        vars(self).setdefault("windows", []).append(list(window))
        return window, num_items


def train(output_dir: str, loss: str, engine: str) -> tuple[dict[str, Tensor], list[Any], list[float]]:
    trainer = make(output_dir, cls=Recorder, **LOSSES[loss][1], **ENGINES[engine])
    trainer.train()
    return weights(trainer.model), trainer.windows, [e["loss"] for e in trainer.state.log_history if "loss" in e]


QUICK = {("own", "none"), ("own", "zero2")}
CASES = [
    pytest.param(loss, engine, marks=[] if (loss, engine) in QUICK else pytest.mark.slow)
    for loss in LOSSES
    for engine in ENGINES
]


@pytest.mark.parametrize(("loss", "engine"), CASES)
def test_every_token_of_a_window_weighs_the_same(loss: str, engine: str, tmp_path: Path) -> None:
    if loss == "label_smoothing" and version.parse(transformers.__version__) < version.parse("5.15"):
        pytest.skip("before 5.15, transformers adds up the means of a window's micro-batches where labels are smoothed")
    results = run_on_ranks(2, train, str(tmp_path), loss, engine)
    trained, _, logged = results[0]
    model = tiny_llama()
    sum_of_losses, settings = LOSSES[loss]

    class Scored:
        named_parameters = model.named_parameters

        def __call__(self, **batch: Tensor) -> Any:
            log_probabilities, tokens = shifted(batch, model(input_ids=batch["input_ids"]).logits)
            return SimpleNamespace(loss=sum_of_losses(log_probabilities, tokens) / len(tokens))

    arms = arms_of_llama(model)
    reference = Reference(Scored(), arms, rho=0.02, weight_decay=0.0, clip=settings.get("max_grad_norm", 0.0))
    for record, *windows, loss_logged in zip(
        read_steps(tmp_path), *(windows for _, windows, _ in results), logged, strict=True
    ):
        rows = [row for window in windows for batch in window for row in unpadded(batch)]
        assert len({len(row["input_ids"]) for row in rows}) > 2
        scale = {arm: 1 / record["probabilities"][arm] for arm in record["active"]}
        expected = reference.step(record["active"], [collate(rows)], scale.__getitem__)
        assert loss_logged == pytest.approx(expected["ascent_loss"], abs=1e-4)
    # float32, and sums over tokens in another order; a step moves weights by up to 5e-3.
    assert distance(trained, dict(model.named_parameters())) <= 3e-6


def unpadded(batch: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        row = tokens[: 1 + int((labels != IGNORED).sum())].tolist()
        yield {"input_ids": row, "labels": row}


# What callbacks see, and which data pass


def observe(output_dir: str, cls: type[Trainer], settings: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    seen, data = Seen(), []

    def collate_and_keep(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        data.append([sample["input_ids"] for sample in samples])
        return collate(samples)

    trainer = make(output_dir, cls=cls, callbacks=[seen], data_collator=collate_and_keep, num_samples=22, **settings)
    trainer.train()
    return seen.events, data


SCHEDULES: dict[str, dict[str, Any]] = {
    "last window shorter, evaluations and checkpoints": {
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "include_num_input_tokens_seen": "all",
    },
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_callbacks_and_data_are_those_of_the_stock_trainer(schedule: str, tmp_path: Path) -> None:
    settings = SCHEDULES[schedule]
    ours = run_on_ranks(1, observe, str(tmp_path / "ours"), SLSAMTrainer, settings)[0]
    stock = run_on_ranks(1, observe, str(tmp_path / "stock"), Trainer, settings)[0]
    assert ours == stock
    assert "include_num_input_tokens_seen" not in settings or ours[0][-1][-1] > 0


# Evaluation, early stopping, the best checkpoint


class Snapshots(TrainerCallback):
    """The weights after each step, and what an evaluation right then said."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}
        self.eval_losses: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = weights(model)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict[str, float], **kwargs: Any) -> None:
        self.eval_losses[state.global_step] = metrics["eval_loss"]


def stop_early(
    output_dir: str, engine: str
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]], dict[int, float]]:
    scores = itertools.chain([1.0, 3.0, 2.0, 0.0], itertools.repeat(9.0))
    snapshots = Snapshots()
    trainer = make(
        output_dir,
        compute_metrics=lambda predictions: {"score": next(scores)},
        callbacks=[snapshots, EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=12,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        per_device_eval_batch_size=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **ENGINES[engine],
    )
    trainer.train()
    return weights(trainer.model), snapshots


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_it_stops_early_and_ends_with_the_best_weights(engine: str, tmp_path: Path) -> None:
    last, snapshots = run_on_ranks(2, stop_early, str(tmp_path), engine)[0]
    after, eval_losses = snapshots.after, snapshots.eval_losses
    assert sorted(after) == sorted(eval_losses) == [1, 2, 3, 4]
    assert all(torch.equal(last[name], weight) for name, weight in after[2].items())
    model = tiny_llama()
    for step, evaluated in eval_losses.items():  # at the weights themselves, without a perturbation
        model.load_state_dict(after[step], strict=False)
        with torch.no_grad():
            expected = model(**collate([sample(100 + index) for index in range(4)])).loss.item()
        assert evaluated == pytest.approx(expected, abs=1e-4)


# Noise, compilation, sequence to sequence


def losses(output_dir: str, settings: dict[str, Any]) -> list[tuple[float, float]]:
    trainer = make(output_dir, slsam={**KNOBS, "rho": 1e-7, "prefix_reuse": False}, **settings)
    trainer.train()
    return [(record["ascent_loss"], record["loss"]) for record in read_steps(output_dir)]


def test_both_passes_draw_the_same_neftune_noise(tmp_path: Path) -> None:
    plain = run_on_ranks(1, losses, str(tmp_path / "plain"), {})[0]
    noisy = run_on_ranks(1, losses, str(tmp_path / "noisy"), {"neftune_noise_alpha": 30.0})[0]
    for (ascent, descent), (without, _) in zip(noisy, plain, strict=True):
        assert descent == pytest.approx(ascent, abs=1e-5)
        assert ascent != pytest.approx(without, abs=1e-3)


def compile_and_train(output_dir: str, engine: str, backend: str | None) -> tuple[dict[str, Tensor], list[int]]:
    graphs: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    settings = {"max_steps": 10, "gradient_accumulation_steps": 1, "train_dataset": [sample(0)] * 64}
    trainer = make(output_dir, callbacks=[Count()], torch_compile_backend=backend, **settings, **ENGINES[engine])
    trainer.train()
    return weights(trainer.model), graphs


@pytest.mark.parametrize(
    "engine", ["none", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_compiling_makes_a_few_graphs_and_no_more_for_other_samples(engine: str, tmp_path: Path) -> None:
    num_ranks = 1 if engine == "none" else 2
    compiled, graphs = run_on_ranks(num_ranks, compile_and_train, str(tmp_path / "compiled"), engine, "aot_eager")[0]
    eager, _ = run_on_ranks(num_ranks, compile_and_train, str(tmp_path / "eager"), engine, None)[0]
    samples = {tuple(record["active"]) for record in read_steps(tmp_path / "compiled")}
    assert len(samples) > 6  # so many would the whole model need
    assert 2 <= graphs[-1] <= 4  # a block is trained or not, with or without gradients to pass down
    assert distance(compiled, eager) <= 1e-5


def checkpoint_and_train(output_dir: str, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[int]]:
    """Weights, and how often each block ran."""
    trainer = make(output_dir, max_steps=6, slsam={"selector": "cyclic", "active_layers": 1}, **settings)
    runs = [0] * NUM_BLOCKS
    for depth, block in enumerate(trainer.model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, depth=depth: runs.__setitem__(depth, runs[depth] + 1))
    trainer.train()
    return weights(trainer.model), runs


def test_gradient_checkpointing_runs_again_only_what_backward_passes(tmp_path: Path) -> None:
    """transformers makes backward go all the way down there."""
    plain, once = run_on_ranks(1, checkpoint_and_train, str(tmp_path / "plain"), {})[0]
    settings = {"gradient_checkpointing": True}
    checkpointed, runs = run_on_ranks(1, checkpoint_and_train, str(tmp_path / "checkpointed"), settings)[0]
    assert distance(plain, checkpointed) <= 1e-6
    # In turn: embeddings, four blocks, head. Block i is passed for arms 0 to i + 1: two passes of three micro-batches;
    # and twice a single one where the prefix below is tried, of the blocks above it.
    assert [again - first for first, again in zip(once, runs, strict=True)] == [12, 18, 24 + 2, 30 + 4]


def refusal(output_dir: str, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        make(output_dir, **kwargs)
    return str(raised.value)


def refuse_data_parallel(output_dir: str) -> str:
    args = TrainingArguments(output_dir=output_dir, use_cpu=True, report_to=[])
    assert args.n_gpu == 0
    args._n_gpu = 2  # what it would find with two GPUs and one process
    with pytest.raises(ValueError, match=r".") as raised:
        SLSAMTrainer(model=tiny_llama(), args=args, train_dataset=[sample(0)])
    return str(raised.value)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    compiled = functools.partial(refusal, torch_compile_backend="eager", **ENGINES["zero3"])
    assert "not supported under ZeRO-3" in run_on_ranks(2, compiled, str(tmp_path))[0]
    assert "start one per GPU" in run_on_ranks(1, refuse_data_parallel, str(tmp_path))[0]


class SLSAMSeq2SeqTrainer(SLSAMMixin, Seq2SeqTrainer):
    """As a user writes it."""


def tiny_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "max_position_embeddings": 32, "vocab_size": VOCABULARY}
    sizes |= {f"{side}_layers": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    return BartForConditionalGeneration(BartConfig(**sizes, dropout=0.1))


def translate(output_dir: str, engine: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    settings = dict(ENGINES[engine])
    if engine == "fsdp2":
        wrap = ["BartEncoderLayer", "BartDecoderLayer"]
        settings["fsdp_config"] = {**settings["fsdp_config"], "transformer_layer_cls_to_wrap": wrap}
    blocks = [f"model.{side}.layers.{index}" for side in ("encoder", "decoder") for index in range(2)]
    args = Seq2SeqTrainingArguments(
        output_dir=output_dir,
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = SLSAMSeq2SeqTrainer(
        model=tiny_bart(),
        args=args,
        slsam={"layers": blocks, "active_layers": 2, "other_parameters": "always"},
        train_dataset=[sample(index) for index in range(32)],
        eval_dataset=[sample(index) for index in range(4)],
        data_collator=collate,
        compute_metrics=lambda predictions: {"longest": predictions.predictions.shape[1]},
    )
    trainer.train()
    return read_steps(output_dir), trainer.evaluate()


@pytest.mark.parametrize(
    "engine", [name if name == "none" else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]
)
def test_sequence_to_sequence_trains_and_generates(engine: str, tmp_path: Path) -> None:
    records, metrics = run_on_ranks(2, translate, str(tmp_path), engine)[0]
    assert [len(record["active"]) for record in records] == [2] * 4
    assert all(math.isfinite(record["loss"]) and record["ascent_loss"] > 0 for record in records)
    assert metrics["eval_longest"] > 1


# What has no label to learn from


def first_without_labels(samples: Sequence[dict[str, Any]], *, ranks: Sequence[int]) -> dict[str, Tensor]:
    """On these ranks, the first row of a batch has none, and the ascent takes that row."""
    batch = collate(samples)
    if torch.distributed.get_rank() in ranks:
        batch["labels"][0] = IGNORED
    return batch


def unlabelled_climb(output_dir: str, ranks: Sequence[int]) -> tuple[list[dict[str, Any]], float]:
    knobs = {**KNOBS, "ascent_fraction": 0.5}
    collator = functools.partial(first_without_labels, ranks=ranks)
    settings = {"gradient_accumulation_steps": 1, "max_steps": 3, "data_collator": collator}
    trainer = make(output_dir, slsam=knobs, **settings)
    before = weights(trainer.model)
    trainer.train()
    return trainer.state.log_history, distance(before, weights(trainer.model))


@pytest.mark.parametrize(("num_ranks", "without"), [(1, [0]), slow(2, [0, 1]), (2, [1])])
def test_a_climb_without_a_label_does_not_skip_the_step(num_ranks: int, without: list[int], tmp_path: Path) -> None:
    for history, moved in run_on_ranks(num_ranks, unlabelled_climb, str(tmp_path), without):
        assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)
        assert moved > 0
    assert [record["skipped"] for record in read_steps(tmp_path)] == [False] * 3
