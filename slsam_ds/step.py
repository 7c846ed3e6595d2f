"""The two-pass step of SL-SAM, written once for every engine.

A step perturbs some arms (P) and updates some (U). SL-SAM perturbs and updates the same sample; dense SAM perturbs and
updates all arms; rho = 0 leaves the ascent out (AdamW with all arms, LISA with a uniform sample).

On one device, for two weights that are both perturbed and updated by plain gradient descent, a step is this:

```python
x = torch.tensor([3.0, 4.0], requires_grad=True)
loss = lambda x: (x * x).sum() / 2
(g,) = torch.autograd.grad(loss(x), x)                      # 3 ascend: the gradient at x, [3, 4]
epsilon = 0.5 * g / g.norm()                                # rho is 0.5: [0.3, 0.4]
(h,) = torch.autograd.grad(loss(x + epsilon), x)            # 4 descend: the gradient at x + ε, [3.3, 4.4]
x = x - 0.1 * h                                             # 5 restore and update, from x: [2.67, 3.56]
```

`SLSAM.step_with` does the rest: 1 select, 2 freeze (by the plan) and 6 reward. What `take_step` adds is what sharding,
accumulation and bad numbers ask for: gradients are reduced once per pass, the norm is taken over all shards and ranks,
weights come back bit for bit, and nothing is updated where a number is not finite.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from slsam_ds.combinations import Combination
from slsam_ds.directions import Direction
from slsam_ds.gradient import Gradient
from slsam_ds.masks import Mask
from slsam_ds.metrics import Metric
from slsam_ds.model.forward_state import ForwardState
from slsam_ds.model.prefix import Prefix
from slsam_ds.passes import BeginPass, Part, Passes
from slsam_ds.perturbation import perturb_, preserved, rounding_generator
from slsam_ds.plan import BadNumbers, Plan, StepResult
from slsam_ds.protocol import ALWAYS, Engine, Piece, Shard
from slsam_ds.records.stopwatch import Stopwatch
from slsam_ds.rng import seed_of
from slsam_ds.tally import Numbers, Tally, local_sq_norms
from slsam_ds.trial import try_prefix


def take_step(
    engine: Engine,
    plan: Plan,
    window: Sequence[Any],
    begin_pass: BeginPass,
    *,
    state: ForwardState,
    direction: Direction,
    metric: Metric,
    combination: Combination,
    mask: Mask | None = None,
    prefix: Prefix | None = None,
    sizes: Sequence[int] | None = None,
) -> StepResult:
    """One optimizer step over a window of micro-batches.

    The host runs ahead of the device: it reads the step's numbers once, after the descent's reduction. If a pass
    raises, the weights are restored, the gathered gradients dropped, and the engine can be used again.

    Args:
        engine: Where shards live and what must travel.
        plan: What to do.
        window: Micro-batches of this rank.
        begin_pass: Runs them.
        state: What their forwards find besides the weights: both passes the same, and they leave that of one behind.
        direction: Where to climb.
        metric: How far.
        combination: What the update descends along.
        mask: Which elements of the perturbed arms move; None: all.
        prefix: The blocks that the descent need not run again.
        sizes: See `SLSAM.step_with`.

    Raises:
        RanksDisagreeError: Before any gradient travels.
    """
    passes = Passes(engine, plan, window, begin_pass, prefix, sizes)
    step = _Step(engine, plan, passes, direction, metric, mask, combination)
    direction.start()
    with _left_clean(engine):
        engine.begin_step(plan.ascended, plan.updated)  # 2 freeze: each pass finds gradients of its own arms only
        for part in step.passes.parts():
            before = state.capture() if plan.ascended else None
            ascent = step.ascend(part)  # 3 ascend: g at x, of the perturbed arms
            with (
                # The same masks; every sample counts once: in the pass that takes the whole window.
                state.second_pass(before, counts=plan.ascent_fraction < 1 and not plan.descends_on_part),
                step.perturbed(ascent, part),  # x + ε; on the way out x again, bit for bit: 5 restore
            ):
                if prefix is not None and prefix.trial is None and part.start == 0:
                    try_prefix(engine, plan, step.passes, part, prefix, state)
                step.descend(part)  # 4 descend: h at x + ε, of the updated arms
            step.rest(part)
        descent = step.reduce(plan.updated, during="descent")
        numbers = step.read()  # the host waits for the device: once in a step
        bad, grad_norm = _bad_numbers(plan, numbers), math.nan
        if bad is None:
            direction.observe(descent, numbers.by_arm("descent_sq_norms", plan.updated))
            factor = _descent_factor(plan, combination, numbers)
            engine.scale_gradients(factor)
            grad_norm = factor * _norm(numbers.by_arm("descent_sq_norms", plan.updated))
        else:  # every rank read the same numbers, so all come here
            engine.discard()
        updated = engine.update(  # 5 update
            plan.updated,
            num_micro_batches=len(window),
            learning_rate_scale=plan.learning_rate_scale,
            grad_norm=grad_norm,
            skip=bad is not None,
        )
        if updated:
            ascent_is_finite = numbers.all_finite("ascent_loss", "ascent_sq_norms")
            direction.keep(ascent_is_finite=ascent_is_finite)
            if mask is not None and ascent_is_finite:
                mask.keep(plan.step)
    return step.result(numbers, bad, updated=updated)


@contextlib.contextmanager
def _left_clean(engine: Engine) -> Iterator[None]:
    """Within is a step. Whatever happens in it, everything is trainable afterwards and no gradient is left behind."""
    try:
        yield
    except BaseException:
        engine.discard()
        raise
    finally:
        engine.end_step()


class _Step:
    """One step under way, and the numbers that it adds up until the one all-reduce of the descent.

    Args:
        engine: As for `take_step`.
        plan: Likewise.
        passes: Runs the micro-batches.
        direction: As for `take_step`.
        metric: Likewise.
        mask: Likewise.
        combination: Likewise.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        passes: Passes,
        direction: Direction,
        metric: Metric,
        mask: Mask | None,
        combination: Combination,
    ) -> None:
        self.passes = passes
        self._mask = mask
        self._engine, self._plan, self._direction, self._metric = engine, plan, direction, metric
        self._seed = seed_of(plan.seed, plan.step)
        self._corrects_locally = plan.descends_on_part and plan.scope == "rank"
        self._ascent_loss: Tensor | None = None  # of the part, while that of the rest is not known
        self._mixture = _Mixture(plan, passes, combination)
        self._tally, self._clock = Tally(engine.ranks, engine.device), Stopwatch(engine.device)

    def ascend(self, part: Part) -> Gradient | None:
        """What the perturbed arms climb along; None where there is nothing to climb."""
        plan, direction = self._plan, self._direction
        if plan.rho == 0:
            return None
        if not direction.needs_pass:
            self.passes.await_agreement()  # the next to travel are perturbed weights
            return direction.climb(plan.perturbed, None, seed=self._seed)
        with self._clock.inside():
            self._engine.begin_ascent()
            gradient = self._global_ascent(part) if plan.scope == "global" else self._local_ascent(part)
            return direction.climb(plan.perturbed, gradient.restricted(plan.perturbed), seed=self._seed)

    def descend(self, part: Part) -> None:
        """Add the gradient at the weights as they are now to the window's."""
        self._engine.begin_descent()
        if self._corrects_locally:
            with self._engine.local_gradients() as shards:
                loss = self.passes.descend(part)
            self._mixture.correct(shards)
        else:
            loss = self.passes.descend(part)
        self._tally.add("loss", loss / self.passes.weight_of_part / self._engine.ranks.world_size)

    def rest(self, part: Part) -> None:
        """Where this rank corrects by itself: the window's gradient at x, beside the correction."""
        if self._ascent_loss is None:
            return
        self._mixture.hand_over()
        loss = self.passes.ascend_rest(part)
        # A loss that is none says that this rank was not perturbed.
        loss = loss + (0.0 * self._ascent_loss if self.passes.part_is_apart else self._ascent_loss)
        self._tally.add("ascent_loss", loss / self._engine.ranks.world_size)

    @contextlib.contextmanager
    def perturbed(self, ascent: Gradient | None, part: Part) -> Iterator[None]:
        """Hold the perturbed arms at x + ε, or at x where there is no way up; restore x exactly on the way out."""
        if ascent is None:
            yield
            return
        engine, plan = self._engine, self._plan
        is_global = plan.scope == "global"
        with preserved(engine.live_weights(plan.perturbed)):
            self._climb(ascent, part)
            ascent.shards.clear()  # the descent pass has no need of the ascent gradient's memory
            if is_global:  # a local ascent leaves the window's gradients alone, and perturbs whole weights in place
                engine.discard()
                engine.publish(plan.perturbed)
            yield

    def reduce(
        self, arms: tuple[int, ...], *, during: Literal["ascent", "descent"], of_part: list[Shard] | None = None
    ) -> Gradient:
        """Average the gradients of a pass over ranks, and sum up their norms with all else that was tallied.

        Args:
            arms: Of the pass.
            during: Which it is.
            of_part: Reduced before, of the part of the window that is descended on: the norms are theirs, and they are
                what is returned.
        """
        engine, tally = self._engine, self._tally
        self.passes.await_agreement()
        shards = engine.reduce()
        self._mixture.mix(shards, during)
        bad = torch.zeros(engine.ranks.world_size, dtype=torch.float64, device=engine.device)
        bad[engine.ranks.rank] = tally.local_sum("ascent_loss", "loss").isfinite().logical_not()
        tally.add(f"{during}_bad", bad)
        scale = engine.loss_scale
        if of_part is not None:
            shards, scale = of_part, scale * self.passes.weight_of_part
        tally.add(f"{during}_sq_norms", self._local_sq_norms(shards, arms, scale))
        tally.reduce()
        return Gradient(arms, shards, tally[f"{during}_sq_norms"], scale)

    def read(self) -> Numbers:
        """All numbers of the step; waits for the device."""
        self._clock.stop()
        return self._tally.read()

    def result(self, numbers: Numbers, bad: BadNumbers | None, *, updated: bool) -> StepResult:
        """What to tell about the step. Of one that met a bad number, what it measured means nothing."""
        plan, told = self._plan, {} if bad is not None else _measured(self._plan, numbers)
        ascent_seconds, descent_seconds = self._clock.seconds()
        climbed = bad is not None or numbers.all_finite("ascent_loss")
        return StepResult(
            step=plan.step,
            loss=math.nan if bad is not None and bad.during == "ascent" else numbers["loss"],
            ascent_loss=numbers.get("ascent_loss") if climbed else None,
            active=plan.choice.updated,
            perturbed=plan.choice.perturbed if plan.rho > 0 else (),
            probabilities=plan.choice.probabilities,
            rho=plan.rho,
            skipped=not updated,
            bad_numbers=bad,
            price=plan.price,
            stop_requested=self.passes.stop_requested,
            ascent_seconds=ascent_seconds,
            descent_seconds=descent_seconds,
            **told,
        )

    def _global_ascent(self, part: Part) -> Gradient:
        """The gradient over the window and all ranks; or over the part of it that the descent takes."""
        of_part: list[Shard] | None = None
        if self._plan.descends_on_part:
            loss = self.passes.ascend_first(part)
            self.passes.await_agreement()
            of_part = self._mixture.keep_part(self._engine.reduce())
            self._engine.discard()
            rest = self.passes.ascend_rest(part)
            loss = rest if self.passes.part_is_apart else loss + rest
        else:
            loss = self.passes.ascend(part)
        self._tally.add("ascent_loss", loss / self._engine.ranks.world_size)
        self.passes.share_reusable()
        return self.reduce(self._plan.ascended, during="ascent", of_part=of_part)

    def _local_ascent(self, part: Part) -> Gradient:
        """This rank's own gradient: nothing travels."""
        on_part, scale = self._corrects_locally, self._engine.loss_scale
        with self._engine.local_gradients() as shards:
            loss = self.passes.ascend_first(part) if on_part else self.passes.ascend(part)
        scale *= self.passes.weight_of_part
        sq_norms = self._local_sq_norms(shards, self._plan.ascended, scale)
        # Where a number is not finite, this rank is not perturbed; the descent's all-reduce tells the others.
        finite = (loss + sq_norms.sum()).isfinite()
        loss = torch.where(finite, loss, math.nan)
        if on_part:
            self._ascent_loss = loss
            self._mixture.keep_local(shards)
        else:
            self._tally.add("ascent_loss", loss / self._engine.ranks.world_size)
        return Gradient(self._plan.ascended, list(shards), sq_norms, scale)

    @torch.no_grad()
    def _climb(self, ascent: Gradient, part: Part) -> None:
        """Add ε to the weights, and count what arrived."""
        engine, plan, tally = self._engine, self._plan, self._tally
        scales = self._metric.scales(ascent, rho=plan.rho, over_ranks=plan.scope == "global")
        scale_of = dict(zip(ascent.arms, scales / ascent.loss_scale, strict=True))
        tally.add("applied", torch.zeros(3, device=engine.device))  # also by a rank that holds nothing of these arms
        if self._mask is not None:
            numel = self._mask.numel(ascent.arms) / engine.ranks.world_size
            tally.add("maskable", torch.full((), numel, device=engine.device))
            tally.add("moving", torch.zeros((), device=engine.device))
        for number, shard in enumerate(ascent.shards):
            piece, along = shard.piece, self._metric.stretched(shard)
            if self._mask is not None:
                along = self._masked(piece, along)
            key = (plan.seed, plan.step, piece.owner, part.num_left, number)
            measured = perturb_(
                piece.weight,
                piece.master,
                along,
                scale=scale_of[piece.arm],
                rounding=plan.rounding,
                generator=rounding_generator(piece.weight.device, *key),
                read_dtype=piece.read_dtype,
            )
            if piece.owner == engine.ranks.rank:  # replicas hold the same elements: one speaks for all
                tally.add("applied", measured)
        if self._mask is not None:
            self._mask.refresh(plan.step, ascent)  # while there is a gradient; for the steps to come
        # Every rank counts its share of the one perturbation of a global ascent, and its own of a local one.
        count = (scales > 0).any().double()
        tally.add("num_perturbations", count / engine.ranks.world_size if plan.scope == "global" else count)

    def _masked(self, piece: Piece, along: Tensor) -> Tensor:
        """0 where the mask lets nothing move; ε keeps the scale of the whole."""
        assert self._mask is not None
        moves = self._mask.moves(piece, along.device)
        if piece.owner == self._engine.ranks.rank:
            self._tally.add("moving", moves.sum())
        return along.masked_fill(~moves, 0.0)

    def _local_sq_norms(self, shards: Sequence[Shard], arms: tuple[int, ...], scale: float) -> Tensor:
        engine = self._engine
        return local_sq_norms(shards, arms, rank=engine.ranks.rank, device=engine.device) / scale**2


