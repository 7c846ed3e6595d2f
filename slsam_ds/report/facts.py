"""What a run's records add up to: the numbers that the end-of-run summary, the tables and the pictures share."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from slsam_ds.report.history import Floats, RunHistory

PRICE_ASSUMPTIONS = (
    "The price of a step is the number of its floating-point operations (FLOPs), relative to a step of AdamW on the "
    "same parameters; dense SAM costs 2. With `budget`, and with rewards per cost, FLOPs were counted in the first "
    "step. Otherwise they are estimated from the numbers of weights: one unit per weight for the forward, one for the "
    "gradient of the activations, which backward computes from the top down to the lowest active layer, and one for "
    "the gradient of the weights of active layers. The estimate leaves out attention scores, gradient checkpointing "
    "and the optimizer, and counts an embedding like a matrix multiplication."
)

PRICE_BASIS = (
    "FLOPs were counted if layers are chosen or rewarded by price (`budget`, `grad_norm_per_cost`); otherwise they are "
    "estimated from the numbers of weights."
)
"""The same in one sentence, for a terminal."""

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
        num_active: Steps that updated it.
        share_active: Those out of all steps.
        num_perturbed: Steps that perturbed it.
        share_perturbed: Those out of all steps.
        probability: Mean inclusion probability.
        last_probability: The latest one.
        grad_norm: Median descent-gradient norm over the steps that chose it; NaN where none did.
    """

    name: str
    numel: int
    num_active: int
    share_active: float
    num_perturbed: int
    share_perturbed: float
    probability: float
    last_probability: float
    grad_norm: float


def layer_facts(history: RunHistory) -> list[LayerFacts]:
    """One for every layer, in forward order."""
    counts, perturbed = history.active.sum(axis=0), history.perturbed_layers.sum(axis=0)
    return [
        LayerFacts(
            name=name,
            numel=int(history.numels[index]),
            num_active=int(counts[index]),
            share_active=float(counts[index] / len(history)),
            num_perturbed=int(perturbed[index]),
            share_perturbed=float(perturbed[index] / len(history)),
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


def facts_as_text(history: RunHistory) -> list[str]:
    """The facts line by line, and below them what the price rests on."""
    has_price = not np.isnan(history.price).all()
    return [*map(str, run_facts(history)), *([f"  (Price: {PRICE_BASIS})"] if has_price else [])]


def run_facts(history: RunHistory) -> list[Fact]:
    """The run in a few lines; what the records say nothing about is left out."""
    num_skipped = int(history.skipped.sum())
    facts = [
        *_loss_facts(history),
        *_held_out_facts(history),
        Fact(
            "Active parameters",
            f"{100 * active_shares(history).mean():.1f}%",
            f"of {history.numels.sum():,} per step; "
            f"{history.active.sum(axis=1).mean():.3g} of {len(history.names)} layers",
        ),
        *_perturbed_facts(history),
        *_price_facts(history),
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


def _held_out_facts(history: RunHistory) -> list[Fact]:
    if not history.held_out:
        return []
    (first_step, first), (step, last) = history.held_out[0], history.held_out[-1]
    lowest, lowest_step = min((loss, step) for step, loss in history.held_out)
    others = [f"{first:.4g} after step {first_step:,}"] if first_step < step else []
    others += [f"lowest {lowest:.4g} after step {lowest_step:,}"] if first_step < lowest_step < step else []
    return [Fact("Held-out loss", f"{last:.4g}", "; ".join([f"after step {step:,}", *others]))]


def _perturbed_facts(history: RunHistory) -> list[Fact]:
    """Only where these are others than the active ones."""
    if not history.perturbs_others:
        return []
    layers = history.perturbed_layers[history.rho > 0]
    share = (layers @ history.numels / history.numels.sum()).mean()
    note = f"per step that perturbs; {layers.sum(axis=1).mean():.3g} of {len(history.names)} layers"
    return [Fact("Perturbed parameters", f"{100 * share:.1f}%", note)]


def _price_facts(history: RunHistory) -> list[Fact]:
    price = mean(history.price)
    if np.isnan(price):
        return []
    return [Fact("Price", f"{price:.2f}", f"of AdamW's FLOPs, {price / DENSE_SAM_PRICE:.2f} of dense SAM's")]


def _perturbation_facts(history: RunHistory) -> list[Fact]:
    facts = []
    projection, rise = mean(history.perturbation_projection), median(loss_rises(history))
    if not np.isnan(projection):
        asked_for = history.rho[history.rho > 0]
        radius = f" = {asked_for[-1]:g}" if asked_for.size else ""
        note = f"of rho{radius} reached the weights (1: all of it)"
        num_perturbed = int(history.perturbed.sum())
        if num_perturbed < len(history) - history.skipped.sum():
            note += f", in the {num_perturbed:,} of {len(history):,} steps that perturbed them"
        facts.append(Fact("Perturbation", f"{projection:.3f}", note))
    density = mean(history.mask_density)
    if not np.isnan(density):
        facts.append(Fact("Mask", f"{100 * density:.1f}%", "of the perturbed layers' weights moved"))
    if not np.isnan(rise):
        facts.append(
            Fact(
                "Rise of the loss",
                f"{100 * rise:+.2g}%",
                "at the perturbed weights, in the median step; not comparable where ascent_fraction is below 1",
            )
        )
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
