"""Building a DeepSpeedEngine whose optimizer keeps one parameter group per arm."""

import functools
import logging
import operator
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from slsam_ds.engines.deepspeed.config import check_config, offload_device
from slsam_ds.engines.deepspeed.lean_start import without_initial_state
from slsam_ds.engines.deepspeed.operator_locks import warn_of_abandoned_locks
from slsam_ds.engines.deepspeed.settings import value_at, without_auto
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.param_groups import split_param_groups

logger = logging.getLogger(__name__)

# What Hugging Face's TrainingArguments default to where a DeepSpeed JSON says "auto", so that one file serves both.
_AUTO_DEFAULTS: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}
_DEFAULT_LEARNING_RATE = 5e-5


def build_engine(
    model: nn.Module,
    config: dict[str, Any],
    layer_map: LayerMap,
    *,
    optimizer: Any = None,
    model_parameters: Any = None,
    lr_scheduler: Any = None,
    total_steps: int | None = None,
    **kwargs: Any,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """`deepspeed.initialize` with parameter groups split by arm, and AdamW where no optimizer is given.

    Args:
        model: The module.
        config: DeepSpeed's configuration without the `slsam` block; "auto" values are resolved.
        layer_map: The arms.
        optimizer: A torch optimizer whose groups are split by arm, or a function from parameter groups to one.
        model_parameters: What an optimizer from the JSON or from a function trains, as in `deepspeed.initialize`.
        lr_scheduler: A scheduler, or a function from the optimizer to one.
        total_steps: Length of the run, for a scheduler of the JSON that leaves it open.
        **kwargs: Passed on to `deepspeed.initialize`.

    Returns:
        engine, optimizer, dataloader, scheduler: as `deepspeed.initialize`.

    Raises:
        ValueError: A setting that is not supported, or that DeepSpeed refuses.
    """
    check_config(config)
    config = _resolve_auto(config, model, optimizer, total_steps)
    if isinstance(model, PipelineModule):
        raise ValueError("PipelineModule: pipeline parallelism is not supported; pass a module that runs as a whole")
    if not isinstance(optimizer, torch.optim.Optimizer):
        trained = list(model_parameters) if model_parameters is not None else _trained_parameters(layer_map)
        model_parameters = split_param_groups(trained, layer_map)
        if optimizer is None and "optimizer" not in config:
            logger.info("no optimizer given: AdamW with lr=%g", _DEFAULT_LEARNING_RATE)
            # On the CPU, torch's would be slow, and DeepSpeed has one of its own.
            if offload_device(config, "offload_optimizer") != "none":
                config["optimizer"] = {"type": "AdamW", "params": {"lr": _DEFAULT_LEARNING_RATE, "weight_decay": 0.01}}
            else:
                optimizer = torch.optim.AdamW(model_parameters, lr=_DEFAULT_LEARNING_RATE)
    warn_of_abandoned_locks()
    try:
        with without_initial_state():
            engine, *others = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=model_parameters,
                lr_scheduler=lr_scheduler,
                config=config,
                **kwargs,
            )
    except (AssertionError, DeepSpeedConfigError) as error:  # by either, DeepSpeed refuses a configuration
        raise ValueError(f"deepspeed.initialize: {str(error) or 'refused'}") from error
    return engine, *others


def _trained_parameters(layer_map: LayerMap) -> list[nn.Parameter]:
    in_arms = [parameter for layer in layer_map for _, parameter in layer.parameters]
    return in_arms + [parameter for _, parameter in layer_map.always]


def _resolve_auto(
    config: Mapping[str, Any], model: nn.Module, optimizer: Any = None, total_steps: int | None = None
) -> dict[str, Any]:
    """Fill in the "auto" values that Hugging Face's Trainer would; other "auto"s give way to DeepSpeed's defaults.

    Raises:
        ValueError: A scheduler that needs the length of the run, which nobody tells.
    """
    dtype = next(model.parameters()).dtype
    rates = [getattr(optimizer, "defaults", {}).get("lr"), value_at(config, "optimizer.params.lr")]
    rate = next((each for each in rates if each not in (None, "auto")), _DEFAULT_LEARNING_RATE)
    filled: dict[str, Any] = {
        **_AUTO_DEFAULTS,
        "bf16.enabled": dtype == torch.bfloat16,
        "fp16.enabled": dtype == torch.float16,
        "optimizer.params.lr": _DEFAULT_LEARNING_RATE,
        "optimizer.params.weight_decay": 0.0,
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": rate,
        "scheduler.params.warmup_num_steps": 1,  # none is refused by DeepSpeed
        "scheduler.params.total_num_steps": total_steps,
    }
    resolved = without_auto(config)
    for path, value in filled.items():
        if value_at(config, path) != "auto":
            continue
        if value is None:
            raise ValueError(f'{path}="auto": give a number, or total_steps to slsam_ds.initialize')
        *outer, key = path.split(".")
        functools.reduce(operator.getitem, outer, resolved)[key] = value
        logger.info("%s=auto: using %s", path, value)
    return resolved
