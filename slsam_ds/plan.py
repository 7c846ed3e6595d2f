"""What a step is told beforehand, and what it tells afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slsam_ds.config import AscentScope, Rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a step needs to know beforehand; the same on every rank.

    Attributes:
        step: Number of the step, from 1.
        perturbed: Arms moved to x + ε for the descent pass.
        updated: Arms the optimizer steps.
        learning_rate_scale: Factor on this step's learning rate, by arm; 1 where absent.
        rho: Perturbation radius; 0 = no ascent pass.
        scope: What the ascent gradient is averaged over.
        ascent_fraction: Share of the window's samples that it is averaged over, in (0, 1].
        rounding: How ε reaches low-precision weights.
        seed: Seed of the rounding noise.
        claims: What the ranks must agree on before anything travels.
        max_grad_norm: Largest norm of the gradient that the update sees; None: any, or the engine clips by itself.
        flag: Whether this rank raises its flag, of which all ranks hear; the one thing that may differ between them.
    """

    step: int
    perturbed: tuple[int, ...]
    updated: tuple[int, ...]
    learning_rate_scale: Mapping[int, float]
    rho: float
    scope: AscentScope
    ascent_fraction: float
    rounding: Rounding
    seed: int
    claims: Mapping[str, Any]
    max_grad_norm: float | None = None
    flag: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNumbers:
    """Where a step met numbers that are not finite.

    Attributes:
        during: The pass.
        ranks: Those whose loss was not finite; none, where it is the gradient alone.
        arms: Those whose gradient, averaged over ranks, was not finite.
    """

    during: Literal["ascent", "descent"]
    ranks: tuple[int, ...]
    arms: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step measured. Numbers are global: over the whole window and all ranks.

    Attributes:
        loss: Window loss at the perturbed point (at x itself if there was no ascent pass).
        ascent_loss: Window loss at x; None without an ascent pass.
        grad_norms: Descent-gradient norm of each updated arm.
        perturbation_norm: Norm of the change really made to the weights; includes rounding noise.
        perturbation_projection: ⟨applied, ε⟩ / rho², 1 where the perturbation arrived whole; None without one.
        skipped: A non-finite loss or gradient stopped the step; weights and optimizer are as before.
        bad_numbers: Where it was; None also where DeepSpeed alone found an overflow.
        flagged: Any rank raised its flag.
        ascent_seconds: Wall-clock time of the ascent on this rank, its reduction included.
        descent_seconds: Likewise of the descent.
    """

    loss: float
    ascent_loss: float | None = None
    grad_norms: Mapping[int, float]
    perturbation_norm: float = 0.0
    perturbation_projection: float | None = None
    skipped: bool = False
    bad_numbers: BadNumbers | None = None
    flagged: bool = False
    ascent_seconds: float = 0.0
    descent_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did. Numbers are global: over the whole window and all ranks.

    Attributes:
        step: Number of the step, from 1; skipped steps count.
        loss: Mean loss of the window at the perturbed point.
        ascent_loss: Mean loss of the window at the weights themselves; None where there was no ascent pass.
        active: Arms perturbed and updated, ascending.
        probabilities: Inclusion probability of every arm when the sample was drawn; they sum to k.
        grad_norms: Descent-gradient norm by active arm.
        rho: Radius asked for.
        perturbation_norm: Norm of the change really made to the weights.
        perturbation_projection: That change along the one asked for: 1 where all of it arrived; None without one.
        skipped: A non-finite loss or gradient stopped the step; nothing changed.
        stop_requested: Some rank called `request_stop` before this step; the same on all ranks.
        seconds: Wall-clock time of the step on this rank.
        ascent_seconds: Of that, the ascent with its reduction.
        descent_seconds: And the descent.
    """

    step: int
    loss: float
    ascent_loss: float | None
    active: tuple[int, ...]
    probabilities: tuple[float, ...]
    grad_norms: Mapping[int, float]
    rho: float
    perturbation_norm: float
    perturbation_projection: float | None
    skipped: bool
    stop_requested: bool
    seconds: float
    ascent_seconds: float
    descent_seconds: float

    def to_record(self) -> dict[str, Any]:
        """The line of `slsam_steps.jsonl`."""
        return {
            "step": self.step,
            "active": list(self.active),
            "probabilities": list(self.probabilities),
            "grad_norms": {str(arm): norm for arm, norm in self.grad_norms.items()},
            "ascent_loss": self.ascent_loss,
            "loss": self.loss,
            "rho": self.rho,
            "perturbation_norm": self.perturbation_norm,
            "perturbation_projection": self.perturbation_projection,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "ascent_seconds": self.ascent_seconds,
            "descent_seconds": self.descent_seconds,
        }
