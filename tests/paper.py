"""The algorithm of the SL-SAM paper in one process, on whole tensors: a second oracle, beside `tests.reference`.

Written from a description of the authors' code, with numpy for the bandit. Shares no code with the package, nor with
the other reference. Every parameter tensor takes part or not by itself; one norm over those that do; the ascent
gradient's norms teach the bandit; AdamW steps the tensors that took part and nothing else is scaled.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

P_MIN = 0.001
ALPHA = 0.001


class PaperBandit:
    """Probabilities of N arms that sum to share * N.

    Each update looks at the norms of the arms that took part; the others keep their weight.
    """

    def __init__(self, num_arms: int, share: float) -> None:
        self.p = np.full(num_arms, share)
        self.budget = share * num_arms

    def update(self, taken: Sequence[int], norms: Sequence[float]) -> None:
        taken, g = np.asarray(taken), np.asarray(norms, dtype=np.float64)
        p = self.p[taken]
        loss = (g.max() / P_MIN) ** 2 - (g / p) ** 2
        w = self.p.copy()
        w[taken] = p * np.exp(-ALPHA * (loss - loss.min()) / p)
        self.p = self.to_budget(w)

    def to_budget(self, w: np.ndarray) -> np.ndarray:
        order = np.argsort(-w, kind="stable")
        p, left = np.empty_like(w), self.budget
        rest = np.maximum(np.cumsum(w[order][::-1])[::-1], 1e-5)  # of each and all lighter ones
        for place, arm in enumerate(order):
            if w[arm] * left > rest[place]:
                p[arm] = 1.0
                left -= 1
            else:
                p[order[place:]] = w[order[place:]] * left / rest[place]
                break
        return np.clip(p, 1e-8, 1.0)


class Paper:
    """Two passes over the same batches, for draws that are given."""

    def __init__(
        self, model: torch.nn.Module, *, share: float, rho: float, lr: float, eps: float, decay: float
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.tensors = [parameter for _, parameter in model.named_parameters()]
        self.model, self.rho = model, rho
        self.bandit = PaperBandit(len(self.tensors), share)
        # One optimizer for each tensor: what takes no part is not stepped, decayed or counted.
        self.optimizers = [torch.optim.AdamW([each], lr=lr, eps=eps, weight_decay=decay) for each in self.tensors]

    def gradients(self, taken: Sequence[int], batches: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
        loss = torch.stack([self.model(**batch).loss for batch in batches]).mean()
        return list(torch.autograd.grad(loss, [self.tensors[index] for index in taken]))

    def step(self, taken: Sequence[int], batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        ascent = self.gradients(taken, batches)
        norms = [gradient.double().norm().item() for gradient in ascent]
        length = float(np.linalg.norm(norms)) + 1e-12
        before = [self.tensors[index].detach().clone() for index in taken]
        with torch.no_grad():
            for index, gradient in zip(taken, ascent, strict=True):
                self.tensors[index].add_(gradient, alpha=self.rho / length)
        descent = self.gradients(taken, batches)
        with torch.no_grad():
            for index, weight in zip(taken, before, strict=True):
                self.tensors[index].copy_(weight)
        for index, gradient in zip(taken, descent, strict=True):
            self.tensors[index].grad = gradient
            self.optimizers[index].step()
            self.tensors[index].grad = None
        self.bandit.update(taken, norms)
