"""`slsam compare`: what it reads from the command line, how it runs trainings, and what it tells of them."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slsam_ds.cli.compare import command, training
from slsam_ds.cli.compare.command import main
from slsam_ds.cli.compare.method import Method
from slsam_ds.estimate.memory import stock_gradients
from slsam_ds.report.writing import COMPARISON_PAGE_FILE, COMPARISON_PICTURE_FILE
from tests.unit.test_report import write_settled_run


@pytest.mark.parametrize(
    ("text", "shared", "name", "assignments"),
    [
        ("adamw", [], "adamw", ("selector=all", "rho=0")),
        ("adamw", ["rho=0.1"], "adamw", ("selector=all", "rho=0")),
        ("defaults", [], "defaults", ()),
        ("defaults", ["preset=depth_price"], "preset=depth_price", ("preset=depth_price",)),
        ("single_pass", [], "single_pass", ("preset=single_pass",)),
        ("single_pass", ["seed=1"], "single_pass,seed=1", ("seed=1", "preset=single_pass")),
        ("rho=0.02,active_layers=4", [], "rho=0.02,active_layers=4", ("rho=0.02", "active_layers=4")),
        ('layers=["a/b"]', [], "layers=_a_b_", ('layers=["a/b"]',)),
    ],
)
def test_a_method_is_a_name_and_knobs(text: str, shared: list[str], name: str, assignments: tuple[str, ...]) -> None:
    assert Method.read(text, shared) == Method(name, assignments)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["adamw"], "give at least two methods"),
        (
            ["adamw", "defaults", "--speed", "5"],
            "unrecognized arguments: --speed 5; put flags of slsam train after --",
        ),
        (["adamw", "deflauts"], "deflauts: no such method; did you mean defaults?"),
        (["adamw", "zzz"], "zzz: no such method; give adamw, defaults, a preset"),
        (["adamw", "rho=much"], "rho"),
        (["adamw", "defaults", "--", "--slsam", "rho=-1"], "rho=-1"),
        (["adamw", "adamw"], "adamw adamw: give each method once"),
        (["adamw", "defaults", "--num_accelerators", "0"], "0: choose a number of at least 1"),
        (["adamw", "defaults", "--output_dir", "/proc/none"], "--output_dir /proc/none: cannot be written to"),
    ],
)
def test_bad_words_get_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.err


def test_our_flags_count_behind_the_training_flags_too() -> None:
    words = "adamw defaults --output_dir here -- --max_steps 3 --verbose --slsam rho=0.1 seed=1 --output_dir there"
    given = command._parse([*words.split(), "--weight_decay", "-1"])
    assert given.flags == ["--max_steps", "3", "--weight_decay", "-1"]
    assert (given.slsam, given.output_dir, given.verbose) == (["rho=0.1", "seed=1"], Path("there"), True)


def test_a_training_is_started_as_the_readme_says() -> None:
    method = Method("defaults", ("rho=0.1",))
    words = training._command(method, Path("out"), ["--deepspeed", "zero2"], 2, 12345)
    assert " ".join(words[1:]) == (
        "-m deepspeed.launcher.runner --quiet --num_accelerators 2 --master_port 12345 --module slsam_ds.train "
        "--deepspeed zero2 --output_dir out --measure True --slsam rho=0.1"
    )


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """In the place of the launcher: a script that gets the folder, and the method's name."""

    def start(method: Method, folder: Path, *_: Any) -> list[str]:
        return [sys.executable, "-c", script, str(folder), method.name]

    monkeypatch.setattr(training, "_command", start)


def test_trainings_are_compared_and_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for name, loss in (("adamw", 2.0), ("defaults", 1.875)):
        write_settled_run(tmp_path / "made" / name, loss=loss)
    script = (
        "import shutil, sys; folder, name = sys.argv[1:]; print('talk'); "
        f"shutil.copytree({str(tmp_path / 'made')!r} + '/' + name, folder, dirs_exist_ok=True)"
    )
    stand_in(monkeypatch, script)
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["adamw", "defaults", "--output_dir", str(out)]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "talk" not in printed
        assert printed.count("held-out loss after") == 1
        assert "defaults ends at the lowest held-out loss, 0.1250 below adamw" in printed
        assert command.EVIDENCE in printed
    assert (out / "adamw" / training.LOG_FILE).read_text() == "talk\n"
    assert (out / COMPARISON_PICTURE_FILE).read_bytes().startswith(b"\x89PNG\r\n")
    assert (out / COMPARISON_PAGE_FILE).is_file()


def test_records_of_an_earlier_run_are_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adamw", "defaults"):
        (tmp_path / "out").mkdir(exist_ok=True)
        write_settled_run(tmp_path / "out" / name, loss=2.0)
    stand_in(monkeypatch, "")
    assert main(["adamw", "defaults", "--output_dir", str(tmp_path / "out")]) == 2
    assert "holds no slsam_layers.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("sys.stderr.write('noise\\nerror: --lr: unknown flag\\nerror: --lr: unknown flag\\n'); sys.exit(2)",
         "error: --lr: unknown flag\n"),
        ("print('the last words'); sys.exit(2)", "the last words\nerror: adamw: the training failed; all that it said"),
    ],
)  # fmt: skip
def test_a_failure_tells_why(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, f"import sys; {script}")
    assert main(["adamw", "defaults", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(told)


def test_a_stop_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in starts a process of its own, as the launcher starts ranks; once it has, we are stopped."""
    script = (
        "import os, pathlib, signal, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); "
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid)); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    )
    stand_in(monkeypatch, script)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["adamw", "defaults", "--output_dir", str(tmp_path)]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Stopped" in capsys.readouterr().err
    child = int((tmp_path / "adamw" / "pid").read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_zero_keeps_a_bucket_or_its_share() -> None:
    assert stock_gradients(100, bucket=30, world_size=2) == 50
    assert stock_gradients(100, bucket=80, world_size=2) == 80
    assert stock_gradients(100, bucket=500, world_size=2) == 100
