"""Starting above the blocks that both passes have in common changes not one bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.model.forward_state import ForwardState
from slsam_ds.model.layers import find_layers
from slsam_ds.model.prefix import Prefix, PrefixNotReusableError
from tests.models import tiny_llama, window

Batches = list[dict[str, Tensor]]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64)).train()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    ).train()


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    config.hidden_dropout_prob = 0.2
    return ViTForImageClassification(config).train()


def tokens(step: int) -> Batches:
    return window(step, 0, 2)


def sentences(step: int) -> Batches:
    return [{"input_ids": batch["input_ids"], "labels": torch.tensor([0, 1])} for batch in tokens(step)]


def images(step: int) -> Batches:
    generator = torch.Generator().manual_seed(step)
    return [
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}
        for _ in range(2)
    ]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batches]]] = {
    "llama": (lambda: tiny_llama(dropout=0.3), tokens),
    "llama in bf16": (lambda: tiny_llama(dropout=0.3).bfloat16(), tokens),
    "gpt2": (gpt2, tokens),  # dropout of its own, and blocks that put out tuples
    "bert": (bert, sentences),
    "vit": (vit, images),
}
SAMPLES = ([5], [3], [2, 4], [1], [0, 3], [4, 5])


def forwards(model: nn.Module) -> ForwardState:
    return ForwardState(model, torch.device("cpu"))


def train(make: Callable[[], nn.Module], data: Callable[[int], Batches], **knobs: Any) -> tuple[nn.Module, list[int]]:
    model = make()
    calls = [0]
    stack = find_layers(model).stack
    assert stack is not None
    for block in stack.children():
        block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-3), SLSAMConfig(**knobs))
    torch.manual_seed(3)
    per_step = []
    for step, sample in enumerate((*SAMPLES, *SAMPLES), start=1):
        calls[0] = 0
        result = slsam.step(data(step), active=sample)
        assert not result.skipped
        per_step.append(calls[0])
    return model, per_step


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_exact_and_runs_fewer_blocks(name: str, scope: str) -> None:
    whole, all_blocks = train(*MODELS[name], prefix_reuse=False, ascent_scope=scope)
    reused, fewer_blocks = train(*MODELS[name], prefix_reuse=True, ascent_scope=scope)
    for (parameter_name, one), other in zip(whole.named_parameters(), reused.parameters(), strict=True):
        assert torch.equal(one, other), parameter_name
    assert all_blocks == [16] * 12  # 4 blocks x 2 micro-batches x 2 passes
    # One block below is not worth the trouble. The first time, a micro-batch more runs above the prefix, and one whole.
    assert fewer_blocks == [8 + 4, 12 + 6, 16, 16, 16, 10 + 5, 8, 12, 16, 16, 16, 10]


def test_the_model_is_put_back_when_the_descent_raises() -> None:
    model = tiny_llama()
    blocks = list(model.model.layers)
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SLSAMConfig())
    slsam.step(window(0, 0, 1), active=[4])  # tries the prefix
    calls = 0

    def fail_in_descent(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = model(**batch).loss
        if calls == 2:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        slsam.step(window(1, 0, 1), loss_fn=fail_in_descent, active=[4])
    assert list(model.model.layers) == blocks
    assert not model.model.layers[2]._forward_hooks


def hidden_states(model: Any, batch: Any) -> Tensor:
    output = model(**batch, output_hidden_states=True)
    return output.loss + 0.01 * output.hidden_states[1].square().mean()


def attention_maps(model: Any, batch: Any) -> Tensor:
    output = model(**batch, output_attentions=True)
    return output.loss + 0.01 * output.attentions[0].square().mean()


@pytest.mark.parametrize("loss_fn", [hidden_states, attention_maps])
def test_a_loss_that_looks_below_is_noticed_and_reuse_given_up(loss_fn: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for reuse in ("auto", False):
        model = tiny_llama()
        slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SLSAMConfig(prefix_reuse=reuse))
        for step, sample in enumerate(([5], [3], [4]), start=1):
            assert not slsam.step(window(step, 0, 2), loss_fn=loss_fn, active=sample).skipped
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert caplog.text.count("prefix_reuse") == 1


def test_what_would_have_been_computed_is_not_a_number() -> None:
    """The second guard: whoever looks, and was not noticed, spoils the loss instead of passing unnoticed."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

        def forward(self, hidden: Tensor) -> Tensor:
            states = [hidden]
            for block in self.blocks:
                states.append(block(states[-1]))
            return states[1].sum() + states[-1].sum()

    model = Looks()
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SLSAMConfig())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    prefix = Prefix(model.blocks, 3, forwards(model))
    with prefix.kept(0):
        model(torch.ones(2, 3))
    assert prefix.watched
    prefix.watched = False
    with prefix.reused(0):
        assert model(torch.ones(2, 3)).isnan()
    slsam.step([torch.ones(2, 3)], loss_fn=lambda model, batch: model(batch), active=[3])
    assert not all(map(torch.equal, before, model.parameters()))


