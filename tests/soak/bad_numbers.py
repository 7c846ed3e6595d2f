"""Numbers that are not finite, injected at random: which rank, which pass, which micro-batch, loss or gradient."""

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.distributed.test_faults import spoil
from tests.distributed.training import Setup, Training
from tests.ranks import run_on_ranks
from tests.soak.digests import digest

ACCUMULATION = 2
NUM_ARMS = 6
WORLD_SIZE = 2


def count_bad_numbers(engine: str, wanted: int, *, seed: int = 0) -> dict[str, int]:
    """Steps that a bad number hits, among as many good ones.

    Returns:
        injected: Steps hit.
        skipped: Of those, steps that all ranks skipped, with a rank or a layer named.
        moved: Of those, steps that changed a weight or the bandit.
        different: 1 where the run did not end bit-identical to one of the good steps alone.
    """
    setup = Setup(engine=engine, accumulation=ACCUMULATION, slsam={"max_skipped_steps": None})
    per_rank = run_on_ranks(WORLD_SIZE, train, setup, wanted, seed, True, timeout=1800)
    clean = run_on_ranks(WORLD_SIZE, train, setup, wanted, seed, False, timeout=1800)
    skipped, moved = (min(rank[key] for rank in per_rank) for key in ("skipped", "kept"))
    return {
        "injected": wanted,
        "skipped": skipped,
        "moved": wanted - moved,
        "different": int(per_rank[0]["weights"] != clean[0]["weights"]),
    }


def train(setup: Setup, num_bad: int, seed: int, inject: bool) -> dict[str, Any]:
    """On every rank: good steps, each with a bad one before it or none. The same choices on every rank."""
    training, chance = Training(setup), random.Random(seed)
    found: dict[str, Any] = {"skipped": 0, "kept": 0}
    for number in range(num_bad):
        sample = sorted(chance.sample(range(NUM_ARMS), chance.choice((1, 2, 3))))
        victim, call = chance.randrange(WORLD_SIZE), chance.randrange(2 * ACCUMULATION)
        value = chance.choice((float("nan"), float("inf"), -float("inf")))
        damage = chance.choice((_spoiled_loss, _spoiled_gradient))
        window = training.window(number + 1)
        if inject:
            before, state = training.live_weights(), training.slsam.selector.state_dict()
            act = partial(damage, value=value) if victim == training.rank else _as_it_is
            result = spoil(training.step, window, call + 1, act, active=sample)
            after = training.live_weights()
            same = all(torch.equal(after[name], weight) for name, weight in before.items())
            found["skipped"] += result.skipped
            found["kept"] += same and training.slsam.selector.state_dict() == state
        training.step(window, active=sample)
    return found | {"weights": digest(training, state=False)}


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _spoiled_loss(loss: Tensor, value: float) -> Tensor:
    return loss * value


class _Spoil(torch.autograd.Function):
    """The loss as it is, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: float) -> Tensor:
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.value, None


def _spoiled_gradient(loss: Tensor, value: float) -> Tensor:
    spoiled: Tensor = _Spoil.apply(loss, value)
    return spoiled
