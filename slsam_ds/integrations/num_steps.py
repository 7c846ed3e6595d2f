"""Whether a training takes any step at all."""

from typing import Any


class NoStepsError(ValueError):
    """Training would end, or has ended, without a single step."""


def check_steps_asked_for(args: Any) -> None:
    """Refuse `TrainingArguments` that ask for no step: the trainer would end well, and what is saved be untrained.

    Raises:
        NoStepsError: Naming the arguments.
    """
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise NoStepsError(
            f"max_steps={args.max_steps} with num_train_epochs={args.num_train_epochs:g}: no step would be taken; "
            "choose a positive number of steps, or max_steps=-1 and a positive number of epochs"
        )


def check_batches(args: Any, dataloader: Any) -> None:
    """Refuse training data that make no batch.

    Args:
        args: The trainer's `TrainingArguments`.
        dataloader: Of the training data, as it is prepared for this rank.

    Raises:
        NoStepsError: Naming the numbers of samples and ranks, and the size of a batch.
    """
    if _num_batches(dataloader) == 0:
        kept = "; or leave out dataloader_drop_last, which drops what is less" if args.dataloader_drop_last else ""
        raise NoStepsError(
            f"{len(dataloader.dataset)} samples make no batch for {args.world_size} ranks of {args.train_batch_size} "
            f"samples each: give more samples or a smaller per_device_train_batch_size{kept}"
        )


def check_steps_taken(num_steps: int, dataloader: Any) -> None:
    """Refuse, at its end, a training whose data were a stream of nothing.

    Args:
        num_steps: The trainer's count.
        dataloader: Of the training data.

    Raises:
        NoStepsError: No step was taken.
    """
    if num_steps == 0 and _num_batches(dataloader) is None:
        raise NoStepsError("training ended without a step: the data gave no batch")


def _num_batches(dataloader: Any) -> int | None:
    """None: of a stream."""
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None
