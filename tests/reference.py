"""SL-SAM in one process, on whole tensors, for forced samples: the judge of every engine.

Shares no code with the package.

A step: g and h are means over all micro-batches of all ranks' windows; one norm over the whole sample; AdamW whose step
counter, per layer, counts the layer's own updates only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch


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
    single_pass: bool = False  # climb along what each layer last descended along, kept in bf16, over their joint norm
    previous: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    moments: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict)

    def gradient(self, sample: Sequence[int], batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[dict, float]:
        parameters = dict(self.model.named_parameters())
        names = [name for arm in sample for name in self.arms[arm]]
        total = {name: torch.zeros_like(parameters[name]) for name in names}
        mean_loss = 0.0
        for batch in batches:
            loss = self.model(**batch).loss
            grads = torch.autograd.grad(loss, [parameters[name] for name in names])
            for name, grad in zip(names, grads, strict=True):
                total[name] += grad / len(batches)
            mean_loss += loss.item() / len(batches)
        return total, mean_loss

    def remembered(self, sample: Sequence[int]) -> tuple[dict, float]:
        names = [name for arm in sample for name in self.arms[arm] if name in self.previous]
        norm = sum(self.previous[name][1] for name in names) ** 0.5
        return {name: self.previous[name][0] for name in names}, norm

    @torch.no_grad()
    def add(self, direction: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.named_parameters())
        before = {name: parameters[name].clone() for name in direction}
        for name, tensor in direction.items():
            parameters[name] += scale * tensor
        return before

    def step(
        self,
        sample: Sequence[int],
        batches: Sequence[Mapping[str, torch.Tensor]],
        lr_scale: Callable[[int], float] = lambda arm: 1.0,
        parts: Sequence[Sequence[Mapping[str, torch.Tensor]]] | None = None,  # each climbs by itself; None: all as one
        climbed: Sequence[Sequence[Mapping[str, torch.Tensor]]] | None = None,  # what of each part to climb on
    ) -> dict:
        descent: dict[str, torch.Tensor] = {}
        ascent_loss = loss = 0.0
        for number, part in enumerate(parts or [batches]):
            share = len(part) / len(batches)
            if self.single_pass:
                ascent, norm = self.remembered(sample)
                part_ascent_loss = 0.0
            else:
                ascent, part_ascent_loss = self.gradient(sample, climbed[number] if climbed else part)
                norm = torch.sqrt(sum(g.double().square().sum() for g in ascent.values())).item()
            before = self.add(ascent, self.rho / norm if norm > 0 else 0.0)
            part_descent, part_loss = self.gradient(sample, part)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in before:
                        parameter.copy_(before[name])
            descent = {name: descent.get(name, 0.0) + share * grad for name, grad in part_descent.items()}
            ascent_loss, loss = ascent_loss + share * part_ascent_loss, loss + share * part_loss
        for name, grad in descent.items():
            self.previous[name] = (grad.to(torch.bfloat16).float(), grad.double().square().sum().item())
        norms = {
            arm: torch.sqrt(sum(descent[n].double().square().sum() for n in self.arms[arm])).item() for arm in sample
        }
        total = sum(n * n for n in norms.values()) ** 0.5
        shrink = min(1.0, self.clip / (total + 1e-6)) if self.clip else 1.0
        for arm in sample:
            for name in self.arms[arm]:
                self.adamw(name, descent[name] * shrink, self.lr * lr_scale(arm))
        return {"loss": loss, "ascent_loss": ascent_loss, "grad_norms": norms}

    @torch.no_grad()
    def adamw(self, name: str, grad: torch.Tensor, lr: float) -> None:
        parameter = dict(self.model.named_parameters())[name]
        m, v, count = self.moments.get(name, (torch.zeros_like(grad), torch.zeros_like(grad), 0))
        b1, b2 = self.betas
        m, v, count = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad.square(), count + 1
        self.moments[name] = (m, v, count)
        parameter *= 1 - lr * self.weight_decay
        parameter -= lr * (m / (1 - b1**count)) / ((v / (1 - b2**count)).sqrt() + self.eps)
