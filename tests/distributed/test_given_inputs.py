"""What people hand over, on two ranks of every engine: micro-batches of another kind, and noise of any source."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

from tests.distributed.training import Setup, Training, slow
from tests.ranks import run_on_ranks

SAMPLES = ([3], [0, 4], [3], [2])
WIDTH, ACCUMULATION = 8, 2


class Noisy(nn.Module):
    """Multiplies by what numpy and random draw, as speech models mask their input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drawn: list[float] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.drawn.append(numpy.random.random() + random.random())
        return hidden + self.linear(hidden * self.drawn[-1]).tanh()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Noisy() for _ in range(5))

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": (x - target).square().mean()}


@dataclass(frozen=True, kw_only=True)
class Blocks(Setup):
    blocks: ClassVar[str] = "blocks"

    def build_model(self) -> nn.Module:
        return Model()


class Pair(NamedTuple):
    x: Tensor
    target: Tensor


def as_pair(model: Any, batch: Pair) -> Tensor:
    loss: Tensor = model(batch.x, batch.target)["loss"]
    return loss


# BatchEncoding and the like are as a dict: `tests/unit/test_nests.py`.
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[..., Tensor] | None]] = {
    "dict": (lambda x, target: {"x": x, "target": target}, None),
    "named tuple": (Pair, as_pair),
}


def follow(engine: str, kind: str) -> dict[str, Any]:
    """Some steps whose ascent takes half of the samples; each rank has data and noise of its own."""
    knobs = {"ascent_fraction": 0.5, "rho": 0.05, "prefix_reuse": False}
    training = Training(Blocks(engine=engine, accumulation=ACCUMULATION, slsam=knobs))
    model: Any = training.model
    make, loss_fn = KINDS[kind]
    random.seed(training.rank)
    numpy.random.seed(training.rank)
    generator = torch.Generator().manual_seed(training.rank)
    numbers, drawn = [], []
    for sample in SAMPLES:
        window = [
            make(torch.randn(4, WIDTH, generator=generator), torch.randn(4, WIDTH, generator=generator))
            for _ in range(ACCUMULATION)
        ]
        for block in model.blocks:
            block.drawn.clear()
        result = training.step(window, loss_fn, active=sample)
        assert not result.skipped
        numbers.append([result.ascent_loss, result.loss, *result.grad_norms.values()])
        drawn.append([list(block.drawn) for block in model.blocks])
    return {"numbers": numbers, "drawn": drawn, "next": numpy.random.random() + random.random()}


def follow_all(engines: tuple[str, ...]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(engine, kind): follow(engine, kind) for engine in engines for kind in KINDS}


@pytest.mark.parametrize("engines", [("local", "zero2"), slow(("local", "fsdp2", "zero0", "zero1", "zero3"))])
def test_micro_batches_of_any_kind_and_noise_of_any_source(engines: tuple[str, ...]) -> None:
    per_rank = run_on_ranks(2, follow_all, engines)
    for rank, found in enumerate(per_rank):
        alone = found["local", "dict"]
        for where, got in found.items():
            for one, other in zip(got["numbers"], alone["numbers"], strict=True):
                assert one == pytest.approx(other, rel=1e-5), where
            assert got["drawn"] == alone["drawn"], where
            assert got["next"] == alone["next"], where
        of_numpy, of_python = numpy.random.RandomState(rank), random.Random(rank)
        streams = [of_numpy.random_sample() + of_python.random() for _ in range(len(SAMPLES) * 5 * ACCUMULATION + 1)]
        assert alone["next"] == streams[-1]  # every stream is where one pass over the window leaves it
        for step, drawn in enumerate(alone["drawn"]):
            first = streams[step * 5 * ACCUMULATION :]
            for place, block in enumerate(drawn):  # the ascent takes the first micro-batch
                assert block == [first[place], first[place], first[5 + place]]
    assert per_rank[0]["local", "dict"]["drawn"] != per_rank[1]["local", "dict"]["drawn"]
