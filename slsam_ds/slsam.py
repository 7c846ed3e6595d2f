"""SL-SAM around a model and its optimizer: composes bandit, step and engine, and owns the state."""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.bandit import make_selector
from slsam_ds.budget import BudgetedExp3
from slsam_ds.calibration import calibrate
from slsam_ds.config import SLSAMConfig
from slsam_ds.cost import CostModel, Passes
from slsam_ds.engines import select_engine, settle
from slsam_ds.engines.torch_optimizer import TorchOptimizerEngine
from slsam_ds.layers import LayerMap, find_layers
from slsam_ds.micro_batches import LossFunction, check_loss, model_loss, to_device
from slsam_ds.prefix import Prefix
from slsam_ds.previous import PreviousGradients, kept_in_optimizer
from slsam_ds.protocol import ALWAYS, Engine
from slsam_ds.rng import RandomState, reseed
from slsam_ds.saved_state import STATE_VERSION, check_layers, check_state, read_state, write_state
from slsam_ds.statistics import RewardScale
from slsam_ds.step import BeginPass, ForwardBackward, Outcome, Plan, take_step

logger = logging.getLogger(__name__)

_MAX_UPDATE_SCALE = 10.0


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


class SLSAM:
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
            from slsam_ds.engines.param_groups import regroup

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
        self._num_updates = [0] * len(layer_map)
        self._optimizer_is_checked = True
        self._costs: CostModel | None = None
        self._priced_window = 0
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
            self._use_costs(costs, len(window))
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
        if prefix is not None and (prefix.watched or (prefix.handed_on and math.isnan(outcome.loss))):
            self._give_up_prefix_reuse(prefix)
        self.num_steps = step
        if not outcome.skipped:
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
            seconds=time.perf_counter() - started,
            ascent_seconds=outcome.ascent_seconds,
            descent_seconds=outcome.descent_seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """SL-SAM's own state as JSON-serialisable values; the same on every rank.

        Model, optimizer and scheduler are saved by whoever owns them. With `ascent_source="previous"` the optimizer's
        state holds the gradients to climb along.
        """
        return {
            "version": STATE_VERSION,
            "step": self.num_steps,
            "layers": self._fingerprint,
            "arms": self.layers.outline(),
            "updates": list(self._num_updates),
            "previous": None if self._previous is None else {str(a): n for a, n in self._previous.sq_norms.items()},
            "selector": self.selector.state_dict(),
            "reward_maximum": self._rewards.maximum,
            "costs": self._costs and {"counted": dataclasses.asdict(self._costs), "window": self._priced_window},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: the same samples follow as in the uninterrupted run.

        Raises:
            ValueError: The state belongs to other layers, another selector or another version.
        """
        check_layers(state, self.layers)
        if self._chooses_by_cost and state.get("costs"):
            self._use_costs(CostModel.from_dict(state["costs"]["counted"]), state["costs"]["window"])
        self.selector.load_state_dict(state["selector"])
        self._rewards.maximum = float(state["reward_maximum"])
        self.num_steps = int(state["step"])
        self._num_updates = list(state["updates"])
        if self._previous is not None:
            self._previous.sq_norms = {int(arm): norm for arm, norm in (state["previous"] or {}).items()}
        self._optimizer_is_checked = False

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Save weights, optimizer, SL-SAM's and each rank's random state: all but scheduler and place in the data.

        Called by every rank. What `slsam_ds.initialize` returns saves checkpoints of its own.

        Args:
            folder: Created where missing; on a disk that all ranks share.
        """
        from slsam_ds.engines.torch_checkpoint import save

        path, ranks = Path(folder), self.engine.ranks
        path.mkdir(parents=True, exist_ok=True)
        self.save_random_state(path)
        optimizer = self._torch_optimizer("save")
        self.complete_optimizer_state()
        save(path, self.model, optimizer)
        if ranks.rank == 0:  # `save` has waited for all ranks
            write_state(path, self.state_dict(), {})
        ranks.together(lambda: None)

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Continue from `save_checkpoint`, with any number of ranks.

        With as many as saved it, the run goes on to the last bit as if it had not stopped. Called by every rank.

        Raises:
            ValueError: The checkpoint is not whole, or that of another setup; nothing was changed.
        """
        from slsam_ds.engines.torch_checkpoint import load

        path, optimizer = Path(folder), self._torch_optimizer("load")
        self.engine.ranks.together(lambda: check_state(path, self.layers, self.config, {}))
        self.complete_optimizer_state()
        load(path, self.model, optimizer)
        self.load_state_dict(read_state(path))
        self.load_random_state(path)

    def save_random_state(self, folder: Path) -> None:
        """Write this rank's random state into the folder of a checkpoint."""
        RandomState.capture(self.engine.device).save(folder, self.engine.ranks.rank)

    def load_random_state(self, folder: Path) -> None:
        """Go on with this rank's random numbers; begin new ones where other ranks saved the checkpoint.

        They are those of dropout. The samples of layers depend on step and seed alone.
        """
        ranks = self.engine.ranks
        saved = RandomState.saved(folder, ranks.rank, ranks.world_size, self.engine.device)
        if saved is not None:
            saved.replay()
        else:
            logger.warning("%s: was saved by another number of ranks: dropout goes on with new random numbers", folder)
            reseed(self.config.seed, self.num_steps, ranks.rank)

    def complete_optimizer_state(self) -> None:
        """Until the next step, give the optimizer state of every layer, as its first step would begin with.

        For `torch.distributed.checkpoint`, which saves and loads the state of all parameters or of none.
        """
        if self._optimizer is not None:
            from slsam_ds.engines.torch_checkpoint import complete_state

            complete_state(self._optimizer, also=kept_in_optimizer(self.config))
            self._optimizer_is_checked = False

    def _torch_optimizer(self, verb: str) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise ValueError(
                f"SLSAM.{verb}_checkpoint: a DeepSpeedEngine has its own; use {verb}_checkpoint of the engine that "
                "slsam_ds.initialize returned"
            )
        return self._optimizer

    def _check_optimizer(self) -> None:
        """Once after a resume, when optimizer and SL-SAM have loaded in either order: undo what loading made up.

        A layer never updated has no optimizer state. `torch.distributed.checkpoint` makes some, with a step counted
        that was never taken, and leaves it where the checkpoint has none (`allow_partial_load`).
        """
        pieces = self.engine.pieces([*range(len(self.layers)), *([ALWAYS] if self.layers.always else [])])
        for piece in pieces:
            if piece.arm != ALWAYS and self._num_updates[piece.arm] == 0:
                self.engine.optimizer_state.pop(piece.stepped, None)
        if self._previous is not None:
            self._previous.forget_lost(pieces)
        self._optimizer_is_checked = True

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
            claims={
                "the step": step,
                f"the active layers of step {step}": sample,
                "the bandit's state": self.selector.state_dict(),
                "the slsam settings": self.config.to_dict(),
                "max_grad_norm": self._max_grad_norm,
                "the model's layers": self._fingerprint,
                "the micro-batches per step": window_length,
                "the layers with a previous gradient": self._previous.arms if self._previous is not None else (),
            },
        )

    def _use_costs(self, costs: CostModel, window_length: int) -> None:
        """Let the choice of layers, and the rewards, go by what samples cost."""
        self._costs, self._priced_window = costs, window_length
        prices = costs.prices(Passes.of(self.config, window_length, reuses_prefix=self._reuses_prefix))
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

    def _learn(self, sample: tuple[int, ...], outcome: Outcome, forced: bool) -> None:
        norms = {arm: outcome.grad_norms[arm] for arm in sample}
        rewards = self._rewards.rewards(norms)
        self.selector.observe(norms)
        self.selector.update(
            sample,
            [rewards[arm] for arm in sample],
            probabilities=[1.0] * len(sample) if forced else None,
        )


def map_layers(model: nn.Module, config: SLSAMConfig, optimizer: torch.optim.Optimizer | None = None) -> LayerMap:
    """Find the arms and freeze what SL-SAM will never train.

    Args:
        model: The module, not yet wrapped.
        config: Says how layers are found and what becomes of the other parameters.
        optimizer: Where given, parameters it does not hold are frozen: nothing would ever update them.
    """
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in held)
    layer_map = find_layers(model, other_parameters=config.other_parameters, patterns=config.layers)
    for _, parameter in layer_map.frozen:
        parameter.requires_grad_(False)
    return layer_map


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
