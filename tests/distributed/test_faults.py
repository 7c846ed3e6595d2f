"""Bad numbers, exceptions and ranks that differ: every rank does the same, and nothing is lost."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slsam_ds import BadNumbersError, RanksDisagreeError
from tests.distributed.training import (
    ALSO_OFFLOADED,
    ALSO_ZERO0,
    ALSO_ZERO1,
    ALSO_ZERO3,
    LOSS_SCALE_POWER,
    LlamaSetup,
    Setup,
    Training,
    follow_reference,
    follow_samples,
    max_error,
    slow,
)
from tests.ranks import run_on_ranks

ENGINES = ["local", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3, *ALSO_OFFLOADED]


def spoil(
    step: Callable[..., Any], window: list[Any], call: int, act: Callable[[Tensor], Tensor], **kwargs: Any
) -> Any:
    """Take a step in which the loss of one forward goes through `act`."""
    calls = 0

    def loss_fn(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = model(**batch).loss
        return act(loss) if calls == call else loss

    return step(window, loss_fn=loss_fn, **kwargs)


def skip_bad_step(setup: Setup, call: int, value: float) -> tuple[Any, ...]:
    training = Training(setup)
    training.step(training.window(1), active=[2])
    before, state = training.live_weights(), training.slsam.state_dict()["selector"]
    act = (lambda loss: loss * value) if training.rank == 1 else (lambda loss: loss)
    bad = spoil(training.step, training.window(7), call, act, active=[1, 3])
    assert max_error(training.live_weights(), before) == 0.0
    assert training.slsam.state_dict()["selector"] == state
    counters = (training.engine.global_steps, training.engine.skipped_steps) if training.engine else (2, 1)
    good = training.step(training.window(2), active=[1, 3])
    return bad, good, counters, training.weights()


@pytest.mark.parametrize(("call", "value"), [slow(1, float("nan")), slow(2, float("inf")), (3, float("nan"))])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_number_on_one_rank_skips_the_step_on_all(engine: str, call: int, value: float) -> None:
    setup = Setup(engine=engine, accumulation=2)  # four forwards: two ascend, two descend
    expected, _ = follow_reference(setup, 2, [[2], [1, 3]])
    for bad, good, counters, weights in run_on_ranks(2, skip_bad_step, setup, call, value):
        assert bad.skipped
        assert (bad.step, good.step) == (2, 3)
        assert counters == (2, 1)
        assert not good.skipped
        assert max_error(weights, expected) <= 1e-6


def give_up(setup: Setup) -> tuple[str, int, float]:
    """Steps of which every third is good, then as many bad ones in a row as are allowed."""
    training = Training(setup)

    def spoiled(loss: Tensor) -> Tensor:
        return loss * float("nan") if training.rank == 1 else loss

    for step in (1, 2, 3, 4, 5):
        spoil(training.step, training.window(step), 1 if step % 3 else 9, spoiled, active=[1, 3])
    before = training.live_weights()
    with pytest.raises(BadNumbersError) as raised:
        spoil(training.step, training.window(6), 1, spoiled, active=[1, 3])
    return str(raised.value), training.slsam.num_steps, max_error(training.live_weights(), before)


@pytest.mark.parametrize("engine", ["local", "fsdp2", "zero2", ALSO_ZERO3])
def test_too_many_bad_steps_in_a_row_stop_the_run_with_the_rank_named(engine: str) -> None:
    for message, num_steps, moved in run_on_ranks(2, give_up, Setup(engine=engine, slsam={"max_skipped_steps": 3})):
        assert message.startswith("step 6 was skipped: in the ascent pass, the loss of rank 1 is not finite")
        assert "the weights are those of step 3" in message
        assert (num_steps, moved) == (6, 0.0)


def overflow_in_backward(setup: Setup) -> str:
    """A gradient that is not finite, of a loss that is."""
    training = Training(setup)
    block = training.model.get_submodule("model.layers.2")
    if training.rank == 1:
        block.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("inf"),))
    with pytest.raises(BadNumbersError) as raised:
        training.step(training.window(1), active=[2, 3])
    return str(raised.value)


@pytest.mark.parametrize("engine", ["local", "zero2"])
def test_a_bad_gradient_stops_the_run_with_the_layer_named(engine: str) -> None:
    for message in run_on_ranks(2, overflow_in_backward, Setup(engine=engine, slsam={"max_skipped_steps": 1})):
        assert "step 1 was skipped: in the ascent pass, the gradient of model.layers.1 is not finite" in message


@pytest.mark.parametrize("scope", ["rank", "micro_batch"])
@pytest.mark.parametrize("engine", ["local", "zero2"])
def test_a_bad_number_in_a_local_ascent_skips_the_step_on_all(engine: str, scope: str) -> None:
    setup = Setup(engine=engine, accumulation=2, slsam={"ascent_scope": scope})
    expected, _ = follow_reference(setup, 2, [[2], [1, 3]])
    for bad, good, _, weights in run_on_ranks(2, skip_bad_step, setup, 1, float("nan")):
        assert (bad.skipped, good.skipped) == (True, False)
        assert max_error(weights, expected) <= 1e-6


def overflow_float16(setup: Setup, call: int) -> tuple[Any, ...]:
    training = Training(setup)
    training.step(training.window(1), active=[2])
    before, masters = training.live_weights(), training.weights()
    scales = [training.engine.optimizer.loss_scale]
    # Too large for float16 where it is computed on one rank, harmless on the other.
    bad = spoil(training.step, training.window(7), call, lambda loss: loss * 1e6 if training.rank == 1 else loss)
    scales.append(training.engine.optimizer.loss_scale)
    assert max_error(training.live_weights(), before) == max_error(training.weights(), masters) == 0.0
    good = training.step(training.window(2), active=[1, 3])
    return bad.skipped, good.skipped, training.engine.skipped_steps, scales, training.weights(), good


@pytest.mark.parametrize("call", [slow(1), slow(2), slow(3), 4])
@pytest.mark.parametrize("engine", [ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_a_float16_overflow_in_either_pass_skips_the_step_and_lowers_the_loss_scale(engine: str, call: int) -> None:
    # To nearest: stochastic rounding draws other noise where a step was lost.
    setup = Setup(engine=engine, dtype=torch.float16, accumulation=2, slsam={"rounding": "nearest"})
    expected, _ = run_on_ranks(2, follow_samples, setup, [[2], [1, 3]])[0]
    for bad, good, skipped, scales, weights, result in run_on_ranks(2, overflow_float16, setup, call):
        assert (bad, good, skipped) == (True, False, 1)
        assert scales == [2**LOSS_SCALE_POWER, 2 ** (LOSS_SCALE_POWER - 1)]
        assert result.perturbation_norm == pytest.approx(0.05, rel=0.05)  # in true units, whatever the loss scale
        # At half the scale the smallest gradients lose a digit; a step on a wrong scale would be off by 1e-3.
        assert max_error(weights, expected) <= 1e-4


class InterruptedPassError(Exception):
    pass


def survive_exception(setup: Setup, call: int) -> dict[str, Tensor]:
    training = Training(setup)
    training.step(training.window(1), active=[2])
    before = training.live_weights()

    def fail(loss: Tensor) -> Tensor:
        raise InterruptedPassError

    with pytest.raises(InterruptedPassError):
        spoil(training.step, training.window(7), call, fail, active=[1, 3])
    assert max_error(training.live_weights(), before) == 0.0
    assert all(parameter.requires_grad for parameter in training.model.parameters())
    training.step(training.window(2), active=[1, 3])
    return training.weights()


@pytest.mark.parametrize("call", [slow(1), slow(2), slow(3), 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_in_either_pass_leaves_everything_as_it_was(engine: str, call: int) -> None:
    setup = Setup(engine=engine, accumulation=2)
    expected, _ = follow_reference(setup, 2, [[2], [1, 3]])
    for weights in run_on_ranks(2, survive_exception, setup, call):
        assert max_error(weights, expected) <= 1e-6


def follow_a_stray_backward(setup: Setup) -> dict[str, Tensor]:
    training = Training(setup)
    training.model(**training.window(9)[0]).loss.backward()
    training.follow([[1, 3]])
    return training.weights()


@pytest.mark.parametrize("engine", ["local", "fsdp2"])
def test_a_gradient_from_outside_is_not_added(engine: str) -> None:
    setup = Setup(engine=engine)
    expected, _ = follow_reference(setup, 2, [[1, 3]])
    for weights in run_on_ranks(2, follow_a_stray_backward, setup):
        assert max_error(weights, expected) <= 1e-6


def disagree(setup: Setup, what: str) -> str:
    training = Training(setup)
    training.step(training.window(1))
    before = training.live_weights()
    window, active = training.window(2), None
    if training.rank == 1:
        if what == "sample":
            active = [0, 1]
        elif what == "window":
            window = window[:1]
        elif what == "bandit":
            training.slsam.selector.update([3], [1.0])
        elif what == "step":
            training.slsam.progress = dataclasses.replace(training.slsam.progress, step=7)
    with pytest.raises(RanksDisagreeError) as raised:
        training.step(window, active=active)
    assert max_error(training.live_weights(), before) == 0.0
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("sample", "active layers of step 2"),
        ("window", "micro-batches per step (rank 0: 2; rank 1: 1)"),
        ("bandit", "the bandit's state"),
        ("step", "the step (rank 0: 2; rank 1: 8)"),
    ],
)
@pytest.mark.parametrize("engine", [slow("local"), slow("fsdp2"), "zero2", ALSO_ZERO3])
def test_ranks_that_differ_stop_with_an_error_that_says_so(engine: str, what: str, named: str) -> None:
    setup = Setup(engine=engine, accumulation=2, slsam={"active_layers": 1})
    for message in run_on_ranks(2, disagree, setup, what):
        assert named in message


def flip_a_bit(setup: Setup, arm: int) -> str:
    training = Training(setup)
    training.follow([[2]] * 3)
    if training.rank == 1:
        weight = training.slsam.layers[arm].parameters[0][1].detach()
        weight.view(-1).view({2: torch.int16, 4: torch.int32}[weight.element_size()])[5] ^= 1
    with pytest.raises(RanksDisagreeError) as raised:
        training.follow([[2]])
    return str(raised.value)


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("local", torch.float32), ("zero2", torch.bfloat16), *(slow(each, torch.bfloat16) for each in ("zero0", "zero1"))],
)
def test_a_flipped_bit_is_noticed_where_weights_are_whole(engine: str, dtype: torch.dtype) -> None:
    setup = Setup(engine=engine, dtype=dtype, slsam={"check_weights_every": 4})
    for message in run_on_ranks(2, flip_a_bit, setup, 3):
        assert message.startswith("slsam: ranks disagree about the weights of model.layers.2 (rank 0: ")


def stop_on_one_rank(setup: Setup) -> list[bool]:
    training = Training(setup)
    stopped = [training.step(training.window(1)).stop_requested]
    if training.rank == 1:
        training.slsam.request_stop()
    return [*stopped, training.step(training.window(2)).stop_requested]


@pytest.mark.parametrize("engine", ["local", "zero2"])
def test_every_rank_hears_that_one_was_asked_to_stop(engine: str) -> None:
    assert run_on_ranks(2, stop_on_one_rank, Setup(engine=engine)) == [[False, True]] * 2
    assert run_on_ranks(1, stop_on_one_rank, Setup(engine=engine)) == [[False, False]]


def replay_dropout(setup: Setup) -> tuple[float, float, float]:
    torch.manual_seed(5 + int(torch.distributed.get_rank()))
    training = Training(setup)
    first = training.step(training.window(1), active=[0])
    second = training.step(training.window(1), active=[0])
    return first.ascent_loss, first.loss, second.ascent_loss


@pytest.mark.parametrize("engine", ENGINES)
def test_descent_draws_the_dropout_masks_of_the_ascent(engine: str) -> None:
    setup = LlamaSetup(engine=engine, accumulation=2, model={"dropout": 0.5}, slsam={"rho": 1e-7})
    ascent, descent, next_ascent = run_on_ranks(2, replay_dropout, setup)[0]
    assert descent == pytest.approx(ascent, abs=1e-5)
    assert abs(next_ascent - ascent) > 1e-3  # and the next step draws others


def step_without_gradient(setup: Setup) -> tuple[Any, dict[str, Tensor]]:
    training = Training(setup)
    result = training.step(training.window(1), loss_fn=lambda model, batch: model(**batch).loss * 0.0, active=[2])
    return result, training.live_weights()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_zero_gradient_perturbs_nothing_and_is_not_nan(engine: str) -> None:
    result, after = run_on_ranks(2, step_without_gradient, Setup(engine=engine))[0]
    assert not result.skipped
    assert result.perturbation_norm == 0.0
    assert result.perturbation_projection is None
    assert all(tensor.isfinite().all() for tensor in after.values())
