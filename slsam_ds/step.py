"""The two-pass step of SL-SAM, written once for every engine.

A step has two selections: the arms it perturbs and the arms it updates. SL-SAM perturbs and updates the same sample;
rho = 0 skips the ascent pass (AdamW with all arms, LISA with a uniform sample); all arms is dense SAM.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slsam_ds.config import Rounding
from slsam_ds.perturbation import perturb_, perturbation_scale, preserved, rounding_generator
from slsam_ds.protocol import Engine, Shard
from slsam_ds.rng import RandomState
from slsam_ds.statistics import local_sq_norms

ForwardBackward = Callable[[Any], Tensor]
"""Runs one micro-batch and calls `engine.backward` on its weighted loss; returns that loss, detached, shape ()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a step needs to know beforehand; the same on every rank.

    Attributes:
        step: Number of the step, from 1.
        perturbed: Arms moved to x + ε for the descent pass.
        updated: Arms the optimizer steps.
        learning_rate_scale: Factor on this step's learning rate, by arm; 1 where absent.
        rho: Perturbation radius; 0 = no ascent pass.
        rounding: How ε reaches low-precision weights.
        seed: Seed of the rounding noise.
        claims: What the ranks must agree on before anything travels.
        max_grad_norm: Largest norm of the gradient that the update sees; None: any, or the engine clips by itself.
    """

    step: int
    perturbed: tuple[int, ...]
    updated: tuple[int, ...]
    learning_rate_scale: Mapping[int, float]
    rho: float
    rounding: Rounding
    seed: int
    claims: Mapping[str, Any]
    max_grad_norm: float | None = None


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
    """

    loss: float
    ascent_loss: float | None = None
    grad_norms: Mapping[int, float]
    perturbation_norm: float = 0.0
    perturbation_projection: float | None = None
    skipped: bool = False


def take_step(engine: Engine, plan: Plan, window: Sequence[Any], forward_backward: ForwardBackward) -> Outcome:
    """Ascend, descend, restore, update: one optimizer step over a window of micro-batches.

    If a pass raises, the weights are restored, the gathered gradients dropped, and the engine can be used again.

    Raises:
        RanksDisagreeError: Before any gradient travels.
    """
    check_agreement = engine.ranks.agree(plan.claims)
    random_state = RandomState.capture(engine.device)
    try:
        ascent = None
        if plan.rho > 0:
            engine.activate(plan.perturbed)
            ascent = _gradient_pass(engine, plan.perturbed, window, forward_backward, check_agreement)
            if not ascent.finite:
                return _skip(engine, plan, window, ascent_loss=ascent.loss)
            random_state.replay()
        with _perturbed(engine, plan, ascent) as applied:
            engine.activate(plan.updated)
            descent = _gradient_pass(engine, plan.updated, window, forward_backward, check_agreement, applied)
        if not descent.finite:
            return _skip(engine, plan, window, loss=descent.loss, ascent_loss=ascent.loss if ascent else None)
        if plan.max_grad_norm is not None:
            _clip(descent, plan.max_grad_norm)
        updated = engine.update(
            plan.updated,
            num_micro_batches=len(window),
            learning_rate_scale=plan.learning_rate_scale,
            skip=False,
        )
    except BaseException:
        engine.discard()
        raise
    finally:
        engine.activate(None)
    projection, applied_sq_norm = descent.extra
    return Outcome(
        loss=descent.loss,
        ascent_loss=ascent.loss if ascent else None,
        grad_norms={arm: math.sqrt(sq_norm) for arm, sq_norm in descent.sq_norms.items()},
        perturbation_norm=math.sqrt(applied_sq_norm),
        perturbation_projection=projection / plan.rho**2 if ascent and ascent.sq_norm > 0 else None,
        skipped=not updated,
    )


@dataclass(frozen=True, slots=True)
class _Pass:
    """Reduced gradients of one pass and its statistics, which are global."""

    shards: list[Shard]
    loss: float
    sq_norms: dict[int, float]
    extra: tuple[float, ...]

    @property
    def sq_norm(self) -> float:
        return math.fsum(self.sq_norms.values())

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, *self.sq_norms.values(), *self.extra)))


def _gradient_pass(
    engine: Engine,
    arms: tuple[int, ...],
    window: Sequence[Any],
    forward_backward: ForwardBackward,
    check_agreement: Callable[[], None],
    extra: Tensor | None = None,
) -> _Pass:
    """Forward and backward over the window, one reduction of the gradients, one all-reduce of every statistic."""
    local_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    if engine.sends_during_backward:
        check_agreement()
    for number, micro_batch in enumerate(window, start=1):
        engine.begin_micro_batch(last=number == len(window))
        local_loss += forward_backward(micro_batch)
    check_agreement()
    shards = engine.reduce()
    local = [
        local_loss[None] / engine.ranks.world_size,
        local_sq_norms(shards, arms, rank=engine.ranks.rank, device=engine.device),
    ]
    if extra is not None:
        local.append(extra)
    loss, *rest = engine.ranks.all_reduce(torch.cat(local)).tolist()
    sq_norms = dict(zip(arms, rest, strict=False))
    return _Pass(shards, loss, sq_norms, tuple(rest[len(arms) :]))


@contextlib.contextmanager
def _perturbed(engine: Engine, plan: Plan, ascent: _Pass | None) -> Iterator[Tensor]:
    """Hold the perturbed arms at x + ε; restore x exactly on the way out.

    Yields:
        This rank's ⟨applied, ε⟩ and ‖applied‖². Shape (2,), float64, local.
    """
    applied = torch.zeros(2, dtype=torch.float64, device=engine.device)
    if ascent is None:
        yield applied
        return
    scale = perturbation_scale(ascent.sq_norm, rho=plan.rho)
    if scale == 0.0:  # no direction to climb: stay at x, without rounding noise
        engine.discard()
        yield applied
        return
    with preserved(engine.live_weights(plan.perturbed)):
        with torch.no_grad():
            for piece, shard in enumerate(ascent.shards):
                generator = rounding_generator(engine.device, plan.seed, plan.step, shard.owner, piece)
                measured = perturb_(
                    shard.weight,
                    shard.master,
                    shard.gradient,
                    scale=scale,
                    rounding=plan.rounding,
                    generator=generator,
                    read_dtype=shard.read_dtype,
                )
                if shard.owner == engine.ranks.rank:
                    applied += measured
        ascent.shards.clear()  # the ascent gradient is not needed during the descent pass
        engine.discard()
        engine.publish(plan.perturbed)
        yield applied


def _clip(descent: _Pass, max_norm: float) -> None:
    """Shrink the gradient in place to a norm of at most `max_norm`; its statistics stay those from before.

    As `torch.nn.utils.clip_grad_norm_`, but over the updated arms only, and the norm is known already.
    """
    factor = max_norm / (math.sqrt(descent.sq_norm) + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_([shard.gradient for shard in descent.shards], factor)


def _skip(
    engine: Engine, plan: Plan, window: Sequence[Any], *, ascent_loss: float | None, loss: float = math.nan
) -> Outcome:
    """Every rank saw the same non-finite number in the all-reduced statistics, so every rank comes here."""
    engine.discard()
    engine.update(plan.updated, num_micro_batches=len(window), learning_rate_scale={}, skip=True)
    return Outcome(loss=loss, ascent_loss=ascent_loss, grad_norms={}, skipped=True)
