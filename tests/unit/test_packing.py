"""Packed rows: full, whole samples, and none of them sees or predicts another."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from slsam_ds.cli.labels import IGNORED
from slsam_ds.cli.packing import PackedCollator, pack
from slsam_ds.cli.probes import ModelCheck, measure_leak
from slsam_ds.cli.refusal import UsageError
from tests.models import VOCABULARY, tiny_llama

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CPU = torch.device("cpu")
# float32 noise of other shapes, in logits and losses of order 1 to 5. What leaks is of order 0.1.
TOLERANCE = 1e-5


def _samples(num: int, longest: int, seed: int = 0) -> dict[str, list[list[int]]]:
    generator = random.Random(seed)
    ids = [[generator.randrange(VOCABULARY) for _ in range(generator.randint(2, longest))] for _ in range(num)]
    masked = [generator.randint(0, len(sample) - 2) for sample in ids]  # a prompt of so many tokens
    labels = [[IGNORED] * mask + sample[mask:] for sample, mask in zip(ids, masked, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _rows(packed: dict[str, list[list[int]]]) -> list[dict[str, list[int]]]:
    return [dict(zip(packed, values, strict=True)) for values in zip(*packed.values(), strict=True)]


def _split(row: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    bounds = zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)
    return [{name: values[start:end] for name, values in row.items()} for start, end in bounds]


def test_every_sample_is_in_one_row_and_whole() -> None:
    samples = _samples(300, 32)
    rows = _rows(pack(samples, 32))
    assert max(len(row["input_ids"]) for row in rows) == 32
    parts = [part for row in rows for part in _split(row)]
    assert sorted(part["input_ids"] for part in parts) == sorted(samples["input_ids"])
    for part in parts:
        assert part["position_ids"] == list(range(len(part["input_ids"])))
        assert part["labels"][0] == IGNORED
        original = samples["labels"][samples["input_ids"].index(part["input_ids"])]
        assert part["labels"][1:] == original[1:]


def test_rows_are_full() -> None:
    samples = _samples(1000, 64)
    rows = _rows(pack(samples, 128))
    assert sum(map(len, samples["input_ids"])) / (128 * len(rows)) > 0.99


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, GPT2Config])
def test_logits_are_those_of_separate_samples(config: Any, attention: str) -> None:
    sizes = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 6}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**sizes, use_cache=False), attn_implementation=attention).eval()
    rows = _rows(pack(_samples(12, 16), 32))
    assert len({len(row["input_ids"]) for row in rows}) > 1  # some are padded
    batch = PackedCollator(pad_token_id=0)(rows)
    with torch.no_grad():
        logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    for row, found in zip(rows, logits, strict=True):
        expected = torch.cat([_logits(model, part["input_ids"]) for part in _split(row)])
        torch.testing.assert_close(found[: len(expected)], expected, atol=TOLERANCE, rtol=0)


def test_loss_and_gradient_are_the_sum_over_separate_samples() -> None:
    samples = _samples(12, 16)
    model = tiny_llama()

    def summed(rows: list[dict[str, list[int]]]) -> torch.Tensor:
        batch = PackedCollator(pad_token_id=0)(rows)
        num_predicted = int((batch["labels"][:, 1:] != IGNORED).sum())
        loss = model(**batch).loss * num_predicted
        loss.backward()
        return loss.detach()

    def gradient() -> torch.Tensor:
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad()
        return found

    packed = summed(_rows(pack(samples, 32)))
    packed_gradient = gradient()
    separate = sum(summed([row]) for row in _rows(samples))
    torch.testing.assert_close(packed, separate, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(packed_gradient, gradient(), rtol=0, atol=1e-4)  # of a sum over 100 tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_leaks_from_sample_to_sample(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype).eval()
    assert measure_leak(model, VOCABULARY, CPU) == 0
    model.config.use_cache = True  # transformers then takes the row for one sample
    assert measure_leak(model, VOCABULARY, CPU) > 0.5


class RunningMean(nn.Module):
    """A model of our own, of which it is certain what a token sees: the mean of the tokens up to itself.

    Args:
        looks_back: Whether the mean goes on across the samples of a row.
    """

    def __init__(self, *, looks_back: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.head = nn.Linear(32, VOCABULARY)
        self.looks_back = looks_back

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> SimpleNamespace:
        sample = (position_ids == 0).cumsum(-1)
        seen = torch.ones(input_ids.shape[-1:] * 2, dtype=torch.bool).tril()
        if not self.looks_back:
            seen = seen & (sample[:, :, None] == sample[:, None, :])
        weights = seen / seen.sum(-1, keepdim=True)
        return SimpleNamespace(logits=self.head(weights @ self.embed(input_ids)))


@pytest.mark.parametrize("looks_back", [True, False])
def test_a_model_that_looks_back_is_found(looks_back: bool) -> None:
    torch.manual_seed(0)
    leak = measure_leak(RunningMean(looks_back=looks_back), VOCABULARY, CPU)
    assert leak == pytest.approx(1.0) if looks_back else leak == 0


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32),
        FalconConfig(**SIZES),
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        LlamaConfig(**SIZES, intermediate_size=64),
    ],
    ids=["opt", "falcon", "bloom", "llama"],
)
def test_it_is_measured_whether_packing_changes_a_sample(config: Any) -> None:
    """For models that are not ours: which of them look back changes with transformers (Falcon did up to 5.23).

    A model looks back where a sample's logits in a packed row are not those of the sample alone.
    """
    config.use_cache = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    packed = pack(_samples(2, 16), 32)
    (row,) = _rows(packed)
    _, second = _split(row)
    ids, positions = (torch.tensor([row[name]]) for name in ("input_ids", "position_ids"))
    with torch.no_grad():
        in_the_row = model(input_ids=ids, position_ids=positions).logits[0, -len(second["input_ids"]) :]
    difference = (in_the_row - _logits(model, second["input_ids"])).abs().max()
    leak = measure_leak(model, VOCABULARY, CPU)
    if difference > TOLERANCE:
        assert leak > 0.1
    else:
        assert leak == 0


def test_training_begins_only_where_samples_stay_apart() -> None:
    def begin(model: Any) -> None:
        trainer = SimpleNamespace(model=model, model_wrapped=model.train(), args=SimpleNamespace(device=CPU))
        ModelCheck(trainer, packed=True).on_train_begin(None, None, None)  # type: ignore[arg-type]
        assert model.training

    model = tiny_llama()
    begin(model)
    model.config.use_cache = True
    with pytest.raises(UsageError, match=r"--packing: samples in a row see each other .*--use_cache False may help"):
        begin(model)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UsageError, match=r"\(bloom with eager attention.*leave --packing out"):
        begin(bloom)
