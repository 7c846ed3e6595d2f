"""bf16 and fp16: the trajectory of a reference that rounds where the engine rounds; perturbations that arrive whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.training import (
    ADAMW,
    ALSO_OFFLOADED,
    ALSO_ZERO0,
    ALSO_ZERO1,
    LOSS_SCALE_POWER,
    Setup,
    Training,
    max_error,
    slow,
)
from tests.models import SAMPLES, arms_of_llama, window
from tests.ranks import run_on_ranks


class RoundingReference:
    """SL-SAM with 16-bit weights under float32 masters, in one process. Shares no code with the package.

    The engine's perturbed weights are given to it and judged: whatever the noise, each must be a neighbour of w + ε.
    AdamW is torch's: 16-bit weights follow masters across rounding boundaries, so that a last bit decides.
    """

    def __init__(self, setup: Setup, world_size: int) -> None:
        torch.set_num_threads(1)  # sums in the order of the ranks' own
        self.setup, self.world_size = setup, world_size
        self.model = setup.build_model()
        self.arms = arms_of_llama(self.model)
        self.masters = {name: nn.Parameter(weight.float()) for name, weight in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), **ADAMW)
        self.loss_scale = 2**LOSS_SCALE_POWER if setup.dtype == torch.float16 else 1

    def gradient(self, step: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Each rank adds up its window in 16 bits, and the mean over ranks is taken in 16 bits too."""
        total: dict[str, Tensor] = {}
        for rank in range(self.world_size):
            self.model.zero_grad()
            for batch in window(step, rank, self.setup.accumulation):
                (self.model(**batch).loss / self.setup.accumulation * self.loss_scale).backward()
            for name in names:
                share = self.model.get_parameter(name).grad / self.world_size
                total[name] = total[name] + share if name in total else share
        return {name: grad.float() / self.loss_scale for name, grad in total.items()}

    def follow(self, step: int, sample: Sequence[int], perturbed: Mapping[str, Tensor]) -> None:
        names = [name for arm in sample for name in self.arms[arm]]
        ascent = self.gradient(step, names)
        norm = torch.sqrt(sum(grad.double().square().sum() for grad in ascent.values())).item()
        nearest = self.setup.slsam["rounding"] == "nearest"
        with torch.no_grad():
            for name in names:
                weight = self.model.get_parameter(name)
                start = self.masters[name] if nearest else weight.float()
                exact = start + ascent[name] * (0.05 / norm)
                assert_rounded(perturbed[name], exact, ulps=0.5 if nearest else 1.0, dtype=weight.dtype)
                weight.copy_(perturbed[name])
        descent = self.gradient(step, names)
        self.optimizer.zero_grad()
        for name in names:
            self.masters[name].grad = descent[name]
        self.optimizer.step()
        with torch.no_grad():
            for name in names:
                self.model.get_parameter(name).copy_(self.masters[name])


def assert_rounded(rounded: Tensor, exact: Tensor, *, ulps: float, dtype: torch.dtype) -> None:
    """Every value is within so many units of the dtype's last place of the exact one."""
    numbers = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(numbers.smallest_normal)))
    ulp = numbers.eps * torch.exp2(exponent)
    float32_error = 1e-8  # of a sum of numbers around 0.1
    assert ((rounded.float() - exact).abs() <= ulps * ulp + float32_error).all()


def follow_bf16(setup: Setup) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]], list[float]]:
    training = Training(setup)
    perturbed, projections = [], []
    for step, sample in enumerate(SAMPLES, start=1):
        seen: list[dict[str, Tensor]] = []

        def loss_fn(model: Any, batch: Any, seen: list[dict[str, Tensor]] = seen) -> Tensor:
            seen.append(training.live_weights())
            return model(**batch).loss

        result = training.step(training.window(step), loss_fn=loss_fn, active=sample)
        perturbed.append(seen[-1])
        projections.append(result.perturbation_projection)
    return training.live_weights(), training.weights(), perturbed, projections


@pytest.mark.parametrize("rounding", ["stochastic", slow("nearest")])
@pytest.mark.parametrize(("world_size", "accumulation"), [slow(1, 1), slow(2, 1), (2, 3)])
@pytest.mark.parametrize("engine", [ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_forced_samples(engine: str, world_size: int, accumulation: int, rounding: str) -> None:
    setup = Setup(engine=engine, dtype=torch.bfloat16, accumulation=accumulation, slsam={"rounding": rounding})
    judge(setup, world_size)


@pytest.mark.parametrize("rounding", ["stochastic", slow("nearest")])
@pytest.mark.parametrize(("world_size", "accumulation"), [slow(1, 1), (2, 3)])
@pytest.mark.parametrize("engine", [ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_forced_samples_in_float16(engine: str, world_size: int, accumulation: int, rounding: str) -> None:
    setup = Setup(engine=engine, dtype=torch.float16, accumulation=accumulation, slsam={"rounding": rounding})
    judge(setup, world_size)


def judge(setup: Setup, world_size: int) -> None:
    per_rank = run_on_ranks(world_size, follow_bf16, setup)
    live, masters, perturbed, _ = per_rank[0]
    for other in per_rank[1:]:
        assert max_error(live, other[0]) == 0.0
        assert all(max_error(mine, theirs) == 0.0 for mine, theirs in zip(perturbed, other[2], strict=True))
    reference = RoundingReference(setup, world_size)
    for step, sample in enumerate(SAMPLES, start=1):
        reference.follow(step, sample, perturbed[step - 1])
    assert max_error(masters, reference.masters) <= 1e-6
    assert max_error(live, dict(reference.model.named_parameters())) == 0.0


@pytest.mark.parametrize("engine", [ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_the_perturbation_arrives_whole(engine: str) -> None:
    setup = Setup(engine=engine, dtype=torch.bfloat16, model={"hidden": 64}, slsam={"rho": 0.02})
    *_, projections = run_on_ranks(2, follow_bf16, setup)[0]
    assert sum(projections) / len(projections) == pytest.approx(1.0, abs=0.03)
