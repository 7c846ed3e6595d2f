"""`python -m slsam_ds.report`: what it computes, draws and writes, and what it refuses."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slsam_ds.cli.summary import summarize
from slsam_ds.records.files import (
    EVALUATIONS_FILE,
    LAYERS_FILE,
    SETTINGS_FILE,
    STEPS_FILE,
    read_steps,
    write_evaluations,
)
from slsam_ds.report.bins import StepBins
from slsam_ds.report.command import main
from slsam_ds.report.comparison import numbers_table, settings_table, what_differs_at_the_start, what_one_sees
from slsam_ds.report.facts import active_shares, layer_facts, loss_rises, run_facts
from slsam_ds.report.history import RecordsError, RunHistory, read_history
from slsam_ds.report.runs import read_runs
from slsam_ds.report.tables import layer_table, progress_table
from slsam_ds.report.writing import COMPARISON_PAGE_FILE, COMPARISON_PICTURE_FILE, PAGE_FILE, PICTURE_FILE

NUMELS = (10, 20, 30, 40)


def make_layers(numels: tuple[int, ...] = NUMELS) -> list[dict[str, Any]]:
    return [
        {"index": index, "name": f"model.layers.{index}", "numel": numel, "parameters": [f"p{index}"]}
        for index, numel in enumerate(numels)
    ]


def make_step(step: int, active: Sequence[int] = (1, 3), *, num_layers: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "active": list(active),
        "probabilities": [len(active) / num_layers] * num_layers,
        "grad_norms": {str(arm): 0.5 + arm for arm in active},
        "ascent_loss": 2.0,
        "loss": 2.1,
        "rho": 0.05,
        "perturbation_norm": 0.06,
        "perturbation_projection": 0.99,
        "skipped": False,
        "price": 1.2,
        "seconds": 1.5,
    } | changes


SKIPPED = {
    "grad_norms": {},
    "ascent_loss": None,
    "loss": None,
    "perturbation_norm": 0.0,
    "perturbation_projection": None,
    "skipped": True,
}


def write_run(folder: Path, steps: list[dict[str, Any]], layers: Any = None, *, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAYERS_FILE).write_text(json.dumps(make_layers() if layers is None else layers))
    (folder / STEPS_FILE).write_text("".join(json.dumps(step) + "\n" for step in steps) + tail)
    return folder


def history_of(*steps: dict[str, Any], numels: tuple[int, ...] = NUMELS) -> RunHistory:
    return RunHistory.from_records(make_layers(numels), steps)


def test_records_become_arrays() -> None:
    history = history_of(make_step(1), make_step(2, (0,), **SKIPPED))
    assert history.steps.tolist() == [1, 2]
    assert history.active.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert history.probabilities[1].tolist() == [0.25] * 4
    np.testing.assert_array_equal(history.grad_norms, [[np.nan, 1.5, np.nan, 3.5], [np.nan] * 4])
    np.testing.assert_array_equal(history.loss_at_weights, [2.0, np.nan])
    assert history.skipped.tolist() == [False, True]


def test_a_running_run_is_read_as_far_as_it_has_come(tmp_path: Path) -> None:
    run = write_run(tmp_path, [make_step(1), make_step(2)], tail='{"step": 3, "acti')
    assert len(read_history(run)) == 2


def test_the_price_is_what_the_run_recorded() -> None:
    history = history_of(make_step(1, price=0.9), make_step(2, price=1.3), make_step(3, price=None))
    np.testing.assert_array_equal(history.price, [0.9, 1.3, np.nan])
    facts = {fact.label: f"{fact.value} {fact.note}" for fact in run_facts(history)}
    assert facts["Price"] == "1.10 of AdamW's FLOPs, 0.55 of dense SAM's"


@pytest.mark.parametrize(
    ("held_out", "fact"),
    [
        ([(20, 2.0)], "2 after step 20"),
        ([(0, 2.5), (20, 2.0)], "2 after step 20; 2.5 after step 0"),
        ([(0, 2.5), (10, 1.75), (20, 2.0)], "2 after step 20; 2.5 after step 0; lowest 1.75 after step 10"),
    ],
)
def test_held_out_losses_are_told(held_out: list[tuple[int, float]], fact: str) -> None:
    history = RunHistory.from_records(make_layers(), [make_step(1)], held_out)
    assert {fact.label: f"{fact.value} {fact.note}" for fact in run_facts(history)}["Held-out loss"] == fact


def test_records_without_a_price_have_none() -> None:
    old = {key: value for key, value in make_step(1).items() if key != "price"}
    history = history_of(old)
    assert np.isnan(history.price).all()
    assert "Price" not in {fact.label for fact in run_facts(history)}
    table = progress_table(history)
    assert table.rows[0][table.header.index("price")] == ""


def test_a_step_that_did_not_climb_shows_its_loss_and_no_rise() -> None:
    climbed = make_step(1)
    history = history_of(climbed, make_step(2, rho=0.0, ascent_loss=None, perturbed=[], perturbation_projection=None))
    assert history.loss_at_weights.tolist() == [2.0, 2.1]
    np.testing.assert_allclose(loss_rises(history), [0.05, np.nan], rtol=1e-9)


def test_a_mask_is_told_where_there_was_one() -> None:
    masked = history_of(make_step(1, mask_density=1.0), make_step(2, mask_density=0.5))
    assert "Mask: 75.0% of the perturbed layers' weights moved" in map(str, run_facts(masked))
    assert "Mask" not in {fact.label for fact in run_facts(history_of(make_step(1)))}


def test_layers_that_are_perturbed_and_not_updated_are_told_apart() -> None:
    figures = pytest.importorskip("slsam_ds.report.figures", exc_type=ImportError)
    alike = history_of(make_step(1), make_step(2, **NOT_CLIMBED, perturbed=[]))
    assert not alike.perturbs_others
    assert alike.perturbed_layers.tolist() == [[False, True, False, True], [False] * 4]
    assert figures.panels_of(alike) == list(figures.PANELS)
    assert "perturbed in" not in layer_table(alike).header
    steps = [make_step(1, perturbed=[2]), make_step(2, perturbed=[0, 2]), make_step(3, **NOT_CLIMBED, perturbed=[])]
    apart = history_of(*steps)
    assert apart.perturbs_others
    titles = [panel.title for panel in figures.panels_of(apart)]
    assert titles[:2] == ["Which layers were active", "Which layers were perturbed"]
    table = layer_table(apart)
    assert [row[table.header.index("perturbed in")] for row in table.rows] == ["1", "0", "2", "0"]
    facts = {fact.label: f"{fact.value} {fact.note}" for fact in run_facts(apart)}
    assert facts["Perturbed parameters"] == "35.0% per step that perturbs; 1.5 of 4 layers"
    text = summarize(make_layers(), steps, held_out=None, held_out_title="", output_dir="out")
    assert "Layers updated, and perturbed, in how many of 3 steps:" in text
    assert "model.layers.2 0 2" in text
    for panel in figures.panels_of(apart)[:2]:
        panel.draw(figures.Figure(), apart, figures.LIGHT)


NOT_CLIMBED = {"rho": 0.0, "ascent_loss": None, "perturbation_norm": 0.0, "perturbation_projection": None}


def test_a_schedule_that_ends_without_a_climb_tells_the_radius_of_those_that_did() -> None:
    history = history_of(make_step(1), make_step(2, **NOT_CLIMBED), make_step(3, **SKIPPED))
    assert history.perturbed.tolist() == [True, False, False]
    facts = {fact.label: f"{fact.value} {fact.note}" for fact in run_facts(history)}
    told = "0.990 of rho = 0.05 reached the weights (1: all of it), in the 1 of 3 steps that perturbed them"
    assert facts["Perturbation"] == told
    history = history_of(make_step(1), make_step(2, perturbation_norm=0.0))  # a direction that had nothing yet
    assert history.perturbed.tolist() == [True, False]


def lines_of(panel: str, history: RunHistory) -> dict[str, list[list[float]]]:
    """What a panel's curves go through, by label."""
    figures = pytest.importorskip("slsam_ds.report.figures", exc_type=ImportError)
    figure = figures.Figure()
    next(each for each in figures.PANELS if each.title == panel).draw(figure, history, figures.LIGHT)
    return {line.get_label(): np.transpose(line.get_data()).tolist() for line in figure.axes[0].get_lines()}


