"""The benchmarks: every mode is what its name says, the counted is right, and the report has all of it. No times."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.modes import ADAMW_MODE, DENSE_SAM, EXACT, FINE_TUNING, MODES, OVERHEAD, REFERENCES, TWO_CALLS
from benchmarks.report import REPORT, SECTIONS
from benchmarks.rows import Row, row

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a comparison of all modes, of the smallest sizes, leaves."""
    folder = tmp_path_factory.mktemp("benchmarks")
    flags = ("--quick", "--blocks", "3", "--rounds", "3", "--only", "comparison")
    assert main([*flags, "--output", str(folder)]) == 0
    return folder


def _row(folder: Path, mode: object) -> Row:
    found = row(json.loads((folder / "comparison.json").read_text())["found"], mode)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_modes_are_what_they_say(folder: Path) -> None:
    """Two implementations of AdamW, and two of dense SAM, lose the same on the same data; the two differ."""
    losses = {mode.name: _row(folder, mode).one.losses for mode in (ADAMW_MODE, OVERHEAD, DENSE_SAM, TWO_CALLS)}
    assert losses[ADAMW_MODE.name] == pytest.approx(losses[OVERHEAD.name], rel=1e-5)
    assert losses[TWO_CALLS.name] == pytest.approx(losses[DENSE_SAM.name], rel=1e-5)
    assert losses[OVERHEAD.name] != pytest.approx(losses[DENSE_SAM.name], rel=1e-4)


def test_prices_are_the_counted_flops(folder: Path) -> None:
    for mode in MODES:
        deviation = _row(folder, mode).deviation
        assert deviation is not None
        assert deviation < 0.02, mode.name
    assert _row(folder, DENSE_SAM).flops == pytest.approx(2.0)


def test_sparse_steps_hold_and_send_less(folder: Path) -> None:
    exact = _row(folder, EXACT)
    assert exact.held(exact.one) < 0.65 * exact.held(exact.dense)
    assert exact.sent(exact.one) < 0.65 * exact.sent(exact.dense)
    assert min(exact.one.peak) > 0


def test_report_has_every_mode_and_picture(folder: Path) -> None:
    text = (folder / REPORT).read_text()
    for mode in MODES:
        assert f"\n| {mode.name} |" in text
    assert "≤ 1.20" in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).stat().st_size > 1000
    assert "comparison.png" in text


def test_report_is_made_again_from_the_numbers(folder: Path) -> None:
    before = (folder / REPORT).read_text()
    (folder / REPORT).unlink()
    assert main(["--report-only", "--output", str(folder)]) == 0
    assert (folder / REPORT).read_text() == before


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", "--world-size", "4096"]) == 2
    assert "choose --world-size" in capsys.readouterr().err
    assert main(["--rounds", "1"]) == 2
    assert "--rounds 1" in capsys.readouterr().err


@pytest.mark.slow
def test_all_sections(tmp_path: Path) -> None:
    assert main(["--quick", "--only", *SECTIONS, "--output", str(tmp_path)]) == 0
    text = (tmp_path / REPORT).read_text()
    assert all((tmp_path / f"{name}.json").is_file() for name in SECTIONS)
    assert "not measured" not in text
    assert "nan" not in text
    assert all(f"\n| {mode.name} |" in text for mode in (*FINE_TUNING, *REFERENCES))
