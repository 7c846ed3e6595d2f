"""What a run's records add up to: the numbers that the end-of-run summary, the tables and the pictures share."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slsam_ds.report.history import Floats, RunHistory

PRICE_ASSUMPTIONS = (
    "The price is an estimate, counted, not measured. A layer costs one unit per weight for its forward, one for the "
    "gradient of its activations, which the backward needs from the top down to the lowest active layer, and one for "
    "the gradient of its weights if it is active. Steps with an ascent make two such passes over the whole window. "
    "AdamW is 3 units for every layer, dense SAM 6. Attention scores, optimizer, communication and gradient "
    "checkpointing are left out, and an embedding counts like a matrix multiplication. Where the descent may reuse "
    "what the layers below the lowest active one computed, its forward starts there (prefix reuse)."
)

DENSE_SAM_PRICE = 2.0
"""Relative to AdamW."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know about a run: a label, a short value, and what the value means."""

    label: str
    value: str
    note: str

    def __str__(self) -> str:
        return f"{self.label}: {self.value} {self.note}"


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """A layer over the whole run.

    Attributes:
        name: Its name.
        numel: Its weights.
        num_active: Steps that chose it.
        share_active: Those out of all steps.
        probability: Mean inclusion probability.
        last_probability: The latest one.
        grad_norm: Median descent-gradient norm over the steps that chose it; NaN where none did.
    """

    name: str
    numel: int
    num_active: int
    share_active: float
    probability: float
    last_probability: float
    grad_norm: float


def layer_facts(history: RunHistory) -> list[LayerFacts]:
    """One for every layer, in forward order."""
    counts = history.active.sum(axis=0)
    return [
        LayerFacts(
            name=name,
            numel=int(history.numels[index]),
            num_active=int(counts[index]),
            share_active=float(counts[index] / len(history)),
            probability=float(history.probabilities[:, index].mean(dtype=np.float64)),
            last_probability=float(history.probabilities[-1, index]),
            grad_norm=median(history.grad_norms[:, index]),
        )
        for index, name in enumerate(history.names)
    ]


def active_shares(history: RunHistory) -> Floats:
    """Share of the weights that each step trains. Shape (T,), in [0, 1]."""
    shares: Floats = history.active @ history.numels / history.numels.sum()
    return shares


def step_prices(history: RunHistory, *, prefix_reuse: bool) -> Floats:
    """Estimated price of each step, AdamW = 1; see `PRICE_ASSUMPTIONS`. Shape (T,)."""
    numels = history.numels.astype(np.float64)
    total = numels.sum()
    weights = history.active @ numels
    from_layer_up = np.append(numels[::-1].cumsum()[::-1], 0.0)
    reached = from_layer_up[np.where(history.active.any(axis=1), history.active.argmax(axis=1), len(numels))]
    one_pass = total + reached + weights
    descent = one_pass - (total - reached if prefix_reuse else 0.0)
    prices: Floats = np.where(has_ascent(history), one_pass + descent, one_pass) / (3 * total)
    return prices


def has_ascent(history: RunHistory) -> NDArray[np.bool_]:
    """Which steps passed over their window twice. A skipped step has no ascent loss, but had an ascent. Shape (T,)."""
    return (history.rho > 0) & (history.skipped | ~np.isnan(history.ascent_loss))


def run_facts(history: RunHistory) -> list[Fact]:
    """The run in a few lines; what the records say nothing about is left out."""
    num_skipped = int(history.skipped.sum())
    facts = [
        *_loss_facts(history),
        Fact(
            "Active parameters",
            f"{100 * active_shares(history).mean():.1f}%",
            f"of {history.numels.sum():,} per step; "
            f"{history.active.sum(axis=1).mean():.3g} of {len(history.names)} layers",
        ),
        _price_fact(history),
        *_perturbation_facts(history),
        *_time_facts(history),
    ]
    if num_skipped:
        note = f"of {len(history):,} steps, because a loss or gradient was not finite"
        facts.append(Fact("Skipped", f"{num_skipped:,}", note))
    return facts


def _loss_facts(history: RunHistory) -> list[Fact]:
    tenth = max(len(history) // 10, 1)
    first, last = mean(history.loss_at_weights[:tenth]), mean(history.loss_at_weights[-tenth:])
    if np.isnan(first) or np.isnan(last):
        return []
    if len(history) == 1:
        return [Fact("Training loss", f"{last:.4g}", "in the only step")]
    of = "step" if tenth == 1 else f"{tenth:,} steps"
    return [Fact("Training loss", f"{last:.4g}", f"in the last {of}, {first:.4g} in the first")]


def _price_fact(history: RunHistory) -> Fact:
    price, reused = (step_prices(history, prefix_reuse=reuse).mean() for reuse in (False, True))
    reuse = f" ({reused:.2f} with prefix reuse)" if reused < price - 0.005 else ""
    return Fact("Estimated price", f"{price:.2f}", f"of AdamW{reuse}, {price / DENSE_SAM_PRICE:.2f} of dense SAM")


def _perturbation_facts(history: RunHistory) -> list[Fact]:
    facts = []
    projection, rise = mean(history.perturbation_projection), median(loss_rises(history))
    if not np.isnan(projection):
        note = f"of rho = {history.rho[-1]:g} reached the weights (1: all of it)"
        facts.append(Fact("Perturbation", f"{projection:.3f}", note))
    if not np.isnan(rise):
        facts.append(Fact("Rise of the loss", f"{100 * rise:+.2g}%", "at the perturbed weights, in the median step"))
    return facts


def _time_facts(history: RunHistory) -> list[Fact]:
    seconds = median(history.seconds)
    if np.isnan(seconds):
        return []
    total = timedelta(seconds=round(float(np.nansum(history.seconds))))
    return [Fact("Time", f"{seconds:.3g} s", f"per step in the median, {total} in all")]


def loss_rises(history: RunHistory) -> Floats:
    """How much higher the loss is at the perturbed point, relative to the loss at the weights. Shape (T,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rises = (history.loss - history.ascent_loss) / np.abs(history.ascent_loss)
    return np.where(np.isfinite(rises), rises, np.nan)


def median(values: Any) -> float:
    """Of what is not NaN; NaN where nothing is left."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else float("nan")


def mean(values: Any) -> float:
    """Of what is not NaN; NaN where nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else float("nan")