class _Mixture:
    """What the descent's gradient is mixed with, until it is there.

    Args:
        plan: Of the step.
        passes: Says how gradients of a part are weighted.
        combination: Says how much of what.
    """

    def __init__(self, plan: Plan, passes: Passes, combination: Combination) -> None:
        self._updated, self._is_apart = plan.updated, passes.part_is_apart
        self._share_of_g, self._factor_of_h = combination.share_of_ascent, 1 - combination.share_of_ascent
        if plan.descends_on_part:
            self._share_of_g, self._factor_of_h = 1.0, combination.correction / passes.weight_of_part
        self._of_part: dict[Any, Tensor] = {}  # by the shard's place
        self._local: list[Shard] = []
        self._kept: dict[Any, Tensor] = {}

    def keep_part(self, shards: Sequence[Shard]) -> list[Shard]:
        """The gradient at x over the part of the window that the descent takes, too. Returns a copy."""
        kept = [Shard(shard.piece, shard.gradient.clone()) for shard in shards]
        self._of_part = {_place(shard): shard.gradient for shard in kept}
        return kept

    def keep_local(self, shards: Sequence[Shard]) -> None:
        """Likewise, of this rank alone."""
        self._of_part = {shard.piece.stepped: shard.gradient for shard in shards}

    def correct(self, shards: Sequence[Shard]) -> None:
        """At x + ε, that of this rank: it becomes the correction, with what the window's own lacks."""
        for shard in shards:
            of_part = self._of_part.pop(shard.piece.stepped)
            shard.gradient.sub_(of_part).mul_(self._factor_of_h)
            if not self._is_apart:
                shard.gradient.add_(of_part)
        self._local = list(shards)
        self._of_part.clear()

    def hand_over(self) -> None:
        """To the parameters, where the backwards of the window add to it."""
        for shard in self._local:
            shard.piece.stepped.grad = shard.gradient.view_as(shard.piece.stepped)
        self._local = []

    def mix(self, shards: Sequence[Shard], during: Literal["ascent", "descent"]) -> None:
        """Of the ascent: keep what the descent is to be mixed with. Of the descent: mix."""
        for shard in shards if self._share_of_g else ():
            place, gradient = _place(shard), shard.gradient
            if during == "ascent":
                of_part = self._of_part.pop(place, None)
                if of_part is not None and not self._is_apart:
                    gradient.add_(of_part)  # the whole window's
                if shard.piece.arm in self._updated:
                    self._kept[place] = gradient * self._share_of_g
                    if of_part is not None:
                        # Not by `alpha`, which the CPU rounds to 16 bits: what h cancels would not be what h is.
                        self._kept[place].sub_(of_part * self._factor_of_h)
            elif place in self._kept:  # not where a rank corrects by itself, nor where the step does not ascend
                gradient.mul_(self._factor_of_h).add_(self._kept.pop(place))