def test_losses_are_drawn_where_they_were_measured() -> None:
    curves = lines_of("Loss", history_of(make_step(1), make_step(2, **NOT_CLIMBED), make_step(3)))
    assert curves == {
        "at the weights": [[1, 2.0], [2, 2.1], [3, 2.0]],
        "at the perturbed weights": [[1, 2.1], [3, 2.1]],
    }
    momentum = history_of(*(make_step(step, ascent_loss=None) for step in (1, 2)))  # perturbed without an ascent pass
    assert lines_of("Loss", momentum) == {"at the perturbed weights": [[1, 2.1], [2, 2.1]]}


def test_steps_that_did_not_climb_leave_the_perturbation_as_it_was() -> None:
    history = history_of(*(make_step(step, **({} if step % 4 == 1 else NOT_CLIMBED)) for step in range(1, 201)))
    reached = lines_of("Size of the perturbation", history)["change made"]
    assert reached == [[step, 0.06] for step in range(1, 201, 4)]  # a line, though none has a neighbour


def test_what_a_run_adds_up_to() -> None:
    history = history_of(make_step(1), make_step(2, (3,), loss=1.0, ascent_loss=0.0), make_step(3, (0,), **SKIPPED))
    assert active_shares(history) == pytest.approx([0.6, 0.4, 0.1])
    np.testing.assert_allclose(loss_rises(history), [0.05, np.nan, np.nan], rtol=1e-9)
    facts = {fact.label: f"{fact.value} {fact.note}" for fact in run_facts(history)}
    assert facts["Active parameters"] == "36.7% of 100 per step; 1.33 of 4 layers"
    assert facts["Perturbation"] == "0.990 of rho = 0.05 reached the weights (1: all of it)"
    assert facts["Skipped"] == "1 of 3 steps, because a loss or gradient was not finite"
    assert facts["Time"] == "1.5 s per step in the median, 0:00:04 in all"
    last = layer_facts(history)[3]
    assert (last.num_active, last.share_active, last.grad_norm) == (2, pytest.approx(2 / 3), 3.5)
    assert np.isnan(layer_facts(history)[2].grad_norm)


