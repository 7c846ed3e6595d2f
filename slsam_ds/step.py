"""The two-pass step of SL-SAM, written once for every engine.

A step has two selections: the arms it perturbs and the arms it updates. SL-SAM perturbs and updates the same sample;
rho = 0 skips the ascent pass (AdamW with all arms, LISA with a uniform sample); all arms is dense SAM.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slsam_ds.directions.previous import PreviousGradients
from slsam_ds.model.micro_batches import ascent_part, first_samples
from slsam_ds.model.prefix import Prefix
from slsam_ds.perturbation import perturb_, perturbation_scale, preserved, rounding_generator
from slsam_ds.plan import BadNumbers, Outcome, Plan
from slsam_ds.protocol import Engine, Shard
from slsam_ds.records.stopwatch import Stopwatch
from slsam_ds.rng import RandomState
from slsam_ds.tally import local_sq_norms, upload

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
            random_state.replay()
            with run.perturbed(ascent):
                run.descend(part)
        descent = run.reduce()
        measured = run.read()
        if not measured.finite:
            return run.skip(measured)
        if previous is not None:
            previous.remember(descent.shards, measured.descent.sq_norms, loss_scale=descent.loss_scale)
        if plan.max_grad_norm is not None:
            _clip(descent.shards, measured.descent.norm, plan.max_grad_norm)
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
    return run.outcome(measured, skipped=not updated)


@dataclass(frozen=True, slots=True)
class _Gradient:
    """The gradient of a pass, not yet read by the host.

    Attributes:
        shards: `loss_scale` times too large.
        sq_norms: By arm, over all ranks, or over this one where the ascent is local. float64, on the engine's device.
    """

    shards: list[Shard]
    loss_scale: float
    sq_norms: Tensor


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What the host read of a pass. `bad_ranks` are those whose own loss is not finite."""

    loss: float
    sq_norms: dict[int, float]
    bad_ranks: tuple[int, ...]

    @classmethod
    def of(cls, statistics: Sequence[float], arms: Sequence[int]) -> "_Numbers":
        loss, *rest = statistics
        bad_ranks = tuple(rank for rank, is_bad in enumerate(rest[len(arms) :]) if is_bad)
        return cls(loss, dict(zip(arms, rest, strict=False)), bad_ranks)

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(self.sq_norms.values()))

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, *self.sq_norms.values())))

    @property
    def bad_arms(self) -> tuple[int, ...]:
        return tuple(arm for arm, sq_norm in self.sq_norms.items() if not math.isfinite(sq_norm))


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the host read of a step, the same on every rank.

    Attributes:
        ascent: None where it was local, or there was none.
        ascent_loss: Also where it was local; None without an ascent pass.
        applied: ⟨applied, ε⟩, ‖applied‖² and the number of perturbations.
        seconds: Of ascent and descent.
    """

    ascent: _Numbers | None
    descent: _Numbers
    ascent_loss: float | None
    applied: tuple[float, float, float]
    seconds: tuple[float, float]

    @property
    def finite(self) -> bool:
        ascended = self.ascent is None or self.ascent.finite
        return ascended and self.descent.finite and (self.ascent_loss is None or math.isfinite(self.ascent_loss))


_Around = Callable[[int], contextlib.AbstractContextManager[None]]
"""What surrounds the forward and backward of a micro-batch, which has the same number in both passes."""


class _Run:
    """One step under way: its passes, and what they add up on this rank until the one all-reduce of the descent.

    The host runs ahead of the device: what it decides by, it reads once, after the descent's reduction.
    """

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
        self._statistics: list[Tensor] = []  # of the passes, over all ranks, for the host to read
        self._everywhere_reusable: Callable[[], Sequence[bool]] | None = None
        self._clock = Stopwatch(engine.device)
        self._ascent_loss, self._descent_loss = torch.zeros(2, dtype=torch.float64, device=engine.device)
        # ⟨applied, ε⟩, ‖applied‖² and the number of perturbations, each counted by the ranks it belongs to.
        self._applied = torch.zeros(3, dtype=torch.float64, device=engine.device)

    def parts(self) -> list[tuple[Sequence[Any], Sequence[Any]]]:
        """What climbs by itself: micro-batches to descend on, and what of them to climb on."""
        if self._plan.scope != "micro_batch":
            return [(self._window, self._climbed)]
        return [([whole], [climbed]) for whole, climbed in zip(self._window, self._climbed, strict=True)]

    def ascend(self, part: Sequence[Any]) -> _Gradient | None:
        """The gradient at x to climb along; None where there is none."""
        if self._plan.rho == 0:
            return None
        if self._previous is not None:
            return self._recalled(self._previous)
        self._engine.activate(self._plan.perturbed, before=self._plan.updated)
        with self._clock.inside():
            return self._global_ascent(part) if self._plan.scope == "global" else self._local_ascent(part)

    def _recalled(self, previous: PreviousGradients) -> _Gradient | None:
        self._flagged = self._check_agreement()  # the next to travel are perturbed weights
        known = [arm for arm in self._plan.perturbed if arm in previous.sq_norms]
        if not known:
            return None
        sq_norms = upload([previous.sq_norms[arm] for arm in known], self._engine.device)
        return _Gradient(previous.recall(self._engine.pieces(known)), 1.0, sq_norms)

    def _global_ascent(self, part: Sequence[Any]) -> _Gradient:
        loss = self._climb_all(part)
        self._ascent_loss += loss
        self._share_reusable()
        return self._reduce(self._plan.perturbed, loss)

    def _local_ascent(self, part: Sequence[Any]) -> _Gradient:
        with self._engine.local_gradients() as shards:
            loss = self._climb_all(part)
        sq_norms = self._local_sq_norms(shards, self._plan.perturbed)
        # Where one is not finite, `perturbed` goes nowhere; the descent's all-reduce tells the others.
        self._ascent_loss += torch.where((loss + sq_norms.sum()).isfinite(), loss, math.nan)
        return _Gradient(shards, self._engine.loss_scale, sq_norms)

    @contextlib.contextmanager
    def perturbed(self, ascent: _Gradient | None) -> Iterator[None]:
        """Hold the perturbed arms at x + ε, or at x where there is no way up; restore x exactly on the way out."""
        engine, plan = self._engine, self._plan
        if ascent is None:
            if plan.scope == "global":
                engine.discard()
            yield
            return
        scale = perturbation_scale(ascent.sq_norms.sum(), rho=plan.rho)
        with preserved(engine.live_weights(plan.perturbed)):
            with torch.no_grad():
                for number, shard in enumerate(ascent.shards):
                    self._perturb(shard, scale / ascent.loss_scale, number)
            ascent.shards.clear()  # the ascent gradient is not needed during the descent pass
            self._applied[2] += (scale > 0).double() / (1 if plan.scope != "global" else engine.ranks.world_size)
            if plan.scope == "global":
                engine.discard()
                engine.publish(plan.perturbed)
            yield

    def descend(self, part: Sequence[Any]) -> None:
        """Add the gradient at the weights as they are now to the window's."""
        self._engine.activate(self._plan.updated)
        self._forget_what_others_run()
        self._descent_loss += self._run_all(part, self._forward_backward, self._reuse, num_left=self._num_left)
        self._num_left -= len(part)

    def reduce(self) -> _Gradient:
        """The window's descent gradient, and every statistic of the step, over all ranks."""
        local = torch.cat([self._ascent_loss[None] / self._engine.ranks.world_size, self._applied])
        return self._reduce(self._plan.updated, self._descent_loss, local)

    def read(self) -> _Measured:
        """Wait for the device: the one time in a step."""
        self._clock.stop()
        numbers = iter(torch.cat(self._statistics).tolist())
        *of_ascent, of_descent = ([*itertools.islice(numbers, len(part))] for part in self._statistics)
        *of_descent, ascent_loss, projection, sq_norm, num_perturbations = of_descent
        return _Measured(
            ascent=_Numbers.of(of_ascent[0], self._plan.perturbed) if of_ascent else None,
            descent=_Numbers.of(of_descent, self._plan.updated),
            ascent_loss=ascent_loss if self._plan.rho > 0 and self._previous is None else None,
            applied=(projection, sq_norm, num_perturbations),
            seconds=self._clock.seconds(),
        )

    def outcome(self, measured: _Measured, *, skipped: bool) -> Outcome:
        """What to tell about a step whose numbers were all finite."""
        projection, applied_sq_norm, num_perturbations = measured.applied
        moved = num_perturbations > 0
        return Outcome(
            loss=measured.descent.loss,
            ascent_loss=measured.ascent_loss,
            grad_norms={arm: math.sqrt(sq_norm) for arm, sq_norm in measured.descent.sq_norms.items()},
            perturbation_norm=math.sqrt(applied_sq_norm / num_perturbations) if moved else 0.0,
            perturbation_projection=projection / num_perturbations / self._plan.rho**2 if moved else None,
            skipped=skipped,
            flagged=self._flagged,
            ascent_seconds=measured.seconds[0],
            descent_seconds=measured.seconds[1],
        )

    def skip(self, measured: _Measured) -> Outcome:
        """Leave all as it is. Every rank saw the same bad number in the all-reduced statistics, so all come here."""
        engine, plan = self._engine, self._plan
        engine.discard()
        engine.update(plan.updated, num_micro_batches=len(self._window), learning_rate_scale={}, skip=True)
        ascent, descent = measured.ascent, measured.descent
        bad = (
            BadNumbers(during="ascent", ranks=ascent.bad_ranks, arms=ascent.bad_arms)
            if ascent is not None and not ascent.finite
            else BadNumbers(during="descent", ranks=descent.bad_ranks, arms=descent.bad_arms)
        )
        return Outcome(
            loss=descent.loss if bad.during == "descent" else math.nan,
            ascent_loss=measured.ascent_loss,
            grad_norms={},
            skipped=True,
            bad_numbers=bad,
            flagged=self._flagged,
            ascent_seconds=measured.seconds[0],
            descent_seconds=measured.seconds[1],
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
        torch.clear_autocast_cache()  # one around the step would go on with the weights that it cast before they moved
        local_loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for number, micro_batch in enumerate(part, start=1):
            self._engine.begin_micro_batch(last=number == num_left)
            with around(self._num_left - number):
                local_loss += forward_backward(micro_batch)
        return local_loss

    def _share_reusable(self) -> None:
        """Where weights are sharded, all ranks must gather for the blocks of a prefix, or none."""
        if self._engine.may_skip_modules and not self._engine.replicated:
            prefix, numbers = self._prefix, range(len(self._window))
            flags = [prefix is not None and prefix.reusable(number) for number in numbers]
            self._everywhere_reusable = self._engine.ranks.every(flags)

    def _forget_what_others_run(self) -> None:
        if self._prefix is not None and self._everywhere_reusable is not None:
            for number, reusable in enumerate(self._everywhere_reusable()):
                if not reusable:
                    self._prefix.forget(number)

    def _reduce(self, arms: tuple[int, ...], local_loss: Tensor, extra: Tensor | None = None) -> _Gradient:
        """One reduction of the gradients, one all-reduce of their statistics and whatever else there is to add up."""
        engine = self._engine
        self._flagged = self._check_agreement()
        shards = engine.reduce()
        sq_norms = self._local_sq_norms(shards, arms)
        bad = torch.zeros(engine.ranks.world_size, dtype=torch.float64, device=engine.device)
        bad[engine.ranks.rank] = (local_loss + self._ascent_loss).isfinite().logical_not()
        local = [local_loss[None] / engine.ranks.world_size, sq_norms, bad, *([extra] if extra is not None else [])]
        self._statistics.append(engine.ranks.all_reduce(torch.cat(local)))
        return _Gradient(shards, engine.loss_scale, self._statistics[-1][1 : 1 + len(arms)])

    def _local_sq_norms(self, shards: list[Shard], arms: tuple[int, ...]) -> Tensor:
        engine = self._engine
        scaled = local_sq_norms(shards, arms, rank=engine.ranks.rank, device=engine.device)
        return scaled / engine.loss_scale**2

    def _perturb(self, shard: Shard, scale: Tensor, number: int) -> None:
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


def _clip(shards: Sequence[Shard], norm: float, max_norm: float) -> None:
    """Shrink the gradient in place to a norm of at most `max_norm`; its statistics stay those from before.

    As `torch.nn.utils.clip_grad_norm_`, but over the updated arms only, and the norm is known already.
    """
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_([shard.gradient for shard in shards], factor)
