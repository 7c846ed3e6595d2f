"""The two-pass step of SL-SAM, written once for every engine.

A step has two selections: the arms it perturbs and the arms it updates. SL-SAM perturbs and updates the same sample;
rho = 0 skips the ascent pass (AdamW with all arms, LISA with a uniform sample); all arms is dense SAM.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slsam_ds.micro_batches import ascent_part, first_samples
from slsam_ds.perturbation import perturb_, perturbation_scale, preserved, rounding_generator
from slsam_ds.plan import BadNumbers, Outcome, Plan
from slsam_ds.prefix import Prefix
from slsam_ds.previous import PreviousGradients
from slsam_ds.protocol import Engine, Shard
from slsam_ds.rng import RandomState
from slsam_ds.statistics import local_sq_norms

ForwardBackward = Callable[[Any], Tensor]
"""Runs one micro-batch and calls `engine.backward` on its weighted loss; returns that loss, detached, shape ()."""

BeginPass = Callable[[Sequence[Any]], ForwardBackward]
"""Given all micro-batches of a pass, what runs one of them, weighted so that the losses add up to that of the pass."""


def take_step(
    engine: Engine,
    plan: Plan,
    window: Sequence[Any],
    begin_pass: BeginPass,
    prefix: Prefix | None = None,
    previous: PreviousGradients | None = None,
) -> Outcome:
    """Ascend, descend, restore, update: one optimizer step over a window of micro-batches.

    If a pass raises, the weights are restored, the gathered gradients dropped, and the engine can be used again.

    Args:
        engine: Where shards live and what must travel.
        plan: What to do; the same on every rank.
        window: Micro-batches of this rank.
        begin_pass: Runs them.
        prefix: The blocks that the descent need not run again.
        previous: Climb along these instead of along the gradient of an ascent pass, and keep this step's there.

    Raises:
        RanksDisagreeError: Before any gradient travels.
    """
    run = _Run(engine, plan, window, begin_pass, prefix, previous)
    try:
        engine.discard()  # what a backward outside of SL-SAM may have left
        for part, climbed in run.parts():
            random_state = RandomState.capture(engine.device)
            ascent = run.ascend(climbed)
            if ascent is not None and not ascent.finite:
                return run.skip(ascent, during="ascent")
            random_state.replay()
            with run.perturbed(ascent):
                run.descend(part)
        descent = run.reduce()
        if not descent.finite:
            return run.skip(descent, during="descent")
        if previous is not None:
            previous.remember(descent.shards, descent.sq_norms, loss_scale=descent.loss_scale)
        if plan.max_grad_norm is not None:
            _clip(descent, plan.max_grad_norm)
        updated = engine.update(
            plan.updated,
            num_micro_batches=len(window),
            learning_rate_scale=plan.learning_rate_scale,
            skip=False,
        )
        if previous is not None and updated:
            previous.keep()
    except BaseException:
        engine.discard()
        raise
    finally:
        engine.activate(None)
    return run.outcome(descent, skipped=not updated)


@dataclass(frozen=True, slots=True)
class _Gradient:
    """The gradient of a pass, its loss, and its norm by arm: global, or this rank's own where the ascent is local.

    Only what the shards hold is `loss_scale` times too large. `bad_ranks` are those whose own loss is not finite.
    """

    shards: list[Shard]
    loss_scale: float
    loss: float
    sq_norms: dict[int, float]
    bad_ranks: tuple[int, ...] = ()
    extra: tuple[float, ...] = ()

    @property
    def sq_norm(self) -> float:
        return math.fsum(self.sq_norms.values())

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, *self.sq_norms.values(), *self.extra)))


_Around = Callable[[int], contextlib.AbstractContextManager[None]]
"""What surrounds the forward and backward of a micro-batch, which has the same number in both passes."""


class _Run:
    """One step under way: its passes, and what they add up on this rank until the one all-reduce of the descent."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        window: Sequence[Any],
        begin_pass: BeginPass,
        prefix: Prefix | None,
        previous: PreviousGradients | None,
    ) -> None:
        self._engine, self._plan = engine, plan
        self._prefix, self._previous = prefix, previous
        self._window, self._climbed = window, _ascent_window(window, plan)
        self._forward_backward = begin_pass(window)
        self._climb = begin_pass(self._climbed) if plan.ascent_fraction < 1 else self._forward_backward
        self._keep, self._reuse = (prefix.kept, prefix.reused) if prefix is not None else (_as_it_is, _as_it_is)
        self._check_agreement = engine.ranks.agree(plan.claims, flag=plan.flag)
        self._num_left = len(window)  # of the descent
        self._flagged = False
        self._started = time.perf_counter()
        self._ascent_seconds = self._descent_seconds = 0.0
        self._ascent_loss, self._descent_loss = torch.zeros(2, dtype=torch.float64, device=engine.device)
        # ⟨applied, ε⟩, ‖applied‖² and the number of perturbations, each counted by the ranks it belongs to.
        self._applied = torch.zeros(3, dtype=torch.float64, device=engine.device)

    def parts(self) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """What climbs by itself: micro-batches to descend on, and what of them to climb on."""
        if self._plan.scope != "micro_batch":
            return [(self._window, self._climbed)]
        return [([whole], [climbed]) for whole, climbed in zip(self._window, self._climbed, strict=True)]

    def ascend(self, part: Sequence[Any]) -> _Gradient | None:
        """The gradient at x to climb along; None where rho is 0."""
        if self._plan.rho == 0:
            return None
        if self._previous is not None:
            shards, sq_norms = self._previous.recall(self._engine.pieces(self._plan.perturbed))
            return _Gradient(shards, 1.0, 0.0, sq_norms)
        started = time.perf_counter()
        self._engine.activate(self._plan.perturbed, before=self._plan.updated)
        ascent = self._global_ascent(part) if self._plan.scope == "global" else self._local_ascent(part)
        self._ascent_seconds += time.perf_counter() - started  # numbers were read back: a GPU is done by now, too
        return ascent

    def _global_ascent(self, part: Sequence[Any]) -> _Gradient:
        loss = self._climb_all(part)
        self._ascent_loss += loss
        ascent = self._reduce(self._plan.perturbed, loss, self._reusable())
        self._agree_on_prefix(ascent.extra)
        return ascent

    def _local_ascent(self, part: Sequence[Any]) -> _Gradient:
        perturbed = self._plan.perturbed
        with self._engine.local_gradients() as shards:
            loss = self._climb_all(part)
        sq_norms = self._local_sq_norms(shards, perturbed)
        if not (loss + sq_norms.sum()).isfinite():  # go nowhere, and let the descent's all-reduce tell the others
            loss, sq_norms = loss * math.nan, torch.zeros_like(sq_norms)
        self._ascent_loss += loss
        return _Gradient(shards, self._engine.loss_scale, 0.0, dict(zip(perturbed, sq_norms.tolist(), strict=True)))

    @contextlib.contextmanager
    def perturbed(self, ascent: _Gradient | None) -> Iterator[None]:
        """Hold the perturbed arms at x + ε; restore x exactly on the way out."""
        engine, plan = self._engine, self._plan
        scale = perturbation_scale(ascent.sq_norm, rho=plan.rho) / ascent.loss_scale if ascent is not None else 0.0
        if ascent is None or scale == 0.0:  # no direction to climb: stay at x, without rounding noise
            if plan.scope == "global":
                engine.discard()
            yield
            return
        with preserved(engine.live_weights(plan.perturbed)):
            with torch.no_grad():
                for number, shard in enumerate(ascent.shards):
                    self._perturb(shard, scale, number)
            ascent.shards.clear()  # the ascent gradient is not needed during the descent pass
            self._applied[2] += 1.0 if plan.scope != "global" else 1.0 / engine.ranks.world_size
            if plan.scope == "global":
                engine.discard()
                engine.publish(plan.perturbed)
            yield

    def descend(self, part: Sequence[Any]) -> None:
        """Add the gradient at the weights as they are now to the window's."""
        self._engine.activate(self._plan.updated)
        self._descent_loss += self._run_all(part, self._forward_backward, self._reuse, num_left=self._num_left)
        self._num_left -= len(part)

    def reduce(self) -> _Gradient:
        """The window's descent gradient, and every statistic of the step, over all ranks."""
        local = torch.cat([self._applied, self._ascent_loss[None] / self._engine.ranks.world_size])
        descent = self._reduce(self._plan.updated, self._descent_loss, local)
        self._descent_seconds = time.perf_counter() - self._started - self._ascent_seconds
        return descent

    def ascent_loss(self, descent: _Gradient) -> float | None:
        """Over all ranks, as the descent's all-reduce has it; None where there was no ascent pass."""
        return descent.extra[-1] if self._plan.rho > 0 and self._previous is None else None

    def outcome(self, descent: _Gradient, *, skipped: bool) -> Outcome:
        """What to tell about a step whose numbers were all finite."""
        projection, applied_sq_norm, num_perturbations, _ = descent.extra
        moved = num_perturbations > 0
        return Outcome(
            loss=descent.loss,
            ascent_loss=self.ascent_loss(descent),
            grad_norms={arm: math.sqrt(sq_norm) for arm, sq_norm in descent.sq_norms.items()},
            perturbation_norm=math.sqrt(applied_sq_norm / num_perturbations) if moved else 0.0,
            perturbation_projection=projection / num_perturbations / self._plan.rho**2 if moved else None,
            skipped=skipped,
            flagged=self._flagged,
            ascent_seconds=self._ascent_seconds,
            descent_seconds=self._descent_seconds,
        )

    def skip(self, gradient: _Gradient, *, during: Literal["ascent", "descent"]) -> Outcome:
        """Leave all as it is. Every rank saw the same bad number in the all-reduced statistics, so all come here."""
        engine, plan = self._engine, self._plan
        engine.discard()
        engine.update(plan.updated, num_micro_batches=len(self._window), learning_rate_scale={}, skip=True)
        bad_arms = tuple(arm for arm, sq_norm in gradient.sq_norms.items() if not math.isfinite(sq_norm))
        return Outcome(
            loss=gradient.loss if during == "descent" else math.nan,
            ascent_loss=self.ascent_loss(gradient) if during == "descent" else gradient.loss,
            grad_norms={},
            skipped=True,
            bad_numbers=BadNumbers(during=during, ranks=gradient.bad_ranks, arms=bad_arms),
            flagged=self._flagged,
        )

    def _climb_all(self, part: Sequence[Any]) -> Tensor:
        whole = all(climbed is micro_batch for climbed, micro_batch in zip(self._climbed, self._window, strict=False))
        return self._run_all(part, self._climb, self._keep if whole else _as_it_is, num_left=len(part))

    def _run_all(
        self, part: Sequence[Any], forward_backward: ForwardBackward, around: _Around, *, num_left: int
    ) -> Tensor:
        """Sum of the weighted losses. Shape (), float64, local."""
        if self._engine.sends_during_backward:
            self._flagged = self._check_agreement()
        local_loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for number, micro_batch in enumerate(part, start=1):
            self._engine.begin_micro_batch(last=number == num_left)
            with around(self._num_left - number):
                local_loss += forward_backward(micro_batch)
        return local_loss

    def _reusable(self) -> Tensor:
        """1 for each of the window's micro-batches whose prefix this rank could reuse, else 0. float64."""
        prefix, numbers = self._prefix, range(len(self._window))
        flags = [prefix is not None and prefix.reusable(number) for number in numbers]
        return torch.tensor(flags, dtype=torch.float64, device=self._engine.device)

    def _agree_on_prefix(self, num_ranks_able: Sequence[float]) -> None:
        """Reuse what every rank kept: where weights are sharded, all must gather for the blocks, or none."""
        for number, num_ranks in enumerate(num_ranks_able):
            if self._prefix is not None and num_ranks < self._engine.ranks.world_size:
                self._prefix.forget(number)

    def _reduce(self, arms: tuple[int, ...], local_loss: Tensor, extra: Tensor | None = None) -> _Gradient:
        """One reduction of the gradients, one all-reduce of their statistics and whatever else there is to add up."""
        engine = self._engine
        self._flagged = self._check_agreement()
        shards = engine.reduce()
        sq_norms = self._local_sq_norms(shards, arms)
        num_ranks, num_arms = engine.ranks.world_size, len(arms)
        bad = torch.zeros(num_ranks, dtype=torch.float64, device=engine.device)
        bad[engine.ranks.rank] = (local_loss + self._ascent_loss).isfinite().logical_not()
        local = [local_loss[None] / num_ranks, sq_norms, bad, *([extra] if extra is not None else [])]
        loss, *rest = engine.ranks.all_reduce(torch.cat(local)).tolist()
        bad_ranks = tuple(rank for rank, is_bad in enumerate(rest[num_arms : num_arms + num_ranks]) if is_bad)
        by_arm = dict(zip(arms, rest, strict=False))
        return _Gradient(shards, engine.loss_scale, loss, by_arm, bad_ranks, tuple(rest[num_arms + num_ranks :]))

    def _local_sq_norms(self, shards: list[Shard], arms: tuple[int, ...]) -> Tensor:
        engine = self._engine
        scaled = local_sq_norms(shards, arms, rank=engine.ranks.rank, device=engine.device)
        return scaled / engine.loss_scale**2

    def _perturb(self, shard: Shard, scale: float, number: int) -> None:
        engine, plan = self._engine, self._plan
        owner, device = shard.piece.owner, shard.piece.weight.device
        generator = rounding_generator(device, plan.seed, plan.step, owner, self._num_left, number)
        measured = perturb_(
            shard.piece.weight,
            shard.piece.master,
            shard.gradient,
            scale=scale,
            rounding=plan.rounding,
            generator=generator,
            read_dtype=shard.piece.read_dtype,
        )
        if owner == engine.ranks.rank:
            self._applied[:2] += measured.to(self._applied.device)


def _ascent_window(window: Sequence[Any], plan: Plan) -> Sequence[Any]:
    """What of the window to climb on."""
    if plan.ascent_fraction == 1:
        return window
    num, share = ascent_part(plan.ascent_fraction, len(window), of_each=plan.scope == "micro_batch")
    return [first_samples(micro_batch, share) for micro_batch in window[:num]]


@contextlib.contextmanager
def _as_it_is(micro_batch: int) -> Iterator[None]:
    yield


def _clip(descent: _Gradient, max_norm: float) -> None:
    """Shrink the gradient in place to a norm of at most `max_norm`; its statistics stay those from before.

    As `torch.nn.utils.clip_grad_norm_`, but over the updated arms only, and the norm is known already.
    """
    factor = max_norm / (math.sqrt(descent.sq_norm) + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_([shard.gradient for shard in descent.shards], factor)