def test_a_loss_may_run_the_model_twice_but_alike_in_both_passes() -> None:
    def runs_twice(model: Any, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss + model(**{**batch, "labels": batch["labels"].flip(0)}).loss
        return loss

    found = []
    for reuse in (True, False):
        model = tiny_llama(dropout=0.2)
        slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SLSAMConfig(prefix_reuse=reuse))
        torch.manual_seed(1)
        slsam.step(window(1, 0, 2), loss_fn=runs_twice, active=[3])
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    calls = 0

    def runs_more_often_later(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = sum(model(**batch).loss for _ in range(calls))
        return loss

    slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SLSAMConfig())
    slsam.step(window(1, 0, 1), active=[3])  # tries the prefix
    with pytest.raises(PrefixNotReusableError, match="prefix_reuse=false"):
        slsam.step(window(1, 0, 1), loss_fn=runs_more_often_later, active=[3])


def test_what_is_kept_is_bounded() -> None:
    model = tiny_llama()
    one_state = 2 * 12 * 32 * 4  # bytes of a micro-batch's hidden state
    prefix = Prefix(model.model.layers, 2, forwards(model), max_bytes=one_state + 1)
    batch = window(1, 0, 1)[0]
    ran: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        expected = model(**batch).loss
        for micro_batch in range(2):
            with prefix.kept(micro_batch):
                model(**batch)
        for micro_batch, blocks in enumerate([[2, 3], [0, 1, 2, 3]]):
            ran.clear()
            with prefix.reused(micro_batch):
                assert torch.equal(model(**batch).loss, expected)
            assert ran == blocks


def test_a_block_that_works_in_place_on_its_input_is_noticed() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.add_(1.0) * self.weight

    stack = nn.Sequential(*(InPlace() for _ in range(3)))
    prefix = Prefix(stack, 2, forwards(stack))
    with torch.no_grad():
        with prefix.kept(0):
            expected = stack(torch.zeros(3))
        with prefix.reused(0):
            assert torch.equal(stack(torch.zeros(3)), expected)


def test_there_is_no_prefix_where_the_first_parameters_are_trained() -> None:
    model = tiny_llama()
    layer_map = find_layers(model)
    assert Prefix.below(layer_map, [0, 4], forwards(model)) is None
    assert Prefix.below(layer_map, [1], forwards(model)) is None
    assert Prefix.below(layer_map, [2, 5], forwards(model)) is None  # one block is not worth it
    assert Prefix.below(layer_map, [3, 5], forwards(model)) is not None
    assert Prefix.below(layer_map, [-1, 4], forwards(model)) is None  # embeddings, trained in every step
    assert Prefix.below(find_layers(model, patterns=["model.layers.2"]), [0], forwards(model)) is None
    with pytest.raises(ValueError, match="named by patterns"):
        SLSAM(model, torch.optim.AdamW(model.parameters()), SLSAMConfig(layers=("model.layers.2",), prefix_reuse=True))
