"""SL-SAM in a training loop of one's own with Accelerate, whatever plugin it was launched with."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DummyOptim
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from slsam_ds.assembly import announce, assemble, split_by_layer
from slsam_ds.config import SLSAMConfig
from slsam_ds.engines.deepspeed.lean_start import without_initial_state
from slsam_ds.integrations.replicas import broadcast_weights
from slsam_ds.integrations.support import block_of, check_accelerator
from slsam_ds.model.param_groups import is_placeholder


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | DummyOptim,
    *others: Any,
    slsam: SLSAMConfig | Mapping[str, Any] | None = None,
    total_steps: int | None = None,
    max_grad_norm: float | None = None,
) -> tuple[Any, ...]:
    """`accelerator.prepare`, and SL-SAM around what it returns.

    With the DeepSpeed plugin the model comes back as a DeepSpeedEngine, with the FSDP2 plugin sharded, and without
    either as it is, on its device: SL-SAM averages over ranks and wants no DistributedDataParallel around it.
    Says on the first rank, on stderr, that SL-SAM is on, and with which settings.
    SL-SAM's state is saved and loaded by `accelerator.save_state` and `load_state`.

    Args:
        accelerator: As it was launched.
        model: The module, not yet prepared.
        optimizer: Built on the module's parameters, or a `DummyOptim` of them where the DeepSpeed JSON brings the
            optimizer; its groups are split by layer.
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
    check_accelerator(accelerator)
    with_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    config = SLSAMConfig.of(slsam, block_of(accelerator))
    if is_placeholder(optimizer) and not with_deepspeed:
        raise ValueError(f"{type(optimizer).__name__}: needs the DeepSpeed plugin; pass a torch optimizer")
    scheduler = next((other for other in others if isinstance(other, LRScheduler)), None)
    layer_map = split_by_layer(model, optimizer, config, scheduler)
    if accelerator.is_fsdp2 or with_deepspeed:
        with without_initial_state():
            model, *prepared = accelerator.prepare(model, optimizer, *others)
    else:
        model = accelerator.prepare_model(model, evaluation_mode=True)  # all of it but the wrapper
        broadcast_weights(model)
        prepared = [accelerator.prepare(other) for other in (optimizer, *others)]
    stepper = assemble(model, prepared[0], config, layer_map, total_steps=total_steps, max_grad_norm=max_grad_norm)
    announce(config, f"Accelerator ({accelerator.distributed_type.value})", rank=accelerator.process_index)
    # Nothing to do with DeepSpeed, which saves the state that there is.
    accelerator.register_save_state_pre_hook(lambda *_: stepper.complete_optimizer_state())
    accelerator.register_load_state_pre_hook(lambda *_: stepper.complete_optimizer_state())
    accelerator.register_for_checkpointing(stepper)
    return stepper, model, *prepared
