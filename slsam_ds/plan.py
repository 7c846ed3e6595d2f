"""What a step is told beforehand, and what it tells afterwards."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slsam_ds.config import AscentScope, Rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who takes part in a step. SL-SAM perturbs and updates the same arms; nothing relies on that.

    Attributes:
        sampled: Arms drawn, ascending; the updated ones where the choice was forced.
        perturbed: Arms moved to x + ε for the descent pass, ascending.
        updated: Arms that the optimizer steps, ascending.
        probability: Of each updated arm: how likely it was to be updated; 1 where it was forced.
        probabilities: Inclusion probability of every arm when the sample was drawn; they sum to the expected number.
        forced: The caller's own choice.
    """

    sampled: tuple[int, ...]
    perturbed: tuple[int, ...]
    updated: tuple[int, ...]
    probability: Mapping[int, float]
    probabilities: tuple[float, ...]
    forced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a step needs to know beforehand; the same on every rank but for `stop`.

    Attributes:
        step: Number of the step, from 1.
        choice: Who takes part, of the arms that are chosen at all.
        perturbed: Those and, with `other_parameters="always"`, what is trained in every step. Empty where rho is 0.
        updated: Likewise.
        ascended: Arms whose gradient the ascent pass finds; empty where there is no ascent pass.
        learning_rate_scale: Factor on this step's learning rate, by arm; 1 where absent.
        rho: Perturbation radius; 0 = the step is not perturbed.
        scope: What the ascent gradient is averaged over.
        ascent_fraction: Share of the window's samples that it is averaged over, in (0, 1].
        descends_on_part: The other way round: the ascent is on the whole window, and the descent on that share of it.
        rounding: How ε reaches low-precision weights.
        seed: Seed of the rounding noise.
        claims: What the ranks must agree on before anything travels.
        max_grad_norm: Largest norm of the gradient that the update sees; None: any, or the engine clips by itself.
        price: FLOPs of the step, AdamW's being 1; None where it is not known. Only recorded.
        stop: This rank asks to stop after the step, which all ranks then hear.
    """

    step: int
    choice: Choice
    perturbed: tuple[int, ...]
    updated: tuple[int, ...]
    ascended: tuple[int, ...]
    learning_rate_scale: Mapping[int, float]
    rho: float
    scope: AscentScope
    ascent_fraction: float
    descends_on_part: bool = False
    rounding: Rounding
    seed: int
    claims: Mapping[str, Any]
    max_grad_norm: float | None = None
    price: float | None = None
    stop: bool = False

    @property
    def touched(self) -> Collection[int]:
        """Every arm that is perturbed or updated: nothing below the lowest of them changes in the step."""
        return {*self.perturbed, *self.updated}


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNumbers:
    """Where numbers that are not finite occurred in a step.

    Attributes:
        during: The pass in which they occurred.
        ranks: Ranks whose loss was not finite; empty if only the gradient was not.
        arms: Layers whose gradient, averaged over ranks, was not finite.
    """

    during: Literal["ascent", "descent"]
    ranks: tuple[int, ...]
    arms: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did. Numbers are global: over the whole window and all ranks.

    Attributes:
        step: Number of the step, from 1; skipped steps count.
        loss: Mean loss of the window at the perturbed point (at the weights where the step was not perturbed).
        ascent_loss: Mean loss of the window at the weights themselves; None where there was no ascent pass, or only
            one over a part of the window whose loss is no number.
        active: Arms updated, ascending.
        perturbed: Arms perturbed, ascending; those of `active` unless they were chosen apart.
        probabilities: Inclusion probability of every arm when the sample was drawn; they sum to k.
        grad_norms: Descent-gradient norm by updated arm, before clipping.
        grad_norm: That of all that is updated, which with `other_parameters="always"` is more than the arms.
        ascent_norms: Norm of the gradient at the weights, over all ranks and what the ascent took of the window, by arm
            of the ascent pass; empty where there was none, or one of each rank's own.
        rho: Radius asked for; 0 where the step was not to be perturbed.
        perturbation_norm: Norm of the change really made to the weights, rounding noise included.
        perturbation_projection: ⟨applied, ε⟩ / ‖ε‖²: 1 where the perturbation arrived whole; None without one. ‖ε‖ is
            rho in the Euclidean metric.
        mask_density: Share of the elements of the perturbed arms that the mask let move; None without a mask, or where
            nothing was perturbed.
        skipped: A non-finite loss or gradient stopped the step; weights and optimizer are as before.
        bad_numbers: Where the non-finite numbers were; None if there were none, or if only DeepSpeed found an overflow.
        price: FLOPs of the step, a step of AdamW on the same parameters being 1; None where it is not known.
        stop_requested: Some rank called `request_stop` before this step; the same on all ranks.
        seconds: Wall-clock time of the step on this rank.
        ascent_seconds: The part of `seconds` that the ascent pass and its reduction took.
        descent_seconds: The part that the descent pass and its reduction took.
    """

    step: int
    loss: float
    ascent_loss: float | None
    active: tuple[int, ...]
    perturbed: tuple[int, ...]
    probabilities: tuple[float, ...]
    grad_norms: Mapping[int, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    ascent_norms: Mapping[int, float] = field(default_factory=dict)
    rho: float
    perturbation_norm: float = 0.0
    perturbation_projection: float | None = None
    mask_density: float | None = None
    skipped: bool = False
    bad_numbers: BadNumbers | None = None
    price: float | None = None
    stop_requested: bool = False
    seconds: float = 0.0
    ascent_seconds: float = 0.0
    descent_seconds: float = 0.0

    @property
    def sq_norm(self) -> float:
        """Squared gradient norm over the updated arms: at the weights where that was found, else at x + ε."""
        at_weights = self.ascent_norms if self.ascent_norms.keys() >= set(self.active) else self.grad_norms
        return sum(at_weights.get(arm, 0.0) ** 2 for arm in self.active)

    def to_record(self) -> dict[str, Any]:
        """The line of `slsam_steps.jsonl`: JSON-serialisable values by name. `mask_density` only with a mask."""
        names = _RECORDED if self.mask_density is None else (*_RECORDED, "mask_density")
        return {name: _plain(getattr(self, name)) for name in names}


_RECORDED = (
    "step", "active", "perturbed", "probabilities", "grad_norms", "ascent_loss", "loss", "rho", "perturbation_norm",
    "perturbation_projection", "skipped", "price", "seconds", "ascent_seconds", "descent_seconds",
)  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
