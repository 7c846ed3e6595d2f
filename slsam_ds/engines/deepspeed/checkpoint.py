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
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from slsam_ds.engines.deepspeed.compatibility import paddings_of
from slsam_ds.engines.deepspeed.partitions import (
    BASE,
    MASTERS,
    PADDINGS,
    Layout,
    Shapes,
    assemble,
    cut_anew,
    cut_each,
    settings_by_group,
)
from slsam_ds.engines.deepspeed.step import overlaid
from slsam_ds.model.given_groups import GIVEN, given_groups, given_schedule, is_split
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
    engine.checkpoint_engine.load = functools.partial(read_file, mmap=None)
    engine.load_checkpoint = functools.partial(_load_checkpoint, engine)


def saved_as_given(engine: DeepSpeedEngine) -> contextlib.AbstractContextManager[None]:
    """Within, the engine saves what a run without SL-SAM loads, as far as its files can be that: see `to_stock`."""
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # in float32 without ZeRO, the file is torch's
        return given_groups(engine.optimizer, engine.lr_scheduler)
    return _given_schedule_of(engine)


def _given_schedule_of(engine: DeepSpeedEngine) -> contextlib.AbstractContextManager[None]:
    """Within, the engine's scheduler is saved and loaded as in a run without SL-SAM."""
    return given_schedule(engine.lr_scheduler, engine.optimizer.param_groups)


def _load_checkpoint(
    engine: DeepSpeedEngine, load_dir: str | os.PathLike[str], tag: str | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """`DeepSpeedEngine.load_checkpoint` by any number of ranks, whatever groups the optimizer was saved with.

    Raises:
        ValueError: The optimizer's state is of another kind of run: nothing was changed; or a file holds more than
            data.
    """
    stock = functools.partial(type(engine).load_checkpoint, engine, str(load_dir), **kwargs)
    folder = checkpoint_folder(load_dir, tag)
    if folder is None:
        return stock(tag=tag)
    with _any_ranks_files(engine), _given_schedule_of(engine):
        name = engine._get_ckpt_name(str(folder.parent), folder.name)
        if not Path(name).is_file():
            raise ValueError(f"{name}: is missing: resume with the ZeRO stage that saved the checkpoint")
        saved = read_file(name)
        loads_optimizer = kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False)
        is_ours = not loads_optimizer or _check_optimizer(engine, folder, saved)
        if not engine.zero_optimization() or (is_ours and _is_cut_alike(engine, saved)):
            return stock(tag=folder.name)
        load_module = functools.partial(_load_module, engine, engine.load_module_state_dict, folder)
        load_zero = functools.partial(
            _load_zero_checkpoint, engine, engine._load_zero_checkpoint, saved["param_shapes"]
        )
        with (
            overlaid(engine, "load_module_state_dict", load_module),
            overlaid(engine, "_load_zero_checkpoint", load_zero),
        ):
            return stock(tag=folder.name)


