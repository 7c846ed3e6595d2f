"""The acceptance run for a card, on the CPU at toy size: parts do what they should; one that fails stops no other."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.gpu import job, machine
from benchmarks.gpu.__main__ import PARTS, main
from benchmarks.gpu.records import Records
from benchmarks.gpu.wheels import needed


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The command changes it, for its ranks."""
    with mock.patch.dict(os.environ):
        yield


def run(folder: Path, *flags: str) -> int:
    return main(["--device", "cpu", "--output", str(folder), *flags])


def rows(folder: Path, part: str) -> list[dict[str, Any]]:
    return [row for row in Records(folder).rows() if row["part"] == part]


def test_cheap_parts(tmp_path: Path) -> None:
    assert run(tmp_path, "--parts", "machine", "large") == 0
    assert rows(tmp_path, "machine")[0]["torch"] != "none"
    prediction, *steps, done = rows(tmp_path, "large")
    assert done.keys() == {"part", "done_in_seconds"}
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:  # small tensors take whole pages, and on a CPU nothing is offloaded
        assert step["predicted_gb"] == pytest.approx(prediction["total_gb"])
        assert 0.5 < step["peak_gb"] / step["predicted_gb"] < 2
    assert "## large" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_all_parts(tmp_path: Path) -> None:
    assert run(tmp_path, "--minutes", "20") == 0
    assert all(rows(tmp_path, part) for part in PARTS)
    assert all(row["follows"] for row in rows(tmp_path, "oracle") if "follows" in row)


def test_a_part_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "wheels", 0.1)  # type: ignore[arg-type]  # a module that has no `run`
    monkeypatch.setattr(machine, "run", lambda given: given.add(left=given.left))
    assert run(tmp_path, "--parts", "machine", "wheels") == 1
    assert "done_in_seconds" in rows(tmp_path, "machine")[-1]
    failed = rows(tmp_path, "wheels")[-1]
    assert failed["failed"].startswith("AttributeError: ")
    assert "Traceback" in failed["traceback"]
    report = (tmp_path / "report.md").read_text()
    assert "\nFailed: AttributeError: " in report
    assert "\n```\nTraceback" in report


def test_rows_of_parts_that_are_not_run_are_kept(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.forget([])
    records.add("machine", torch="1.0")
    records.add("speed", mode="AdamW", tflop_per_second=400.0, quartiles=[0.1, 0.2])
    records.forget(["machine"])
    assert records.rows() == [{"part": "speed", "mode": "AdamW", "tflop_per_second": 400.0, "quartiles": [0.1, 0.2]}]


def test_fsdp2_is_left_out_where_torch_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "has_fsdp2", lambda: False)
    records = Records(tmp_path)
    records.forget([])
    given = job.Job(part="waits", device="cpu", ranks=1, ends=0.0, dies=0.0, records=records)
    assert given.engines("local", "fsdp2", "zero3") == ["local", "zero3"]
    assert records.rows() == [{"part": "waits", "engine": "fsdp2", "left_out": "needs torch 2.13"}]


def test_more_ranks_than_cards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "4096", "--output", str(tmp_path)]) == 2
    assert "--ranks 4096: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_card_may_lack_is_fetched_without_torch() -> None:
    names = needed()
    assert {"deepspeed", "transformers", "datasets", "pytest", "tokenizers"} <= set(names)
    assert not [name for name in names if name.startswith(("torch", "nvidia", "triton", "sympy"))]
