"""The reference with 16-bit weights under float32 masters: it rounds where engines round.

Shares no code with the package.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.reference import Batches, Reference, Tensors

FLOAT32_ERROR = 1e-8  # of a sum of numbers around 0.1
MOST_DEVIATIONS = 6.0  # of rounding noise: one in 5e8, and the noise of a test is the same in every run


@dataclass
class RoundingReference(Reference):
    """Shared weights and gradients of 16 bits.

    The engine's own weights are given and judged, then gone on with, for noise and last bits decide them: perturbed
    ones must be neighbours of w + ε, and w + ε on average; updated ones the masters, rounded to the nearest.

    AdamW is torch's.
    """

    world_size: int = 1
    rounding: str = "stochastic"
    loss_scale: float = 1.0
    held_in: torch.dtype = torch.float32  # reduced gradients, which are mixed and scaled there
    tolerance: float = 1e-6  # of masters
    slack: float = FLOAT32_ERROR  # of perturbed weights, where gradients may differ in their last bits

    def __post_init__(self) -> None:
        self.masters = {name: nn.Parameter(weight.float()) for name, weight in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.masters.values(), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        self.perturbed: Mapping[str, torch.Tensor] = {}
        self.projection: float | None = None  # of the perturbation on ε
        self.window = self.part = 0  # micro-batches of a rank: of a step; to descend on, where those are fewer

    def follow(
        self,
        perturbed_arms: Sequence[int],
        batches: Batches,
        *,
        perturbed: Mapping[str, torch.Tensor],
        live: Mapping[str, torch.Tensor],
        descended: Batches | None = None,
        **kwargs: Any,
    ) -> dict:
        """A step in which the engine had these weights at the perturbed point, and afterwards."""
        self.perturbed = perturbed
        self.window = len(batches) // self.world_size
        self.part = 0  # of samples, a pass is by itself
        if descended is not None and descended[0] is batches[0]:
            self.part = len(descended) // self.world_size % self.window
        result = self.step(perturbed_arms, batches, descended=descended, **kwargs)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                rounded = live[name].to(weight.dtype)
                assert_rounded(rounded, self.masters[name], ulps=0.5, dtype=weight.dtype, error=self.tolerance)
                weight.copy_(live[name])
        return result

    def gradient(self, names: Sequence[str], batches: Batches) -> tuple[Tensors, float]:
        size = len(batches) // self.world_size
        ranks = [batches[start : start + size] for start in range(0, len(batches), size)]
        whole = self.window if self.part else size
        weight = 1 / whole
        total, losses = self.reduced(names, [rank[: self.part or size] for rank in ranks], weight)
        if 0 < self.part < size:  # the rest is reduced by itself
            rest, more = self.reduced(names, [rank[self.part :] for rank in ranks], weight)
            total = {name: self.held(total[name] + rest[name]) for name in names}
            losses += more
        return {name: grad * (whole / size) for name, grad in total.items()}, sum(losses) / len(losses)

    def reduced(self, names: Sequence[str], ranks: Sequence[Batches], weight: float) -> tuple[Tensors, list[float]]:
        """The mean over ranks is taken in 16 bits."""
        total: Tensors = {}
        losses: list[float] = []
        for batches in ranks:
            for name, share in self.summed(names, batches, weight, losses).items():
                share /= self.world_size
                total[name] = total[name] + share if name in total else share
        return {name: grad.float() / self.loss_scale for name, grad in total.items()}, losses

    def summed(self, names: Sequence[str], batches: Batches, weight: float, losses: list[float]) -> Tensors:
        """Each rank adds up its window in 16 bits."""
        total: Tensors = {}
        for grads in self.each(names, batches, weight, losses):
            total = {name: total[name] + grad if total else grad for name, grad in grads.items()}
        return total

    def each(self, names: Sequence[str], batches: Batches, weight: float, losses: list[float]) -> Iterator[Tensors]:
        """Of each micro-batch."""
        parameters = [self.model.get_parameter(name) for name in names]
        for batch in batches:
            loss = self.model(**batch).loss
            losses.append(loss.item())
            grads = torch.autograd.grad(loss * weight * self.loss_scale, parameters)
            yield dict(zip(names, grads, strict=True))

    def held(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.to(self.held_in).float()

    def mix(self, g: torch.Tensor, g_there: torch.Tensor, h: torch.Tensor, share: float) -> torch.Tensor:
        kept = self.held((1 - share) * g if g_there is g else g - self.held(share * g_there))
        return self.held(kept + self.held(share * h))

    def scale(self, gradients: Tensors, factor: float) -> Tensors:
        return {name: self.held(gradient * factor) for name, gradient in gradients.items()}

    def precise_weights(self) -> Mapping[str, torch.Tensor]:
        return self.masters

    @torch.no_grad()
    def add(self, epsilon: Tensors) -> Tensors:
        before = {}
        stochastic = self.rounding == "stochastic"
        for name, weight in self.model.named_parameters():
            given = self.perturbed[name].to(weight.dtype)
            still = epsilon[name] == 0 if name in epsilon else torch.ones_like(weight, dtype=torch.bool)
            if stochastic or name not in epsilon:
                assert torch.equal(given[still], weight[still]), name
            if name in epsilon:
                exact = (weight.float() if stochastic else self.masters[name]) + epsilon[name]
                ulps = 1.0 if stochastic else 0.5
                assert_rounded(self.perturbed[name], exact, ulps=ulps, dtype=weight.dtype, error=self.slack)
                before[name] = weight.clone()
        if stochastic:
            for arm in self.arms:
                self.assert_whole({name: epsilon[name] for name in arm if name in epsilon})
        applied = {name: self.perturbed[name].float() - weight.float() for name, weight in before.items()}
        dots = [(tensor.double() * epsilon[name]).sum().item() for name, tensor in applied.items()]
        asked_for = sum(tensor.double().square().sum().item() for tensor in epsilon.values())
        self.projection = sum(dots) / asked_for if asked_for else None
        for name in before:
            self.model.get_parameter(name).copy_(self.perturbed[name])
        return before

    def assert_whole(self, epsilon: Tensors) -> None:
        """The noise is none that ε explains: rounded up is as often as the distance to the neighbours asks for."""
        error = variance = 0.0
        for name, tensor in epsilon.items():
            weight = self.model.get_parameter(name)
            exact = weight.float() + tensor
            ulp = ulps_of(exact, weight.dtype)
            along = tensor / ulp.clamp_min(2**-15) ** 2  # or a few weights near zero would say it all
            up = torch.remainder(exact, ulp) / ulp
            error += ((self.perturbed[name].float() - exact) * along).double().sum().item()
            variance += (up * (1 - up) * (ulp * along) ** 2).double().sum().item()
        assert abs(error) <= MOST_DEVIATIONS * variance**0.5 + FLOAT32_ERROR, (error, variance**0.5)

    @torch.no_grad()
    def adamw(self, name: str, grad: torch.Tensor, lr: float) -> None:
        self.optimizer.zero_grad()
        self.masters[name].grad = grad
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        state = self.optimizer.state[self.masters[name]]
        self.moments[name] = (state["exp_avg"], state["exp_avg_sq"], int(state["step"]))


def ulps_of(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit in the last place of numbers of this size."""
    numbers = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(numbers.smallest_normal)))
    return numbers.eps * torch.exp2(exponent)


def assert_rounded(
    rounded: torch.Tensor, exact: torch.Tensor, *, ulps: float, dtype: torch.dtype, error: float = FLOAT32_ERROR
) -> None:
    """Every value is within so many units of the dtype's last place of the exact one."""
    assert ((rounded.float() - exact).abs() <= ulps * ulps_of(exact, dtype) + error).all()


class MixedReference(RoundingReference):
    """Weights are cast to bf16 for forward and backward, buffers are not; gradients add up in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    def each(self, names: Sequence[str], batches: Batches, weight: float, losses: list[float]) -> Iterator[Tensors]:
        for grads in super().each(names, batches, weight, losses):
            yield {name: grad.float() for name, grad in grads.items()}