def _is_cut_alike(engine: DeepSpeedEngine, saved: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed itself can load the partitions."""
    here = [list(group) for group in engine._get_zero_param_shapes()]
    alike: bool = saved["dp_world_size"] == engine.seq_dp_world_size
    return alike and [list(group) for group in saved["param_shapes"]] == here


def _check_optimizer(engine: DeepSpeedEngine, folder: Path, saved: Mapping[str, Any]) -> bool:
    """Refuse, before anything is loaded, the state of another kind of optimizer, or of other parameters.

    Returns:
        Whether its groups are split by arm.

    Raises:
        ValueError: Saying what differs.
    """
    if not engine.zero_optimization():
        _check_unsharded(engine, folder, saved)
        return True  # if they are not, they will be as they are loaded
    names = engine._get_mp_rank_zero_checkpoint_names(
        str(folder.parent), folder.name, 0, saved["dp_world_size"], engine.bfloat16_enabled()
    )
    missing = [name for name in names if not Path(name).is_file()]
    optimizer = {} if missing else read_file(names[0])["optimizer_state_dict"]
    if MASTERS[_stage(engine)] not in optimizer:
        raise ValueError(
            f"{(missing or names)[0]}: is missing, or was saved by another kind of run: resume with the ZeRO stage and "
            "the precision that saved the checkpoint"
        )
    trained = {name for group in saved["param_shapes"] for name in group}
    here = {name for group in engine._get_zero_param_shapes() for name in group}
    for name in sorted(trained ^ here):
        there, now = ("trained", "is not") if name in trained else ("not trained", "is")
        raise ValueError(
            f"{folder}: {name} was {there} in the run that saved it, and {now} in this one: train the same parameters "
            "(requires_grad and slsam.other_parameters say which)"
        )
    base = optimizer[BASE[_stage(engine)]]
    _check_settings(engine, folder, base, saved["param_shapes"])
    return is_split(base["param_groups"])


def _check_settings(engine: DeepSpeedEngine, folder: Path, optimizer: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse to give parameters the settings of others."""
    settings = {
        number: repr({key: value for key, value in group.items() if key not in ("params", "arm", GIVEN)})
        for number, group in settings_by_group(optimizer).items()
    }
    group_of = {name: number for number, group in enumerate(shapes) for name in group}
    for group in engine._get_zero_param_shapes():
        first, *others = group
        for name in others:
            if settings[group_of[name]] != settings[group_of[first]]:
                raise ValueError(
                    f"{folder}: {first} and {name} have different settings in the optimizer that was saved, the same "
                    "in this run's: build it with the groups of the run that saved the checkpoint"
                )


def _check_unsharded(engine: DeepSpeedEngine, folder: Path, saved: Mapping[str, Any]) -> None:
    optimizer = saved["optimizer"]
    if optimizer is None:
        raise ValueError(f"{folder}: was saved with ZeRO: resume with the stage that saved it")
    for masters in ("fp32_groups", "fp32_groups_flat"):
        if len(optimizer.get(masters, ())) != len(getattr(engine.optimizer, masters, ())):
            raise ValueError(
                f"{folder}: was saved without SL-SAM, with ZeRO stage 0 in 16 bits, whose master weights slsam_ds does "
                "not split by layer: load the weights alone (load_module_only=True)"
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
        saved = [read_file(name)["frozen_param_fragments"] or {} for name in names]
        here = {name: parameter for parameter, name in engine.param_names.items()}
        rank = dist.get_rank(engine.optimizer.dp_process_group)
        fragments = {}
        for name in saved[0]:
            numel, size = {name: here[name].ds_numel}, here[name].ds_tensor.numel()
            cuts = [(cut_each(numel, num_ranks=num_saved, rank=r), file[name]) for r, file in enumerate(saved)]
            wanted = cut_each(numel, num_ranks=engine.seq_dp_world_size, rank=rank)
            fragments[name] = assemble(wanted, size, cuts)
        checkpoint["frozen_param_fragments"] = fragments or None
    stock(checkpoint=checkpoint, **kwargs)


def _load_zero_checkpoint(
    engine: DeepSpeedEngine,
    stock: Callable[..., bool],
    shapes: Shapes,
    load_dir: str,
    tag: str,
    load_optimizer_states: bool = True,
) -> bool:
    """DeepSpeed's own, with the file that this rank would have saved.

    Args:
        engine: Whose ranks load.
        stock: DeepSpeed's own.
        shapes: Of the parameters, in the checkpoint.
        load_dir: As DeepSpeed passes it.
        tag: Likewise.
        load_optimizer_states: Likewise.
    """
    if not load_optimizer_states:
        return stock(load_dir, tag, load_optimizer_states=load_optimizer_states)
    names = engine._get_all_zero_checkpoint_names(load_dir, tag, engine.bfloat16_enabled())
    saved = [read_file(name)["optimizer_state_dict"] for name in names]
    rank = dist.get_rank(engine.optimizer.dp_process_group)
    engine.optimizer.load_state_dict(
        state_dict_list={rank: _cut_anew(engine, shapes, saved, rank)},  # of the list, it reads this rank's alone
        load_optimizer_states=True,
        load_from_fp32_weights=engine.zero_load_from_fp32_weights(),
        param_shapes=engine._get_zero_param_shapes(),
    )
    return True


def _stage(engine: DeepSpeedEngine) -> int:
    """3, or 2, which stage 1 saves like."""
    return 3 if engine.zero_optimization_partition_weights() else 2


def layout_of(engine: DeepSpeedEngine) -> Layout:
    """How ZeRO cuts the optimizer's groups here."""
    zero: Any = engine.optimizer
    shapes, num_ranks = engine._get_zero_param_shapes(), engine.seq_dp_world_size
    if _stage(engine) == 3:
        return Layout(shapes=shapes, num_ranks=num_ranks)
    sizes = [partition.numel() for partition in zero.single_partition_of_fp32_groups]
    return Layout(shapes=shapes, num_ranks=num_ranks, sizes=sizes, paddings=paddings_of(zero))


def _cut_anew(engine: DeepSpeedEngine, shapes: Shapes, saved: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """The optimizer's file as this rank would have saved it.

    Args:
        engine: Whose ranks load.
        shapes: Of the parameters, in the checkpoint.
        saved: The files of all ranks that saved.
        rank: This one.
    """
    zero: Any = engine.optimizer
    layout, there = layout_of(engine), Layout.saved(saved, shapes)
    own = cut_anew(saved, there, layout, rank)
    if layout.paddings is not None:
        own[PADDINGS] = layout.paddings
    base = BASE[_stage(engine)]
    settings = settings_by_group(own[base])
    sources = layout.sources(there)
    param_group_of = zero.sub_group_to_group_id if _stage(engine) == 3 else range(len(sources))
    param_groups = []
    for index, group in enumerate(zero.optimizer.param_groups):
        members = [member for member in range(len(sources)) if param_group_of[member] == index]
        own_settings = {key: group[key] for key in ("arm", GIVEN)}
        param_groups.append({**settings[sources[members[0]][0]], **own_settings, "params": members})
    return {**own, base: {**own[base], "param_groups": param_groups}}


def read_file(name: str, map_location: Any = "cpu", *, mmap: bool | None = True) -> dict[str, Any]:
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
                "loading it may run code: if you trust the file, allow it with torch.serialization.add_safe_globals"
            ) from None
    return content