def _place(shard: Shard) -> tuple[Tensor, int]:
    return shard.piece.stepped, shard.piece.offset


def _measured(plan: Plan, numbers: Numbers) -> dict[str, Any]:
    """Norms and the perturbation, of a step whose numbers are all finite."""
    sq_norms = numbers.by_arm("descent_sq_norms", plan.updated)
    told: dict[str, Any] = {"grad_norms": {arm: math.sqrt(sq_norms[arm]) for arm in plan.choice.updated}}
    told["grad_norm"] = _norm(sq_norms)
    if numbers.all_finite("ascent_sq_norms") and "ascent_sq_norms" in numbers:
        of_ascended = numbers.by_arm("ascent_sq_norms", plan.ascended)
        told["ascent_norms"] = {arm: math.sqrt(of_ascended[arm]) for arm in plan.ascended if arm != ALWAYS}
    count = numbers.get("num_perturbations")
    if count:
        projection, sq_norm, asked_for = (each / count for each in numbers.vector("applied"))
        told["perturbation_norm"] = math.sqrt(sq_norm)
        told["perturbation_projection"] = projection / asked_for if asked_for > 0 else None
        if "maskable" in numbers:
            told["mask_density"] = numbers["moving"] / numbers["maskable"]
    return told


def _bad_numbers(plan: Plan, numbers: Numbers) -> BadNumbers | None:
    """Where the step met a number that is not finite; None: nowhere that matters.

    Of a part of the window, samples without a label may be all there is: their mean loss is no number, nothing was
    perturbed, and the descent is on all samples, at x.
    """
    descent_is_finite = numbers.all_finite("loss", "descent_sq_norms")
    if plan.ascent_fraction < 1 and descent_is_finite:
        return None
    if "ascent_sq_norms" in numbers and not numbers.all_finite("ascent_loss", "ascent_sq_norms"):
        return _bad_during("ascent", plan.ascended, numbers)
    if not (descent_is_finite and numbers.all_finite("ascent_loss")):  # a local ascent's loss travels with these
        return _bad_during("descent", plan.updated, numbers)
    return None


