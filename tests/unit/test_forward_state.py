"""What a forward finds besides the weights is the same in both passes, and afterwards as one pass leaves it."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.model.forward_state import ForwardState
from tests.models import tiny_llama, window

WIDTH = 4


class Block(nn.Module):
    """A linear layer in front of something that keeps buffers."""

    def __init__(self, keeper: nn.Module) -> None:
        super().__init__()
        self.linear, self.keeper = nn.Linear(WIDTH, WIDTH), keeper

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.keeper(self.linear(hidden))
        return out


class Replaces(nn.Module):
    """Keeps a mean in a buffer that is another tensor each time, and is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out = hidden - self.mean
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return out


class Uncounted(nn.Module):
    """Batch norm that does not count its batches: torch does not tell that its buffers were written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.batch_norm(hidden, self.mean, self.variance, training=True)


KEEPERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "cumulative batch norm": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
    "spectral norm": lambda: spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "replaced": Replaces,
    "uncounted": Uncounted,
}


def of_blocks(keeper: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(KEEPERS[keeper]()) for _ in range(4))).train()


def batches(step: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(6, WIDTH, generator=generator) for _ in range(length)]


def loss_of(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def slsam_of(model: nn.Module, **knobs: Any) -> SLSAM:
    return SLSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), SLSAMConfig(**{"rho": 0.5, **knobs}))


def assert_same_buffers(model: nn.Module, expected: nn.Module) -> None:
    pairs = zip(model.named_buffers(), expected.buffers(), strict=True)
    for (name, one), other in pairs:
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("knobs", [{}, {"ascent_scope": "micro_batch"}, {"prefix_reuse": False}], ids=str)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_buffers_are_those_of_one_forward_at_the_weights(keeper: str, knobs: dict[str, Any]) -> None:
    model = of_blocks(keeper)
    slsam = slsam_of(model, **knobs)
    for step, (length, active) in enumerate([(1, [3]), (3, [2]), (3, [0, 3]), (2, [3])], start=1):
        plain = copy.deepcopy(model)
        for batch in batches(step, length):
            plain(batch)
        assert not slsam.step(batches(step, length), loss_of, active=active).skipped
        assert_same_buffers(model, plain)


@pytest.mark.parametrize("keeper", KEEPERS)
def test_both_passes_find_the_same(keeper: str) -> None:
    results = [
        slsam_of(of_blocks(keeper), rho=1e-7, prefix_reuse=False).step(batches(1, 2), loss_of, active=[3])
        for _ in range(2)
    ]
    for result in results:
        assert result.ascent_loss == pytest.approx(result.loss, rel=1e-5)


@pytest.mark.parametrize(
    "knobs",
    [{"ascent_fraction": 0.5}, {"ascent_source": "previous"}, {"rho": 0.0}, {"ascend_when": {"every": 2}}],
    ids=str,
)
def test_every_sample_counts_once(knobs: dict[str, Any]) -> None:
    """Also where the first pass takes but a part of them, or there is none."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(4))).train()
    slsam = slsam_of(model, **knobs)
    at_the_inputs = nn.BatchNorm1d(WIDTH)
    for step in (1, 2, 3):
        for batch in batches(step, 2):
            at_the_inputs(batch)
        slsam.step(batches(step, 2), loss_of, active=[1, 3])
        assert_same_buffers(model[0][0], at_the_inputs)
        assert {int(block[0].num_batches_tracked) for block in model} == {2 * step}


def test_a_skipped_step_counts_as_any_other() -> None:
    model = of_blocks("batch norm")
    plain = copy.deepcopy(model)
    for batch in batches(1, 2):
        plain(batch)
    assert slsam_of(model).step(batches(1, 2), lambda *args: loss_of(*args) * torch.inf, active=[1]).skipped
    assert_same_buffers(model, plain)


