"""On every engine: buffers are those of one forward, and no descent starts above blocks that others look into."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.training import Setup, Training
from tests.ranks import run_on_ranks

ENGINES = ("local", "fsdp2", "zero0", "zero1", "zero2", "zero3")
SAMPLES = ([3], [4], [3], [1, 4], [3])
WIDTH, ACCUMULATION = 8, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(self.norm(hidden)).tanh()


class Model(nn.Module):
    """Blocks with statistics; with `shares`, the last but one adds what the second left behind."""

    def __init__(self, shares: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.shares, self.num_lowest = shares, 0
        self.blocks[0].register_forward_hook(lambda *_: setattr(self, "num_lowest", self.num_lowest + 1))
        self.blocks[1].register_forward_hook(lambda block, inputs, output: vars(self).update(memory=2 * output))

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        for index, block in enumerate(self.blocks):
            hidden = block(hidden + self.memory if self.shares and index == 3 else hidden)
        return {"loss": hidden.square().mean()}


@dataclass(frozen=True, kw_only=True)
class Blocks(Setup):
    shares: bool = False
    blocks: ClassVar[str] = "blocks"

    def build_model(self) -> nn.Module:
        return Model(self.shares)


def batches(step: int, rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [{"hidden": torch.randn(6, WIDTH, generator=generator)} for _ in range(ACCUMULATION)]


def follow(setup: Blocks) -> dict[str, Any]:
    """Five steps, the first of which is skipped; and how far buffers were from those of one forward."""
    training = Training(setup)
    model: Any = training.model
    results, errors = [], []
    for step, sample in enumerate(SAMPLES, start=1):
        window = batches(step, training.rank)
        plain = setup.build_model()
        plain.load_state_dict({**training.live_weights(), **dict(model.named_buffers())})
        for batch in window:
            plain(**batch)
        bad = torch.nan if step == 1 else 1.0
        results.append(training.step(window, lambda model, batch, bad=bad: model(**batch)["loss"] * bad, active=sample))
        pairs = zip(plain.buffers(), model.buffers(), strict=True)
        errors += [(one - other).abs().max().item() for one, other in pairs]
    return {
        "skipped": [result.skipped for result in results],
        "numbers": [[result.ascent_loss, result.loss, *result.grad_norms.values()] for result in results[1:]],
        "error": max(errors),
        "reuses": training.slsam._prefixes.allowed,
        "num_lowest": model.num_lowest,
    }


def follow_all() -> dict[tuple[str, bool], dict[str, Any]]:
    found = {}
    for shares in (False, True):
        settings: dict[str, Any] = {"accumulation": ACCUMULATION, "shares": shares}
        found["whole", shares] = follow(Blocks(engine="local", slsam={"prefix_reuse": False}, **settings))
        for engine in ENGINES:
            found[engine, shares] = follow(Blocks(engine=engine, **settings))
    return found


def test_on_every_engine() -> None:
    per_rank = run_on_ranks(2, follow_all)
    for found in per_rank:
        for (engine, shares), got in found.items():
            assert got["skipped"] == [True, *[False] * 4], engine
            assert got["error"] < 1e-6, engine
            for one, other in zip(got["numbers"], found["whole", shares]["numbers"], strict=True):
                assert one == pytest.approx(other, rel=1e-5), (engine, shares)
            assert got["reuses"] == (engine != "whole" and not shares), engine
        assert found["whole", False]["num_lowest"] == len(SAMPLES) * 2 * ACCUMULATION
        # Not in the descents of the second, third and fifth step, but once more in the trial of either depth. The first
        # step is tried in vain: once above the prefix, once over all blocks.
        fewer = len(SAMPLES) * 2 * ACCUMULATION - 3 * ACCUMULATION + 2 + 1
        assert {found[engine, False]["num_lowest"] for engine in ENGINES} == {fewer}
