"""Partitions of ZeRO's, made of those that another layout has cut.

Other ranks, other groups (a run without SL-SAM has one or two), another order: each element is found by its
parameter's name. ZeRO's stages 1 and 2 lay the parameters of a group end to end and cut the whole; stage 3 cuts each
parameter by itself.

Private structures: the state that deepspeed/runtime/zero/stage_1_and_2.py and stage3.py save, 0.19.8.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shapes = Sequence[Mapping[str, torch.Size]]
"""By group of what ZeRO steps at once: the shape of each parameter, in the order in which they lie there."""

MASTERS = {3: "fp32_flat_groups", 2: "single_partition_of_fp32_groups"}
"""By stage: where an optimizer's file holds master weights. Stage 1 saves as stage 2 does."""

BASE = {3: "optimizer_state_dict", 2: "base_optimizer_state"}
"""And where the state of the torch optimizer that steps them."""

PADDINGS = "param_alignment_paddings"
"""Key of the padding after each parameter of each group; older versions of DeepSpeed have none."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Consecutive elements of a parameter, in a partition.

    Attributes:
        name: The parameter's.
        start: First element, of the parameter laid flat.
        stop: And one after the last.
        offset: Where in the partition the first one is.
    """

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run cuts its groups.

    Attributes:
        shapes: Of its parameters, by group.
        num_ranks: How many share them.
        sizes: Elements of a partition of each group; None: stage 3, which needs no telling.
        paddings: Of each group: elements of padding after each parameter; None: there are none.
    """

    shapes: Shapes
    num_ranks: int
    sizes: Sequence[int] | None = None
    paddings: Sequence[Sequence[int]] | None = None

    @classmethod
    def saved(cls, files: Sequence[Mapping[str, Any]], shapes: Shapes) -> "Layout":
        """Of the optimizer's files of all ranks."""
        first = files[0]
        if MASTERS[3] in first:
            return cls(shapes=shapes, num_ranks=len(files))
        # Partitions are saved without the padding at the end.
        sizes = [part.numel() + end for part, end in zip(first[MASTERS[2]], first["group_paddings"], strict=True)]
        return cls(shapes=shapes, num_ranks=len(files), sizes=sizes, paddings=first.get(PADDINGS))

    def size(self, group: int) -> int:
        """Elements of a partition of a group."""
        if self.sizes is not None:
            return self.sizes[group]
        return sum(-(-math.prod(shape) // self.num_ranks) for shape in self.shapes[group].values())

    def fragments(self, group: int, rank: int) -> list[Fragment]:
        """What a rank has of a group."""
        numels = {name: math.prod(shape) for name, shape in self.shapes[group].items()}
        if self.sizes is None:
            return cut_each(numels, num_ranks=self.num_ranks, rank=rank)
        paddings = self.paddings[group] if self.paddings is not None else [0] * len(numels)
        return cut_whole(numels, paddings, size=self.sizes[group], rank=rank)

    def sources(self, other: "Layout") -> list[list[int]]:
        """For each group: those groups of another layout that its parameters are in; of the first parameter, first."""
        group_of = {name: group for group, names in enumerate(other.shapes) for name in names}
        return [list(dict.fromkeys(group_of[name] for name in names)) for names in self.shapes]


def cut_whole(numels: Mapping[str, int], paddings: Iterable[int], *, size: int, rank: int) -> list[Fragment]:
    """What a rank has of a group under stage 1 or 2.

    Args:
        numels: Elements of each parameter, in order.
        paddings: Elements of padding after each.
        size: Elements of a partition.
        rank: The rank.
    """
    fragments = []
    begins = -rank * size
    for (name, numel), padding in zip(numels.items(), paddings, strict=True):
        start, stop = max(-begins, 0), min(size - begins, numel)
        if start < stop:
            fragments.append(Fragment(name, start, stop, begins + start))
        begins += numel + padding
    return fragments


def cut_each(numels: Mapping[str, int], *, num_ranks: int, rank: int) -> list[Fragment]:
    """What a rank has of a group, or of any parameters, under stage 3.

    Args:
        numels: Elements of each parameter, in order.
        num_ranks: How many ranks share them.
        rank: The rank.
    """
    fragments = []
    offset = 0
    for name, numel in numels.items():
        size = -(-numel // num_ranks)
        start, stop = rank * size, min((rank + 1) * size, numel)
        if start < stop:
            fragments.append(Fragment(name, start, stop, offset))
        offset += size
    return fragments


def assemble(wanted: Iterable[Fragment], size: int, saved: Sequence[tuple[Sequence[Fragment], Tensor]]) -> Tensor:
    """A partition of elements that are in others; zeros where it is padded.

    Args:
        wanted: What it consists of.
        size: Its elements.
        saved: The others, each with what it consists of; at the end they may lack what is padding. At least one.
    """
    found: dict[str, list[tuple[Fragment, Tensor]]] = {}
    for fragments, partition in saved:
        for fragment in fragments:
            found.setdefault(fragment.name, []).append((fragment, partition))
    assembled = saved[0][1].new_zeros(size)
    for want in wanted:
        for have, partition in found[want.name]:
            start, stop = max(want.start, have.start), min(want.stop, have.stop)
            if start < stop:
                there, here = have.offset - have.start, want.offset - want.start
                assembled[here + start : here + stop].copy_(partition[there + start : there + stop])
    return assembled


def cut_anew(files: Sequence[Mapping[str, Any]], saved: Layout, here: Layout, rank: int) -> dict[str, Any]:
    """The optimizer's file of a rank, as it would have been saved with another layout.

    Args:
        files: Those of all ranks that saved. They are not changed.
        saved: Their layout.
        here: The other. Its parameters are the same; those of a group have the same settings and step counter.
        rank: The rank.

    Returns:
        The first of the files, with other master weights and optimizer state; settings in "param_groups" are still
        those of the saved groups.
    """
    stage = 2 if here.sizes is not None else 3
    masters, base = MASTERS[stage], BASE[stage]
    sources = here.sources(saved)

    def merge(group: int, value_in: Callable[[Mapping[str, Any], int], Any]) -> Any:
        """The rank's part of what the ranks that saved have parts of; of a step counter all have the same."""
        parts = [(r, source, value_in(file, source)) for source in sources[group] for r, file in enumerate(files)]
        first = parts[0][2]
        if not isinstance(first, Tensor):
            return first
        if first.dim() == 0:
            return first.clone()  # of the file, nothing stays in use
        cuts = [(saved.fragments(source, r), value) for r, source, value in parts]
        return assemble(here.fragments(group, rank), here.size(group), cuts)

    # Torch numbers what it steps, which is one tensor per group.
    state = files[0][base]["state"]
    return {
        **files[0],
        masters: [merge(group, lambda file, source: file[masters][source]) for group in range(len(sources))],
        base: {
            **files[0][base],
            "state": {
                group: {
                    key: merge(group, lambda file, source, key=key: file[base]["state"][source][key])  # type: ignore[misc]
                    for key in state[own[0]]
                }
                for group, own in enumerate(sources)
                if own[0] in state
            },
        },
    }


def settings_by_group(optimizer: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """A torch optimizer's settings, by the number of what it steps."""
    return {number: settings for settings in optimizer["param_groups"] for number in settings["params"]}
