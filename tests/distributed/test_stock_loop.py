"""A stock DeepSpeed loop takes SL-SAM's steps, to the bit; what it cannot be followed in is refused on every engine."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.training import ALSO_ZERO0, ALSO_ZERO1, LlamaSetup, Setup, Training, slow
from tests.models import loss_in_autocast, micro_batch, tiny_llama
from tests.ranks import run_on_ranks

NUM_STEPS = 4
ACCUMULATION = 3
DROPOUT = {"dropout": 0.2}


class Counting(nn.Module):
    """Its loss depends on a buffer that counts its forwards in training, and on noise of a generator of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.llama = tiny_llama(**kwargs)
        self.register_buffer("num_forwards", torch.zeros(()))
        self.noise = torch.Generator().manual_seed(0)

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        output = self.llama(**batch)
        noise = torch.zeros(())
        if self.training:
            self.num_forwards += 1
            noise = torch.rand((), generator=self.noise)
        return output.loss * (1 + 0.01 * self.num_forwards + 0.1 * noise), output.logits


class CountingSetup(LlamaSetup):
    def build_model(self) -> nn.Module:
        return Counting(**self.model).to(self.dtype)


def outcome(training: Training, losses: list[float]) -> dict[str, Any]:
    engine = training.engine
    return {
        "losses": losses,
        "weights": training.live_weights(),
        "counters": (engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps),
        "timed": (engine.tput_timer.micro_step_count, engine.tput_timer.global_step_count),
        "random": torch.get_rng_state(),
        "slsam": training.slsam.state_dict(),
        "buffers": [buffer.clone() for buffer in training.model.buffers()],
    }


def by_windows(setup: Setup) -> dict[str, Any]:
    training = Training(setup)
    torch.manual_seed(training.rank)
    results = [training.step(training.window(step), loss_fn(setup)) for step in range(1, NUM_STEPS + 1)]
    return outcome(training, [result.ascent_loss for result in results])


def loss_fn(setup: Setup) -> Callable[[Any, Any], Tensor] | None:
    return (lambda model, batch: model(**batch)[0]) if isinstance(setup, CountingSetup) else None


def by_a_stock_loop(setup: Setup) -> dict[str, Any]:
    """With what loops do between the calls: they read losses, evaluate, skip a batch, fill the same tensors again."""
    training = Training(setup)
    engine = training.engine
    torch.manual_seed(training.rank)
    losses, boundaries = [], []
    reused: dict[str, Tensor] = {name: torch.zeros_like(each) for name, each in training.window(1)[0].items()}
    for step in range(1, NUM_STEPS + 1):
        of_window = []
        for batch in training.window(step):
            for name, tensor in batch.items():
                reused[name].copy_(tensor)
            output = engine(**reused)
            loss = output[0]
            of_window.append(float(loss))
            with torch.no_grad(), between(engine):
                engine(**batch)
            assert torch.equal(engine.backward(loss), loss / ACCUMULATION)
            boundaries.append(bool(engine.is_gradient_accumulation_boundary()))
            result = engine.step()
            assert (result is not None) == boundaries[-1]
        losses.append(sum(of_window) / ACCUMULATION)
    assert boundaries == [index % ACCUMULATION == ACCUMULATION - 1 for index in range(NUM_STEPS * ACCUMULATION)]
    return outcome(training, losses)


@contextlib.contextmanager
def between(engine: Any) -> Iterator[None]:
    """An evaluation, whose own random numbers do not count here."""
    state = torch.get_rng_state()
    engine.eval()
    yield
    engine.train()
    torch.set_rng_state(state)


