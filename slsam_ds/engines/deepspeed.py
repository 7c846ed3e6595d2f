"""Building a DeepSpeedEngine whose optimizer keeps one parameter group per arm."""

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError
from torch import nn

from slsam_ds.engines.deepspeed_checkpoint import accept_other_ranks
from slsam_ds.engines.operator_locks import warn_of_abandoned_locks
from slsam_ds.engines.param_groups import regroup
from slsam_ds.layers import LayerMap, split_param_groups

logger = logging.getLogger(__name__)

# What Hugging Face's TrainingArguments default to where a DeepSpeed JSON says "auto", so that one file serves both.
_AUTO_DEFAULTS: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}
_DEFAULT_LEARNING_RATE = 5e-5

_SECTIONS = (
    "zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "activation_checkpointing", "checkpoint",
    "hybrid_engine",
)  # fmt: skip
_NUMBERS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_USUAL_KEYS = (*_SECTIONS, *_NUMBERS, "slsam")
_SURELY = 0.8  # no other key that DeepSpeed 0.19 reads is so similar to one of these
_MODELS: Mapping[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}

# The private structures that engines/zero*.py rely on were read in these versions.
_OLDEST_DEEPSPEED = (0, 19, 8)
_FIRST_UNKNOWN_DEEPSPEED = (0, 20)


