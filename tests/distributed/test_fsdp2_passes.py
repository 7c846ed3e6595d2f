"""FSDP2: what travels, and what a pass leaves behind."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from slsam_ds import SLSAM
from slsam_ds.records.traffic import Traffic
from tests.distributed.training import LlamaSetup, Setup, Training, follow_reference, max_error, slow
from tests.models import SAMPLES, window
from tests.ranks import run_on_ranks

TOLERANCE = 1e-6  # as in test_reference.py


def gathered(model: nn.Module) -> list[str]:
    """Modules whose weights are whole at the moment."""
    units = [(name, unit._get_fsdp_state()) for name, unit in model.named_modules() if isinstance(unit, FSDPModule)]
    return [name for name, state in units if any(group.is_unsharded for group in state._fsdp_param_groups)]


def traffic_of_steps(setup: Setup, samples: Sequence[Sequence[int]]) -> list[tuple[dict[str, int], list[str]]]:
    """Bytes of each step, and what was left gathered after it."""
    training = Training(setup)
    seen = []
    for sample in samples:
        with Traffic() as traffic:
            training.step(training.window(1), active=sample)
        seen.append((dict(traffic.bytes), gathered(training.model)))
    return seen


BLOCK, EMBEDDINGS, HEAD = 4 * 9280, 4 * 2048, 4 * 2080  # bytes of a block of `tiny_llama`, and of what is around them
NUMEL = [EMBEDDINGS, *[BLOCK] * 4, HEAD]
STATISTICS = 400  # bytes: the agreement check, norms, losses


@pytest.mark.parametrize("accumulation", [slow(1), 3])
def test_only_sampled_layers_are_reduced_and_once_per_window(accumulation: int) -> None:
    samples = [[2], [0, 5], [1, 3, 4], range(6)]
    seen = run_on_ranks(2, traffic_of_steps, LlamaSetup(engine="fsdp2", accumulation=accumulation), samples)[0]
    for sample, (traffic, still_gathered) in zip(samples, seen, strict=True):
        passes = 2 * sum(NUMEL[arm] for arm in sample)
        assert passes <= traffic["reduce"] <= passes + STATISTICS
        assert still_gathered == []


def test_only_what_a_pass_needs_and_does_not_have_is_gathered() -> None:
    samples = [[5], [4], [2, 4], [1], [0]]
    forward, root = sum(NUMEL), EMBEDDINGS + HEAD  # FSDP2 keeps the root gathered until backward
    backward = [0, BLOCK, 3 * BLOCK, 4 * BLOCK, 4 * BLOCK]  # nothing below the lowest sampled layer
    # What is not sampled, from the lowest sampled layer up, stays from the first forward to the second backward; the
    # root would be gathered twice without that, and blocks four times.
    stays = [0, root, root + 3 * BLOCK, root + 9 * BLOCK, 12 * BLOCK]
    # With the prefix reused, that does not gather the blocks below either, where they are two or more.
    left_out = [4 * BLOCK, 3 * BLOCK, 0, 0, 0]
    both = [2 * (forward + below) - kept for below, kept in zip(backward, stays, strict=True)]
    setup = LlamaSetup(engine="fsdp2", slsam={"prefix_reuse": False})
    seen = run_on_ranks(2, traffic_of_steps, setup, samples)[0]
    assert [traffic["gather"] for traffic, _ in seen] == both
    # The first time, each prefix is tried.
    seen = run_on_ranks(2, traffic_of_steps, LlamaSetup(engine="fsdp2"), [*samples, *samples])[0][len(samples) :]
    assert [traffic["gather"] for traffic, _ in seen] == [a - b for a, b in zip(both, left_out, strict=True)]


def traffic_with_room_for(num_bytes: int, sample: Sequence[int]) -> int:
    from slsam_ds.engines import fsdp2

    fsdp2.MAX_KEPT_BYTES = num_bytes
    return traffic_of_steps(LlamaSetup(engine="fsdp2"), [sample])[0][0]["gather"]


def test_what_stays_gathered_is_bounded() -> None:
    """From the lowest block up: what is needed first, and was gathered last."""
    none, one, two = (run_on_ranks(2, traffic_with_room_for, room, [1])[0] for room in (0, BLOCK, 3 * BLOCK - 1))
    assert [none - one, none - two] == [3 * BLOCK, 6 * BLOCK]


def follow_with_evaluations(setup: Setup) -> dict[str, Tensor]:
    """A forward without backward before SL-SAM is built, and between steps: it leaves FSDP2's root gathered."""

    def evaluate(model: nn.Module) -> None:
        with torch.no_grad():
            model(**window(99, 0, 1)[0])

    training = Training(setup)
    evaluate(training.model)
    assert gathered(training.model) == [""]
    training.slsam = SLSAM(training.model, training.optimizer)
    for step, sample in enumerate(SAMPLES, start=1):
        training.slsam.step(training.window(step), active=sample)
        evaluate(training.model)
    training.model.reshard()
    return training.weights()


