"""SL-SAM around a model and its optimizer: composes policy, step and engine, and owns the state."""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.combinations import make_combination
from slsam_ds.config import SLSAMConfig
from slsam_ds.directions import DIRECTIONS
from slsam_ds.engines import release_gathered, select_engine
from slsam_ds.engines.agreement import checksum
from slsam_ds.engines.guard import guard, stepping
from slsam_ds.engines.torch_optimizer import TorchOptimizerEngine
from slsam_ds.masks import make_mask
from slsam_ds.metrics import METRICS
from slsam_ds.model.forward_state import ForwardState
from slsam_ds.model.layers import LayerMap, map_layers, norm_layers
from slsam_ds.model.micro_batches import LossFunction, check_loss, model_loss, num_samples, to_device
from slsam_ds.model.param_groups import regroup, sets_own_rate
from slsam_ds.model.reuse import PrefixReuse
from slsam_ds.model.state_home import load_at_home, send_home
from slsam_ds.passes import BeginPass, ForwardBackward
from slsam_ds.plan import StepResult
from slsam_ds.planner import Planner
from slsam_ds.policy import Policy
from slsam_ds.pricing.calibration import calibrate
from slsam_ds.pricing.cost import Workload
from slsam_ds.pricing.pricing import Pricing
from slsam_ds.protocol import ALWAYS, Engine
from slsam_ds.rewards import RewardScale
from slsam_ds.schedules import make_schedule
from slsam_ds.selectors import Selector, make_selector
from slsam_ds.skipping import report_skipped
from slsam_ds.state.checkpoint import TorchCheckpoint, load_random_state, save_random_state
from slsam_ds.state.files import STATE_VERSION, check_layers, naming_settings, settings_that_differ
from slsam_ds.state.progress import Progress
from slsam_ds.step import take_step

logger = logging.getLogger(__name__)


