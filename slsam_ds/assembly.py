"""SL-SAM around what a framework prepares: before the engine is built, and after.

Every way in (`slsam_ds.initialize`, Accelerate's `prepare`, the Trainer) takes these steps in this order:

1. `SLSAMConfig.of`: the knobs, from the caller or from the `slsam` block of a DeepSpeed JSON (`take_block`).
2. `split_by_layer`: find the layers, freeze what is never trained, and split the optimizer's groups by layer. The
   Trainer builds its optimizer later and then calls `regroup`, which is the second half.
3. The framework's own: wrap or shard the model, build the engine.
4. `assemble`: SL-SAM around the result.
"""

import sys
from typing import Any

import torch
from torch import nn

from slsam_ds.config import SLSAMConfig
from slsam_ds.engines import is_deepspeed_engine
from slsam_ds.model.layers import LayerMap, map_layers
from slsam_ds.model.param_groups import is_placeholder, regroup
from slsam_ds.slsam import SLSAM


def split_by_layer(model: nn.Module, optimizer: Any, config: SLSAMConfig, lr_scheduler: Any = None) -> LayerMap:
    """Find the layers of a model that is not wrapped yet, and split the groups of its optimizer by them.

    Args:
        model: The module.
        optimizer: Its torch optimizer, or a placeholder for one that DeepSpeed will build; changed in place. None:
            whoever builds one splits its groups.
        config: The knobs.
        lr_scheduler: A scheduler already built on the optimizer.
    """
    # The parameters of a placeholder may be a generator: they are read once, when they are split.
    layer_map = map_layers(model, config, None if is_placeholder(optimizer) else optimizer)
    if optimizer is not None:
        regroup(optimizer, layer_map, lr_scheduler)
    return layer_map


def announce(config: SLSAMConfig, where: str, *, rank: int) -> None:
    """Say on the first rank, on stderr, that SL-SAM is on, and with which settings: a forgotten block shows.

    Args:
        config: The settings.
        where: In what they are on.
        rank: This one.
    """
    if rank == 0:
        print(f"SL-SAM is on in {where}: {config.summary()}", file=sys.stderr, flush=True)


def assemble(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: SLSAMConfig,
    layer_map: LayerMap,
    *,
    total_steps: int | None = None,
    max_grad_norm: float | None = None,
) -> SLSAM:
    """SL-SAM around a prepared model.

    Args:
        model: A DeepSpeedEngine, or a module that may have been sharded.
        optimizer: The torch optimizer of a module. A DeepSpeedEngine has its own.
        config: The knobs.
        layer_map: What `split_by_layer` found.
        total_steps: As for `SLSAM`.
        max_grad_norm: Likewise.

    Raises:
        ValueError: A model, wrapper or combination that is not supported.
    """
    limits: dict[str, Any] = {"total_steps": total_steps, "max_grad_norm": max_grad_norm}
    if is_deepspeed_engine(model):
        from slsam_ds.engines.deepspeed.checkpoint import accept_other_ranks

        accept_other_ranks(model)
        return SLSAM(model, None, config, layer_map=layer_map, **limits)
    # Sharding has put other tensors into the module and into the optimizer's groups: the layers are looked for again.
    return SLSAM(model, getattr(optimizer, "optimizer", optimizer), config, **limits)
