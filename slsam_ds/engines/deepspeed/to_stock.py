"""The command that makes of a DeepSpeed checkpoint of a run with SL-SAM one that a stock loop or Trainer loads.

    slsam to_stock CHECKPOINT OUTPUT

ZeRO cuts an optimizer's groups into partitions, and SL-SAM has a group for each layer. The command puts together the
groups that the optimizer was given, and cuts those, for as many ranks. A group has one step counter in ZeRO: layers
that were updated less often get the most frequent one's, and moments that mean the same with it.

Private structures: as in `partitions`.
"""

import argparse
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slsam_ds.engines.deepspeed.checkpoint import checkpoint_folder, read_file
from slsam_ds.engines.deepspeed.partitions import (
    BASE,
    MASTERS,
    PADDINGS,
    Layout,
    Shapes,
    cut_anew,
    settings_by_group,
)
from slsam_ds.model.given_groups import OWN_KEYS, given_of

_ALIGNMENT = 2
"""`nccl_start_alignment_factor`: partitions of stages 1 and 2 have a multiple of it, and the last is padded."""

_MOMENTS = {"exp_avg": 0, "exp_avg_sq": 1}
"""Adam's: which of the betas each is a running mean with."""


def convert(checkpoint: Path, output: Path, tag: str | None = None) -> None:
    """Write a checkpoint that stock DeepSpeed loads, with as many ranks.

    Args:
        checkpoint: The folder that `save_checkpoint` was given, or a Trainer's checkpoint.
        output: A new folder for the same with one tag. Files beside the tags are copied, SL-SAM's left out.
        tag: Which; None: the one that `latest` names.

    Raises:
        ValueError: It cannot be converted; nothing was written.
    """
    source = checkpoint_folder(checkpoint, tag)
    if source is None or not source.is_dir():
        raise ValueError(f"{checkpoint}: holds no DeepSpeed checkpoint{'' if tag is None else f' with tag {tag}'}")
    if output.exists():
        raise ValueError(f"{output}: exists already: choose a new folder")
    model_files = {path: read_file(str(path)) for path in sorted(source.glob("*_model_states.pt"))}
    optimizer_files = sorted(source.glob("*_optim_states.pt"), key=_rank_of)
    if not model_files or not optimizer_files:
        raise ValueError(f"{source}: holds no ZeRO optimizer state, so it needs no conversion")
    contents = [read_file(str(path)) for path in optimizer_files]
    model = next(iter(model_files.values()))
    converted, shapes = _join([content["optimizer_state_dict"] for content in contents], model)
    target = output / source.name
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file() and not path.name.startswith("slsam_"):
            shutil.copy2(path, output)
    (output / "latest").write_text(source.name, encoding="utf-8")
    for path, content in model_files.items():
        torch.save({**content, "param_shapes": shapes}, target / path.name)
    for path, content, state in zip(optimizer_files, contents, converted, strict=True):
        torch.save({**content, "optimizer_state_dict": state}, target / path.name)


