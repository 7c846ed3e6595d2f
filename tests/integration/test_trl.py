"""SLSAMMixin before the trainers of TRL: they train, only the sample moves, and metrics are counted once."""

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from slsam_ds.integrations.huggingface import SLSAMMixin
from slsam_ds.records.files import LAYERS_FILE, read_steps
from tests.distributed.training import slow, whole
from tests.integration.engines import ENGINES
from tests.models import tiny_llama
from tests.ranks import run_on_ranks
from tests.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

STEPS, ACCUMULATION = 3, 2
KNOBS = {"active_layers": 2, "rho": 0.02, "seed": 1, "prefix_reuse": False}  # passes are counted
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
PAIR = {"prompt": "what ", "chosen": "yes please ", "rejected": "no "}


class SLSAMSFTTrainer(SLSAMMixin, SFTTrainer):
    """As the README writes it."""


class SLSAMDPOTrainer(SLSAMMixin, DPOTrainer):
    """As the README writes it."""


class SLSAMRewardTrainer(SLSAMMixin, RewardTrainer):
    """Likewise."""


class SLSAMGRPOTrainer(SLSAMMixin, GRPOTrainer):
    """What nobody should write."""


class Watch(TrainerCallback):
    """Which parameters moved in each step, and which were trainable whenever the policy ran."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.trainable: list[set[str]] = []
        self._before: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self._before = weights(model)
        model.register_forward_pre_hook(self.policy_runs)

    def policy_runs(self, model: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            self.trainable.append({name for name, weight in model.named_parameters() if weight.requires_grad})

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        now = weights(model)
        self.moved.append({name for name, weight in now.items() if not torch.equal(weight, self._before[name])})
        self._before = now


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


def tiny_policy() -> nn.Module:
    """A Llama that TRL 0.24 takes, too: it asks for a dict that models of transformers 5 have no more."""
    model = tiny_llama()
    model.warnings_issued = {}
    return model


def sentence(index: int) -> str:
    return "abc def " * (1 + index % 3) + str(index)


def make(kind: str, *, stock: bool = False, callbacks: Any = (), **settings: Any) -> Any:
    """A trainer of TRL on a tiny model; `kind` is "sft" or "dpo", with "_lora" where it trains adapters."""
    given = {"model": tiny_policy(), "processing_class": tiny_tokenizer(), "callbacks": list(callbacks)}
    if kind.endswith("_lora"):
        given["peft_config"] = LORA
    elif kind == "dpo":
        given["ref_model"] = tiny_policy()
    if "deepspeed" in settings:  # the reference model gets this JSON, too
        settings["deepspeed"] = {**settings["deepspeed"], "slsam": KNOBS}
    elif not stock:
        given["slsam"] = KNOBS
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **settings,
    }
    if kind.startswith("sft"):
        rows = [{"text": sentence(index)} for index in range(32)]
        trainer, config = (SFTTrainer if stock else SLSAMSFTTrainer), SFTConfig
    else:
        rows = [{name: part + sentence(index) for name, part in PAIR.items()} for index in range(32)]
        trainer, config = (DPOTrainer if stock else SLSAMDPOTrainer), DPOConfig
    return trainer(args=config(**settings), train_dataset=Dataset.from_list(rows), **given)


def train(output_dir: str, kind: str, engine: str) -> tuple[list[set[str]], list[set[str]], list[dict[str, Any]]]:
    watch = Watch()
    trainer = make(kind, output_dir=output_dir, callbacks=[watch], **ENGINES[engine])
    trainer.train()
    return watch.moved, watch.trainable, trainer.state.log_history


QUICK = {("sft_lora", "none")}
COMBINATIONS = [
    pytest.param(kind, engine, marks=[] if (kind, engine) in QUICK else pytest.mark.slow)
    for kind in ("sft", "sft_lora", "dpo", "dpo_lora")
    for engine in ENGINES
]


@pytest.mark.parametrize(("kind", "engine"), COMBINATIONS)
def test_it_trains_and_only_the_sample_moves(kind: str, engine: str, tmp_path: Path) -> None:
    (moved, trainable, history), _ = run_on_ranks(2, train, str(tmp_path), kind, engine)
    layers = [set(layer["parameters"]) for layer in json.loads((tmp_path / LAYERS_FILE).read_text())]
    records = read_steps(tmp_path)
    assert len(records) == len(moved) == STEPS
    assert len(trainable) == STEPS * 2 * ACCUMULATION
    for step, record in enumerate(records):
        sample = set().union(*(layers[arm] for arm in record["active"]))
        assert moved[step]
        assert moved[step] <= sample
        assert all(names == sample for names in trainable[step * 2 * ACCUMULATION : (step + 1) * 2 * ACCUMULATION])
        assert not record["skipped"]
        assert math.isfinite(record["loss"])
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(
        [record["ascent_loss"] for record in records], abs=1e-4
    )


def logged(output_dir: str, kind: str, stock: bool) -> list[dict[str, float]]:
    trainer = make(kind, stock=stock, output_dir=output_dir)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_metrics_are_counted_once_and_at_the_weights_themselves(kind: str, tmp_path: Path) -> None:
    ours = run_on_ranks(1, logged, str(tmp_path / "ours"), kind, False)[0]
    stock = run_on_ranks(1, logged, str(tmp_path / "stock"), kind, True)[0]
    assert [entry.get("num_tokens") for entry in ours] == [entry.get("num_tokens") for entry in stock]
    first_ours, first_stock = ours[0], stock[0]  # from the same weights
    shared = {name for name in first_ours if not name.startswith("slsam/")}
    assert shared == first_stock.keys()
    for name in shared - {"grad_norm"}:
        assert first_ours[name] == pytest.approx(first_stock[name], abs=1e-6), name


def make_online(output_dir: str, kind: str) -> Any:
    common = {"output_dir": output_dir, "report_to": [], "use_cpu": True, "bf16": False}
    if kind == "grpo":
        return SLSAMGRPOTrainer(
            model=tiny_policy(),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=GRPOConfig(per_device_train_batch_size=2, num_generations=2, **common),
            train_dataset=Dataset.from_list([{"prompt": sentence(index)} for index in range(8)]),
            processing_class=tiny_tokenizer(),
        )
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError:  # where it was before
        from trl import GKDConfig, GKDTrainer

    class SLSAMGKDTrainer(SLSAMMixin, GKDTrainer):
        """Nor this."""

    message = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    return SLSAMGKDTrainer(
        model=tiny_policy(),
        teacher_model=tiny_policy(),
        args=GKDConfig(**common),
        train_dataset=Dataset.from_list([{"messages": message}] * 8),
        processing_class=tiny_tokenizer(chat_template=CHAT_TEMPLATE),
    )


def refusal(output_dir: str, kind: str) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        make_online(output_dir, kind)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["grpo", pytest.param("gkd", marks=pytest.mark.slow)])
def test_trainers_that_generate_while_they_step_are_refused(kind: str, tmp_path: Path) -> None:
    message = run_on_ranks(1, functools.partial(refusal, kind=kind), str(tmp_path))[0]
    assert "generates its data while it steps" in message


def rows_of_pairs(inputs: dict[str, Tensor]) -> Tensor:
    """All chosen completions, then all rejected ones; TRL 0.24's DPO has them apart."""
    if "input_ids" in inputs:
        return inputs["input_ids"]
    return nn.utils.rnn.pad_sequence([*inputs["chosen_input_ids"], *inputs["rejected_input_ids"]], batch_first=True)


