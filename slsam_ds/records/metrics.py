"""What a step did, as the few numbers that people plot beside their loss."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "slsam/"


def step_metrics(record: Mapping[str, Any], numels: Sequence[int]) -> dict[str, float]:
    """The metrics of one step. What the step did not measure is absent.

    Args:
        record: A line of `slsam_steps.jsonl`.
        numels: Elements of each arm, global.

    Returns:
        The metrics by name, each name with the prefix `slsam/`.

        - `ascent_rise`: Loss at the perturbed point minus loss at the weights: what SAM lives on.
        - `price`: FLOPs of the step, a step of AdamW being 1.
        - `perturbation_norm`: Norm of the change that was made to the weights.
        - `perturbation_projection`: How much of ε arrived; 1 where all of it did.
        - `mask_density`: Share of the perturbed arms' elements that the mask let move.
        - `active_share`: Share of the arms' parameters that were active, in [0, 1].
        - `selection_entropy`: Of the inclusion probabilities: 1 where all arms are equally likely, 0 where one is
          certain.
        - `ascent_seconds`, `descent_seconds`: Wall-clock time of each pass on this rank, its reduction included.
        - `skipped`: 1 where a bad number stopped the step.
    """
    metrics = {
        "active_share": sum(numels[arm] for arm in record["active"]) / sum(numels),
        "selection_entropy": _relative_entropy(record["probabilities"]),
        "skipped": float(record["skipped"]),
    }
    if record.get("price") is not None:
        metrics["price"] = record["price"]
    if not record["skipped"]:
        metrics["descent_seconds"] = record["descent_seconds"]
        if record["ascent_loss"] is not None:
            metrics["ascent_seconds"] = record["ascent_seconds"]
            metrics["ascent_rise"] = record["loss"] - record["ascent_loss"]
        if record["perturbation_projection"] is not None:  # also perturbed along a direction that needs no ascent pass
            metrics["perturbation_norm"] = record["perturbation_norm"]
            metrics["perturbation_projection"] = record["perturbation_projection"]
        if record.get("mask_density") is not None:
            metrics["mask_density"] = record["mask_density"]
    return {PREFIX + name: value for name, value in metrics.items()}


class MetricMeans:
    """Means of metrics over the steps since they were last asked for; each over the steps that measured it."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in one step."""
        for name, value in metrics.items():
            self._values[name].append(value)

    def take(self) -> dict[str, float]:
        """The means, and start over."""
        means = {name: math.fsum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means


def _relative_entropy(probabilities: Sequence[float]) -> float:
    if len(probabilities) < 2:
        return 0.0
    total = math.fsum(probabilities)
    shares = [probability / total for probability in probabilities if probability > 0]
    return -math.fsum(share * math.log(share) for share in shares) / math.log(len(probabilities))