def test_bins_of_a_short_run_are_its_steps() -> None:
    bins = StepBins(np.arange(5, 9), max_bins=10)
    assert bins.centers.tolist() == [5, 6, 7, 8]
    assert bins.means(np.array([1.0, np.nan, 3.0, 4.0])).tolist() == pytest.approx([1, np.nan, 3, 4], nan_ok=True)


def test_bins_of_a_long_run_are_few_and_cover_it() -> None:
    steps = np.arange(1, 100_001)
    bins = StepBins(steps, max_bins=320)
    assert 160 < len(bins) <= 320
    assert (bins.edges[0], bins.edges[-1]) == (0.5, 100_000.5)
    assert bins.sums(np.ones(100_000)).sum() == 100_000
    means = bins.means(np.stack([steps, -steps], axis=1).astype(float))
    np.testing.assert_allclose(means, np.stack([bins.centers, -bins.centers], axis=1))
    low, high = bins.quantiles(steps.astype(float), 0.0, 1.0)
    np.testing.assert_allclose(low, np.ceil(bins.edges[:-1]))
    np.testing.assert_allclose(high, np.floor(bins.edges[1:]))


def test_bins_without_a_record_are_nan() -> None:
    bins = StepBins(np.array([1, 2, 9]), max_bins=3)
    assert bins.means(np.array([1.0, 3.0, 5.0])).tolist() == pytest.approx([2, np.nan, 5], nan_ok=True)


