"""The model and the tokenizer that the command line trains, whole or by LoRA."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from slsam_ds.cli.adapters import SavedAdapter, add_lora, find_adapter, holds_adapter
from slsam_ds.cli.arguments import ModelArguments
from slsam_ds.cli.demo import load_demo_model
from slsam_ds.cli.refusal import UsageError, path_of, refusals
from slsam_ds.integrations.console import warn
from slsam_ds.shards import whole_shape

_WEIGHTS = ("*.safetensors", "*.bin")
_WHOLE_MODELS = ("model*.safetensors", "pytorch_model*.bin")
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
    adapter = None
    if arguments.model_name_or_path is None:
        model, tokenizer = load_demo_model(dtype)
    else:
        flag = f"--model_name_or_path {arguments.model_name_or_path}"
        name = _checked_name(flag, arguments.model_name_or_path)
        adapter = find_adapter(name, arguments)
        if adapter is None:
            tokenizer, model = _load_tokenizer(flag, name), _load_weights(flag, name, dtype)
        else:
            model, tokenizer = _load_adapted(flag, adapter, dtype)
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
    if adapter is not None:
        model = adapter.put_on(model)
    elif arguments.peft == "lora":
        model = add_lora(model, arguments)
    return model, tokenizer


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


def _checked_name(flag: str, name: str) -> str:
    """The folder, where there is such a one and it holds weights; else what can only be a hub id."""
    folder = path_of(flag, name)
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file() and not (folder / ADAPTER_CONFIG_NAME).is_file():
            raise UsageError(f"{flag}: the folder holds no {CONFIG_NAME}")
        if not _holds(folder, _WEIGHTS):
            raise UsageError(f"{flag}: the folder holds no weights (model.safetensors)")
        return str(folder)
    if folder.exists():
        raise UsageError(f"{flag}: expected a folder, not a file")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UsageError(f"{flag}: no such folder")
    return name


def _load_adapted(
    flag: str, adapter: SavedAdapter, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an adapter was trained on, and the adapter's tokenizer, which may have a template of its own."""
    folder, base_flag = Path(adapter.name), f"{flag}: its model {adapter.base}"
    if _holds(folder, _WHOLE_MODELS):
        raise UsageError(f"{flag}: the folder holds both a model and an adapter: give each a folder of its own")
    base = _checked_name(base_flag, adapter.base)
    if holds_adapter(base_flag, base):
        raise UsageError(f"{base_flag}: is an adapter itself: merge it into its model first")
    has_tokenizer = not folder.is_dir() or _holds(folder, _TOKENIZERS)
    tokenizer = _load_tokenizer(flag, adapter.name) if has_tokenizer else _load_tokenizer(base_flag, base)
    return _load_weights(base_flag, base, dtype), tokenizer


def _load_tokenizer(flag: str, name: str) -> PreTrainedTokenizerBase:
    folder = Path(name)
    if folder.is_dir() and not _holds(folder, _TOKENIZERS):
        raise UsageError(f"{flag}: the folder holds no tokenizer (tokenizer.json)")
    with _loading(flag, name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _load_weights(flag: str, name: str, dtype: torch.dtype) -> PreTrainedModel:
    with _loading(flag, name):
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        warn(
            f"{flag}: {len(missing)} weights, such as {missing[0]}, are not in the folder and start from random values"
        )
    loaded: PreTrainedModel = model
    return loaded


def _loading(flag: str, name: str) -> AbstractContextManager[None]:
    """Within, what transformers and its friends raise is a refusal."""
    failures = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)
    why = "cannot be loaded: " if Path(name).is_dir() else "no such folder, and not to be had from the hub: "
    return refusals(*failures, prefix=f"{flag}: {why}")


def _holds(folder: Path, patterns: Iterable[str]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)
