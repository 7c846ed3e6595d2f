"""DeepSpeed's configuration: the `slsam` block taken out of it, and what the engines do not support refused."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from pydantic import BaseModel, ValidationError

from slsam_ds.engines.deepspeed.internals import check_version
from slsam_ds.engines.deepspeed.settings import REFUSED, SECTIONS, VALUES, check_settings, without_auto
from slsam_ds.engines.named_configs import find_config, named_configs
from slsam_ds.sentences import did_you_mean

logger = logging.getLogger(__name__)

_KNOWN = (*SECTIONS, *VALUES, "slsam")
_SURELY = 0.85  # so similar to one of these, it was meant as that
_MODELS: Mapping[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}


def read_config(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split a DeepSpeed configuration into DeepSpeed's part and the `slsam` block.

    Args:
        config: A path to a JSON file, the name of one that comes with the package, like "zero2", or the mapping itself
            (left unchanged).

    Returns:
        DeepSpeed's configuration, and the `slsam` block or None.

    Raises:
        ValueError: No such file, not JSON, or not a mapping.
    """
    if isinstance(config, Mapping):
        values: Any = dict(config)
    else:
        try:
            values = json.loads(Path(find_config(config, "zero")).read_text(encoding="utf-8"))
        except OSError as error:
            ours = "" if Path(config).suffix else f"; by name there are {', '.join(named_configs('zero'))}"
            raise ValueError(f"DeepSpeed configuration {config}: cannot be read ({error.strerror}){ours}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"DeepSpeed configuration {config}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"DeepSpeed configuration {config}: expected a JSON object of settings")
    return values, values.pop("slsam", None)


def take_block(config: dict[str, Any]) -> dict[str, Any] | None:
    """Take the `slsam` block out of a configuration that DeepSpeed will read, and check the rest.

    Args:
        config: Changed in place: DeepSpeed does not know the block.

    Returns:
        The block; None where there is none.

    Raises:
        ValueError: See `check_config`.
    """
    block: dict[str, Any] | None = config.pop("slsam", None)
    check_config(config)
    return block


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse, before anything is built, what the engines do not support.

    Raises:
        ValueError: Naming the setting, its value and what to use.
    """
    check_version()
    _look_for_unknown(config)
    config = without_auto(config)  # whoever resolves those keeps to what is allowed
    check_settings(config)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage}: choose 0, 1, 2 or 3")
    for name in _MODELS:
        _parse_section(name, config.get(name, {}))
    for name in ("offload_optimizer", "offload_param"):
        device = offload_device(config, name)
        if device not in ("none", "cpu"):
            raise ValueError(f"zero_optimization.{name}.device={device}: not supported yet; use cpu")
    if stage == 0 and config.get("fp16", {}).get("enabled") is True:
        raise ValueError("fp16.enabled=true: needs zero_optimization.stage 1, 2 or 3; or use bf16 or float32")


def offload_device(config: Mapping[str, Any], name: str) -> str:
    """Where it is offloaded to, also where the configuration says so in an older way (`"cpu_offload": true`).

    Args:
        config: DeepSpeed's.
        name: `"offload_optimizer"` or `"offload_param"`.
    """
    offload = getattr(_parse_section("zero_optimization", config.get("zero_optimization", {})), name)
    return "none" if offload is None else str(OffloadDeviceEnum(offload.device).value)


def _look_for_unknown(config: Mapping[str, Any]) -> None:
    """Refuse what was surely meant as another key: DeepSpeed ignores, without a word, any that it does not know."""
    for key in config:
        if key in _KNOWN or key in REFUSED:
            continue
        hint = did_you_mean(key, _KNOWN, cutoff=_SURELY)
        if hint:
            raise ValueError(f"{key}: unknown key; {hint}")
        logger.warning("%s: DeepSpeed has no such configuration key and ignores it", key)


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
    otherwise = "move it to the top level" if path[-1] in _KNOWN else "remove it"
    hint = did_you_mean(path[-1], _known_keys(_MODELS[name], path[:-1]), otherwise)
    raise ValueError(f"{where}: unknown key; {hint}")


def _known_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys of a section, or of the section inside it that `path` leads to."""
    for part in path:
        annotation = section.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]  # most are optional
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return [key for name, field in section.model_fields.items() for key in (name, field.alias) if key]
