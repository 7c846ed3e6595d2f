"""SLSAMMixin before the trainers of TRL, on two ranks: they train, only the sample moves, and metrics are counted once."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from slsam_ds.integrations.huggingface import SLSAMMixin
from slsam_ds.records import LAYERS_FILE, read_steps
from tests.distributed.training import whole
from tests.models import tiny_llama
from tests.ranks import run_on_ranks
from tests.tokenizers import tiny_tokenizer

ENGINES: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}},
}
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
STEPS, ACCUMULATION, RANKS = 4, 2, 2


class SLSAMSFTTrainer(SLSAMMixin, SFTTrainer):
    """As the README writes it."""


class SLSAMDPOTrainer(SLSAMMixin, DPOTrainer):
    """As the README writes it."""


class Moves(TrainerCallback):
    """Which parameters moved in each step."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self._before: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self._before = weights(model)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        now = weights(model)
        self.moved.append({name for name, weight in now.items() if not torch.equal(weight, self._before[name])})
        self._before = now


def weights(model: Any) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


def text(index: int) -> str:
    return "abc def " * (1 + index % 3) + str(index)


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
PAIRS = {"prompt": "what ", "chosen": "yes please ", "rejected": "no "}


def make(kind: str, **settings: Any) -> SLSAMMixin:
    """A trainer of TRL on a tiny model; `kind` is "sft" or "dpo", and "_lora" where it trains adapters."""
    moves = Moves()
    common = {"model": tiny_llama(), "processing_class": tiny_tokenizer(), "callbacks": [moves]}
    common |= {"peft_config": LORA if kind.endswith("_lora") else None}
    common |= {"slsam": {"active_layers": 2, "rho": 0.02, "seed": 1}}
    if kind.startswith("sft"):
        data = Dataset.from_list([{"text": text(index)} for index in range(32)])
        trainer = SLSAMSFTTrainer(args=SFTConfig(**settings), train_dataset=data, **common)
    else:
        data = Dataset.from_list([{name: part + text(index) for name, part in PAIRS.items()} for index in range(32)])
        common |= {"ref_model": None if kind == "dpo_lora" else tiny_llama()}
        trainer = SLSAMDPOTrainer(args=DPOConfig(**settings), train_dataset=data, **common)
    trainer.moves = moves
    return trainer


def train(output_dir: str, kind: str, engine: str) -> tuple[list[set[str]], list[dict[str, Any]], int]:
    chosen = dict(ENGINES[engine])
    if "deepspeed" in chosen:
        chosen["deepspeed"] = {**AUTO, **chosen["deepspeed"]}
    trainer = make(
        kind,
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=1e-3,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **chosen,
    )
    trainer.train()
    return trainer.moves.moved, trainer.state.log_history, trainer._total_train_tokens


KINDS = ["sft", "sft_lora", "dpo", "dpo_lora"]
@pytest.mark.parametrize("engine", ["none", "fsdp2", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_only_the_sample_moves(kind: str, engine: str, tmp_path: Path) -> None:
    (moved, history, tokens), _ = run_on_ranks(RANKS, train, str(tmp_path), kind, engine)
    layers = [set(layer["parameters"]) for layer in json.loads((tmp_path / LAYERS_FILE).read_text())]
    records = read_steps(tmp_path)
    assert len(records) == len(moved) == STEPS
    for record, names in zip(records, moved, strict=True):
        assert not record["skipped"]
        assert names
        assert names <= set().union(*(layers[arm] for arm in record["active"]))
    print(history, tokens)
