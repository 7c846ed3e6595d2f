"""SL-SAM in a training loop of one's own with Accelerate, whatever plugin it was launched with."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, broadcast
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from slsam_ds.config import SLSAMConfig
from slsam_ds.engines.deepspeed.checkpoint import accept_other_ranks
from slsam_ds.engines.deepspeed.config import check_config
from slsam_ds.model.layers import map_layers
from slsam_ds.model.param_groups import regroup
from slsam_ds.slsam import SLSAM


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *others: Any,
    slsam: SLSAMConfig | Mapping[str, Any] | None = None,
    total_steps: int | None = None,
    max_grad_norm: float | None = None,
) -> tuple[Any, ...]:
    """`accelerator.prepare`, and SL-SAM around what it returns.

    With the DeepSpeed plugin the model comes back as a DeepSpeedEngine, with the FSDP2 plugin sharded, and without
    either as it is, on its device: SL-SAM averages over ranks and wants no DistributedDataParallel around it.
    SL-SAM's state is saved and loaded by `accelerator.save_state` and `load_state`.

    Args:
        accelerator: As it was launched.
        model: The module, not yet prepared.
        optimizer: Built on the module's parameters; its groups are split by layer.
        *others: Data loaders, at most one scheduler, and whatever else `accelerator.prepare` takes.
        slsam: SL-SAM's knobs; None takes the `slsam` block of the DeepSpeed JSON, or the defaults.
        total_steps: Length of the run; `gamma="auto"` needs it.
        max_grad_norm: Clip to this norm before the update; with DeepSpeed, its `gradient_clipping` does so instead.

    Returns:
        SL-SAM, whose `step(window)` takes the place of forward, `accelerator.backward` and `optimizer.step`; then
        model, optimizer and others as `accelerator.prepare` returns them.

    Raises:
        ValueError: Bad knobs, or an engine that is not supported.
    """
    _check_supported(accelerator)
    block = _take_block(accelerator)
    config = slsam if isinstance(slsam, SLSAMConfig) else SLSAMConfig.from_dict(slsam if slsam is not None else block)
    layer_map = map_layers(model, config, optimizer)
    regroup(optimizer, layer_map, next((other for other in others if isinstance(other, LRScheduler)), None))
    sharded = accelerator.is_fsdp2 or accelerator.distributed_type == DistributedType.DEEPSPEED
    if sharded:
        model, *prepared = accelerator.prepare(model, optimizer, *others)
    else:
        model = accelerator.prepare_model(model, evaluation_mode=True)  # all of it but the wrapper
        for tensor in (*model.parameters(), *model.buffers()):  # the wrapper would have done it
            broadcast(tensor.detach())
        prepared = [accelerator.prepare(other) for other in (optimizer, *others)]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accept_other_ranks(model)
        stepper = SLSAM(model, None, config, layer_map=layer_map, total_steps=total_steps, max_grad_norm=max_grad_norm)
    else:  # FSDP2 has put other tensors into the module and the groups
        inner = getattr(prepared[0], "optimizer", prepared[0])
        stepper = SLSAM(
            model,
            inner,
            config,
            layer_map=map_layers(model, config),
            total_steps=total_steps,
            max_grad_norm=max_grad_norm,
        )
        accelerator.register_save_state_pre_hook(lambda *_: stepper.complete_optimizer_state())
        accelerator.register_load_state_pre_hook(lambda *_: stepper.complete_optimizer_state())
    accelerator.register_for_checkpointing(stepper)
    return stepper, model, *prepared


def _take_block(accelerator: Accelerator) -> dict[str, Any]:
    """The `slsam` block, taken out of the plugin's JSON: DeepSpeed does not know it."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return plugin.deepspeed_config.pop("slsam", {}) if plugin is not None else {}


def _check_supported(accelerator: Accelerator) -> None:
    """Refuse, before anything is prepared, what cannot work.

    Raises:
        ValueError: Naming the setting and what to use.
    """
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("dynamo_backend: a graph of the whole model fits one sample of layers; leave it out")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        check_config(accelerator.state.deepspeed_plugin.deepspeed_config)
        return
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={accelerator.mixed_precision}: not supported; use bf16 or no")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1: not supported; use fsdp_version: 2")