def read_config(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split a DeepSpeed configuration into DeepSpeed's part and the `slsam` block.

    Args:
        config: A path to a JSON file, or the mapping itself (left unchanged).

    Returns:
        DeepSpeed's configuration, and the `slsam` block or None.

    Raises:
        ValueError: No such file, not JSON, or not a mapping.
    """
    if isinstance(config, Mapping):
        values: Any = dict(config)
    else:
        try:
            values = json.loads(Path(config).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"DeepSpeed configuration {config}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"DeepSpeed configuration {config}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"DeepSpeed configuration {config}: expected a JSON object of settings")
    return values, values.pop("slsam", None)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse, before anything is built, what the engines do not support.

    Raises:
        ValueError: Naming the setting, its value and what to use.
    """
    if (
        not _OLDEST_DEEPSPEED
        <= tuple(map(int, deepspeed.__version__.split("+")[0].split(".")[:3]))
        < _FIRST_UNKNOWN_DEEPSPEED
    ):
        oldest, unknown = (".".join(map(str, version)) for version in (_OLDEST_DEEPSPEED, _FIRST_UNKNOWN_DEEPSPEED))
        raise ValueError(f"slsam_ds supports deepspeed >={oldest},<{unknown}; found {deepspeed.__version__}")
    _refuse_misspelt(config)
    for name in _SECTIONS:
        if not isinstance(config.get(name, {}), Mapping):
            raise ValueError(f"{name}={config[name]!r}: expected a section, like {{...}}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage}: choose 0, 1, 2 or 3")
    parsed = {name: _parse_section(name, config.get(name, {})) for name in _MODELS}
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(parsed["zero_optimization"], name)  # where older spellings of it have gone, too
        if offload is not None and offload.device not in ("none", "cpu"):
            raise ValueError(f"zero_optimization.{name}.device={offload.device}: not supported yet; use cpu")
    if config.get("checkpoint", {}).get("load_universal") is True:  # its step counters are another layer's
        raise ValueError(
            "checkpoint.load_universal=true: not supported; leave it out, slsam_ds loads plain checkpoints of any "
            "number of ranks"
        )
    if config.get("hybrid_engine", {}).get("enabled") is True:
        raise ValueError("hybrid_engine.enabled=true: not supported; switch it off")
    if stage == 0 and config.get("fp16", {}).get("enabled") is True:
        raise ValueError("fp16.enabled=true: needs zero_optimization.stage 1, 2 or 3; or use bf16 or float32")


def _refuse_misspelt(config: Mapping[str, Any]) -> None:
    """Refuse what was surely meant as another key: DeepSpeed ignores, without a word, any that it does not know."""
    for key in config:
        near = difflib.get_close_matches(key, _USUAL_KEYS, n=1, cutoff=_SURELY)
        if key not in _USUAL_KEYS and near:
            raise ValueError(f"{key}: unknown key; did you mean {near[0]!r}?")


def _parse_section(name: str, values: Mapping[str, Any]) -> DeepSpeedConfigModel:
    """A section as DeepSpeed will read it."""
    try:
        return _MODELS[name](**values)
    except ValidationError as error:
        problem = error.errors()[0]
    path = [str(part) for part in problem["loc"]]
    where = ".".join([name, *path])
    if problem["type"] != "extra_forbidden":
        reason = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
        reason = "expected a section, like {...}" if problem["type"] == "model_type" else reason
        raise ValueError(f"{where}={problem['input']!r}: {reason}")
    near = difflib.get_close_matches(path[-1], _known_keys(_MODELS[name], path[:-1]), n=1)
    raise ValueError(f"{where}: unknown key; " + (f"did you mean {near[0]!r}?" if near else "remove it"))


def _known_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys of a section, or of the section inside it that `path` leads to."""
    for part in path:
        annotation = section.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]  # most are optional
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return [key for name, field in section.model_fields.items() for key in (name, field.alias) if key]


def build_engine(
    model: nn.Module,
    config: dict[str, Any],
    layer_map: LayerMap,
    *,
    optimizer: Any = None,
    model_parameters: Any = None,
    lr_scheduler: Any = None,
    **kwargs: Any,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """`deepspeed.initialize` with parameter groups split by arm, and AdamW where no optimizer is given.

    Args:
        model: The module.
        config: DeepSpeed's configuration without the `slsam` block; "auto" values are resolved.
        layer_map: The arms.
        optimizer: A torch optimizer (regrouped in place), or a function from parameter groups to one.
        model_parameters: What an optimizer from the JSON or from a function trains, as in `deepspeed.initialize`.
        lr_scheduler: A scheduler (its per-group lists are split along), or a function from the optimizer to one.
        **kwargs: Passed on to `deepspeed.initialize`.

    Returns:
        engine, optimizer, dataloader, scheduler: as `deepspeed.initialize`.
    """
    config = _resolve_auto(config, model)
    check_config(config)
    if isinstance(model, PipelineModule):
        raise ValueError("PipelineModule: pipeline parallelism is not supported; pass a module that runs as a whole")
    if isinstance(optimizer, torch.optim.Optimizer):
        regroup(optimizer, layer_map, lr_scheduler if _is_scheduler(lr_scheduler) else None)
    else:
        trained = list(model_parameters) if model_parameters is not None else _trained_parameters(layer_map)
        model_parameters = split_param_groups(trained, layer_map)
        if optimizer is None and "optimizer" not in config:
            logger.info("no optimizer given: AdamW with lr=%g", _DEFAULT_LEARNING_RATE)
            if _offloads_optimizer(config):  # torch's would be slow on the CPU, DeepSpeed has one of its own
                config["optimizer"] = {"type": "AdamW", "params": {"lr": _DEFAULT_LEARNING_RATE, "weight_decay": 0.01}}
            else:
                optimizer = torch.optim.AdamW(model_parameters, lr=_DEFAULT_LEARNING_RATE)
    warn_of_abandoned_locks()
    engine, *others = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        lr_scheduler=lr_scheduler,
        config=config,
        **kwargs,
    )
    accept_other_ranks(engine)
    return engine, *others


def _offloads_optimizer(config: Mapping[str, Any]) -> bool:
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _trained_parameters(layer_map: LayerMap) -> list[nn.Parameter]:
    in_arms = [parameter for layer in layer_map for _, parameter in layer.parameters]
    return in_arms + [parameter for _, parameter in layer_map.always]


def _is_scheduler(lr_scheduler: Any) -> bool:
    return hasattr(lr_scheduler, "step") and hasattr(lr_scheduler, "state_dict")


def _resolve_auto(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Fill in the "auto" values that Hugging Face's Trainer would; other "auto"s give way to DeepSpeed's defaults."""
    dtype = next(model.parameters()).dtype
    precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    resolved: dict[str, Any] = {}
    for key, value in config.items():
        if value == "auto":
            if key in _AUTO_DEFAULTS:
                resolved[key] = _AUTO_DEFAULTS[key]
                logger.info("%s=auto: using %s", key, resolved[key])
        elif isinstance(value, Mapping):
            filled = {inner: precision[key] for inner in value if key in precision and value[inner] == "auto"}
            resolved[key] = {inner: item for inner, item in value.items() if item != "auto"} | filled
        else:
            resolved[key] = value
    return resolved
