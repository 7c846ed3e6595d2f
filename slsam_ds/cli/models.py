"""The model and the tokenizer that the command line trains, whole or by LoRA."""

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slsam_ds.cli.arguments import ModelArguments
from slsam_ds.cli.demo import load_demo_model
from slsam_ds.cli.refusal import UsageError, path_of, refusals
from slsam_ds.integrations.console import warn
from slsam_ds.shards import whole_shape

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_DEFAULT_MAX_LENGTH = 1024


def load_model(arguments: ModelArguments, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what `--model_name_or_path` names, or the demo model; adapted by LoRA where asked for.

    Args:
        arguments: The flags.
        dtype: Of the weights.

    Raises:
        UsageError: No such folder, a folder without configuration, weights or tokenizer, or LoRA settings that do not
            fit the model.
    """
    if arguments.model_name_or_path is None:
        model, tokenizer = load_demo_model(dtype)
    else:
        model, tokenizer = _load_named(arguments.model_name_or_path, dtype)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"{tokenizer.name_or_path}: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so the token does not matter
    weight = model.get_input_embeddings().weight
    num_rows = whole_shape(weight)[0]
    if len(tokenizer) > num_rows:
        raise UsageError(
            f"{tokenizer.name_or_path}: its tokenizer has {len(tokenizer)} tokens, its model embeddings for "
            f"{num_rows}; they do not belong together"
        )
    return (add_lora(model, arguments) if arguments.peft == "lora" else model), tokenizer


def choose_max_length(asked: int | None, model: PreTrainedModel, *, flag: str = "--max_length") -> int:
    """Tokens per sample: what was asked for, or 1024, within what the model allows.

    Raises:
        UsageError: More than the model has positions for, or fewer than 2.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    allowed = positions if isinstance(positions, int) and positions > 0 else None
    if asked is None:
        return min(_DEFAULT_MAX_LENGTH, allowed or _DEFAULT_MAX_LENGTH)
    if asked < 2 or (allowed is not None and asked > allowed):
        raise UsageError(f"{flag} {asked}: choose from 2 to the model's {allowed or 'limit'}")
    return asked


def _load_named(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    flag = f"--model_name_or_path {name}"
    failing = f"{flag}: no such folder, and not to be had from the hub: "
    folder = path_of(flag, name)
    if folder.is_dir():
        name = str(folder)
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise UsageError(f"{flag}: the folder holds no config.json")
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            raise UsageError(f"{flag}: the folder holds no weights (model.safetensors)")
        if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
            raise UsageError(f"{flag}: the folder holds no tokenizer (tokenizer.json)")
        failing = f"{flag}: cannot be loaded: "
    elif folder.exists():
        raise UsageError(f"{flag}: expected a folder, not a file")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UsageError(f"{flag}: no such folder")
    failures = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)
    with refusals(*failures, prefix=failing):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        warn(f"{flag}: {len(missing)} weights are not in the folder and start from random values, like {missing[0]}")
    return model, tokenizer


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel:
    """The model with adapters, and everything else frozen.

    Raises:
        UsageError: Settings that do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    targets = arguments.lora_target_modules
    with refusals(ValueError, TypeError, KeyError, prefix="--peft lora: "):
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=arguments.lora_r,
                lora_alpha=arguments.lora_alpha,
                lora_dropout=arguments.lora_dropout,
                target_modules=targets[0] if targets == ["all-linear"] else targets,
            ),
        )
