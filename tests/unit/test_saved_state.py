"""A checkpoint's SL-SAM state: read back as it was, and refused where the run is another one."""

from pathlib import Path

import pytest
import torch

from slsam_ds import SLSAM
from slsam_ds.config import SLSAMConfig
from slsam_ds.model.layers import find_layers
from slsam_ds.selectors import make_selector
from slsam_ds.state.files import STATE_FILE, STATE_VERSION, check_contents, check_state, read_state, write_state
from tests.models import tiny_llama

KNOBS = SLSAMConfig(active_layers=2)
LAYERS = find_layers(tiny_llama())
SETUP = {"zero_optimization.stage": 2, "bf16": True}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = {
        "version": STATE_VERSION,
        "layers": LAYERS.fingerprint(),
        "arms": LAYERS.outline(),
        "selector": make_selector(KNOBS, len(LAYERS)).state_dict(),
        "step": 3,
    }
    (tmp_path / "weights").write_bytes(b"1234")
    write_state(tmp_path, state, SETUP)
    return tmp_path


def test_the_same_run_may_resume(checkpoint: Path) -> None:
    check_state(checkpoint, LAYERS, KNOBS, SETUP)
    assert read_state(checkpoint)["step"] == 3


def test_knobs_that_the_state_does_not_depend_on_may_change(checkpoint: Path) -> None:
    check_state(checkpoint, LAYERS, SLSAMConfig(active_layers=2, rho=0.01, gamma="auto"), SETUP)


@pytest.mark.parametrize(
    ("knobs", "setup", "sentence"),
    [
        ({"active_layers": 3}, {}, "the number of active layers is 2 in the saved state and 3 here"),
        ({"active_layers": 2, "selector": "uniform"}, {}, "the selector is 'exp3m' in the saved state and 'uniform'"),
        (
            {"active_layers": 2},
            {"zero_optimization.stage": 3},
            "was saved with zero_optimization.stage=2, this run has 3",
        ),
        ({"active_layers": 2}, {"bf16": False}, "was saved with bf16=True, this run has False: resume with True"),
    ],
)
def test_another_run_is_refused(
    checkpoint: Path, knobs: dict[str, object], setup: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        check_state(checkpoint, LAYERS, SLSAMConfig(**knobs), SETUP | setup)  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"{checkpoint}: ")
    assert sentence in str(refused.value)


def test_other_settings_are_refused_by_their_names(checkpoint: Path) -> None:
    write_state(checkpoint, {**read_state(checkpoint), "settings": KNOBS.to_dict()}, SETUP)
    preset = SLSAMConfig.from_dict({"preset": "adamw_price"})
    with pytest.raises(ValueError, match=r".") as refused:
        check_state(checkpoint, LAYERS, preset, SETUP)
    for words in ("active_layers=2 (this run: 0.2)", "budget=null (this run: 1.0)", "the settings of the saved run"):
        assert words in str(refused.value)


def test_another_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"was saved for other layers.*: it has 6 layers, this run 4; resume with"):
        check_state(checkpoint, find_layers(tiny_llama(), other_parameters="freeze"), KNOBS, SETUP)


def test_a_file_that_is_being_written_is_not_held_against_the_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "rng_state_1.pth").touch()  # by another rank, which has only just opened it
    write_state(checkpoint, read_state(checkpoint), SETUP, unfinished="rng_state_*")
    (checkpoint / "rng_state_1.pth").write_bytes(b"12")
    check_state(checkpoint, LAYERS, KNOBS, SETUP)


def test_a_torn_file_is_refused(checkpoint: Path) -> None:
    (checkpoint / "weights").write_bytes(b"12")
    with pytest.raises(ValueError, match="weights has 2 of 4 bytes: resume from another checkpoint"):
        check_state(checkpoint, LAYERS, KNOBS, SETUP)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_state_that_is_missing_or_torn_is_refused(checkpoint: Path, text: str | None) -> None:
    if text is None:
        (checkpoint / STATE_FILE).unlink()
    else:
        (checkpoint / STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"slsam_state\.json: no readable slsam state"):
        check_state(checkpoint, LAYERS, KNOBS, SETUP)


def test_a_damaged_file_is_found_by_the_rank_whose_share_it_is(checkpoint: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, checkpoint / "model.pt")
    write_state(checkpoint, read_state(checkpoint), SETUP)
    check_contents(checkpoint, rank=0, num_ranks=1)
    content = bytearray((checkpoint / "model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "model.pt").write_bytes(content)
    check_contents(checkpoint, rank=1, num_ranks=2)  # the other file
    with pytest.raises(ValueError, match=r"model\.pt is damaged"):
        check_contents(checkpoint, rank=0, num_ranks=2)


def test_changed_settings_are_named_where_a_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def build(**knobs: object) -> SLSAM:
        model = tiny_llama()
        return SLSAM(model, torch.optim.AdamW(model.parameters()), {"active_layers": 2, **knobs})

    state = build(rho=0.05).state_dict()
    build(rho=0.05).load_state_dict(state)
    assert not caplog.records
    build(rho=0.02).load_state_dict(state)
    assert "other slsam settings than it was saved with: rho=0.05 (this run: 0.02)" in caplog.text
    with pytest.raises(ValueError, match=r"do not fit this run's: active_layers=2 \(this run: 3\); resume with"):
        build(active_layers=3).load_state_dict(state)
