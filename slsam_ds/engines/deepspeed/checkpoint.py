"""DeepSpeed checkpoints, loaded by any number of ranks: each is given the partition that it would have saved itself.

DeepSpeed's universal checkpoint is the stock way to another number of ranks. It needs optimizer state of every layer,
gives all of ZeRO-3's layers the step counter of the first, and knows Adam only. Nothing of that can happen where the
saved partitions are cut anew and handed to DeepSpeed's own load.

Private structures: the files and methods of deepspeed/runtime/engine.py, and the state that
deepspeed/runtime/zero/stage_1_and_2.py and stage3.py save, 0.19.8.
"""

import contextlib
import functools
import glob
import itertools
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from slsam_ds.engines.deepspeed.step import overlaid
from slsam_ds.state.enums import enum_member

_SAVED_BY_DEEPSPEED = [
    DynamicLossScaler,
    LossScaler,
    ZeroStageEnum,
    fragment_address,
    (enum_member, "builtins.getattr"),
]


def setup_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What the files of a checkpoint depend on: another stage or dtype looks for files of other names and contents."""
    return {
        "zero_optimization.stage": int(engine.zero_optimization_stage()),
        "bf16": bool(engine.bfloat16_enabled()),
        "fp16": bool(engine.fp16_enabled()),
    }


def checkpoint_folder(load_dir: str | os.PathLike[str], tag: str | None) -> Path | None:
    """Where a checkpoint lies; without a tag the one that `latest` names, None where there is no such file."""
    if tag is None:
        latest = Path(load_dir, "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text(encoding="utf-8").strip()
    return Path(load_dir, tag)


def writes_for_its_node(engine: DeepSpeedEngine) -> bool:
    """Whether this rank writes what is the same on all: one per checkpoint, or per node where each has its own disk."""
    return int(engine.local_rank if engine.use_node_local_storage() else engine.global_rank) == 0


def accept_other_ranks(engine: DeepSpeedEngine) -> None:
    """From here on, `engine.load_checkpoint` takes what any number of ranks has saved, and runs no code in it."""
    engine.checkpoint_engine.load = functools.partial(_read, mmap=None)
    engine.load_checkpoint = functools.partial(_load_checkpoint, engine)


def _load_checkpoint(
    engine: DeepSpeedEngine, load_dir: str | os.PathLike[str], tag: str | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """`DeepSpeedEngine.load_checkpoint` by any number of ranks.

    Raises:
        ValueError: Another number of ranks has saved it, and ordered the weights otherwise: nothing was changed; or a
            file holds more than data.
    """
    stock = functools.partial(type(engine).load_checkpoint, engine, str(load_dir), **kwargs)
    folder = checkpoint_folder(load_dir, tag)
    if folder is None or not engine.zero_optimization():
        return stock(tag=tag)
    load_module = functools.partial(_load_module, engine, engine.load_module_state_dict, folder)
    load_zero = functools.partial(_load_zero_checkpoint, engine, engine._load_zero_checkpoint)
    with (
        _any_ranks_files(engine),
        overlaid(engine, "load_module_state_dict", load_module),
        overlaid(engine, "_load_zero_checkpoint", load_zero),
    ):
        _check_order(engine, folder)
        return stock(tag=folder.name)


def _check_order(engine: DeepSpeedEngine, folder: Path) -> None:
    """Refuse, before anything is loaded, partitions that cannot be cut anew."""
    saved = _read(engine._get_ckpt_name(str(folder.parent), folder.name))
    num_saved, num_ranks = saved["dp_world_size"], engine.seq_dp_world_size
    saved_order = [list(group) for group in saved["param_shapes"]]
    if num_saved != num_ranks and saved_order != [list(group) for group in engine._get_zero_param_shapes()]:
        raise ValueError(
            f"{folder}: was saved by {num_saved} ranks, whose partitions hold the weights in another order than those "
            f"of {num_ranks} (zero_optimization.round_robin_gradients or sub_group_size): resume with {num_saved} ranks"
        )


@contextlib.contextmanager
def _any_ranks_files(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within, a rank that has not saved a model file reads the first one's: under ZeRO-3 there is one per rank."""
    stock = engine._get_ckpt_name

    def name(folder: str, tag: str, mp_placeholder: str | None = None, pp_placeholder: str | None = None) -> str:
        own: str = stock(folder, tag, mp_placeholder, pp_placeholder)
        return own if glob.glob(own) else str(stock(folder, tag, mp_placeholder, "0"))

    with overlaid(engine, "_get_ckpt_name", name):
        yield


def _load_module(
    engine: DeepSpeedEngine, stock: Callable[..., None], folder: Path, checkpoint: dict[str, Any], **kwargs: Any
) -> None:
    """DeepSpeed's own; parameters outside the optimizer, of which ZeRO-3 saves partitions, cut anew.

    With `exclude_frozen_parameters`, as a Trainer saves adapters, there are none.
    """
    num_saved = checkpoint["dp_world_size"]
    if engine.zero_optimization_partition_weights() and num_saved != engine.seq_dp_world_size:
        names = [engine._get_ckpt_name(str(folder.parent), folder.name, None, str(rank)) for rank in range(num_saved)]
        saved = [_read(name)["frozen_param_fragments"] or {} for name in names]
        here = {name: parameter for parameter, name in engine.param_names.items()}
        rank = dist.get_rank(engine.optimizer.dp_process_group)
        cuts = {
            name: _Cut(here[name].ds_numel, saved=fragment.numel(), here=here[name].ds_tensor.numel())
            for name, fragment in saved[0].items()
        }
        fragments = {name: cut.take([file[name] for file in saved], 0, rank) for name, cut in cuts.items()}
        checkpoint["frozen_param_fragments"] = fragments or None
    stock(checkpoint=checkpoint, **kwargs)