def _rank_of(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


def _join(files: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Shapes]:
    """The optimizer's files with the groups that were given, and the shapes in them.

    Raises:
        ValueError: The groups do not make such ones.
    """
    stage = 3 if MASTERS[3] in files[0] else 2
    base = BASE[stage]
    saved = Layout.saved(files, model["param_shapes"])
    zero = model["ds_config"]["zero_optimization"]
    if any(map(any, saved.paddings or ())) or zero.get("round_robin_gradients", False):
        raise ValueError("zero_optimization.parameter_alignment and round_robin_gradients: cannot be converted")
    given = _given_shapes(files[0][base], model["param_shapes"])
    limit = int(zero.get("sub_group_size", 1e9))
    parts = [_sub_groups(group, len(files), limit) if stage == 3 else [group] for group in given]
    layout = _stock_layout([part for group in parts for part in group], len(files), stage)
    sources = layout.sources(saved)
    param_groups, first = [], 0
    for group in parts:
        members = list(range(first, first + len(group)))
        first += len(group)
        settings = _common_settings(files[0][base], [source for member in members for source in sources[member]])
        param_groups.append({**settings, "params": members})
    in_step = [{**file, base: {**file[base], "state": _in_step(file, stage, sources)}} for file in files]
    return [_of_rank(rank, in_step, saved, layout, param_groups) for rank in range(len(files))], layout.shapes


def _given_shapes(optimizer: Mapping[str, Any], shapes: Shapes) -> list[dict[str, torch.Size]]:
    """The parameters of each group that was given, in their order; no group is empty."""
    places = {}
    for group in optimizer["param_groups"]:
        index, positions, _ = given_of(group)
        members = [item for number in group["params"] for item in shapes[number].items()]
        places.update({(index, position): item for position, item in zip(positions, members, strict=True)})
    given: dict[int, dict[str, torch.Size]] = {}
    for index, position in sorted(places):
        name, shape = places[index, position]
        given.setdefault(index, {})[name] = shape
    return list(given.values())


def _stock_layout(shapes: Shapes, num_ranks: int, stage: int) -> Layout:
    if stage == 3:
        return Layout(shapes=shapes, num_ranks=num_ranks)
    sizes = [_ALIGNMENT * -(-_total(group) // (_ALIGNMENT * num_ranks)) for group in shapes]
    return Layout(shapes=shapes, num_ranks=num_ranks, sizes=sizes)


def _total(group: Mapping[str, torch.Size]) -> int:
    return sum(map(math.prod, group.values()))


def _common_settings(optimizer: Mapping[str, Any], groups: Sequence[int]) -> dict[str, Any]:
    """The settings of groups that are to be one.

    Raises:
        ValueError: They differ.
    """
    of_group = settings_by_group(optimizer)
    settings = [{key: value for key, value in of_group[group].items() if key not in OWN_KEYS} for group in groups]
    if any(repr(own) != repr(settings[0]) for own in settings):
        raise ValueError("the layers of a parameter group have different settings, which stock DeepSpeed cannot store")
    return settings[0]


def _sub_groups(group: Mapping[str, torch.Size], num_ranks: int, size: int) -> list[dict[str, torch.Size]]:
    """What stage 3 steps at once: as many parameters as reach `sub_group_size` on a rank."""
    parts: list[dict[str, torch.Size]] = [{}]
    reached = 0
    for name, shape in group.items():
        if reached >= size:
            parts.append({})
            reached = 0
        parts[-1][name] = shape
        reached += -(-math.prod(shape) // num_ranks)
    return parts


def _in_step(file: Mapping[str, Any], stage: int, sources: Sequence[Sequence[int]]) -> dict[int, dict[str, Any]]:
    """The state of each group, with the step counter that those which are to be one have in common."""
    optimizer = file[BASE[stage]]
    state, settings = optimizer["state"], settings_by_group(optimizer)
    result: dict[int, dict[str, Any]] = {}
    for own in sources:
        held = {group: _own_state(state.get(group, {})) for group in own}
        stepped = [values for values in held.values() if values]
        if not stepped:
            continue
        latest = max(stepped, key=lambda values: float(values.get("step", 0)))
        for group in own:
            master = file[MASTERS[stage]][group]
            before = held[group] or {key: _beginning(value, master) for key, value in latest.items()}
            after = dict(before)
            if "step" in latest:
                after["step"] = latest["step"]
                for key, beta in _MOMENTS.items():
                    if key in before and float(before["step"]) > 0:
                        decay = settings[group]["betas"][beta]
                        ratio = (1 - decay ** float(latest["step"])) / (1 - decay ** float(before["step"]))
                        after[key] = before[key] * ratio
            result[group] = after
    return result


def _own_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is the optimizer's own of it; nothing, where a mask alone was saved, with a step counter for it."""
    own = {key: value for key, value in state.items() if not key.startswith("slsam_")}
    return own if own.keys() - {"step"} else {}


def _beginning(value: Any, master: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return type(value)(0)
    return torch.zeros_like(value) if value.dim() == 0 else torch.zeros_like(master, dtype=value.dtype)


def _of_rank(
    rank: int,
    files: Sequence[Mapping[str, Any]],
    saved: Layout,
    layout: Layout,
    param_groups: list[dict[str, Any]],
) -> dict[str, Any]:
    """The optimizer's file of a rank."""
    stage = 3 if layout.sizes is None else 2
    masters, base = MASTERS[stage], BASE[stage]
    file = cut_anew(files, saved, layout, rank)
    file[base]["param_groups"] = param_groups
    if layout.sizes is None:
        return file
    ends = [(rank + 1) * size - _total(group) for size, group in zip(layout.sizes, layout.shapes, strict=True)]
    paddings = [min(max(end, 0), size) for end, size in zip(ends, layout.sizes, strict=True)]
    file[masters] = [part[: len(part) - end].clone() for part, end in zip(file[masters], paddings, strict=True)]
    file["group_paddings"] = paddings
    file["partition_count"] = [layout.num_ranks] * len(paddings)
    file["param_slice_mappings"] = None  # of DeepSpeed's universal checkpoint
    if PADDINGS in file:
        file[PADDINGS] = [[0] * len(group) for group in layout.shapes]
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where the checkpoint cannot be converted, after one sentence on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="slsam to_stock",
        description="Convert a DeepSpeed checkpoint of a run with SL-SAM to one that a run without SL-SAM can load.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="checkpoint folder written by save_checkpoint or by a Trainer",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="new folder for the converted checkpoint")
    parser.add_argument("--tag", help="tag of the checkpoint to convert (default: the tag in the file `latest`)")
    parsed = parser.parse_args(arguments)
    try:
        convert(parsed.checkpoint, parsed.output, parsed.tag)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