@pytest.mark.parametrize("engine", [ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3"])
def test_a_stock_loop_takes_the_steps_of_train_step(engine: str) -> None:
    setup = LlamaSetup(engine=engine, accumulation=ACCUMULATION, model=DROPOUT, slsam={"seed": 1, "active_layers": 2})
    compare(setup)


@pytest.mark.parametrize(
    "knobs",
    [
        slow({"ascent_fraction": 0.5}),
        slow({"ascent_scope": "micro_batch"}),
        slow({"ascent_source": "previous"}),
        slow({"budget": 1.0, "ascent_fraction": 0.25}),
        slow({"rho": 0.0}),
    ],
)
def test_so_it_does_with_other_knobs(knobs: dict[str, Any]) -> None:
    compare(LlamaSetup(engine="zero2", accumulation=ACCUMULATION, slsam={"seed": 1, **knobs}))


def compare(setup: Setup) -> None:
    ranks = run_on_ranks(2, both, setup)
    for expected, found in ranks:
        check_same(expected, found)
    expected_losses = ranks[0][0]["losses"]
    if None not in expected_losses and setup.slsam.get("ascent_fraction", 1) == 1:
        means = [sum(found["losses"][step] for _, found in ranks) / 2 for step in range(NUM_STEPS)]
        assert means == pytest.approx(expected_losses, rel=1e-5)


def both(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    return by_windows(setup), by_a_stock_loop(setup)


def check_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert found["counters"] == expected["counters"]
    assert found["slsam"] == expected["slsam"]
    assert torch.equal(found["random"], expected["random"])
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name
    for one, other in zip(expected["buffers"], found["buffers"], strict=True):
        assert torch.equal(one, other)


def refusals(setup: Setup) -> dict[str, str]:
    """What each wrong call of a half converted loop says; nothing has changed afterwards, and SL-SAM still steps."""
    sentences: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(RuntimeError) as raised:
            call()
        sentences[name] = str(raised.value)

    training = Training(setup)
    before = training.live_weights()
    batch = micro_batch(1, training.rank, 0)
    if training.engine is None:
        training.model(**batch).loss.backward()
        attempt("optimizer", training.optimizer.step)
    else:
        engine, raw = training.engine, training.slsam.model
        attempt("no backward", engine.step)
        attempt("made of logits", lambda: engine.backward(engine(**batch).logits.mean()))
        attempt("scaled", lambda: engine.backward(engine(**batch).loss * 2))
        loss = engine(**batch).loss
        engine.backward(loss)
        attempt("twice", lambda: engine.backward(loss))
        attempt("raw backward", lambda: raw.backward(raw(**batch).loss))
        attempt("raw step", raw.step)
        attempt("optimizer", training.engine.optimizer.step if not plain(training) else lambda: step_on(training))
    training.model.zero_grad()
    for name, weight in training.live_weights().items():
        assert torch.equal(weight, before[name]), name
    assert not training.step([batch]).skipped
    return sentences


def plain(training: Training) -> bool:
    return isinstance(training.engine.optimizer, torch.optim.Optimizer)


def step_on(training: Training) -> None:
    """Without ZeRO in float32, DeepSpeed steps the user's own optimizer, which does nothing without a gradient."""
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step()


def refusals_everywhere() -> dict[str, dict[str, str]]:
    setup = LlamaSetup(engine="zero0")
    return {
        name: refusals(replace(setup, engine=name)) for name in ("local", "fsdp2", "zero0", "zero1", "zero2", "zero3")
    }


def test_a_half_conversion_is_refused_on_every_engine() -> None:
    first, second = run_on_ranks(2, refusals_everywhere)
    assert first == second
    for engine, sentences in first.items():
        assert len(sentences) == (1 if engine in ("local", "fsdp2") else 7), engine
        for name, sentence in sentences.items():
            through = name in ("raw backward", "raw step", "optimizer")
            assert ("slsam.step(window)" if through else "engine.train_step(window") in sentence, (engine, name)


def test_what_is_around_and_inside_of_a_forward_is_as_it_was() -> None:
    autocast, counting = run_on_ranks(1, other_forwards)[0]
    for name, weight in autocast[0].items():
        assert torch.equal(autocast[1][name], weight), name
    check_same(*counting)
    assert counting[0]["buffers"][0] > 0


def other_forwards() -> tuple[Any, Any]:
    """In autocast; and of a model that returns a tuple and counts its forwards in a buffer."""
    return in_autocast(), both(CountingSetup(engine="zero2", accumulation=ACCUMULATION))


def in_autocast() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    setup = LlamaSetup(engine="zero1", slsam={"rounding": "nearest"})
    windows, stock = Training(setup), Training(setup)
    windows.step(windows.window(1), loss_in_autocast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stock.engine(**stock.window(1)[0]).loss
    stock.engine.backward(loss)
    stock.engine.step()
    return windows.live_weights(), stock.live_weights()
