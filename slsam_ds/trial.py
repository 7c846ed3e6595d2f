"""Whether a descent may start above the prefix: tried, before the first one that would start above so many blocks."""

import math
from collections.abc import Sequence

from torch import Tensor

from slsam_ds.model.forward_state import ForwardState
from slsam_ds.model.prefix import Prefix
from slsam_ds.passes import Part, Passes
from slsam_ds.plan import Plan
from slsam_ds.protocol import Engine
from slsam_ds.tally import Tally, local_sq_norms

# Kernels that add up in no fixed order give other numbers each time: what differs by less than a few times as much is
# not told apart. Where runs repeat to the bit, numbers must be equal.
_NOISE_FACTOR = 10.0


def try_prefix(engine: Engine, plan: Plan, passes: Passes, part: Part, prefix: Prefix, state: ForwardState) -> None:
    """Descend on the part's first micro-batch above the prefix and over all blocks; compare loss and gradient norms.

    The answer is `prefix.trial`, the same on every rank: None where nothing was kept, or a number is not finite. Unless
    it is yes, the step runs all blocks. Gradients are dropped, random numbers and buffers put back. Called by every
    rank.

    Args:
        engine: Has gathered no gradients of the descent yet.
        plan: Of the step.
        passes: Likewise; the ascent on the part is done.
        part: Of the window.
        prefix: Not tried yet.
        state: What all runs find.
    """
    passes.await_agreement()
    begin = state.capture()
    trial = _Trial(engine, plan, passes, part)
    if all(engine.ranks.all_of([prefix.reusable(part.start)])()):
        # First above the prefix: what a run over all blocks leaves behind in the model would help this one.
        above = trial.above()
        begin.replay()
        whole = trial.over_all_blocks()
        if above == whole or not all(map(math.isfinite, whole)):
            prefix.trial = True if above == whole else None
        else:
            begin.replay()
            prefix.trial = above is not None and _within_noise(above, whole, trial.over_all_blocks())
    if not prefix.trial:
        prefix.forget_all()
    begin.replay()


class _Trial:
    """Runs the part's first micro-batch. Each gives its loss and squared gradient norms, over all ranks."""

    def __init__(self, engine: Engine, plan: Plan, passes: Passes, part: Part) -> None:
        self._engine, self._plan, self._passes, self._part = engine, plan, passes, part

    def above(self) -> list[float] | None:
        """Above the prefix; None where that raised on any rank."""
        try:
            local_loss = self._run(reuse=True)
        except Exception:  # whatever a stranger's model raises that misses what a block has not left there
            local_loss = None
        if all(self._engine.ranks.all_of([local_loss is not None])()):
            assert local_loss is not None
            return self._reduced(local_loss)
        self._engine.end_step()  # as after any pass that raised
        self._engine.begin_step(self._plan.ascended, self._plan.updated)
        return None

    def over_all_blocks(self) -> list[float]:
        """As any descent."""
        return self._reduced(self._run(reuse=False))

    def _run(self, *, reuse: bool) -> Tensor:
        self._engine.begin_descent()
        return self._passes.try_first(self._part, reuse=reuse)

    def _reduced(self, local_loss: Tensor) -> list[float]:
        engine, arms = self._engine, self._plan.updated
        tally = Tally(engine.ranks, engine.device)
        tally.add("numbers", local_loss)
        tally.add("sq_norms", local_sq_norms(engine.reduce(), arms, rank=engine.ranks.rank, device=engine.device))
        tally.reduce()
        engine.discard()
        numbers = tally.read()
        return [*numbers.vector("numbers"), *numbers.vector("sq_norms")]


def _within_noise(above: Sequence[float], whole: Sequence[float], again: Sequence[float]) -> bool:
    """Whether the first differ from the second by no more than a few times what two runs over all blocks do."""
    pairs = zip(_differences(above, whole), _differences(whole, again), strict=True)
    return all(found <= _NOISE_FACTOR * noise for found, noise in pairs)


def _differences(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Relative: of the loss, and the largest of the norms."""
    loss, *norms = (0.0 if a == b else abs(a - b) / max(abs(a), abs(b)) for a, b in zip(one, other, strict=True))
    return loss, max(norms, default=0.0)
