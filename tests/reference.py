"""SL-SAM in one process, on whole tensors, for forced choices: the judge of every engine.

Shares no code with the package.

A step perturbs the arms P and updates the arms U. g and h are means over all micro-batches of all ranks' windows; there
is one norm over all of P; AdamW has a step counter per layer, which counts the layer's own updates only.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Batches = Sequence[Mapping[str, torch.Tensor]]
Tensors = dict[str, torch.Tensor]


@dataclass
class Reference:
    model: torch.nn.Module  # float32; only parameters named in `arms` are trained
    arms: Sequence[Sequence[str]]
    rho: float = 0.05
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-4
    weight_decay: float = 0.1
    clip: float = 0.0
    # "previous" (what a layer last descended along, in bf16), "momentum", "friendly" (less its running mean, in bf16),
    # "random"
    direction: str = "current"
    metric: str = "euclidean"  # or "adaptive", "preconditioned", "by_layer"
    descend_along: str | dict = "perturbed"  # or "renormalised", {"mixed": a}, {"corrected": c}
    mask: str | None = None  # or "fisher", "dynamic"
    mask_density: float = 0.5
    mask_every: int = 100
    total_steps: int = 0
    masks: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # by arm, from its latest refresh on
    masked_in: dict[int, int] = field(default_factory=dict)
    num_steps: int = 0
    means: Tensors = field(default_factory=dict)
    previous: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    moments: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict)

    def names(self, arms: Sequence[int]) -> list[str]:
        return [name for arm in arms for name in self.arms[arm]]

    def starts(self) -> dict[str, int]:
        """Number of the first element of each parameter in the model."""
        names = self.names(range(len(self.arms)))
        numels = (self.model.get_parameter(name).numel() for name in names)
        return dict(zip(names, itertools.accumulate(numels, initial=0), strict=False))

    def gradient(self, names: Sequence[str], batches: Batches) -> tuple[Tensors, float]:
        parameters = dict(self.model.named_parameters())
        total = {name: torch.zeros_like(parameters[name]) for name in names}
        mean_loss = 0.0
        for batch in batches:
            loss = self.model(**batch).loss
            grads = torch.autograd.grad(loss, [parameters[name] for name in names])
            for name, grad in zip(names, grads, strict=True):
                total[name] += grad / len(batches)
            mean_loss += loss.item() / len(batches)
        return total, mean_loss

    def climb(self, perturbed: Sequence[int], updated: Sequence[str], batches: Batches) -> tuple[Tensors, float, float]:
        """Direction, its norm, and the loss at x."""
        names = self.names(perturbed)
        if self.direction == "previous":
            known = [name for name in names if name in self.previous]
            return {n: self.previous[n][0] for n in known}, sum(self.previous[n][1] for n in known) ** 0.5, 0.0
        if self.direction == "momentum":
            moments = {name: self.moments[name][0] for name in names if name in self.moments}
            return moments, norm_of(moments), 0.0
        if self.direction == "random":
            starts, key, drawn = self.starts(), key_of(0, self.num_steps), {}
            for name in names:
                like = self.model.get_parameter(name)
                first, second = (
                    bits_of(starts[name] + torch.arange(like.numel()), key_of(key, which)).double() / 2**30
                    for which in (0, 1)
                )
                z = (-2 * (first + 2**-30).log()).sqrt() * (2 * math.pi * second).cos()
                drawn[name] = z.float().view_as(like)
            return drawn, norm_of(drawn), 0.0
        ascent, loss = self.gradient(names, batches)
        if self.direction == "friendly":
            means = {name: self.means.get(name) for name in names}
            for name, mean in means.items():
                new = ascent[name] if mean is None else torch.lerp(mean, ascent[name], 0.1)
                if name in updated:
                    self.means[name] = new.bfloat16().float()
            ascent = {name: ascent[name] - (0.0 if mean is None else mean) for name, mean in means.items()}
        return ascent, norm_of(ascent), loss

    def precise_weights(self) -> Mapping[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def epsilon(self, perturbed: Sequence[int], ascent: Tensors, norm: float) -> Tensors:
        weights = self.precise_weights()
        stretch = {name: torch.ones_like(tensor) for name, tensor in ascent.items()}
        for arm in perturbed:
            for name in [name for name in self.arms[arm] if name in ascent]:
                if self.metric == "adaptive":
                    stretch[name] = weights[name].detach() ** 2
                elif self.metric == "preconditioned":
                    _, v, count = self.moments.get(name, (None, torch.tensor(torch.inf), 1))
                    stretch[name] = 1 / ((v / (1 - self.betas[1] ** count)).sqrt() + self.eps) * stretch[name]
                elif self.metric == "by_layer":
                    whole = [norm_of({name: tensors[name] for name in self.arms[arm]}) for tensors in (weights, ascent)]
                    stretch[name] *= whole[0] / whole[1]
        if self.metric == "by_layer":
            return {name: self.rho * stretch[name] * tensor for name, tensor in ascent.items()}
        if self.metric != "euclidean":
            norm = norm_of({name: tensor * stretch[name].sqrt() for name, tensor in ascent.items()})
        return {name: (self.rho / norm if norm > 0 else 0.0) * stretch[name] * g for name, g in ascent.items()}

    def masked(self, perturbed: Sequence[int], ascent: Tensors, epsilon: Tensors) -> tuple[Tensors, float | None]:
        """Epsilon, where the mask lets it be, and the share of it; then the mask for the steps to come."""
        if self.mask is None or not epsilon:
            return epsilon, None
        starts = self.starts()
        numels = {name: self.model.get_parameter(name).numel() for name in starts}
        arms = [arm for arm in perturbed if self.arms[arm][0] in epsilon]
        names = self.names(arms)
        numbers = torch.cat([starts[name] + torch.arange(numels[name]) for name in names])
        moves = {}
        for arm in arms:
            for name in self.arms[arm]:
                at_first = torch.ones(numels[name], dtype=torch.bool)
                if self.mask == "dynamic":
                    at_first = bits_of(starts[name] + torch.arange(numels[name]), key_of(0, 0)) < round(
                        self.mask_density * 2**30
                    )
                moves[name] = self.masks.get(arm, {}).get(name, at_first)
        active = torch.cat([moves[name] for name in names])
        if any(self.num_steps - self.masked_in.get(arm, -self.mask_every) >= self.mask_every for arm in arms):
            count, size = (
                round(self.mask_density * len(active)),
                torch.cat([ascent[name].flatten().abs() for name in names]),
            )
            if self.mask == "fisher":
                chosen = largest(size, count)
            else:
                share = 0.25 * (1 + math.cos(math.pi * (self.num_steps - 1) / self.total_steps))
                stay = count - min(round(share * count), len(active) - count)
                chosen = largest(torch.where(active, size, -1.0), min(stay, int(active.sum())))
                chance = bits_of(numbers, key_of(0, self.num_steps)) + torch.where(active, 0, 2**30)
                chosen |= largest(torch.where(chosen, -1, chance), count - int(chosen.sum()))
            parts = dict(zip(names, chosen.split([numels[name] for name in names]), strict=True))
            for arm in arms:
                self.masks[arm] = {name: parts[name] for name in self.arms[arm]}
                self.masked_in[arm] = self.num_steps
        return {
            name: tensor * moves[name].view_as(tensor) for name, tensor in epsilon.items()
        }, active.float().mean().item()

    @torch.no_grad()
    def add(self, epsilon: Tensors) -> Tensors:
        parameters = dict(self.model.named_parameters())
        before = {name: parameters[name].clone() for name in epsilon}
        for name, tensor in epsilon.items():
            parameters[name] += tensor
        return before

    def step(
        self,
        perturbed: Sequence[int],
        batches: Batches,
        lr_scale: Callable[[int], float] = lambda arm: 1.0,
        parts: Sequence[Batches] | None = None,  # each climbs by itself; None: all as one
        climbed: Sequence[Batches] | None = None,  # what of each part to climb on
        updated: Sequence[int] | None = None,  # None: the perturbed
        descended: Batches | None = None,  # what of all to descend on, where that is a part
        descended_by: Sequence[Batches] | None = None,  # the same of each part
        ascends: bool = True,
    ) -> dict:
        updated = perturbed if updated is None else updated
        self.num_steps += 1
        descent: Tensors = {}
        ascent_loss = loss = 0.0
        for number, part in enumerate(parts or [batches]):
            share = len(part) / len(batches)
            ascent, norm, part_ascent_loss = {}, 0.0, 0.0
            if ascends:
                climbs_on = (
                    descended_by[number] if descended_by else descended or (climbed[number] if climbed else part)
                )
                ascent, norm, part_ascent_loss = self.climb(perturbed, self.names(updated), climbs_on)
            epsilon, mask_density = self.masked(perturbed, ascent, self.epsilon(perturbed, ascent, norm))
            before = self.add(epsilon)
            part_descent, part_loss = self.gradient(
                self.names(updated), descended_by[number] if descended_by else descended or part
            )
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in before:
                        parameter.copy_(before[name])
            descent = {name: descent.get(name, 0.0) + share * grad for name, grad in part_descent.items()}
            ascent_loss, loss = ascent_loss + share * part_ascent_loss, loss + share * part_loss
        if isinstance(self.descend_along, dict) and ascends:
            at_x, ascent_loss = self.gradient(self.names(updated), batches)
            ((how, share),) = self.descend_along.items()
            if descended_by:
                descended = [batch for each in descended_by for batch in each]
            there, _ = self.gradient(self.names(updated), descended) if how == "corrected" else (at_x, 0.0)
            descent = {name: self.mix(at_x[name], there[name], grad, share) for name, grad in descent.items()}
        for name, grad in descent.items():
            self.previous[name] = (grad.to(torch.bfloat16).float(), grad.double().square().sum().item())
        norms = {arm: norm_of({name: descent[name] for name in self.arms[arm]}) for arm in updated}
        if self.descend_along == "renormalised" and ascends:
            at_x, _ = self.gradient(self.names(updated), batches)
            descent = self.scale(descent, norm_of(at_x) / norm_of(descent))
        factor = min(1.0, self.clip / (norm_of(descent) + 1e-6)) if self.clip else 1.0
        for arm in updated:
            for name in self.arms[arm]:
                self.adamw(name, descent[name] * factor, self.lr * lr_scale(arm))
        sq_norm = norm**2 if ascends else sum(each**2 for each in norms.values())
        return {
            "loss": loss,
            "ascent_loss": ascent_loss,
            "grad_norms": norms,
            "sq_norm": sq_norm,
            "mask_density": mask_density,
        }

    def mix(self, g: torch.Tensor, g_there: torch.Tensor, h: torch.Tensor, share: float) -> torch.Tensor:
        return g + share * (h - g_there)

    def scale(self, gradients: Tensors, factor: float) -> Tensors:
        return {name: factor * gradient for name, gradient in gradients.items()}

    @torch.no_grad()
    def adamw(self, name: str, grad: torch.Tensor, lr: float) -> None:
        parameter = dict(self.model.named_parameters())[name]
        m, v, count = self.moments.get(name, (torch.zeros_like(grad), torch.zeros_like(grad), 0))
        b1, b2 = self.betas
        m, v, count = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad.square(), count + 1
        self.moments[name] = (m, v, count)
        parameter *= 1 - lr * self.weight_decay
        parameter -= lr * (m / (1 - b1**count)) / ((v / (1 - b2**count)).sqrt() + self.eps)


def norm_of(tensors: Tensors) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors.values()) ** 0.5


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Which are the `count` largest; of equal ones the first."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def key_of(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def bits_of(numbers: torch.Tensor, key: int) -> torch.Tensor:
    """SplitMix64's mixing function: 30 bits for each number."""
    mixed = numbers.numpy().astype(np.uint64) + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((mixed ^ (mixed >> np.uint64(31))) & np.uint64(2**30 - 1)).astype(np.int64))