def _bad_during(during: Literal["ascent", "descent"], arms: tuple[int, ...], numbers: Numbers) -> BadNumbers:
    sq_norms = numbers.by_arm(f"{during}_sq_norms", arms)
    bad_arms = tuple(arm for arm, sq_norm in sq_norms.items() if not math.isfinite(sq_norm))
    return BadNumbers(during=during, ranks=numbers.raised(f"{during}_bad"), arms=bad_arms)


def _descent_factor(plan: Plan, combination: Combination, numbers: Numbers) -> float:
    """What the optimizer's gradient is, as a multiple of the descent gradient: combined, then clipped.

    Clipping is that of `torch.nn.utils.clip_grad_norm_`, over the updated arms.
    """
    norm = _norm(numbers.by_arm("descent_sq_norms", plan.updated))
    ascent_norm = None
    reads_ascent = combination.reads_ascent and "ascent_sq_norms" in numbers
    if reads_ascent and numbers.all_finite("ascent_loss", "ascent_sq_norms"):
        of_ascended = numbers.by_arm("ascent_sq_norms", plan.ascended)
        ascent_norm = _norm({arm: of_ascended[arm] for arm in plan.updated})
    factor = combination.factor(ascent_norm, norm)
    if plan.max_grad_norm is not None:
        factor *= min(1.0, plan.max_grad_norm / (norm * factor + 1e-6))
    return factor


def _norm(sq_norms: Mapping[int, float]) -> float:
    return math.sqrt(math.fsum(sq_norms.values()))