def climbed(output_dir: str, kind: str, num_pairs: int, fraction: float) -> list[tuple[Tensor, Tensor]]:
    """Rows that the ascent and the descent were given in each step, of windows of one micro-batch."""
    passes: list[Tensor] = []
    base: Any = SLSAMDPOTrainer if kind == "dpo" else SLSAMRewardTrainer

    class Noting(base):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            passes.append(rows_of_pairs(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = {"output_dir": output_dir, "per_device_train_batch_size": num_pairs, "max_steps": 2, "report_to": []}
    settings |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    rows = [{name: part + sentence(index) for name, part in PAIR.items()} for index in range(4 * num_pairs)]
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
    given["slsam"] = {**KNOBS, "ascent_fraction": fraction}
    if kind == "dpo":
        given |= {"model": tiny_policy(), "ref_model": tiny_policy(), "args": DPOConfig(**settings)}
    else:
        config = tiny_llama().config
        config.num_labels, config.pad_token_id = 1, 0
        given |= {"model": LlamaForSequenceClassification(config), "args": RewardConfig(**settings)}
    trainer = Noting(**given)
    trainer.train()
    assert not any(record["skipped"] for record in read_steps(output_dir))
    return list(zip(passes[::2], passes[1::2], strict=True))


@pytest.mark.parametrize(
    ("kind", "num_pairs", "fraction", "num_ranks"),
    [("dpo", 4, 0.5, 2), ("dpo", 2, 0.25, 1), ("reward", 4, 0.5, 1), slow("reward", 4, 0.5, 2), ("reward", 2, 0.25, 1)],
)
def test_the_ascent_takes_whole_pairs(
    kind: str, num_pairs: int, fraction: float, num_ranks: int, tmp_path: Path
) -> None:
    per_rank = run_on_ranks(num_ranks, climbed, str(tmp_path), kind, num_pairs, fraction)
    kept = max(1, round(fraction * num_pairs))
    for ascent, descent in itertools.chain.from_iterable(per_rank):
        assert len(descent) == 2 * num_pairs
        assert torch.equal(ascent, torch.cat([descent[:kept], descent[num_pairs : num_pairs + kept]]))