def test_tables() -> None:
    history = history_of(*(make_step(step) for step in range(1, 101)))
    lines = str(layer_table(history)).splitlines()
    assert lines[0] == "Layers over 100 steps"
    assert len(lines[1]) == len(lines[3])  # aligned; layer 0 was never active, and its last cell is empty
    assert lines[3].split() == ["model.layers.1", "20", "100", "100.0%", "0.500", "0.500", "1.5"]
    rows = progress_table(history).rows
    assert [row[0] for row in rows][:2] == ["1 to 10", "11 to 20"]
    assert len(rows) == 10


def test_the_summary_at_the_end_of_a_run_says_the_same() -> None:
    steps = [make_step(1), make_step(2, **SKIPPED)]
    text = summarize(make_layers(), steps, held_out=(2.0, 1.0), held_out_title="8 samples", output_dir="out")
    for fact in run_facts(history_of(*steps)):
        assert str(fact) in text.splitlines()
    assert "FLOPs were counted if" in text
    unpriced = [{**step, "price": None} for step in steps]
    text_of_unpriced = summarize(make_layers(), unpriced, held_out=None, held_out_title="", output_dir="out")
    assert "FLOPs" not in text_of_unpriced
    assert "Held-out loss (8 samples): 2.0000 before, 1.0000 after (-50.0%)" in text
    assert "  model.layers.1 2 ████████████████████████" in text.splitlines()


