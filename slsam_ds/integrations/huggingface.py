"""SL-SAM inside the Hugging Face Trainer, and inside trainers derived from it."""

import contextlib
import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from slsam_ds.assembly import announce, assemble, split_by_layer
from slsam_ds.config import SLSAMConfig
from slsam_ds.engines.deepspeed.checkpoint import accept_other_ranks
from slsam_ds.engines.deepspeed.lean_start import without_initial_state
from slsam_ds.engines.torch_checkpoint import complete_state
from slsam_ds.integrations.checkpoints import check_complete, is_stock, last_complete_checkpoint
from slsam_ds.integrations.collation import sized_batches, take_sizes
from slsam_ds.integrations.compilation import compiled_blocks, take_over_compilation
from slsam_ds.integrations.num_steps import check_batches, check_steps_asked_for, check_steps_taken
from slsam_ds.integrations.replicas import broadcast_weights, prepared_bare, replicates
from slsam_ds.integrations.side_effects import counted_once, kept_trainable
from slsam_ds.integrations.support import block_of, check_trainer
from slsam_ds.model.given_groups import given_groups, given_schedule
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.param_groups import regroup
from slsam_ds.model.state_home import load_at_home
from slsam_ds.passes import ForwardBackward
from slsam_ds.plan import StepResult
from slsam_ds.protocol import Engine
from slsam_ds.records.files import StepWriter, write_evaluations, write_layers, write_settings
from slsam_ds.records.metrics import MetricMeans, step_metrics
from slsam_ds.slsam import SLSAM
from slsam_ds.state.files import SPLIT_VERSION, check_state, read_state, write_state

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerMethods
else:
    _TrainerMethods = object  # the mixin stands before a trainer, whichever it is

_TOLD_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "fp16",
    "seed", "data_seed",
)  # fmt: skip
"""Of the trainer's arguments, those that `slsam_settings.json` tells: what a run learns depends on them, and none is
secret."""


