"""`slsam_ds.initialize`: a DeepSpeedEngine that steps with SL-SAM."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds.assembly import announce, assemble, split_by_layer
from slsam_ds.config import SLSAMConfig
from slsam_ds.model.compiled import whole_graph
from slsam_ds.model.micro_batches import LossFunction
from slsam_ds.plan import StepResult
from slsam_ds.records.metrics import step_metrics
from slsam_ds.slsam import SLSAM
from slsam_ds.state.files import check_contents, check_state, read_state, write_state
from slsam_ds.state.replacing import replace_text
from slsam_ds.stock_loop import StockLoop


class SLSAMEngine:
    """A DeepSpeedEngine that steps with SL-SAM.

    `train_step`, the methods that a stock loop calls, and checkpoints are defined here. All other attributes are
    forwarded to the DeepSpeedEngine.

    Args:
        engine: The DeepSpeedEngine.
        slsam: The `SLSAM` that takes its steps.
    """

    def __init__(self, engine: Any, slsam: SLSAM) -> None:
        vars(self).update(_engine=engine, slsam=slsam, _stock_loop=StockLoop(engine, slsam))

    def train_step(
        self,
        micro_batches: Sequence[Any],
        loss_fn: LossFunction | None = None,
        active: Iterable[int] | None = None,
        *,
        perturbed: Iterable[int] | None = None,
        updated: Iterable[int] | None = None,
    ) -> StepResult:
        """One optimizer step over a window of micro-batches; see `SLSAM.step`.

        DeepSpeed's monitor, where one is configured, gets the loss and `slsam_ds.records.metrics` of every step.
        """
        result = self.slsam.step(micro_batches, loss_fn, active, perturbed=perturbed, updated=updated)
        self._tell_monitor(result)
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`DeepSpeedEngine.forward`. In training, its loss can be passed to `backward`."""
        return self._stock_loop.forward(args, kwargs)

    __call__ = forward

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Keep what `loss` was computed from until `step`: see `slsam_ds.stock_loop`.

        Args:
            loss: The loss that the engine returned for a micro-batch, unchanged: the output itself, its `.loss`, or its
                first element.
            retain_graph: Ignored; no graph is kept.
            scale_wrt_gas: Divide by the gradient accumulation, as in `DeepSpeedEngine.backward`.

        Returns:
            The loss, divided if `scale_wrt_gas` says so.

        Raises:
            RuntimeError: The loss is not one that the engine returned, so it cannot be computed again. Use
                `train_step(window, loss_fn=...)` instead.
        """
        return self._stock_loop.backward(loss, scale_wrt_gas=scale_wrt_gas)

    def step(self, lr_kwargs: Any = None) -> StepResult | None:
        """Count a micro-batch as `DeepSpeedEngine.step` does; at the end of a window, take SL-SAM's step.

        Returns:
            What the step did; None if the window is not complete yet.

        Raises:
            RuntimeError: `backward` was not called before.
        """
        result = self._stock_loop.step(lr_kwargs)
        if result is not None:
            self._tell_monitor(result)
        return result

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            ValueError: Saying what to compile instead.
        """
        raise whole_graph("engine.compile()")

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        **kwargs: Any,
    ) -> Any:
        """`DeepSpeedEngine.save_checkpoint`, with SL-SAM's state and each rank's random state.

        The file `latest` is written last, so that it always names a complete checkpoint.
        """
        from slsam_ds.engines.deepspeed.checkpoint import saved_as_given, setup_of, writes_for_its_node

        tag = str(tag) if tag is not None else f"global_step{self._engine.global_steps}"  # DeepSpeed's own choice
        folder = Path(save_dir, tag)
        folder.mkdir(parents=True, exist_ok=True)
        self.slsam.save_random_state(folder)
        self.slsam.unpack_masks()
        later = self._engine.checkpoint_engine.is_decoupled()  # then DeepSpeed alone knows when all is written
        with saved_as_given(self._engine):
            saved = self._engine.save_checkpoint(
                str(save_dir),
                tag=tag,
                client_state=dict(client_state or {}),
                save_latest=save_latest and later,
                **kwargs,
            )

        def finish() -> None:
            if writes_for_its_node(self._engine):  # DeepSpeed has waited for all ranks
                write_state(folder, self.slsam.state_dict(), setup_of(self._engine), unfinished="*" if later else "")
                if save_latest and not later:
                    replace_text(Path(save_dir, "latest"), tag)

        self.slsam.engine.ranks.check_together(finish)
        return saved

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_module_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """`DeepSpeedEngine.load_checkpoint`, with SL-SAM's state. The number of ranks may have changed.

        One that a DeepSpeedEngine without SL-SAM has saved goes on with a fresh bandit. With `load_module_only`
        DeepSpeed's own, which leaves SL-SAM and the optimizer as they are.

        Raises:
            ValueError: The checkpoint is not whole, or that of another setup; nothing was changed.
        """
        from slsam_ds.engines.deepspeed.checkpoint import checkpoint_folder, setup_of

        folder = checkpoint_folder(load_dir, tag)
        if folder is None or load_module_only:
            return self._engine.load_checkpoint(str(load_dir), tag=tag, load_module_only=load_module_only, **kwargs)
        if not any(folder.glob("slsam_*")):  # we write the random states first of all
            path, client_state = self._engine.load_checkpoint(load_dir, folder.name, **kwargs)
            self.slsam.start_after(self._engine.global_steps)
            return path, client_state
        ranks, setup = self.slsam.engine.ranks, setup_of(self._engine)
        ranks.check_together(lambda: check_state(folder, self.slsam.layers, self.slsam.config, setup))
        ranks.check_together(lambda: check_contents(folder, rank=ranks.rank, num_ranks=ranks.world_size))
        path, client_state = self._engine.load_checkpoint(load_dir, folder.name, **kwargs)
        self.slsam.load_state_dict(read_state(folder))
        self.slsam.load_random_state(folder)
        return path, client_state

    def _tell_monitor(self, result: StepResult) -> None:
        engine = self._engine
        if not engine.monitor.enabled or engine.global_rank != 0:
            return
        loss = result.loss if result.ascent_loss is None else result.ascent_loss  # at the weights, as everywhere else
        metrics = {"train_loss": loss, **step_metrics(result.to_record(), self.slsam.layers.numels)}
        # Named and counted as the engine's own events are.
        engine.monitor.write_events(
            [(f"Train/Samples/{name}", value, engine.global_samples) for name, value in metrics.items()]
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_engine"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._engine, name, value)


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    *,
    slsam: SLSAMConfig | Mapping[str, Any] | None = None,
    total_steps: int | None = None,
) -> tuple[SLSAMEngine, Any, Any, Any]:
    """`deepspeed.initialize`, with SL-SAM's step in the engine it returns.

    Says on the first rank, on stderr, that SL-SAM is on, and with which settings.

    Args:
        args: As in `deepspeed.initialize`; its `deepspeed_config` names the JSON where `config` is not given.
        model: The module to train.
        optimizer: A torch optimizer, or a function from parameter groups to one. None: the optimizer of the JSON, else
            AdamW.
        model_parameters: What to train if `optimizer` does not say so. None: all trainable parameters.
        training_data: As in `deepspeed.initialize`.
        lr_scheduler: A scheduler, or a function from the optimizer to one. None: the scheduler of the JSON, if any.
        distributed_port: As in `deepspeed.initialize`.
        mpu: As in `deepspeed.initialize`.
        dist_init_required: As in `deepspeed.initialize`.
        collate_fn: As in `deepspeed.initialize`.
        config: DeepSpeed's JSON (path or dict). Its `slsam` block holds SL-SAM's knobs; "auto" values are resolved.
        mesh_param: As in `deepspeed.initialize`.
        config_params: An older name for `config`.
        slsam: SL-SAM's settings; they replace the `slsam` block of the JSON.
        total_steps: Length of the run; `gamma="auto"` needs it, and so do some schedulers.

    Returns:
        engine, optimizer, dataloader, scheduler.

    Raises:
        ValueError: Bad settings or an unsupported combination, in one sentence.
    """
    from slsam_ds.engines.deepspeed.build import build_engine
    from slsam_ds.engines.deepspeed.config import read_config

    if model is None:
        raise ValueError("slsam_ds.initialize needs a model")
    configs = [each for each in (config, config_params, getattr(args, "deepspeed_config", None)) if each is not None]
    if not configs:
        raise ValueError("slsam_ds.initialize needs a DeepSpeed configuration: config=PATH or a dict")
    ds_config, block = read_config(configs[0])
    knobs = SLSAMConfig.of(slsam, block)
    built = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
    layer_map = split_by_layer(model, built, knobs, lr_scheduler if hasattr(lr_scheduler, "step") else None)
    engine, zero, loader, scheduler = build_engine(
        model,
        ds_config,
        layer_map,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        mesh_param=mesh_param,
        total_steps=total_steps,
    )
    slsam_engine = SLSAMEngine(engine, assemble(engine, None, knobs, layer_map, total_steps=total_steps))
    announce(knobs, "DeepSpeedEngine", rank=engine.global_rank)
    return slsam_engine, zero, loader, scheduler
