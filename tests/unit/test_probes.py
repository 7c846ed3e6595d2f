"""A model that sees what it is to predict is found by what it does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, GPT2Config, MambaConfig, RobertaConfig

from slsam_ds.cli.probes import ModelCheck, measure_foresight
from slsam_ds.cli.refusal import UsageError
from tests.models import VOCABULARY, tiny_llama

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Of the size of trained weights: with transformers' 0.02 and so few features, attention adds next to nothing.
ENCODER = {**SIZES, "intermediate_size": 64, "initializer_range": 0.2}
CPU = torch.device("cpu")


def build(config: Any, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_model_does_not_see_ahead(dtype: torch.dtype) -> None:
    state_space = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    models = [tiny_llama(), build(GPT2Config(**SIZES)), build(state_space, "eager")]
    for model in models:
        # Rounding may differ between rows of other content.
        assert measure_foresight(model.to(dtype).eval(), VOCABULARY, CPU) < 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
def test_an_encoder_does_unless_it_is_made_a_decoder(config: Any, attention: str) -> None:
    assert measure_foresight(build(config(**ENCODER), attention).eval(), VOCABULARY, CPU) > 0.1
    assert measure_foresight(build(config(**ENCODER, is_decoder=True), attention).eval(), VOCABULARY, CPU) < 1e-3


def test_training_begins_only_with_a_causal_model() -> None:
    def begin(model: Any) -> None:
        trainer = SimpleNamespace(model=model, model_wrapped=model.train(), args=SimpleNamespace(device=CPU))
        ModelCheck(trainer, packed=False).on_train_begin(None, None, None)  # type: ignore[arg-type]
        assert model.training

    begin(tiny_llama())
    begin(build(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "eager"))
    with pytest.raises(UsageError, match=r"this model \(bert\) lets tokens see those after them"):
        begin(build(BertConfig(**ENCODER)))
