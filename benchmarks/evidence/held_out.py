"""What a trained model is worth on data it has not seen: loss, accuracy, calibration and sharpness."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_NUM_BINS = 15
_IGNORED = -100  # the label of what is not to be predicted


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over samples, or over tokens where those are predicted.

    Attributes:
        loss: Cross-entropy, in nats.
        accuracy: Share of right answers.
        calibration_error: Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, eq. 3).
    """

    loss: float
    accuracy: float
    calibration_error: float


@torch.no_grad()
def score(model: nn.Module, batches: Sequence[dict[str, Tensor]], *, predicts_tokens: bool) -> Score:
    """Judge a model; its mode and its random state are as before."""
    was_training = model.training
    model.eval()
    answers = [_answers(model, batch, predicts_tokens=predicts_tokens) for batch in batches]
    model.train(was_training)
    each_loss, confidence, right = (torch.cat(each).double().cpu() for each in zip(*answers, strict=True))
    return Score(
        loss=float(each_loss.mean()),
        accuracy=float(right.mean()),
        calibration_error=_calibration_error(confidence, right),
    )


def losses(model: nn.Module, batch: Mapping[str, Tensor], *, predicts_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, logits and label of every answer of a batch, whatever the model computes in.

    Returns:
        Shape (answers,), float32; (answers, classes), float32; (answers,), int64.
    """
    labels = batch["labels"]
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    if predicts_tokens:
        logits, labels = logits[:, :-1], labels[:, 1:]
        asked = labels != _IGNORED
        logits, labels = logits[asked], labels[asked]
    logits = logits.float()
    return functional.cross_entropy(logits, labels, reduction="none"), logits, labels


def _answers(model: nn.Module, batch: Mapping[str, Tensor], *, predicts_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, confidence and whether it is right, of every answer of a batch. Each of shape (answers,)."""
    each_loss, logits, labels = losses(model, batch, predicts_tokens=predicts_tokens)
    confidence, answer = functional.softmax(logits, dim=-1).max(dim=-1)
    return each_loss, confidence, answer == labels


def _calibration_error(confidence: Tensor, right: Tensor) -> float:
    bins = (confidence * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    gaps = torch.zeros(_NUM_BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return float(gaps.abs().sum() / len(right))


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Rise of the loss at a distance from the weights, over all trainable parameters.

    Attributes:
        along_gradient: At `rho` along the gradient of that very loss.
        in_random_directions: Mean over random directions, at ten times `rho`: at `rho` the rise is lost in rounding.
    """

    along_gradient: float
    in_random_directions: float


def sharpness(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    *,
    predicts_tokens: bool,
    rho: float,
    num_directions: int = 3,
) -> Sharpness:
    """Climb from the weights and come back; the same directions for every model of a shape.

    Args:
        model: Trained.
        batches: Held-out data, all of which count the same.
        predicts_tokens: As in `score`.
        rho: Radius in parameter units.
        num_directions: Random ones.
    """
    parameters = list(model.parameters())
    trainable = [parameter.requires_grad for parameter in parameters]
    model.requires_grad_(True)
    model.eval()
    model.zero_grad()

    def loss() -> float:
        return score(model, batches, predicts_tokens=predicts_tokens).loss

    for batch in batches:
        losses(model, batch, predicts_tokens=predicts_tokens)[0].sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    at_weights = loss()
    along_gradient = _loss_at(parameters, gradients, rho, loss) - at_weights
    generator = torch.Generator().manual_seed(0)
    rises = []
    for _ in range(num_directions):
        direction = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        rises.append(_loss_at(parameters, direction, 10 * rho, loss) - at_weights)
    model.zero_grad()
    for parameter, was_trainable in zip(parameters, trainable, strict=True):
        parameter.requires_grad_(was_trainable)
    return Sharpness(along_gradient=along_gradient, in_random_directions=sum(rises) / len(rises))


@torch.no_grad()
def _loss_at(parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], radius: float, loss: Any) -> float:
    kept = [parameter.clone() for parameter in parameters]
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in direction))
    for parameter, each in zip(parameters, direction, strict=True):
        parameter.add_(each, alpha=radius / norm if norm > 0 else 0.0)
    found = float(loss())
    for parameter, before in zip(parameters, kept, strict=True):
        parameter.copy_(before)
    return found
