"""Adapters that were saved are trained on as they are, or refused in a sentence that can be followed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor

from slsam_ds.cli.arguments import ModelArguments
from slsam_ds.cli.models import load_model
from slsam_ds.cli.refusal import UsageError
from tests.models import tiny_llama
from tests.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """As a run leaves it: trained, with the tokenizer."""
    save_adapter(
        base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS)
    )
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def save_adapter(base: Path, folder: Path, config: Any) -> None:
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)


def load(folder: Path, **flags: Any) -> Any:
    return load_model(ModelArguments(model_name_or_path=str(folder), **flags), torch.float32)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_saved_adapter_is_trained_on(base: Path, adapter: Path) -> None:
    model, tokenizer = load(adapter, peft="lora", lora_r=4, lora_target_modules=["v_proj", "q_proj"])
    assert tokenizer.chat_template == CHAT_TEMPLATE
    found = trained(model)
    assert all("lora_" in name for name in found)
    assert {parameter.shape[0] for name, parameter in found.items() if "lora_A" in name} == {4}
    assert any(bool(parameter.any()) for name, parameter in found.items() if "lora_B" in name)  # new ones are 0
    model.save_pretrained(adapter.parent / "again")
    again, tokenizer = load(adapter.parent / "again", peft="lora")  # which has the model's tokenizer
    assert tokenizer.chat_template is None
    assert found.keys() == trained(again).keys()
    assert all(torch.equal(parameter, found[name]) for name, parameter in trained(again).items())


def test_adapters_that_cannot_be_trained_on_are_one_sentence(base: Path, adapter: Path, tmp_path: Path) -> None:
    def refusal(folder: Path, **flags: Any) -> str:
        with pytest.raises(UsageError) as refused:
            load(folder, **{"peft": "lora", **flags})
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "is an adapter, not a model: add --peft lora" in refusal(adapter, peft="none")
    assert refusal(adapter, lora_r=8).startswith(
        f"--lora_r 8: the adapter in {adapter} has 4, which cannot be changed: leave"
    )
    assert "has q_proj v_proj, which cannot be changed" in refusal(adapter, lora_target_modules=["all-linear"])
    save_adapter(
        base, tmp_path / "ia3", IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=[])
    )
    assert "is an adapter of type IA3" in refusal(tmp_path / "ia3")
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def with_settings(**changes: Any) -> Path:
        (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
        return adapter

    assert "is an adapter for SEQ_CLS" in refusal(with_settings(task_type="SEQ_CLS"))
    assert "does not name its model" in refusal(with_settings(base_model_name_or_path=None))
    assert "its model /nowhere: no such folder" in refusal(with_settings(base_model_name_or_path="/nowhere"))
    assert "is an adapter itself" in refusal(with_settings(base_model_name_or_path=str(adapter)))
    others = {"deeper": {"num_blocks": 5}, "shallower": {"num_blocks": 3}, "wider": {"hidden": 64}}
    for name, size in others.items():
        tiny_llama(**size).save_pretrained(tmp_path / name)  # type: ignore[arg-type]
        assert "does not fit its model" in refusal(with_settings(base_model_name_or_path=str(tmp_path / name)))
    tiny_llama().save_pretrained(adapter)
    assert "holds both a model and an adapter" in refusal(with_settings())
    (adapter / "adapter_config.json").write_text("{}")
    assert "adapter_config.json cannot be used" in refusal(adapter)