def test_buffers_are_put_back_when_the_descent_raises() -> None:
    model = of_blocks("batch norm")
    plain = copy.deepcopy(model)
    plain(batches(1, 1)[0])
    calls = 0

    def fail_in_descent(model: Any, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(model, batch)
        if calls == 2:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        slsam_of(model).step(batches(1, 1), fail_in_descent, active=[0])
    assert_same_buffers(model, plain)


def test_a_layer_that_begins_to_change_its_buffers_is_noticed() -> None:
    model = of_blocks("batch norm").eval()
    slsam = slsam_of(model)
    slsam.step(batches(1, 1), loss_of, active=[1])
    model.train()
    plain = copy.deepcopy(model)
    for step in (2, 3):
        plain.load_state_dict({**plain.state_dict(), **dict(model.named_parameters())})
        plain(batches(step, 1)[0])
        slsam.step(batches(step, 1), loss_of, active=[1])
        assert_same_buffers(model, plain)


def test_what_does_not_change_is_not_copied() -> None:
    model = tiny_llama()
    state = ForwardState(model, torch.device("cpu"))
    before = state.capture()
    assert before.buffers.copies  # nobody knows yet
    model(**window(1, 0, 1)[0])
    with state.second_pass(before, counts=False):
        pass
    assert not state.capture().buffers.copies


class Draws(nn.Module):
    """Masks its input by every generator that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.torch_generator = torch.Generator().manual_seed(1)
        self.numpy_generator = numpy.random.default_rng(2)
        self.numpy_state = numpy.random.RandomState(3)
        self.python_generator = random.Random(4)

    def draws(self) -> Iterator[float]:
        yield torch.rand(()).item()
        yield numpy.random.random()
        yield random.random()
        yield torch.rand((), generator=self.torch_generator).item()
        yield self.numpy_generator.random()
        yield self.numpy_state.random()
        yield self.python_generator.random()

    def forward(self, hidden: Tensor) -> Tensor:
        factors = torch.tensor([1.0 + draw for draw in self.draws()])
        out: Tensor = self.linear(hidden * factors.prod()).tanh()
        return out


@pytest.mark.parametrize("knobs", [{}, {"ascent_fraction": 0.5}, {"prefix_reuse": False}], ids=str)
def test_both_passes_draw_the_same_from_every_generator(knobs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Draws() for _ in range(4)))
    slsam = slsam_of(model, rho=1e-7, **knobs)
    for step, active in enumerate(([3], [2, 3], [0]), start=1):
        torch.manual_seed(step)
        numpy.random.seed(step)
        random.seed(step)
        plain = copy.deepcopy(model)
        for draws, generator in zip(model, plain, strict=True):  # a copy of a torch.Generator would be the same
            generator.torch_generator = torch.Generator()
            generator.torch_generator.set_state(draws.torch_generator.get_state())
        before = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
        expected = sum(loss_of(plain, batch).item() for batch in batches(step, 2)) / 2
        then = [next(draws) for draws in (plain[0].draws(),) for _ in range(7)]
        torch.set_rng_state(before[0])
        numpy.random.set_state(before[1])
        random.setstate(before[2])
        result = slsam.step(batches(step, 2), loss_of, active=active)
        assert result.loss == pytest.approx(expected, rel=1e-5)
        assert list(model[0].draws()) == then  # every stream is where one pass leaves it


def test_a_speech_model_masks_alike_in_both_passes() -> None:
    """Its spans are drawn by numpy, the layers that it drops by torch."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,), conv_stride=(4,), conv_kernel=(8,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.5, mask_time_length=2, layerdrop=0.3,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config).train()
    batch = {"input_values": torch.randn(2, 400), "labels": torch.tensor([[1, 2, 3], [2, 3, 4]])}
    slsam = slsam_of(model, rho=1e-7)
    for active in ([0], [4], [3], [2]):
        result = slsam.step([batch, batch], active=active)
        assert result.ascent_loss == pytest.approx(result.loss, rel=1e-5)
