"""`preset: paper` is the paper's algorithm on every engine: a second, independent oracle agrees."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slsam_ds import SLSAMConfig, StepResult
from tests.distributed.training import ADAMW, ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, Setup, Training, max_error, slow
from tests.models import tiny_decoder, window
from tests.paper import Paper
from tests.ranks import run_on_ranks

WORLD_SIZE, NUM_STEPS = 2, 12
KNOBS = SLSAMConfig.from_dict({"preset": "paper", "seed": 2}).to_dict()
NAMES = [name for name, _ in tiny_decoder().named_parameters()]


def train(setup: Setup) -> tuple[dict[str, Tensor], list[StepResult], list[str], list[float]]:
    training = Training(setup)
    results = []
    for step in range(1, NUM_STEPS + 1):
        before = training.live_weights()
        results.append(training.step(training.window(step)))
        sampled = {training.slsam.layers[arm].name for arm in results[-1].active}
        for name, weight in training.live_weights().items():
            assert torch.equal(weight, before[name]) == (name not in sampled), name
    names = [layer.name for layer in training.slsam.layers]
    return training.weights(), results, names, training.slsam.selector.probabilities().tolist()


def oracle(accumulation: int, draws: list[list[str]]) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
    torch.set_num_threads(1)
    model: nn.Module = tiny_decoder()
    paper = Paper(model, share=0.2, rho=0.01, lr=ADAMW["lr"], eps=ADAMW["eps"], decay=ADAMW["weight_decay"])
    for step, names in enumerate(draws, start=1):
        batches = [batch for rank in range(WORLD_SIZE) for batch in window(step, rank, accumulation)]
        paper.step([paper.names.index(name) for name in names], batches)
    weights: dict[str, Any] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return weights, dict(zip(paper.names, paper.bandit.p.tolist(), strict=True))


@pytest.mark.parametrize("accumulation", [slow(1), 3])
@pytest.mark.parametrize("engine", ["local", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_every_engine_follows_the_papers_algorithm(engine: str, accumulation: int) -> None:
    per_rank = run_on_ranks(WORLD_SIZE, train, Setup(engine=engine, accumulation=accumulation, slsam=KNOBS))
    weights, results, names, probabilities = per_rank[0]
    assert sorted(names) == sorted(NAMES)
    expected, chances = oracle(accumulation, [[names[arm] for arm in result.active] for result in results])
    assert len({result.active for result in results}) > NUM_STEPS // 2
    assert max_error(weights, expected) <= 1e-6
    assert dict(zip(names, probabilities, strict=True)) == pytest.approx(chances, rel=1e-3)
    for other, their_results, *_ in per_rank[1:]:
        assert max_error(other, weights) == 0.0
        assert [result.active for result in their_results] == [result.active for result in results]