def test_the_summary_of_a_run_without_steps() -> None:
    text = summarize(make_layers(), [], held_out=None, held_out_title="", output_dir="out")
    assert text.split() == ["Outputs:", "out", "(model,", f"{LAYERS_FILE},", f"{STEPS_FILE})"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 400 steps whose names want escaping, and where its report went."""
    layers = make_layers()
    layers[0]["name"] = r"<script>alert('no')</script> h\.\d+$"
    steps = [make_step(step, loss=2.1 + 1 / step) for step in range(1, 401)]
    steps[7] |= SKIPPED
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path_factory.mktemp("run") / "a<b>", steps, layers, tail='{"step": 401, "ac')
    target = run.parent / "made" / "for it"
    assert main([str(run), "--to", str(target)]) == 0
    return run, target


def test_files_go_where_asked(report: tuple[Path, Path]) -> None:
    run, target = report
    assert sorted(path.name for path in target.iterdir()) == sorted([PAGE_FILE, PICTURE_FILE])
    assert (target / PICTURE_FILE).read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in run.iterdir()) == sorted([LAYERS_FILE, STEPS_FILE])


def test_the_page_needs_no_other_file(report: tuple[Path, Path]) -> None:
    page = (report[1] / PAGE_FILE).read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|srcset|href)=\"(.{0,22})", page)
    assert len(sources) > 20
    assert set(sources) == {"data:image/png;base64,"}
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_names_are_escaped(report: tuple[Path, Path]) -> None:
    page = (report[1] / PAGE_FILE).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<title>SL-SAM: a&lt;b&gt;</title>" in page


def test_the_page_tells_what_the_table_tells(report: tuple[Path, Path]) -> None:
    run, target = report
    page = (target / PAGE_FILE).read_text(encoding="utf-8")
    history = read_history(run)
    for cell in (cell for row in layer_table(history).rows[1:] for cell in row):
        assert f">{cell}</" in page
    assert "Skipped" in page
    assert "dense SAM costs 2" in page


def wide_run() -> list[dict[str, Any]]:
    return [make_step(step, (step % 300, 299), num_layers=300) for step in range(1, 1001)]


@pytest.mark.parametrize(
    ("steps", "num_layers"),
    [
        (lambda: [make_step(1)], 4),
        (lambda: [make_step(1, **SKIPPED)], 4),
        (lambda: [make_step(1, (0,), num_layers=1, grad_norms={"0": 0.0}, seconds=0.0)], 1),
        (lambda: [make_step(step, rho=0.0, ascent_loss=None, perturbation_projection=None) for step in (3, 90)], 4),
        (lambda: [make_step(1, **dict.fromkeys(("loss", "ascent_loss", "rho", "perturbation_norm", "seconds")))], 4),
        (wide_run, 300),
    ],
    ids=["one step", "skipped", "one layer", "no ascent, a gap", "nulls", "hundreds of layers"],
)
@pytest.mark.filterwarnings("error")
def test_odd_runs_can_be_drawn(steps: Callable[[], list[dict[str, Any]]], num_layers: int) -> None:
    figures = pytest.importorskip("slsam_ds.report.figures", exc_type=ImportError)
    history = history_of(*steps(), numels=tuple(range(1, num_layers + 1)))
    assert str(layer_table(history))
    assert str(progress_table(history))
    assert run_facts(history)
    assert figures.draw_report(history, "title", "subtitle").startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([], "slsam_steps.jsonl: holds no step yet, or was not written by slsam_ds"),
        ([{"loss": 1.0}], "line 1: not a record of these layers (lacks 'probabilities')"),
        (["text"], "line 1: not a record of these layers (not a JSON object)"),
        ([make_step(1, num_layers=5)], "line 1: not a record of these layers (5 probabilities for 4 layers)"),
        ([make_step(1), make_step(2, (4,))], "line 2: not a record of these layers (layer 4 of 4)"),
        ([make_step(1) | {"active": ["0"]}], "line 1: not a record of these layers (layer '0' of 4)"),
        ([make_step(1, grad_norms=[0.5])], "line 1: not a record of these layers ("),
        ([make_step(1, loss="low")], "line 1: not a record of these layers (could not convert string to float"),
        ([make_step(2), make_step(1)], "line 2: step 1 after step 2; did two runs write into one folder?"),
    ],
)
def test_foreign_steps_are_refused(steps: list[Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecordsError) as refusal:
        read_history(write_run(tmp_path, steps))
    assert str(refusal.value).startswith(f"{tmp_path}: {STEPS_FILE}")
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([], "lists no layers with weights"),
        ({"a": 1}, "not a list of layers"),
        (5, "not a list of layers"),
        ([{"name": "a"}], "not a list of layers"),
        (make_layers((3, 0)), "lists no layers with weights"),
    ],
)
def test_foreign_layers_are_refused(layers: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match=sentence):
        read_history(write_run(tmp_path, [make_step(1)], layers))


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [make_step(1)])
    (tmp_path / STEPS_FILE).write_bytes(b"\xff\xfe\x00\x01\n" * 3)
    with pytest.raises(RecordsError, match="holds no step yet"):
        read_history(tmp_path)
    (tmp_path / LAYERS_FILE).write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecordsError, match="not JSON"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "none", "none: no such folder; give the --output_dir of a run"),
        (lambda folder: folder, f"holds no {LAYERS_FILE}; give the --output_dir of a run that has started to train"),
        (lambda folder: write_run(folder / "b", []).parent, "holds no slsam_layers.json; its runs are "),
        (lambda folder: write_run(folder, []), "holds no step yet"),
    ],
)
def test_bad_input_ends_with_one_sentence(
    make: Callable[[Path], Path], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(make(tmp_path))]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.err


def test_a_place_that_cannot_be_written_ends_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", [make_step(1)])
    assert main([str(run), "--to", str(run / LAYERS_FILE / "below a file")]) == 2
    assert re.fullmatch(r"error: .*below a file: Not a directory\n", capsys.readouterr().err)


def test_without_matplotlib_there_are_tables_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "slsam_ds.report.figures", raising=False)
    run = write_run(tmp_path, [make_step(1)])
    assert main([str(run)]) == 2
    printed = capsys.readouterr()
    assert "Active parameters: 60.0%" in printed.out
    assert printed.err.count("\n") == 1
    assert 'pip install "slsam-ds[report]"' in printed.err
    assert sorted(path.name for path in run.iterdir()) == sorted([LAYERS_FILE, STEPS_FILE])


def test_as_a_command(tmp_path: Path) -> None:
    """Its exit code, and that no framework is imported only to draw."""
    command = [sys.executable, "-X", "importtime", "-m", "slsam_ds.report", str(tmp_path / "none")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "none: no such folder" in run.stderr
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "slsam_ds.report.history" in loaded
    assert not loaded & {"deepspeed", "transformers", "matplotlib"}


def test_steps_can_be_read_one_at_a_time(tmp_path: Path) -> None:
    run = write_run(tmp_path, [make_step(1)], tail="\x00\x00")
    assert [record["step"] for record in read_steps(run)] == [1]


SETTINGS = {"slsam": {"rho": 0.05, "selector": "exp3m"}, "training": {"seed": 42}, "total_steps": 20, "has_ended": True}


def write_settled_run(folder: Path, *, loss: float, settings: dict[str, Any] = SETTINGS, **changes: Any) -> Path:
    """A run of 20 steps that measured its costs and its held-out loss."""
    costs = {"reduced_bytes": 3e6, "gathered_bytes": 1e6, "gradient_bytes": 2e6, "activation_bytes": 8e6}
    steps = [make_step(step, **{**costs, **changes}) for step in range(1, 21)]
    steps[0] |= {"reduced_bytes": 9e9, "activation_bytes": 9e9}  # the first step sets things up
    run = write_run(folder, steps)
    (run / SETTINGS_FILE).write_text(json.dumps(settings))
    log = [{"step": 0, "eval_loss": 2.5}, {"step": 10, "loss": 2.0}, {"step": 20, "eval_loss": loss}]
    write_evaluations(run, log)
    return run


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    plain = {"active": [0, 1, 2, 3], "rho": 0.0, "ascent_loss": None, "perturbation_projection": None, "price": 1.0}
    settings = SETTINGS | {"slsam": {"rho": 0.0, "selector": "all"}}
    adamw = write_settled_run(tmp_path / "adamw", loss=2.0, settings=settings, **plain, reduced_bytes=7e6, seconds=3.0)
    return [adamw, write_settled_run(tmp_path / "defaults", loss=2.125)]


def test_several_runs_stand_side_by_side(two_runs: list[Path]) -> None:
    runs = read_runs(two_runs)
    assert [run.name for run in runs] == ["adamw", "defaults"]
    assert runs[1].history.held_out == ((0, 2.5), (20, 2.125))
    rows = {row[0]: row[1:] for row in numbers_table(runs).rows}
    assert numbers_table(runs).header == ("", "adamw", "defaults", "defaults vs adamw")
    assert rows["held-out loss before"] == ("2.5000", "2.5000", "+0.0000")
    assert rows["held-out loss after"] == ("2.0000", "2.1250", "+0.1250")
    assert rows["seconds per step"] == ("3", "1.5", "0.50x")
    assert rows["sent per step, MB"] == ("8", "4", "0.50x")
    assert rows["gradients held, MB: largest step"] == ("2", "2", "1.00x")
    assert rows["layers updated per step"] == ("100.0%", "50.0%", "0.50x")
    assert "skipped steps" not in rows
    different = settings_table(runs)
    assert different.rows == (("slsam.rho", "0", "0.05"), ("slsam.selector", "all", "exp3m"))
    assert what_one_sees(runs) == (
        "adamw ends at the lowest held-out loss, 0.1250 below defaults; a step of defaults takes 0.50 of the time and "
        "0.50 of the bytes of one of adamw."
    )
    assert what_one_sees(runs[::-1]).startswith("adamw ends at the lowest")  # whatever the order
    assert what_differs_at_the_start(runs) == ""


def test_a_comparison_tells_what_it_does_not_know(two_runs: list[Path], tmp_path: Path) -> None:
    (two_runs[1] / EVALUATIONS_FILE).unlink()
    (tmp_path / "elsewhere").mkdir()
    other = write_run(tmp_path / "elsewhere" / "adamw", [make_step(1)])
    runs = read_runs([*two_runs, other])
    assert [run.name for run in runs] == [str(two_runs[0]), "defaults", str(other)]
    assert what_one_sees(runs) == ""
    rows = {row[0]: row[1:] for row in numbers_table(runs).rows}
    assert rows["held-out loss after"] == ("2.0000", "", "")
    assert rows["sent per step, MB"] == ("8", "4", "")


def test_runs_that_start_apart_are_named(two_runs: list[Path]) -> None:
    write_evaluations(two_runs[0], [{"step": 0, "eval_loss": 2.25}])
    told = what_differs_at_the_start(read_runs(two_runs))
    assert told == "The runs did not start alike: held-out losses before are 2.2500, 2.5000."


def test_several_runs_have_one_page(two_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([*map(str, two_runs)]) == 0
    folder = two_runs[0].parent
    assert sorted(path.name for path in folder.glob("slsam_*")) == [COMPARISON_PAGE_FILE, COMPARISON_PICTURE_FILE]
    printed = capsys.readouterr().out
    assert "Settings that differ" in printed
    assert "0.1250 below defaults" in printed
    page = (folder / COMPARISON_PAGE_FILE).read_text(encoding="utf-8")
    assert "slsam.selector" in page
    assert 'http-equiv="refresh"' not in page
    assert page.count("<figure") == 6
    assert all(caption.startswith("Look for") and "Bad:" in caption for caption in captions_of(page))


def captions_of(page: str) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", page)


def test_each_picture_says_what_is_good_and_what_is_bad(report: tuple[Path, Path]) -> None:
    captions = captions_of((report[1] / PAGE_FILE).read_text(encoding="utf-8"))
    assert len(captions) == 10
    assert all(caption.startswith("Look for") and "Bad:" in caption for caption in captions)


def test_a_page_follows_its_run_to_the_end(
    two_runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run = two_runs[1]
    (run / SETTINGS_FILE).write_text(json.dumps(SETTINGS | {"has_ended": False}))
    pages = []

    def sleep(seconds: float) -> None:
        """A step later, or once more at the end."""
        assert seconds == 2
        pages.append((run / PAGE_FILE).read_text(encoding="utf-8"))
        if len(pages) == 2:
            (run / SETTINGS_FILE).write_text(json.dumps(SETTINGS))
            return
        with (run / STEPS_FILE).open("a") as steps:
            steps.write(json.dumps(make_step(21)) + "\n")

    monkeypatch.setattr("slsam_ds.report.command.time.sleep", sleep)
    assert main([str(run), "--follow", "2"]) == 0
    assert [f"Steps 1 to {last}" in page for page, last in zip(pages, (20, 21), strict=True)] == [True, True]
    assert all('<meta http-equiv="refresh" content="2">' in page for page in pages)
    assert 'http-equiv="refresh"' not in (run / PAGE_FILE).read_text(encoding="utf-8")
    assert "The run has ended." in capsys.readouterr().out


def test_following_waits_for_the_first_step_and_stops_by_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    waits = iter([lambda: write_run(tmp_path, [make_step(1)]), None])

    def sleep(seconds: float) -> None:
        do = next(waits)
        if do is None:
            raise KeyboardInterrupt
        do()

    monkeypatch.setattr("slsam_ds.report.command.time.sleep", sleep)
    assert main([str(tmp_path), "--follow"]) == 0
    assert 'http-equiv="refresh"' not in (tmp_path / PAGE_FILE).read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert printed.startswith("Waiting for the first step")
    assert "Stopped following" in printed


@pytest.mark.parametrize("seconds", ["0", "soon", "inf"])
def test_a_bad_interval_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["somewhere", "--follow", seconds])
    assert f"{seconds}: choose a number of seconds, at least 1" in capsys.readouterr().err


def test_what_is_not_a_run_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--follow"]) == 2
    assert "no such folder" in capsys.readouterr().err
