"""Configurations that come with the package are known by name, wherever it runs."""

from pathlib import Path

import pytest

from slsam_ds.cli.settings import read_settings
from slsam_ds.engines.deepspeed.config import read_config
from slsam_ds.engines.named_configs import find_config, named_configs

FOLDER = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_they_are_the_repositorys() -> None:
    ours = named_configs("zero") | named_configs("fsdp")
    assert {path.read_text() for path in ours.values()} == {path.read_text() for path in FOLDER.glob("*.json")}
    assert {"zero2", "zero3_offload", "fsdp2"} <= set(ours)
    assert not FOLDER.is_symlink()


def test_a_file_of_that_name_wins() -> None:
    assert find_config("zero2", "zero") == named_configs("zero")["zero2"]
    assert find_config("fsdp2", "zero") == "fsdp2"  # not DeepSpeed's
    Path("zero2").write_text("{}")
    assert find_config("zero2", "zero") == "zero2"
    assert read_config("zero2") == ({}, None)


def test_they_are_read_by_name() -> None:
    assert read_config("zero3") == read_config(FOLDER / "zero3.json")
    settings = read_settings(["--deepspeed", "zero3"])
    assert settings.training.hf_deepspeed_config.config["zero_optimization"]["stage"] == 3
    assert settings.slsam.rho == 0.05
    fsdp = read_settings(["--fsdp", "full_shard", "--fsdp_config", "fsdp2"]).training.fsdp_config
    assert fsdp["version"] == 2


def test_a_name_that_there_is_not_gets_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"configuration zero9: cannot be read .*; by name there are zero0, .*zero3"):
        read_config("zero9")
    with pytest.raises(ValueError, match=r"configuration zero9.json: cannot be read \([^;]*$"):
        read_config("zero9.json")
