"""What a model is tried for before its first step: whether it can learn from what it will be given.

Measured, not looked up: what a token sees depends on class, attention, configuration and the version of transformers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from slsam_ds.cli.refusal import UsageError
from slsam_ds.integrations.console import one_line

_PROBE_LENGTH = 6  # tokens of each of the two parts that are told apart
_LEAK = 0.01  # of what a part changes where nothing hides it; masked attention hides exactly, but for rounding


class ModelCheck(TrainerCallback):
    """Refuses, before the first step, a model that sees what it is to predict, or packed samples that see each other.

    Args:
        trainer: Its model is tried as the engine has prepared it, on all ranks.
        packed: Whether rows hold several samples.
    """

    def __init__(self, trainer: Trainer, *, packed: bool) -> None:
        self._trainer = trainer
        self._packed = packed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises: UsageError: See above."""
        model = self._trainer.model_wrapped
        training = model.training
        model.eval()  # no dropout
        try:
            self._check_order(model)
            if self._packed:
                self._check_packing(model)
        finally:
            model.train(training)

    def _check_order(self, model: Any) -> None:
        config = self._trainer.model.config
        if measure_foresight(model, config.get_text_config().vocab_size, self._trainer.args.device) > _LEAK:
            raise UsageError(
                f"this model ({config.model_type}) lets tokens see those after them, which it is to predict, as "
                "encoders do: choose a causal language model"
            )

    def _check_packing(self, model: Any) -> None:
        config = self._trainer.model.config
        try:
            leak = measure_leak(model, config.get_text_config().vocab_size, self._trainer.args.device)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--packing: {config.model_type} cannot be packed ({one_line(error)})") from error
        if not leak <= _LEAK:
            attention = config._attn_implementation
            cache = "; --use_cache False may help" if config.use_cache else ""
            raise UsageError(
                f"--packing: samples in a row see each other in this model ({config.model_type} with {attention} "
                f"attention{cache}): leave --packing out"
            )


@torch.no_grad()
def measure_foresight(model: Any, vocabulary: int, device: torch.device) -> float:
    """How much a token depends on those after it.

    Args:
        model: In eval mode.
        vocabulary: Number of tokens.
        device: Of the model's inputs.

    Returns:
        The change of the logits of the first tokens when the later ones change, as a share of the change of the later
        ones' own: 0 for a causal model.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, vocabulary, (_PROBE_LENGTH,), generator=generator)
    # One token over and over: what an encoder takes the mean of would partly cancel out.
    later = torch.randperm(vocabulary, generator=generator)[:2, None].expand(2, _PROBE_LENGTH)
    ids = torch.cat([first.expand(2, -1), later], dim=1).to(device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    change = (logits[0] - logits[1]).abs()
    return float(change[:_PROBE_LENGTH].mean() / change[_PROBE_LENGTH:].mean())


@torch.no_grad()
def measure_leak(model: Any, vocabulary: int, device: torch.device) -> float:
    """How much a sample depends on the one before it in the row.

    Args:
        model: In eval mode.
        vocabulary: Number of tokens.
        device: Of the model's inputs.

    Returns:
        The change of its logits when the other one changes, as a share of what it is where both are one sample: 0 where
        nothing leaks.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(0, vocabulary, (3, _PROBE_LENGTH), generator=generator)
    ids = torch.stack([torch.cat([first, second]), torch.cat([other, second])]).to(device)
    joined = torch.arange(2 * _PROBE_LENGTH, device=device).expand(2, -1)

    def change(positions: Tensor) -> float:
        logits = model(input_ids=ids, position_ids=positions).logits[:, _PROBE_LENGTH:].float()
        return float((logits[0] - logits[1]).abs().mean())

    return change(joined % _PROBE_LENGTH) / change(joined)
