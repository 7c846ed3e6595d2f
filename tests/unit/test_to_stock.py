"""Layers that were updated unlike often, in a checkpoint for stock DeepSpeed, whose groups have one step counter."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from slsam_ds.engines.deepspeed.to_stock import main
from slsam_ds.model.given_groups import GIVEN

BETAS = (0.9, 0.99)
SETTINGS = {"lr": 0.1, "betas": BETAS, "weight_decay": 0.0}
STATES = {  # of three layers of three weights each; the last was never updated, and has a mask all the same
    0: {"step": torch.tensor(5.0), "exp_avg": torch.tensor([1.0, 2, 3, 0]), "exp_avg_sq": torch.tensor([4.0, 5, 6, 0])},
    1: {"step": torch.tensor(2.0), "exp_avg": torch.tensor([7.0, 8, 9, 0]), "exp_avg_sq": torch.tensor([1.0, 2, 3, 0])},
    2: {"step": torch.tensor(0.0)},
}
for _state in STATES.values():
    _state["slsam_mask"] = torch.tensor([1, 0, 1, 0], dtype=torch.uint8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of one rank, ZeRO-2; the optimizer was given a group with the layers in another order."""
    folder = tmp_path / "saved" / "global_step5"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step5")
    (folder / "slsam_state.json").write_text("{}")
    (folder.parent / "slsam_steps.jsonl").write_text("")
    names = ["first", "second", "third"]
    model = {
        "param_shapes": [OrderedDict({name: torch.Size([3])}) for name in names],
        "ds_config": {"zero_optimization": {"stage": 2}},
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    groups = [
        {**SETTINGS, "params": [arm], "arm": arm, GIVEN: (0, (place,), (3,))} for arm, place in enumerate([1, 2, 0])
    ]
    optimizer: dict[str, Any] = {
        "single_partition_of_fp32_groups": [torch.full((3,), float(arm)) for arm in range(3)],
        "group_paddings": [1, 1, 1],
        "partition_count": [1, 1, 1],
        "base_optimizer_state": {"state": STATES, "param_groups": groups},
    }
    torch.save({"optimizer_state_dict": optimizer}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder.parent


def test_layers_get_one_step_counter_and_moments_that_mean_the_same(checkpoint: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), str(tmp_path / "stock")]) == 0
    assert sorted(path.name for path in (tmp_path / "stock").rglob("*") if path.is_file()) == [
        "latest", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ]  # fmt: skip
    folder = tmp_path / "stock" / "global_step5"
    saved = torch.load(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    (masters,) = saved["single_partition_of_fp32_groups"]
    assert masters.tolist() == [2, 2, 2, 0, 0, 0, 1, 1, 1]  # of 10 elements, the last is padding
    assert saved["group_paddings"] == [1]
    base = saved["base_optimizer_state"]
    assert base["param_groups"] == [{**SETTINGS, "params": [0]}]
    (state,) = base["state"].values()
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"] == 5
    for key, beta in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True):
        corrected = state[key] / (1 - beta**5)
        expected = [torch.zeros(3)] + [STATES[arm][key][:3] / (1 - beta ** STATES[arm]["step"]) for arm in (0, 1)]
        torch.testing.assert_close(corrected[:9], torch.cat(expected), rtol=1e-5, atol=0)
    shapes = torch.load(folder / "mp_rank_00_model_states.pt")["param_shapes"]
    assert [list(group) for group in shapes] == [["third", "first", "second"]]


@pytest.mark.parametrize("there", ["nothing", "output"])
def test_what_cannot_be_converted_is_refused(
    there: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path if there == "output" else tmp_path / "stock"
    assert main([str(checkpoint / "none" if there == "nothing" else checkpoint), str(output)]) == 2
    said = capsys.readouterr().err
    assert ("holds no DeepSpeed checkpoint" if there == "nothing" else "exists already") in said
    assert not (tmp_path / "stock").exists()
