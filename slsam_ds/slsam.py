"""SL-SAM around a model and its optimizer: composes bandit, step and engine, and owns the state."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.config import SLSAMConfig
from slsam_ds.directions.previous import PreviousGradients
from slsam_ds.engines import select_engine, settle
from slsam_ds.engines.agreement import checksum
from slsam_ds.engines.torch_optimizer import TorchOptimizerEngine
from slsam_ds.model.layers import LayerMap, map_layers
from slsam_ds.model.micro_batches import LossFunction, check_loss, model_loss, num_samples, to_device
from slsam_ds.model.prefix import Prefix
from slsam_ds.plan import BadNumbers, Outcome, Plan, StepResult
from slsam_ds.pricing.budget import BudgetedExp3
from slsam_ds.pricing.calibration import calibrate
from slsam_ds.pricing.cost import CostModel, Passes
from slsam_ds.protocol import ALWAYS, Engine
from slsam_ds.rewards import RewardScale
from slsam_ds.selectors import make_selector
from slsam_ds.state.checkpoint import Resumable
from slsam_ds.step import BeginPass, ForwardBackward, take_step

logger = logging.getLogger(__name__)


class BadNumbersError(RuntimeError):
    """Too many steps in a row were skipped; the weights are those of the last step before them."""


_MAX_UPDATE_SCALE = 10.0


class SLSAM(Resumable):
    """Sparse-Layer SAM around a model and its optimizer.

    Args:
        model: A plain module (one device, or replicated over the ranks of a process group), one that went through
            `fully_shard`, or a DeepSpeedEngine that `slsam_ds.initialize` or the Trainer integration built.
        optimizer: The module's torch optimizer; its groups are split by layer. None with a DeepSpeedEngine.
        config: The knobs; None: the defaults.
        layer_map: The arms, where they were found before the model was wrapped.
        total_steps: Length of the run; `gamma="auto"` needs it.
        max_grad_norm: Clip the gradient of the active layers to this global norm before the update; None: do not.
            DeepSpeed has `gradient_clipping` in its configuration instead.

    Raises:
        ValueError: A model, wrapper or combination that is not supported, in one sentence.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        config: SLSAMConfig | None = None,
        *,
        layer_map: LayerMap | None = None,
        total_steps: int | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.config = config or SLSAMConfig()
        self.model = model
        settle(model)
        if layer_map is None:
            layer_map = map_layers(model, self.config, optimizer)
        if optimizer is not None:
            from slsam_ds.model.param_groups import regroup

            regroup(optimizer, layer_map)
        self._optimizer = optimizer
        self.layers = layer_map
        self._fingerprint = layer_map.fingerprint()
        self.selector = make_selector(self.config, len(layer_map), total_steps=total_steps)
        self.engine = select_engine(model, optimizer, layer_map)
        if self.config.ascent_scope != "global" and not self.engine.replicated:
            raise ValueError(
                f'slsam.ascent_scope="{self.config.ascent_scope}": needs whole weights on every rank; where they are '
                'sharded (ZeRO-3, FSDP), use "global"'
            )
        self.engine.activate(None)
        home = torch.device("cpu") if self.config.offload_state else None
        self.engine.optimizer_state_home = home
        self._previous = None
        if self.config.ascent_source == "previous":
            self._previous = PreviousGradients(self.engine, home)
        self._max_grad_norm = _checked_max_grad_norm(max_grad_norm, self.engine)
        self._reuses_prefix = self._can_reuse_prefix()
        self.num_steps = 0
        self._num_skipped = 0  # in a row, up to now
        self._stop_requested = False
        self._num_updates = [0] * len(layer_map)
        self._optimizer_is_checked = True
        self._costs: CostModel | None = None
        self._passes: Passes | None = None
        self._chooses_by_cost = self.config.budget is not None or self.config.reward == "grad_norm_per_cost"
        self._rewards = RewardScale(self.config.reward, layer_map.numels)

    def step(
        self,
        window: Sequence[Any],
        loss_fn: LossFunction | None = None,
        active: Iterable[int] | None = None,
    ) -> StepResult:
        """One optimizer step over a window of micro-batches (its length is the gradient accumulation).

        Args:
            window: Micro-batches of this rank: dicts of tensors, or whatever `loss_fn` takes.
            loss_fn: Mean loss of one micro-batch; None: `model(**micro_batch).loss`.
            active: Forces the sample; the same on every rank.

        Raises:
            ValueError: An empty window, or arms that do not exist.
            RanksDisagreeError: Ranks were about to take different steps; nothing was sent or changed.
            BadNumbersError: As many steps in a row as `max_skipped_steps` allows had no finite loss and gradient.
        """
        compute_loss = loss_fn or model_loss

        def begin_pass(micro_batches: Sequence[Any]) -> ForwardBackward:
            def forward_backward(micro_batch: Any) -> Tensor:
                loss = compute_loss(self.model, to_device(micro_batch, self.engine.device)) / len(micro_batches)
                check_loss(loss)
                self.engine.backward(loss)
                return loss.detach()

            return forward_backward

        return self.step_with(window, begin_pass, active)

    def step_with(
        self, window: Sequence[Any], begin_pass: BeginPass, active: Iterable[int] | None = None
    ) -> StepResult:
        """As `step`, for trainers with a forward and backward of their own.

        Args:
            window: Micro-batches of this rank.
            begin_pass: Called with the micro-batches of a pass, or with those parts of them that the ascent takes;
                returns what is then called for each of them: it calls `engine.backward` itself, on a loss weighted so
                that their sum is the loss to minimise, and returns that loss, detached.
            active: Forces the sample.
        """
        started = time.perf_counter()
        if len(window) == 0:
            raise ValueError("an empty window: a step needs at least one micro-batch")
        if self._costs is None and self._chooses_by_cost:
            one = [window[0]]
            costs = calibrate(self.engine, self.model, self.layers, lambda: begin_pass(one)(window[0]))
            self._use_costs(costs, self.passes(window))
        if not self._optimizer_is_checked:
            self._check_optimizer()
        step = self.num_steps + 1
        forced = active is not None
        sample = _checked_sample(active, len(self.layers)) if active is not None else self.selector.sample(step)
        probabilities = tuple(self.selector.probabilities().tolist())
        plan = self._plan(
            step, sample, dict.fromkeys(sample, 1.0) if forced else {a: probabilities[a] for a in sample}, len(window)
        )
        climbs = plan.rho > 0 and self._previous is None
        prefix = Prefix.below(self.layers, plan.perturbed) if self._reuses_prefix and climbs else None
        outcome = take_step(self.engine, plan, window, begin_pass, prefix, self._previous)
        if prefix is not None and (prefix.watched or (prefix.handed_on and _lost_in_descent(outcome))):
            self._give_up_prefix_reuse(prefix)
        self.num_steps = step
        self._num_skipped = self._num_skipped + 1 if outcome.skipped else 0
        if outcome.skipped:
            self._report_skipped(step, outcome.bad_numbers)
        else:
            for arm in sample:
                self._num_updates[arm] += 1
            self._learn(sample, outcome, forced)
        return StepResult(
            step=step,
            loss=outcome.loss,
            ascent_loss=outcome.ascent_loss,
            active=sample,
            probabilities=probabilities,
            grad_norms={arm: norm for arm, norm in outcome.grad_norms.items() if arm != ALWAYS},
            rho=self.config.rho,
            perturbation_norm=outcome.perturbation_norm,
            perturbation_projection=outcome.perturbation_projection,
            skipped=outcome.skipped,
            stop_requested=outcome.flagged,
            seconds=time.perf_counter() - started,
            ascent_seconds=outcome.ascent_seconds,
            descent_seconds=outcome.descent_seconds,
        )

    def passes(self, window: Sequence[Any]) -> Passes:
        """What a step over such a window runs, and so pays for."""
        return Passes.of(self.config, len(window), num_samples(window[0]), reuses_prefix=self._reuses_prefix)

    def request_stop(self) -> None:
        """Let the next step say `stop_requested` on every rank: a signal may reach one of them alone."""
        self._stop_requested = True

    def _plan(self, step: int, sample: tuple[int, ...], inclusion: Mapping[int, float], window_length: int) -> Plan:
        arms = (ALWAYS, *sample) if self.layers.always else sample
        scale = {}
        if self.config.update_scale == "inverse_probability":
            scale = {arm: min(1 / probability, _MAX_UPDATE_SCALE) for arm, probability in inclusion.items()}
        return Plan(
            step=step,
            perturbed=arms,
            updated=arms,
            learning_rate_scale=scale,
            rho=self.config.rho,
            scope=self.config.ascent_scope,
            ascent_fraction=self.config.ascent_fraction,
            rounding=self.config.rounding,
            seed=self.config.seed,
            max_grad_norm=self._max_grad_norm,
            flag=self._stop_requested,
            claims={
                "the step": step,
                f"the active layers of step {step}": sample,
                "the bandit's state": self.selector.state_dict(),
                "the slsam settings": self.config.to_dict(),
                "max_grad_norm": self._max_grad_norm,
                "the model's layers": self._fingerprint,
                "the micro-batches per step": window_length,
                "the layers with a previous gradient": self._previous.arms if self._previous is not None else (),
                **self._checksums(step),
            },
        )

    def _checksums(self, step: int) -> dict[str, int]:
        """Of what every rank holds alike, by what it is, in the steps that compare them."""
        every = self.config.check_weights_every
        if not self.engine.replicated or every == 0 or step % every != 0 or self.engine.ranks.world_size == 1:
            return {}
        return {f"the weights of {arm.name}": checksum(self.engine.live_weights([arm.index])) for arm in self.layers}

    def _use_costs(self, costs: CostModel, passes: Passes) -> None:
        """Let the choice of layers, and the rewards, go by what samples cost."""
        self._costs, self._passes = costs, passes
        prices = costs.prices(passes)
        self._rewards.costs = [base + share for base, share in zip(prices.base, prices.share, strict=True)]
        if isinstance(self.selector, BudgetedExp3):
            self.selector.use_prices(prices)

    def _can_reuse_prefix(self) -> bool:
        """Whether the descent may start above the blocks that both passes have in common."""
        obstacles = {
            "the layers were named by patterns": self.layers.stack is None,
            "this engine runs all of the model every time": not self.engine.may_skip_modules,
        }
        found = [obstacle for obstacle, present in obstacles.items() if present]
        if found and self.config.prefix_reuse is True:
            raise ValueError(f'slsam.prefix_reuse=true: {found[0]}; use "auto" or false')
        return self.config.prefix_reuse is not False and not found

    def _give_up_prefix_reuse(self, prefix: Prefix) -> None:
        """What the blocks compute that were not to run again is used elsewhere; NaN stood in for it."""
        reason = "something keeps what lower layers compute" if prefix.watched else "the perturbed loss is NaN"
        logger.warning(
            "step %d: %s: from here on both passes run every layer (prefix_reuse)", self.num_steps + 1, reason
        )
        self._reuses_prefix = False

    def _report_skipped(self, step: int, bad: BadNumbers | None) -> None:
        what = f"step {step} was skipped: {self._describe(bad)}"
        limit = self.config.max_skipped_steps
        if limit is not None and self._num_skipped >= limit:
            raise BadNumbersError(
                f"{what}; so were the {limit - 1} before it (slsam.max_skipped_steps={limit}), and the weights are "
                f"those of step {step - limit}: look at the data, or lower the learning rate or slsam.rho"
            )
        logger.warning("%s", what)

    def _describe(self, bad: BadNumbers | None) -> str:
        if bad is None:
            return "a gradient overflowed"
        if bad.ranks:
            ranks = f"rank {bad.ranks[0]}" if len(bad.ranks) == 1 else f"ranks {', '.join(map(str, bad.ranks))}"
            return f"in the {bad.during} pass, the loss of {ranks} is not finite"
        names = ["what is always trained" if arm == ALWAYS else self.layers[arm].name for arm in bad.arms]
        return f"in the {bad.during} pass, the gradient of {', '.join(names)} is not finite, though every loss is"

    def _learn(self, sample: tuple[int, ...], outcome: Outcome, forced: bool) -> None:
        norms = {arm: outcome.grad_norms[arm] for arm in sample}
        rewards = self._rewards.rewards(norms)
        self.selector.observe(norms)
        self.selector.update(
            sample,
            [rewards[arm] for arm in sample],
            probabilities=[1.0] * len(sample) if forced else None,
        )


def _lost_in_descent(outcome: Outcome) -> bool:
    """Whether the loss was a number at x and is none at x + ε."""
    ascended = outcome.ascent_loss is not None and math.isfinite(outcome.ascent_loss)
    bad = outcome.bad_numbers
    return ascended and bad is not None and bad.during == "descent" and math.isnan(outcome.loss)


def _checked_max_grad_norm(max_grad_norm: float | None, engine: Engine) -> float | None:
    if max_grad_norm is None:
        return None
    if not isinstance(engine, TorchOptimizerEngine):
        raise ValueError(
            f"max_grad_norm={max_grad_norm}: DeepSpeed clips by itself; set gradient_clipping in its configuration"
        )
    if not 0 < max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm={max_grad_norm}: choose a number above 0, or None for no clipping")
    return float(max_grad_norm)


def _checked_sample(active: Iterable[int], num_arms: int) -> tuple[int, ...]:
    sample = tuple(sorted({int(arm) for arm in active}))
    if not sample or sample[0] < 0 or sample[-1] >= num_arms:
        raise ValueError(f"active={list(sample)}: choose arms from 0 to {num_arms - 1}")
    return sample
