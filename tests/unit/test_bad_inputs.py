"""Whatever people give: accepted, or refused with one sentence that names it; never a traceback, never a hang."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from hypothesis import given
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from slsam_ds.cli.settings import read_settings
from slsam_ds.engines.deepspeed.checkpoint import read_file
from slsam_ds.engines.torch_checkpoint import _check_index
from slsam_ds.slsam import SLSAM
from tests.bad_input_strategies import SAVED_KNOBS, CommandExample, DataExample, saved_model
from tests.bad_inputs import KINDS, BrokenError, attempt, trying

NUM_EXAMPLES = {"launch/train.py": 40, "checkpoint": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_input_is_accepted_or_refused_with_one_sentence(kind: str) -> None:
    outcomes = set()

    @trying(NUM_EXAMPLES.get(kind, 80))
    @given(KINDS[kind].examples)
    def check(example: Any) -> None:
        outcomes.add(attempt(kind, example))

    check()
    assert "accepted" in outcomes
    assert "refused" in outcomes or not KINDS[kind].refusals


def _text(**files: bytes) -> DataExample:
    return DataExample({name.replace("_", "."): content for name, content in files.items()}, {}, has_template=False)


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("config block", ({"rho": 10**400}, None)),
        ("config block", ({}, ["rho=" + "9" * 5000])),
        ("config block", ({}, ["rho=" + "[" * 100_000])),
        ("config block", ({"layers": ["a{99999999999999999999}"]}, None)),
        ("config block", ({"a\nb": 1}, None)),
        ("data file", _text(a_jsonl=b'{"text": "half a pair: \\ud800"}\n')),
        ("data file", _text(a_jsonl=b'{"text": "x", "id": ' + b"9" * 5000 + b"}\n")),
        ("data file", _text(a_csv=b'"a\nb"\nx\n')),
        (
            "launch/train.py",
            CommandExample(["--train_file", "~nobody/x.jsonl", "--resume_from_checkpoint", "x" * 5000]),
        ),
        ("launch/train.py", CommandExample(["--deepspeed", "ds.json"], {"ds.json": b'{"hybrid_engine": 5}'})),
    ],
)
def test_what_once_ended_in_a_traceback_is_refused(kind: str, example: Any) -> None:
    assert attempt(kind, example) == "refused"


def test_a_traceback_counts_as_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("slsam_ds.config.SLSAMConfig.from_dict", fail)
    with pytest.raises(BrokenError, match="KeyError"):
        attempt("config block", ({}, None))


# Security


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_nothing_in_a_checkpoint_of_deepspeed_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"module": {}, "extra": _RunsCode()}, "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: holds .* neither a tensor nor plain data"):
        read_file("model.pt")
    assert not Path("ran").exists()


class _Attribute:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enum."""

    def __init__(self, holder: Any, name: str) -> None:
        self.holder, self.name = holder, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.holder, self.name)


def test_members_of_enums_are_read_however_python_pickled_them(tmp_path: Path) -> None:
    torch.save({"stage": _Attribute(ZeroStageEnum, "weights")}, tmp_path / "model.pt")
    assert read_file(str(tmp_path / "model.pt")) == {"stage": ZeroStageEnum.weights}
    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps(_Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")))
    _check_index(index)


@pytest.mark.parametrize("name", ["__subclasses__", "mro", "missing"])
def test_no_other_attribute_is_read(tmp_path: Path, name: str) -> None:
    torch.save({"stage": _Attribute(ZeroStageEnum, name)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="neither a tensor nor plain data"):
        read_file(str(tmp_path / "model.pt"))
    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps(_Attribute(_MEM_FORMAT_ENCODING, name)))
    with pytest.raises(ValueError, match="cannot be loaded"):
        _check_index(index)


def test_nothing_in_a_checkpoint_of_torch_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved_model()
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SAVED_KNOBS)
    slsam.save_checkpoint("saved")
    slsam.load_checkpoint("saved")
    index = Path("saved", ".metadata")
    index.write_bytes(pickle.dumps(_RunsCode()).ljust(index.stat().st_size, b"\0"))
    with pytest.raises(
        ValueError, match=r"\.metadata: cannot be loaded \(pathlib.* is neither a tensor nor plain data"
    ):
        slsam.load_checkpoint("saved")
    assert not Path("ran").exists()


def test_the_hub_token_is_in_no_arguments_that_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "")
    settings = read_settings(["--hub_token", "hf_secret"])
    assert "hf_secret" not in repr(vars(settings.training))
