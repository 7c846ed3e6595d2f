"""SL-SAM inside the Hugging Face Trainer, and inside trainers derived from it."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DummyOptim
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor
from transformers import Trainer, TrainerCallback

from slsam_ds.config import SLSAMConfig
from slsam_ds.engines.deepspeed import check_config
from slsam_ds.engines.param_groups import regroup
from slsam_ds.engines.ranks import ProcessGroupRanks
from slsam_ds.layers import LayerMap, split_param_groups
from slsam_ds.protocol import Engine
from slsam_ds.records import StepWriter, write_layers
from slsam_ds.slsam import SLSAM, map_layers

STATE_FILE = "slsam_state.json"

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerMethods
else:
    _TrainerMethods = object  # the mixin stands before a trainer, whichever it is


class SLSAMMixin(_TrainerMethods):
    """Makes a Trainer step with SL-SAM: `class MyTrainer(SLSAMMixin, Trainer)`.

    The trainer keeps its own data order, loss, logging, evaluation, scheduler and checkpoints. Its `training_step` runs
    every micro-batch of both passes, so what a derived trainer computes there or in `compute_loss` stays as it is; only
    the backward underneath is ours, and one window of micro-batches becomes one SL-SAM step.

    Args:
        *args: The trainer's own.
        slsam: SL-SAM's knobs; None takes the `slsam` block of the DeepSpeed JSON, or the defaults.
        **kwargs: The trainer's own.

    Raises:
        ValueError: Bad knobs, or an engine that is not supported.
    """

    def __init__(self, *args: Any, slsam: SLSAMConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.is_deepspeed_enabled:
            raise ValueError(
                "SLSAMTrainer runs under DeepSpeed ZeRO stage 1 or 2 today: give TrainingArguments a deepspeed JSON"
            )
        num_ranks = ProcessGroupRanks(None, self.args.device).world_size
        if self.args.world_size != num_ranks:  # every rank would train on the same data
            raise ValueError(
                f"TrainingArguments sees {self.args.world_size} process where {num_ranks} train together: "
                "on a machine without accelerator, give it use_cpu=True"
            )
        block = _take_block(self.args.hf_deepspeed_config)
        check_config(self.args.hf_deepspeed_config.config)
        self.slsam_config = slsam if isinstance(slsam, SLSAMConfig) else SLSAMConfig.from_dict(slsam or block or {})
        self.slsam: SLSAM | None = None
        self._layer_map: LayerMap | None = None
        self._step_writer: StepWriter | None = None
        self._resumed_from: str | None = None
        self._window: list[Any] = []
        self._num_seen = 0
        self.add_callback(_SLSAMCallback(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, its parameter groups split by layer."""
        if self._layer_map is None:
            self._layer_map = map_layers(self.model, self.slsam_config)
        optimizer = super().create_optimizer(*args, **kwargs)
        if isinstance(optimizer, DummyOptim):  # the DeepSpeed JSON brings the optimizer
            optimizer.params = split_param_groups(
                [p for p in self.model.parameters() if p.requires_grad], self._layer_map
            )
        else:
            regroup(optimizer, self._layer_map)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step; kept, because SL-SAM passes over them twice."""
        self._window, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._num_seen = 0
        return self._window, num_items_in_batch

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Nothing for all but the window's last micro-batch, then the whole SL-SAM step.

        Returns:
            The window's loss at the unperturbed weights, comparable to any other optimizer's. Shape ().
        """
        self._num_seen += 1
        if self._num_seen < len(self._window):
            return torch.zeros((), device=self.args.device)
        stock_training_step = super().training_step

        def forward_backward(micro_batch: Any) -> Tensor:
            return stock_training_step(model, copy.copy(micro_batch), num_items_in_batch)

        assert self.slsam is not None
        result = self.slsam.step_with(self._window, forward_backward)
        if self._step_writer is not None:
            self._step_writer.write(result.to_record())
        loss = result.loss if result.ascent_loss is None else result.ascent_loss
        return torch.tensor(loss, device=self.args.device)

    def _begin_slsam(self, total_steps: int) -> None:
        """Build SL-SAM around the prepared engine, and continue where the checkpoint left off."""
        self.slsam = SLSAM(
            self.model_wrapped, None, self.slsam_config, layer_map=self._layer_map, total_steps=total_steps
        )
        self.accelerator.deepspeed_engine_wrapped = _WindowBackward(self.model_wrapped, self.slsam.engine)
        if self._resumed_from is not None:
            self.slsam.load_state_dict(_read_state(self._resumed_from))
        if self.is_world_process_zero():
            write_layers(self.args.output_dir, self.slsam.layers.describe())
            self._step_writer = StepWriter(self.args.output_dir, first_step=self.slsam.num_steps + 1)

    def _end_slsam(self) -> None:
        if self._step_writer is not None:
            self._step_writer.close()
            self._step_writer = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.slsam is not None:
            Path(output_dir, STATE_FILE).write_text(json.dumps(self.slsam.state_dict()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint


class SLSAMTrainer(SLSAMMixin, Trainer):
    """`transformers.Trainer` with SL-SAM; takes one more argument, `slsam`."""


class _SLSAMCallback(TrainerCallback):
    """Starts SL-SAM once the trainer has prepared its engine, before the first step."""

    def __init__(self, trainer: SLSAMMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_slsam(state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_slsam()


class _WindowBackward(DeepSpeedEngineWrapper):
    """What `accelerator.backward` calls: gathers gradients for SL-SAM, which reduces and steps at the window's end."""

    def __init__(self, engine: Any, slsam_engine: Engine) -> None:
        super().__init__(engine)
        self._slsam_engine = slsam_engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self._slsam_engine.backward(loss)


def _take_block(hf_deepspeed_config: Any) -> dict[str, Any] | None:
    """The `slsam` block, taken out of the JSON, where accelerate would try to resolve its "auto" values.

    It stays beside the JSON, so that a second trainer on the same arguments finds it.
    """
    if "slsam" in hf_deepspeed_config.config:
        hf_deepspeed_config.slsam_block = hf_deepspeed_config.config.pop("slsam")
    return getattr(hf_deepspeed_config, "slsam_block", None)


def _read_state(checkpoint: str) -> dict[str, Any]:
    path = Path(checkpoint) / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: no readable slsam state ({error}); was this checkpoint saved by SLSAMTrainer?"
        ) from None
    return state
