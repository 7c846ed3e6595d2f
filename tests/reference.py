"""SL-SAM in one process, on whole tensors, for forced choices: the judge of every engine.

Shares no code with the package.

A step perturbs the arms P and updates the arms U. g and h are means over all micro-batches of all ranks' windows; there
is one norm over all of P; AdamW has a step counter per layer, which counts the layer's own updates only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
    # "random" (what `drawn` says)
    direction: str = "current"
    metric: str = "euclidean"  # or "adaptive", "preconditioned", "by_layer"
    descend_along: str | dict = "perturbed"  # or "renormalised", or {"mixed": a}
    drawn: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like
    means: Tensors = field(default_factory=dict)
    previous: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    moments: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict)

    def names(self, arms: Sequence[int]) -> list[str]:
        return [name for arm in arms for name in self.arms[arm]]

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

    def climb(self, perturbed: Sequence[int], batches: Batches) -> tuple[Tensors, float, float]:
        """Direction, its norm, and the loss at x."""
        names = self.names(perturbed)
        if self.direction == "previous":
            known = [name for name in names if name in self.previous]
            return {n: self.previous[n][0] for n in known}, sum(self.previous[n][1] for n in known) ** 0.5, 0.0
        if self.direction == "momentum":
            moments = {name: self.moments[name][0] for name in names if name in self.moments}
            return moments, norm_of(moments), 0.0
        if self.direction == "random":
            drawn = {name: self.drawn(dict(self.model.named_parameters())[name].detach()) for name in names}
            return drawn, norm_of(drawn), 0.0
        ascent, loss = self.gradient(names, batches)
        if self.direction == "friendly":
            means = {name: self.means.get(name) for name in names}
            for name, mean in means.items():
                self.means[name] = (
                    (ascent[name] if mean is None else 0.9 * mean + 0.1 * ascent[name]).bfloat16().float()
                )
            ascent = {name: ascent[name] - (0.0 if mean is None else mean) for name, mean in means.items()}
        return ascent, norm_of(ascent), loss

    def epsilon(self, perturbed: Sequence[int], ascent: Tensors, norm: float) -> Tensors:
        weights = dict(self.model.named_parameters())
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
        ascends: bool = True,
    ) -> dict:
        updated = perturbed if updated is None else updated
        descent: Tensors = {}
        ascent_loss = loss = 0.0
        for number, part in enumerate(parts or [batches]):
            share = len(part) / len(batches)
            ascent, norm, part_ascent_loss = {}, 0.0, 0.0
            if ascends:
                ascent, norm, part_ascent_loss = self.climb(perturbed, climbed[number] if climbed else part)
            before = self.add(self.epsilon(perturbed, ascent, norm))
            part_descent, part_loss = self.gradient(self.names(updated), part)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in before:
                        parameter.copy_(before[name])
            descent = {name: descent.get(name, 0.0) + share * grad for name, grad in part_descent.items()}
            ascent_loss, loss = ascent_loss + share * part_ascent_loss, loss + share * part_loss
        if isinstance(self.descend_along, dict) and ascends:
            at_x, _ = self.gradient(self.names(updated), batches)
            share = self.descend_along["mixed"]
            descent = {name: (1 - share) * at_x[name] + share * grad for name, grad in descent.items()}
        for name, grad in descent.items():
            self.previous[name] = (grad.to(torch.bfloat16).float(), grad.double().square().sum().item())
        norms = {arm: norm_of({name: descent[name] for name in self.arms[arm]}) for arm in updated}
        factor = 1.0
        if self.descend_along == "renormalised" and ascends:
            at_x, _ = self.gradient(self.names(updated), batches)
            factor = norm_of(at_x) / norm_of(descent)
        if self.clip:
            factor *= min(1.0, self.clip / (factor * norm_of(descent) + 1e-6))
        for arm in updated:
            for name in self.arms[arm]:
                self.adamw(name, descent[name] * factor, self.lr * lr_scale(arm))
        sq_norm = norm**2 if ascends else sum(each**2 for each in norms.values())
        return {"loss": loss, "ascent_loss": ascent_loss, "grad_norms": norms, "sq_norm": sq_norm}

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