class SLSAM:
    """Sparse-Layer SAM around a model and its optimizer.

    ```python
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-4), SLSAMConfig(rho=0.05, active_layers=0.2))
    for window in slsam_ds.windows(loader, 4):
        result = slsam.step(window)  # forward, backward, both passes and optimizer.step()
    ```

    Args:
        model: A plain module (one device, or replicated over the ranks of a process group), one that went through
            `fully_shard`, or a DeepSpeedEngine that `slsam_ds.initialize` or the Trainer integration built.
        optimizer: The module's torch optimizer; its groups are split by layer. None with a DeepSpeedEngine.
        config: The knobs, or a dict of them; None: the defaults.
        layer_map: The layers, if they were found before the model was wrapped. None: find them.
        total_steps: Length of the run; `gamma="auto"`, `mask="dynamic"` and some values of `ascend_when` need
            it.
        max_grad_norm: Clip the gradient of the updated layers to this global norm before the update; None: do not.
            DeepSpeed has `gradient_clipping` in its configuration instead.
        lr_scheduler: A scheduler already built on the optimizer, whose groups are split by layer.

    Attributes:
        layers: The arms.
        policy: Chooses them, and learns.
        engine: Where their shards are.
        forwards: What the model's forwards find besides the weights.
        progress: How far the run has come.

    Raises:
        ValueError: A model, wrapper or combination that is not supported, in one sentence.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        config: SLSAMConfig | Mapping[str, Any] | None = None,
        *,
        layer_map: LayerMap | None = None,
        total_steps: int | None = None,
        max_grad_norm: float | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        self.config = config = SLSAMConfig.of(config)
        self.model = model
        release_gathered(model)
        self.layers = layers = layer_map if layer_map is not None else map_layers(model, config, optimizer)
        if optimizer is not None:
            regroup(optimizer, layers, lr_scheduler)
        self.engine = engine = select_engine(model, optimizer, layers)
        if config.ascent_scope != "global" and not engine.replicated:
            raise ValueError(
                f'slsam.ascent_scope="{config.ascent_scope}": needs whole weights on every rank; where they are '
                'sharded (ZeRO-3, FSDP), use "global"'
            )
        guard(model, optimizer)
        engine.end_step()
        if config.update_scale != "none" and sets_own_rate(engine.optimizer.param_groups):
            logger.warning(
                "%s sets its own learning rate: slsam.update_scale=%s has no effect, and rarely updated layers "
                "learn more slowly",
                type(engine.optimizer).__name__,
                config.update_scale,
            )
        home = config.state_home
        engine.keep_state_at(home)
        send_home(engine.optimizer, home)
        load_at_home(engine.optimizer, home)
        self._fingerprint = layers.fingerprint()
        selector = make_selector(config, len(layers), total_steps=total_steps)
        self.policy = Policy(
            selector,
            RewardScale(config.reward, layers.numels),
            perturb=config.perturb,
            update=config.update,
            norm_layers=norm_layers(model, layers) if config.perturb == "norm_layers" else (),
            redraw_every=config.redraw_every,
        )
        self._schedule = schedule = make_schedule(config.ascend_when, total_steps=total_steps, seed=config.seed)
        self._direction = DIRECTIONS[config.ascent_source](engine)
        self._metric = METRICS[config.metric](engine)
        self._combination = make_combination(config.descend_along)
        self._mask = make_mask(
            config.mask,
            engine,
            layers.numels_of_all(),
            density=config.mask_density,
            every=config.mask_every,
            seed=config.seed,
            total_steps=total_steps,
        )
        self.forwards = ForwardState(model, engine.device)
        self._prefixes = PrefixReuse(config, layers, self.forwards, may_skip_modules=engine.may_skip_modules)
        self._pricing = Pricing(config, layers, self.policy.use_prices, ascent_share=schedule.share)
        self._planner = Planner(
            config,
            layers,
            schedule=schedule,
            direction=self._direction,
            combination=self._combination,
            pricing=self._pricing,
            max_grad_norm=_checked_max_grad_norm(max_grad_norm, engine),
        )
        self._checkpoint = (
            TorchCheckpoint(engine, model, optimizer, config.kept, self.unpack_masks) if optimizer is not None else None
        )
        self.progress = Progress.start(len(layers))
        self._stop_requested = False
        self._resumed = False  # the optimizer may hold state that loading made up

    @property
    def num_steps(self) -> int:
        """Steps taken so far, skipped ones among them."""
        return self.progress.step

    @property
    def selector(self) -> Selector:
        """Draws the samples."""
        return self.policy.selector

    def step(
        self,
        window: Sequence[Any],
        loss_fn: LossFunction | None = None,
        active: Iterable[int] | None = None,
        *,
        perturbed: Iterable[int] | None = None,
        updated: Iterable[int] | None = None,
    ) -> StepResult:
        """One optimizer step over a window of micro-batches (its length is the gradient accumulation).

        Args:
            window: Micro-batches of this rank: dicts of tensors, or whatever `loss_fn` takes.
            loss_fn: Mean loss of one micro-batch; None: `model(**micro_batch).loss`.
            active: Perturb and update these layers instead of drawn ones. The same on every rank.
            perturbed: Perturb these layers instead of drawn ones. Must be given together with `updated`.
            updated: Update these layers, which may differ from the perturbed ones.

        Raises:
            TypeError: A window that is no sequence of micro-batches.
            ValueError: An empty window, or arms that do not exist.
            RanksDisagreeError: The ranks were about to take different steps. Nothing was sent or changed.
            BadNumbersError: The loss or gradient was not finite in `max_skipped_steps` consecutive steps.
        """
        compute_loss = loss_fn or model_loss

        def begin_pass(micro_batches: Sequence[Any]) -> ForwardBackward:
            def forward_backward(micro_batch: Any) -> Tensor:
                loss = compute_loss(self.model, to_device(micro_batch, self.engine.device)) / len(micro_batches)
                check_loss(loss)
                self.engine.backward(loss)
                return loss.detach()

            return forward_backward

        return self.step_with(window, begin_pass, active, perturbed=perturbed, updated=updated)

    @stepping()
    def step_with(
        self,
        window: Sequence[Any],
        begin_pass: BeginPass,
        active: Iterable[int] | None = None,
        *,
        perturbed: Iterable[int] | None = None,
        updated: Iterable[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> StepResult:
        """As `step`, for trainers with a forward and backward of their own.

        Args:
            window: Micro-batches of this rank.
            begin_pass: Called with the micro-batches of a pass, or with those parts of them that the ascent takes;
                returns what is then called for each of them: it calls `engine.backward` itself, on a loss weighted so
                that their sum is the loss to minimise, and returns that loss, detached.
            active: As for `step`.
            perturbed: Likewise.
            updated: Likewise.
            sizes: How many samples each micro-batch has, where that is known: a sample may be a pair of rows.
        """
        started = time.perf_counter()
        if callable(window) or isinstance(window, Mapping | Tensor):
            raise TypeError(
                f"window: got a {type(window).__name__}, expected a list of micro-batches, for example step([batch]); "
                "SL-SAM runs the forwards itself and takes no closure"
            )
        if len(window) == 0:
            raise ValueError("an empty window: a step needs at least one micro-batch")
        self._prepare(window, begin_pass, sizes)

        step = self.num_steps + 1
        choice = self.policy.forced(active, perturbed, updated) or self.policy.choose(step)  # 1 select
        plan = self._planner.plan(  # 2 freeze: gradients flow to the perturbed arms, then to the updated ones
            step,
            choice,
            workload=self.workload(window, sizes),
            claims=self._claims(step, len(window)),
            stop=self._stop_requested,
        )
        prefix = self._prefixes.prefix_of(plan, len(window))
        result = take_step(  # 3 ascend, 4 descend, 5 restore and update
            self.engine,
            plan,
            window,
            begin_pass,
            state=self.forwards,
            direction=self._direction,
            metric=self._metric,
            combination=self._combination,
            mask=self._mask,
            prefix=prefix,
            sizes=sizes,
        )
        self._prefixes.review(prefix, result, len(window))
        self.progress = self.progress.after(choice.updated, skipped=result.skipped)
        if result.skipped:
            limit = self.config.max_skipped_steps
            report_skipped(result, self.layers, in_a_row=self.progress.skipped_in_a_row, limit=limit)
        else:
            self.policy.learn(choice, result.grad_norms, result.ascent_norms)  # 6 reward
            self._schedule.observe(result.sq_norm)
        return dataclasses.replace(result, seconds=time.perf_counter() - started)

    def workload(self, window: Sequence[Any], sizes: Sequence[int] | None = None) -> Workload:
        """What a step over such a window runs where it ascends, and so pays for. `sizes`: as for `step_with`."""
        size = num_samples(window[0], sizes[0] if sizes else None)
        return Workload.of(self.config, len(window), size, reuses_prefix=self._prefixes.allowed)

    def request_stop(self) -> None:
        """Set `stop_requested` in the next step's result on every rank, even if only one rank calls this."""
        self._stop_requested = True

    def state_dict(self) -> dict[str, Any]:
        """SL-SAM's own state as JSON-serialisable values; the same on every rank.

        Model, optimizer and scheduler are saved by whoever owns them. What the ascent direction keeps of the size of
        the weights is in the optimizer's state.
        """
        return {
            "version": STATE_VERSION,
            "settings": self.config.to_dict(),
            **self.progress.to_dict(),
            "layers": self._fingerprint,
            "arms": self.layers.outline(),
            "previous": self._direction.state_dict(),
            "masks": None if self._mask is None else self._mask.state_dict(),
            "schedule": self._schedule.state_dict(),
            **self.policy.state_dict(),
            "costs": self._pricing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: the same samples follow as in the uninterrupted run.

        Knobs that were changed since are named in a warning.

        Raises:
            ValueError: The state belongs to other layers, another selector or another version.
        """
        check_layers(state, self.layers)
        self._pricing.load_state_dict(state.get("costs"))
        with naming_settings(state, self.config):
            self.policy.load_state_dict(state)
        if (differences := settings_that_differ(state, self.config)) and self.engine.ranks.rank == 0:
            logger.warning("continuing a run with other slsam settings than it was saved with: %s", differences)
        self.progress = Progress.from_dict(state)
        self._direction.load_state_dict(state["previous"])
        if self._mask is not None:
            self._mask.load_state_dict(state.get("masks"))
        self._schedule.load_state_dict(state.get("schedule"))
        self._resumed = True

    def start_after(self, steps: int) -> None:
        """Go on after steps that were taken without SL-SAM: each of them has updated every layer.

        Weights, optimizer and scheduler are loaded by whoever owns them.

        Args:
            steps: How many.
        """
        self.progress = Progress.start(len(self.layers), after=steps)
        if self.engine.ranks.rank == 0:
            logger.warning("continuing after %d steps without SL-SAM: the bandit starts anew", steps)

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Save weights, optimizer, SL-SAM's and each rank's random state: all but scheduler and place in the data.

        Called by every rank. What `slsam_ds.initialize` returns saves checkpoints of its own.

        Args:
            folder: On a disk that all ranks share. A checkpoint that is there is replaced when this one is whole.

        Raises:
            ValueError: The disk is full or cannot be written; what was there still is.
        """
        self._torch_checkpoint("save").save(folder, self.state_dict())
        self._resumed = True

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Continue from `save_checkpoint`, with any number of ranks.

        With as many as saved it, the run goes on to the last bit as if it had not stopped. Called by every rank.

        Raises:
            ValueError: The checkpoint is not whole, or that of another setup; nothing was changed.
        """
        self.load_state_dict(self._torch_checkpoint("load").load(folder, self.layers, self.config))

    def save_random_state(self, folder: Path) -> None:
        """Write this rank's random state into the folder of a checkpoint."""
        save_random_state(self.engine, folder)

    def load_random_state(self, folder: Path) -> None:
        """Go on with this rank's random numbers; begin new ones where other ranks saved the checkpoint."""
        load_random_state(self.engine, folder, seed=self.config.seed, step=self.num_steps)

    def complete_optimizer_state(self) -> None:
        """Until the next step, give the optimizer state of every layer, as its first step would begin with.

        For `torch.distributed.checkpoint`, which saves and loads the state of all parameters or of none.
        """
        if self._checkpoint is not None:
            self._checkpoint.complete_optimizer_state()
            self._resumed = True
        self.unpack_masks()

    def unpack_masks(self) -> None:
        """Until the next step, hold the masks in the optimizer's state, where whatever saves it takes them along."""
        if self._mask is not None:
            self._mask.unpack()
            self._resumed = True

    def _torch_checkpoint(self, verb: str) -> TorchCheckpoint:
        if self._checkpoint is None:
            raise ValueError(
                f"SLSAM.{verb}_checkpoint: a DeepSpeedEngine has its own; use {verb}_checkpoint of the engine that "
                "slsam_ds.initialize returned"
            )
        return self._checkpoint

    def _prepare(self, window: Sequence[Any], begin_pass: BeginPass, sizes: Sequence[int] | None) -> None:
        """What comes before the first step, or the first one after a resume."""
        if self._pricing.must_count:
            one = [window[0]]
            counted = calibrate(self.engine, self.model, self.layers, lambda: begin_pass(one)(window[0]))
            self._pricing.use(counted, self.workload(window, sizes))
        if self._resumed:
            self._drop_made_up_state()
            self._resumed = False
        elif self.num_steps == 0 and self._checkpoint is not None:
            self._count_earlier_updates()

    def _count_earlier_updates(self) -> None:
        """Before the first step: state that the user's optimizer has brought along is not made up."""
        state = self.engine.optimizer.state
        earlier = {piece.arm for piece in self.engine.pieces(range(len(self.layers))) if state.get(piece.stepped)}
        updates = tuple(int(arm in earlier) for arm in range(len(self.layers)))
        self.progress = dataclasses.replace(self.progress, updates=updates)

    def _drop_made_up_state(self) -> None:
        """Once after a resume, when optimizer and SL-SAM have loaded in either order: undo what loading made up.

        A layer never updated has no optimizer state. `torch.distributed.checkpoint` makes some, with a step counted
        that was never taken, and leaves it where the checkpoint has none (`allow_partial_load`).
        """
        pieces = self.engine.pieces([*range(len(self.layers)), *([ALWAYS] if self.layers.always else [])])
        if self._mask is not None:
            self._mask.pack(pieces)  # first: a layer never updated may have one, and no other state
        for piece in pieces:
            if piece.arm != ALWAYS and self.progress.updates[piece.arm] == 0:
                self.engine.optimizer.state.pop(piece.stepped, None)
        self._direction.forget_lost(pieces)

    def _claims(self, step: int, window_length: int) -> dict[str, Any]:
        """What this rank holds that the others must hold too, by what it is."""
        return {
            "the bandit's state": self.selector.state_dict(),
            "the model's layers": self._fingerprint,
            "the micro-batches per step": window_length,
            "the layers with a mask": () if self._mask is None else self._mask.claims(),
            **self._checksums(step),
        }

    def _checksums(self, step: int) -> dict[str, int]:
        """Of whole weights, in the steps that compare them."""
        every = self.config.check_weights_every
        if not self.engine.replicated or every == 0 or step % every != 0 or self.engine.ranks.world_size == 1:
            return {}
        return {f"the weights of {arm.name}": checksum(self.engine.live_weights([arm.index])) for arm in self.layers}


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
