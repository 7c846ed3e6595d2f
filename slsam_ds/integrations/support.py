"""What the integrations ask before anything is built: whether it can work, and where its knobs are."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from transformers import Seq2SeqTrainer, Trainer

from slsam_ds.engines.deepspeed.config import take_block
from slsam_ds.engines.ranks import ProcessGroupRanks
from slsam_ds.model.compiled import whole_graph


def check_trainer(trainer: Any, mixin: type) -> None:
    """Refuse, at construction, a Trainer that cannot work.

    Args:
        trainer: Constructed, but for SL-SAM's part.
        mixin: What makes it SL-SAM's: its own methods are not the trainer's.

    Raises:
        ValueError: Naming the setting and what to use.
    """
    num_ranks = ProcessGroupRanks(None, trainer.args.device).world_size
    if trainer.args.world_size != num_ranks:  # every rank would train on the same data
        raise ValueError(
            f"TrainingArguments sees {trainer.args.world_size} process where {num_ranks} train together: "
            "on a machine without an accelerator, set use_cpu=True"
        )
    if _generates(trainer, mixin):
        raise ValueError(
            f"{type(trainer).__name__}: generates its data while it steps, which two passes over the same data cannot "
            "follow; use a trainer of a fixed data set (SFT, DPO, KTO, reward)"
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
        raise ValueError(
            f"optim={optim}: updates weights while gradients are computed, which SL-SAM does twice; use an optimizer "
            "that steps afterwards, such as adamw_torch"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(f"one process drives {trainer.args.n_gpu} GPUs: start one per GPU, with torchrun or deepspeed")
    if trainer.is_deepspeed_enabled:
        mismatches = describe_mismatches(trainer.accelerator.state.deepspeed_plugin.hf_ds_config)
        if mismatches:
            raise ValueError(f"DeepSpeed's configuration contradicts the arguments: {mismatches}")
        return
    if trainer.args.fp16:
        raise ValueError("fp16=True: needs DeepSpeed, which scales the loss; or use bf16=True")
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError('FSDP version 1: not supported; use fsdp_config={"fsdp_version": 2, ...}')


def _generates(trainer: Any, mixin: type) -> bool:
    """Whether the trainer samples completions in its step: it prepares its inputs or steps in a way of its own, and
    its arguments have the temperature to sample at. True of every online trainer of TRL 1.16, and of no other.
    """
    own_steps = any(
        name in vars(base)
        for base in type(trainer).__mro__
        if issubclass(base, Trainer) and base not in (Trainer, Seq2SeqTrainer) and not issubclass(base, mixin)
        for name in ("_prepare_inputs", "training_step")
    )
    return own_steps and hasattr(trainer.args, "temperature")


def describe_mismatches(hf_deepspeed_config: Any) -> str:
    """Where DeepSpeed's configuration and the training arguments disagree, and the way out; empty where they do not.

    Args:
        hf_deepspeed_config: transformers' `HfTrainerDeepSpeedConfig`, which has compared them.
    """
    lines = [line.removeprefix("- ds ").replace(" vs hf ", " but --") for line in hf_deepspeed_config.mismatches]
    return "; ".join([*lines, '"auto" takes the argument\'s value']) if lines else ""


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse, before anything is prepared, how an Accelerator was launched where that cannot work.

    Raises:
        ValueError: Naming the setting and what to use.
    """
    num_ranks = ProcessGroupRanks(None, accelerator.device).world_size
    if accelerator.num_processes != num_ranks:  # every rank would train on the same data
        raise ValueError(
            f"Accelerator sees {accelerator.num_processes} process where {num_ranks} train together: "
            "on a machine without an accelerator, set cpu=True"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise whole_graph("dynamo_backend")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={accelerator.mixed_precision}: not supported; use bf16 or no")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1: not supported; use fsdp_version: 2")


def block_of(accelerator: Accelerator) -> dict[str, Any] | None:
    """The `slsam` block of the DeepSpeed configuration, taken out: Accelerate would try to resolve its "auto" values.

    Asks Accelerate's plugin, which has the configuration whoever brought it: the arguments or `accelerate launch`. The
    block stays beside it, so that a second trainer or `prepare` with the same plugin finds it.

    Returns:
        The block; None where there is none, or no DeepSpeed.

    Raises:
        ValueError: The rest of the configuration is not supported.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return None
    block = take_block(plugin.deepspeed_config)
    if block is not None:
        plugin.slsam_block = block
    return getattr(plugin, "slsam_block", None)
