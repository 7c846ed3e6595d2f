"""LoRA adapters: new ones around a model, and saved ones that are trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from slsam_ds.cli.arguments import ModelArguments
from slsam_ds.cli.refusal import UsageError, refusals

if TYPE_CHECKING:
    from peft import PeftConfig

_DEFAULTS: Mapping[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ["all-linear"],
}
_ADAPTER_NAME = "default"  # peft's own, which checkpoints leave out of the weights' names
_FAILURES = (ValueError, TypeError, KeyError, OSError, RuntimeError)  # what peft raises on what does not fit together


def given_lora_flags(arguments: Any) -> dict[str, Any]:
    """The LoRA flags that the user gave, by name."""
    return {name: getattr(arguments, name) for name in _DEFAULTS if getattr(arguments, name) is not None}


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel:
    """The model with new adapters, and everything else frozen.

    Raises:
        UsageError: Settings that do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    flags = {**_DEFAULTS, **given_lora_flags(arguments)}
    targets = flags["lora_target_modules"]
    with refusals(*_FAILURES, prefix="--peft lora: "):
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=flags["lora_r"],
                lora_alpha=flags["lora_alpha"],
                lora_dropout=flags["lora_dropout"],
                target_modules=targets[0] if targets == ["all-linear"] else targets,
            ),
        )


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter that was trained before, in a folder or on the hub.

    Attributes:
        name: The folder or hub id.
        config: Its own settings.
    """

    name: str
    config: "PeftConfig"

    @property
    def base(self) -> str:
        """The model that it adapts: folder or hub id."""
        return str(self.config.base_model_name_or_path)

    def put_on(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with this adapter, trainable, and everything else frozen.

        Raises:
            UsageError: It is another model's.
        """
        from peft import get_peft_model

        prefix = f"--model_name_or_path {self.name}: the adapter does not fit its model {self.base}: "
        with refusals(*_FAILURES, prefix=prefix):
            adapted = get_peft_model(model, self.config)
            # By itself, because `PeftModel.from_pretrained` does not tell what was left over.
            report = adapted.load_adapter(self.name, _ADAPTER_NAME, is_trainable=True)
        strange = [*report.missing_keys, *report.unexpected_keys]
        if strange:
            raise UsageError(f"{prefix}{len(strange)} weights are in only one of them, such as {strange[0]}")
        return adapted


def holds_adapter(flag: str, name: str) -> bool:
    """Whether a folder or hub id is an adapter's.

    Args:
        flag: The flag that named it, for messages.
        name: The folder or hub id.

    Raises:
        UsageError: Nobody can tell.
    """
    with refusals(OSError, ValueError, prefix=f"{flag}: "):
        return find_adapter_config_file(name) is not None


def find_adapter(name: str, arguments: ModelArguments) -> SavedAdapter | None:
    """The adapter that a folder or hub id holds; None where it holds none.

    Raises:
        UsageError: An adapter that cannot be trained on, or not with these flags.
    """
    flag = f"--model_name_or_path {arguments.model_name_or_path}"
    if not holds_adapter(flag, name):
        return None
    from peft import PeftConfig

    if arguments.peft != "lora":
        raise UsageError(
            f"{flag}: is an adapter, not a model: add --peft lora to train it further, or merge it into its model first"
        )
    with refusals(*_FAILURES, AttributeError, prefix=f"{flag}: its adapter_config.json cannot be used: "):
        config = PeftConfig.from_pretrained(name)
        if config.peft_type is None:
            raise ValueError("it names no peft_type")
    config.inference_mode = False  # as which all are saved
    if config.peft_type != "LORA":
        raise UsageError(f"{flag}: is an adapter of type {config.peft_type.value}; only LoRA adapters are supported")
    if config.task_type not in ("CAUSAL_LM", None):
        raise UsageError(f"{flag}: is an adapter for {config.task_type}; only adapters for CAUSAL_LM are supported")
    if config.base_model_name_or_path is None:
        raise UsageError(f"{flag}: its adapter_config.json does not name its model (base_model_name_or_path)")
    _check_flags(name, config, arguments)
    return SavedAdapter(name, config)


def _check_flags(name: str, config: Any, arguments: ModelArguments) -> None:
    """Refuse LoRA flags that the saved adapter contradicts."""
    targets = config.target_modules
    own = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": [targets] if isinstance(targets, str) else sorted(targets or ()),
    }
    for flag, given in given_lora_flags(arguments).items():
        if (sorted(given) if isinstance(given, list) else given) != own[flag]:
            asked, has = (" ".join(value) if isinstance(value, list) else value for value in (given, own[flag]))
            raise UsageError(
                f"--{flag} {asked}: the adapter in {name} has {has}, which cannot be changed: leave the flag out"
            )