def _load_zero_checkpoint(
    engine: DeepSpeedEngine, stock: Callable[..., bool], load_dir: str, tag: str, load_optimizer_states: bool = True
) -> bool:
    """DeepSpeed's own; where other ranks saved, with the file that this rank would have saved."""
    if engine.loaded_checkpoint_dp_world_size == engine.seq_dp_world_size or not load_optimizer_states:
        return stock(load_dir, tag, load_optimizer_states=load_optimizer_states)
    names = engine._get_all_zero_checkpoint_names(load_dir, tag, engine.bfloat16_enabled())
    saved = [_read(name)["optimizer_state_dict"] for name in names]
    rank = dist.get_rank(engine.optimizer.dp_process_group)
    engine.optimizer.load_state_dict(
        state_dict_list={rank: _cut_anew(engine, saved, rank)},  # of the list, DeepSpeed reads this rank's alone
        load_optimizer_states=True,
        load_from_fp32_weights=engine.zero_load_from_fp32_weights(),
        param_shapes=engine._get_zero_param_shapes(),
    )
    return True


def _read(name: str, map_location: Any = "cpu", *, mmap: bool | None = True) -> dict[str, Any]:
    """A file of the checkpoint; with `mmap`, of its tensors only what is looked at.

    DeepSpeed's own (TorchCheckpointEngine.load) unpickles whatever it finds, and a pickle may run anything.

    Raises:
        ValueError: It holds objects that neither torch nor DeepSpeed has put there.
    """
    with torch.serialization.safe_globals(_SAVED_BY_DEEPSPEED):
        try:
            content: dict[str, Any] = torch.load(name, map_location, mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{name}: holds {found[1] if found else 'something'}, which is neither a tensor nor plain data, and "
                "loading it may run code: if you trust the file, name it to torch.serialization.add_safe_globals"
            ) from None
    return content


@dataclass(frozen=True, slots=True)
class _Cut:
    """Consecutive elements, cut into equal partitions, the last of them padded.

    Attributes:
        numel: Elements, without padding.
        saved: Elements of a partition in the checkpoint.
        here: And of one here.
    """

    numel: int
    saved: int
    here: int

    def take(self, partitions: Sequence[Tensor], offset: int, rank: int) -> Tensor:
        """A rank's partition here, zeros where it is padded.

        Args:
            partitions: Of each rank that saved, 1-D; at the end they may lack what is padding.
            offset: Where in them the saved partition begins.
            rank: The rank.
        """
        taken = partitions[0].new_zeros(self.here)
        first, last = rank * self.here, min((rank + 1) * self.here, self.numel)
        for number, partition in enumerate(partitions):
            begins = number * self.saved
            start, end = max(first, begins), min(last, begins + self.saved)
            if start < end:
                source = partition[offset + start - begins : offset + end - begins]
                taken[start - first : end - first].copy_(source)
        return taken


def _cut_anew(engine: DeepSpeedEngine, saved: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """The optimizer's file as this rank would have saved it.

    Args:
        engine: Whose ranks load.
        saved: The files of all ranks that saved.
        rank: This one.
    """
    if engine.zero_optimization_partition_weights():
        masters, base = "fp32_flat_groups", "optimizer_state_dict"
        cuts = _cuts_of_stage_3(engine, len(saved))
    else:
        masters, base = "single_partition_of_fp32_groups", "base_optimizer_state"
        cuts = _cuts_of_stage_1_2(engine, saved)
    optimizer = saved[0][base]
    state = {
        group: {
            key: _merge(cuts[group], [file[base]["state"][group][key] for file in saved], rank)
            for key in optimizer["state"][group]
        }
        for group in optimizer["state"]  # torch numbers what it steps, which is one tensor per group
    }
    partitions = [
        _merge(group_cuts, [file[masters][group] for file in saved], rank) for group, group_cuts in enumerate(cuts)
    ]
    return {**saved[0], masters: partitions, base: {**optimizer, "state": state}}


def _cuts_of_stage_1_2(engine: DeepSpeedEngine, saved: Sequence[Mapping[str, Any]]) -> list[list[_Cut]]:
    """A group is cut as a whole. Its partitions are saved without padding, which only the last one has."""
    zero: Any = engine.optimizer
    cuts = []
    for group, partition in enumerate(zero.single_partition_of_fp32_groups):
        paddings = zero.round_robin_bit16_padding[group]
        numel = sum(p.numel() for p in zero.round_robin_bit16_groups[group]) + sum(paddings)
        first = saved[0]["single_partition_of_fp32_groups"][group].numel() + saved[0]["group_paddings"][group]
        cuts.append([_Cut(numel, saved=first, here=partition.numel())])
    return cuts


def _cuts_of_stage_3(engine: DeepSpeedEngine, num_saved: int) -> list[list[_Cut]]:
    """Each parameter is cut by itself."""
    return [
        [_Cut(p.ds_numel, saved=-(-p.ds_numel // num_saved), here=p.ds_tensor.numel()) for p in group]
        for group in engine.optimizer.fp16_groups
    ]


def _merge(cuts: Sequence[_Cut], values: Sequence[Any], rank: int) -> Any:
    """A rank's part of what the ranks that saved have parts of; of a step counter all have the same."""
    if not isinstance(values[0], Tensor):
        return values[0]
    if values[0].dim() == 0:
        return values[0].clone()  # of the file, nothing stays in use
    offsets = itertools.accumulate((cut.saved for cut in cuts), initial=0)
    return torch.cat([cut.take(values, offset, rank) for cut, offset in zip(cuts, offsets, strict=False)])