class SLSAMMixin(_TrainerMethods):
    """Makes a Trainer step with SL-SAM: `class MyTrainer(SLSAMMixin, Trainer)`.

    The trainer keeps its own data order, loss, logging, evaluation, scheduler and checkpoints. Its `training_step` runs
    every micro-batch of both passes, so what a derived trainer computes there or in `compute_loss` stays as it is; only
    the backward underneath is ours, and one window of micro-batches becomes one SL-SAM step.

    That step is over, and its gradients are gone, when callbacks hear of `on_pre_optimizer_step` and
    `on_optimizer_step`. What they would read of them is in the logs (`grad_norm`) and, for each layer, in
    `slsam_steps.jsonl`; the gradients themselves are seen by `Tensor.register_hook` on a parameter, in both passes.

    Args:
        *args: The trainer's own.
        slsam: SL-SAM's knobs; None takes the `slsam` block of the DeepSpeed JSON, or the defaults.
        **kwargs: The trainer's own.

    Raises:
        ValueError: Bad knobs, or an engine that is not supported.
    """

    optimizer: Any
    lr_scheduler: Any
    current_gradient_accumulation_steps: int

    was_stopped = False
    """Training ended because some rank was asked to stop by `request_stop`."""

    _stop_requested = False
    _divides = False  # the ascent takes a part of the samples
    _is_repeated: bool | None = None  # whether this pass over a micro-batch is its second; None: no step is under way

    def __init__(self, *args: Any, slsam: SLSAMConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_trainer(self, SLSAMMixin)
        block = block_of(self.accelerator)
        self._compile_settings = take_over_compilation(self)
        self._compiled = contextlib.ExitStack()
        self.slsam_config = self._choose_knobs(slsam, block)
        self.slsam: SLSAM | None = None
        self._mapped: tuple[torch.nn.Module, LayerMap] | None = None
        self._step_writer: StepWriter | None = None
        self._resumed_from: str | None = None
        self._window: list[_MicroBatch] = []
        self._sizes: deque[int | None] = deque()
        self._divides = self.slsam_config.ascent_fraction < 1
        self._grad_norm = 0.0
        self._slsam_metrics = MetricMeans()
        self.add_callback(_SLSAMCallback(self))
        self._given = (self.optimizer, self.lr_scheduler)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Split what the optimizer's makers make, whoever has the last word: a derived trainer may override either."""
        super().__init_subclass__(**kwargs)
        for name in ("create_optimizer", "create_optimizer_and_scheduler"):
            make = getattr(cls, name, None)  # of a class beside the trainer, none
            if make is not None and not hasattr(make, "splits"):
                setattr(cls, name, _splitting(make))

    def _choose_knobs(
        self, given: SLSAMConfig | Mapping[str, Any] | None, block: Mapping[str, Any] | None
    ) -> SLSAMConfig:
        return SLSAMConfig.of(given, block)

    @property
    def layer_map(self) -> LayerMap:
        """The model's arms; found once per model, because a step leaves only its own trainable."""
        if self._mapped is None or self._mapped[0] is not self.model:  # `model_init` makes another
            layer_map = split_by_layer(self.model, self.optimizer, self.slsam_config, self.lr_scheduler)
            self._mapped = (self.model, layer_map)
        return self._mapped[1]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, once the checkpoint to resume from is known to fit.

        Says on the first rank, on stderr, that SL-SAM is on, and with which settings.

        Raises:
            ValueError: It does not.
        """
        if resume_from_checkpoint is True:  # where there is none, the trainer says so
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            self.check_checkpoint(resume_from_checkpoint)
        announce(self.slsam_config, type(self).__name__, rank=self.args.process_index)
        with without_initial_state(), prepared_bare(self.accelerator):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_checkpoint(self, folder: str) -> None:
        """Refuse a checkpoint that this trainer cannot resume from, before DeepSpeed tries to.

        One that a trainer without SL-SAM has saved is looked at when it is loaded.

        Raises:
            ValueError: It is not whole, or was saved with another model, setup, or other knobs.
        """
        if is_stock(folder):
            check_complete(Path(folder))
        else:
            check_state(folder, self.layer_map, self.slsam_config, self._setup())

    def request_stop(self) -> None:
        """Finish the step under way or the next one, save a checkpoint and end the training, on all ranks.

        For handlers of signals: may be called at any time, on any rank. `was_stopped` then tells, on every rank.
        """
        self._stop_requested = True
        if self.slsam is not None:
            self.slsam.request_stop()

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any) -> Any:
        """The trainer's own: the number of steps among them, before anything is prepared.

        Raises:
            NoStepsError: There would be none.
        """
        check_steps_asked_for(args)
        check_batches(args, dataloader)
        return super().set_initial_training_values(args, dataloader, *more)

    def _split_created(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What creates the trainer's optimizer, and perhaps its scheduler; then the groups are split by layer."""
        optimizer, lr_scheduler = self._given  # transformers forgets them under DeepSpeed
        self.optimizer = self.optimizer if self.optimizer is not None else optimizer
        self.lr_scheduler = self.lr_scheduler if self.lr_scheduler is not None else lr_scheduler
        layer_map = self.layer_map  # first: it freezes what the optimizer should not get to see
        created = create(*args, **kwargs)
        optimizer = created if created is not None else self.optimizer
        regroup(optimizer, layer_map, self.lr_scheduler)
        if not self.is_deepspeed_enabled:
            load_at_home(getattr(optimizer, "optimizer", optimizer), self.slsam_config.state_home)
        return created

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own. The engine is made by then, and its checkpoint not yet loaded.

        Raises:
            ValueError: There is none, because this trainer has trained before.
        """
        if self.is_deepspeed_enabled:
            wrapped = self.accelerator.deepspeed_engine_wrapped
            if wrapped is None:  # the trainer forgets it after a training, and builds no other
                raise ValueError("under DeepSpeed, a trainer can train only once: create a new trainer to train again")
            accept_other_ranks(wrapped.engine)
            stepped = wrapped.engine.optimizer
            load_at_home(getattr(stepped, "optimizer", stepped), self.slsam_config.state_home)
        return super().create_scheduler(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The trainer's own; where the ascent takes a part of the samples, its batches say how many there are."""
        streamed = isinstance(self.train_dataset, IterableDataset)  # Accelerate may join and divide its batches
        with sized_batches(self) if self._divides and not streamed else contextlib.nullcontext():
            return super().get_train_dataloader()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The trainer's own; of each of its micro-batches it is noted how many samples it has, where that is told."""
        micro_batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        sizes = take_sizes(micro_batches, self._train_batch_size) if self._divides else None
        self._sizes.extend(sizes if sizes is not None else [None] * len(micro_batches))
        return micro_batches, num_items_in_batch

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float:
        """What the trainer logs. By the time it asks, the gradients are gone."""
        return self._grad_norm

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Nothing but to keep the micro-batch, until the one after which the trainer steps: then the SL-SAM step.

        That need not be the last of those that were fetched together. Where a stream of unknown length ends within a
        window, or a resume begins within one, the trainer goes on accumulating; a step taken nonetheless would be
        one that nobody counts.

        Returns:
            The window's loss at the unperturbed weights, comparable to any other optimizer's. Shape ().
        """
        size = self._sizes.popleft() if self._sizes else None
        self._window.append(_MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps, size))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        noted, self._window = self._window, []
        window, sizes = [each.inputs for each in noted], [each.size for each in noted if each.size is not None]
        stock_training_step = super().training_step
        trained = model if self.is_deepspeed_enabled else self.model
        passed: set[int] = set()

        def begin_pass(micro_batches: Sequence[Any]) -> ForwardBackward:
            is_window = micro_batches is window
            # What each is divided by: the number of items, or that of micro-batches.
            divisors = {id(each.inputs): (each.num_items, each.num_fetched) for each in noted}
            if not is_window:
                num_items = num_items_in_batch
                if num_items is not None:
                    num_items = self._get_num_items_in_batch(micro_batches, self.args.device)
                    num_items = num_items if num_items is None else max(num_items, 1)  # there may be no label in them
                divisors = dict.fromkeys(map(id, micro_batches), (num_items, len(micro_batches)))

            def forward_backward(micro_batch: Any) -> Tensor:
                self._is_repeated = not is_window or id(micro_batch) in passed
                passed.add(id(micro_batch))
                num_items, self.current_gradient_accumulation_steps = divisors[id(micro_batch)]
                # A copy, because `compute_loss` may take entries out of the batch, which passes here twice.
                return stock_training_step(trained, copy.copy(micro_batch), num_items)

            return forward_backward

        assert self.slsam is not None
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # a schedule-free one moves the weights back that an evaluation was made at
        try:
            result = self.slsam.step_with(window, begin_pass, sizes=sizes if len(sizes) == len(window) else None)
        finally:
            self._is_repeated = None
            self.current_gradient_accumulation_steps = noted[-1].num_fetched
        self.was_stopped |= result.stop_requested
        record = self.step_record(result)
        self._slsam_metrics.add(step_metrics(record, self.slsam.layers.numels))
        if self._step_writer is not None:
            self._step_writer.write(record)
        self._grad_norm = result.grad_norm
        loss = result.loss if result.ascent_loss is None else result.ascent_loss
        return torch.tensor(loss, device=self.args.device)

    def step_record(self, result: StepResult) -> dict[str, Any]:
        """The line of `slsam_steps.jsonl` about a step. A derived trainer may add to it."""
        return result.to_record()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with the means of `slsam_ds.records.metrics` since the last training loss."""
        super().log({**logs, **self._slsam_metrics.take()} if "loss" in logs else logs, *args, **kwargs)
        if self.slsam is not None and "eval_loss" in logs and self.is_world_process_zero():
            write_evaluations(self.args.output_dir, self.state.log_history)

    @contextlib.contextmanager
    def compute_loss_context_manager(self) -> Iterator[None]:
        """The trainer's own, around every loss; in a step, what SL-SAM relies on and what is counted stay right.

        Metrics are those of the first pass over a whole micro-batch: at the weights themselves where both passes are.
        """
        with contextlib.ExitStack() as stack:
            if self._is_repeated is not None:
                stack.enter_context(kept_trainable(self.model))
            if self._is_repeated:
                stack.enter_context(counted_once(self, self.state))
            stack.enter_context(super().compute_loss_context_manager())
            yield

    def _setup(self) -> dict[str, Any]:
        """What a checkpoint depends on: with another stage or dtype, DeepSpeed looks for files of other names."""
        if not self.is_deepspeed_enabled:
            return {}
        stage = self.accelerator.state.deepspeed_plugin.zero_stage
        return {"zero_optimization.stage": stage, "bf16": self.args.bf16, "fp16": self.args.fp16}

    def _begin_slsam(self, total_steps: int) -> None:
        """Build SL-SAM around the prepared engine, and continue where the checkpoint left off."""
        self._window.clear()  # of a training before this one, which may have ended within a window
        self._sizes.clear()
        settings = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and not settings.get("use_reentrant", False):
            # transformers 5 makes the embeddings' output require a gradient, which only reentrant checkpointing needs:
            # backward would run through every block, whatever is sampled.
            self.model.disable_input_require_grads()
        # Without DeepSpeed the trainer clips and steps as well, and finds no gradients: SL-SAM has done both.
        self.slsam = assemble(
            self.model_wrapped if self.is_deepspeed_enabled else self.model,
            self.optimizer,
            self.slsam_config,
            self.layer_map,
            total_steps=total_steps,
            max_grad_norm=None if self.is_deepspeed_enabled else self.args.max_grad_norm or None,
        )
        if replicates(self.accelerator) and self.slsam.engine.replicated:
            broadcast_weights(self.model)
        if self.is_deepspeed_enabled:
            self.accelerator.deepspeed_engine_wrapped = _WindowBackward(self.model_wrapped, self.slsam.engine)
        if self._stop_requested:
            self.slsam.request_stop()
        if self._resumed_from is not None and is_stock(self._resumed_from):
            self.slsam.start_after(check_complete(Path(self._resumed_from)))
        elif self._resumed_from is not None:
            self.slsam.load_state_dict(read_state(self._resumed_from))
        self._compiled.enter_context(compiled_blocks(self.slsam.layers, **self._compile_settings))
        if self.is_world_process_zero():
            write_layers(self.args.output_dir, self.slsam.layers.describe())
            self._write_settings(total_steps, has_ended=False)
            write_evaluations(self.args.output_dir, self.state.log_history)
            self._step_writer = StepWriter(self.args.output_dir, first_step=self.slsam.num_steps + 1)

    def _write_settings(self, total_steps: int, *, has_ended: bool) -> None:
        setup = {"world_size": self.args.world_size, **self._setup()}
        training = {name: getattr(self.args, name) for name in _TOLD_SETTINGS} | setup
        values = {name: getattr(value, "value", value) for name, value in training.items()}
        write_settings(
            self.args.output_dir,
            slsam=self.slsam_config.to_dict(),
            training=values,
            total_steps=total_steps,
            has_ended=has_ended,
        )

    def _end_slsam(self, total_steps: int) -> None:
        if self._step_writer is not None:
            self._write_settings(total_steps, has_ended=True)
        self._compiled.close()
        if self._step_writer is not None:
            self._step_writer.close()
            self._step_writer = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.slsam is not None:
            self.slsam.unpack_masks()
            if self.is_fsdp_enabled:
                self.slsam.complete_optimizer_state()
        with self._given_groups():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """The trainer's own, and last of all SL-SAM's state: only trainer_state.json comes after it.

        Older checkpoints are deleted when both are there.
        """
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and self.slsam is not None:
            write_state(output_dir, self.slsam.state_dict(), self._setup())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_fsdp_enabled:  # what was saved is complete, too
            kept = {} if is_stock(checkpoint) else self.slsam_config.kept
            complete_state(self.optimizer.optimizer, also=kept, home=self.slsam_config.state_home)
        was_split = (
            checkpoint is not None and not is_stock(checkpoint) and read_state(checkpoint)["version"] == SPLIT_VERSION
        )
        with contextlib.nullcontext() if was_split else self._given_groups():
            super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def _given_groups(self) -> contextlib.AbstractContextManager[None]:
        """Within, optimizer and scheduler are saved and loaded as by a trainer without SL-SAM."""
        if self.is_deepspeed_enabled:  # where checkpoints of any groups are loaded
            return given_schedule(self.lr_scheduler, self.optimizer.param_groups)
        optimizer: Any = self.optimizer
        return given_groups(getattr(optimizer, "optimizer", optimizer), self.lr_scheduler)


def _splitting(make: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's method that makes its optimizer, whose groups are then split by layer."""

    @functools.wraps(make)
    def making(trainer: SLSAMMixin, *args: Any, **kwargs: Any) -> Any:
        return trainer._split_created(functools.partial(make, trainer), *args, **kwargs)

    making.splits = True  # type: ignore[attr-defined]
    return making


class SLSAMTrainer(SLSAMMixin, Trainer):
    """`transformers.Trainer` with SL-SAM; takes one more argument, `slsam`."""


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    """What the trainer gave to `training_step`, to be kept until it steps.

    Attributes:
        inputs: The batch.
        num_items: What its losses are divided by; None: by the number of micro-batches.
        num_fetched: Of the micro-batches that were fetched together.
        size: Samples in it, where that is told.
    """

    inputs: Any
    num_items: Any
    num_fetched: int
    size: int | None


class _SLSAMCallback(TrainerCallback):
    """Starts SL-SAM once the trainer has prepared its engine, and ends the training when it was asked to."""

    def __init__(self, trainer: SLSAMMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_slsam(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.was_stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_slsam(state.max_steps)
        check_steps_taken(state.global_step, kwargs["train_dataloader"])


class _WindowBackward(DeepSpeedEngineWrapper):
    """What `accelerator.backward` calls: gathers gradients for SL-SAM, which reduces and steps at the window's end."""

    def __init__(self, engine: Any, slsam_engine: Engine) -> None:
        super().__init__(engine)
        self._slsam_engine = slsam_engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self._slsam_engine.backward(loss)