def test_an_evaluation_leaves_nothing_stale() -> None:
    expected, _ = follow_reference(LlamaSetup(engine="fsdp2"), 2, SAMPLES)
    for weights in run_on_ranks(2, follow_with_evaluations, LlamaSetup(engine="fsdp2")):
        assert max_error(weights, expected) <= TOLERANCE


def publish_what_is_gathered() -> tuple[list[str], list[str]]:
    training = Training(LlamaSetup(engine="fsdp2"))
    with torch.no_grad():
        training.model(**window(1, 0, 1)[0])
    before = gathered(training.model)
    training.slsam.engine.publish([5])
    return before, gathered(training.model)


def test_published_shards_are_gathered_anew() -> None:
    assert run_on_ranks(2, publish_what_is_gathered)[0] == ([""], [])


class InterruptedPassError(Exception):
    pass


def fail_inside(setup: Setup, where: str, call: int) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """A step in which a forward or backward raises halfway, and a good one after it."""
    training = Training(setup)
    block = training.model.model.layers[2]
    calls = 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise InterruptedPassError

    if where == "forward":
        handle = block.mlp.register_forward_pre_hook(fail)
    else:
        handle = block.mlp.register_full_backward_pre_hook(fail)
    before = training.weights()
    with pytest.raises(InterruptedPassError):
        training.step(training.window(7), active=[1, 3, 5])
    handle.remove()
    still_gathered = gathered(training.model)
    assert max_error(training.weights(), before) == 0.0
    training.model(**training.window(2)[0]).loss.backward()  # between steps the model works as without SL-SAM
    without_gradient = [name for name, parameter in training.model.named_parameters() if parameter.grad is None]
    training.step(training.window(1), active=[1, 3, 5])
    return training.weights(), still_gathered, without_gradient


@pytest.mark.parametrize("call", [slow(1), slow(2), slow(3), 4])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_halfway_leaves_nothing_behind(where: str, call: int) -> None:
    setup = LlamaSetup(engine="fsdp2", accumulation=2)  # four forwards: two ascend, two descend
    expected, _ = follow_reference(setup, 2, [[1, 3, 5]])
    for weights, still_gathered, without_gradient in run_on_ranks(2, fail_inside, setup, where, call):
        assert max_error(weights, expected) <= TOLERANCE
        assert still_gathered == []
        assert without_gradient == []


def leave_out_a_block() -> tuple[bool, float]:
    training = Training(LlamaSetup(engine="fsdp2"))
    training.step(training.window(1), active=[4])
    before = training.weights()
    training.model.config.num_hidden_layers = 3  # FSDP2 never hears that the last block is frozen now
    training.step(training.window(2), active=[1])
    after = training.weights()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    return all(name.startswith("model.layers.0.") for name in moved), len(moved)


def test_a_frozen_layer_that_a_pass_leaves_out_stays_as_it_is() -> None:
    only_the_active, num_moved = run_on_ranks(2, leave_out_a_block)[0]
    assert only_the_active
    assert num_moved == 9


def keep_prefetch() -> bool:
    training = Training(LlamaSetup(engine="fsdp2"))
    blocks = training.model.model.layers
    blocks[2].set_modules_to_backward_prefetch([blocks[1], blocks[0]])
    own = list(blocks[2]._get_fsdp_state()._states_to_backward_prefetch)
    training.step(training.window(1), active=[3])
    return blocks[2]._get_fsdp_state()._states_to_backward_prefetch == own


def test_the_users_own_prefetch_survives() -> None:
    assert run_on_ranks(2, keep_prefetch) == [True, True]
