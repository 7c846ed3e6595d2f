"""Partitions cut anew hold the same elements, whoever cut them before."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from slsam_ds.engines.deepspeed.partitions import BASE, MASTERS, Layout, cut_anew

NUMELS = {"a": 5, "b": 3, "c": 7, "d": 1}
VALUES = {name: 100.0 * index + torch.arange(numel) for index, (name, numel) in enumerate(NUMELS.items())}
ONE, SPLIT = [["a", "b", "c", "d"]], [["d"], ["b", "a"], ["c"]]


def layout(stage: int, groups: Sequence[Sequence[str]], num_ranks: int, padding: int = 0) -> Layout:
    shapes = [{name: torch.Size([NUMELS[name]]) for name in group} for group in groups]
    if stage == 3:
        return Layout(shapes=shapes, num_ranks=num_ranks)
    paddings = [[padding] * len(group) for group in groups]
    totals = [sum(NUMELS[name] + padding for name in group) for group in groups]
    sizes = [2 * -(-total // (2 * num_ranks)) for total in totals]
    return Layout(shapes=shapes, num_ranks=num_ranks, sizes=sizes, paddings=paddings)


def files(stage: int, cut: Layout) -> list[dict[str, Any]]:
    """What each rank would have saved, where the moment of an element is its negative."""
    saved = []
    for rank in range(cut.num_ranks):
        masters, state = [], {}
        for group in range(len(cut.shapes)):
            partition = torch.zeros(cut.size(group))
            for part in cut.fragments(group, rank):
                partition[part.offset : part.offset + part.stop - part.start] = VALUES[part.name][
                    part.start : part.stop
                ]
            masters.append(partition)
            state[group] = {"step": torch.tensor(3.0), "exp_avg": -partition}
        saved.append({MASTERS[stage]: masters, BASE[stage]: {"state": state}})
    return saved


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(ONE, SPLIT), (SPLIT, ONE), (SPLIT, SPLIT[::-1])])
@pytest.mark.parametrize("stage", [2, 3])
def test_partitions_are_those_of_the_other_layout(
    stage: int, before: Any, after: Any, num_ranks: int, padding: int
) -> None:
    saved, here = layout(stage, before, 2), layout(stage, after, num_ranks, padding)
    expected = files(stage, here)
    for rank in range(num_ranks):
        found = cut_anew(files(stage, saved), saved, here, rank)
        assert all(map(torch.equal, found[MASTERS[stage]], expected[rank][MASTERS[stage]]))
        for group, state in expected[rank][BASE[stage]]["state"].items():
            assert torch.equal(found[BASE[stage]]["state"][group]["exp_avg"], state["exp_avg"])
            assert found[BASE[stage]]["state"][group]["step"] == 3
