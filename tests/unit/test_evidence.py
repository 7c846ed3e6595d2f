"""The evidence: data without leaks, scores that are right, runs that are repeated, resumed and told truly."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import study, tasks
from benchmarks.evidence.corpus import documented
from benchmarks.evidence.held_out import score, sharpness
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.runs import FILE, Key, Runs
from benchmarks.evidence.tables import Mean, difference, methods_table
from benchmarks.evidence.training import batches, run, training_batches

DIGITS = tasks.TASKS["digits"]
QUICK = {"dense_sam", "slsam", "budget"}


class Logits(nn.Module):
    """Answers with what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, values: torch.Tensor) -> object:
        return type("Output", (), {"logits": values + self.shift})


def test_no_file_is_in_two_parts_and_no_sentence_comes_twice() -> None:
    rows = list(documented(("numpy",)))
    assert len({row.sentence for row in rows}) == len(rows) > 200
    assert {row.part for row in rows} == {"train", "validation", "test"}
    assert rows == list(documented(("numpy",)))  # whatever the order in which the file system lists
    for row in rows:
        assert row.header.startswith(f"def {row.name}(")


def test_digits_are_in_one_part_each() -> None:
    data = DIGITS.load()
    images = [sample["pixel_values"] for part in (data.train, data.validation, data.test) for sample in part]
    assert len({tuple(image.flatten().tolist()) for image in images}) == len(images) == 1797


def test_epochs_take_every_sample_once_and_differ() -> None:
    data = DIGITS.load()
    stream = training_batches(DIGITS, data, seed=3)
    epochs = [[next(stream)["pixel_values"] for _ in range(len(data.train) // DIGITS.batch)] for _ in range(2)]
    sums = [sorted(torch.cat(epoch).sum(dim=(1, 2, 3)).tolist()) for epoch in epochs]
    assert sums[0] == sums[1]
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_score_of_classes() -> None:
    right, wrong = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    found = score(
        Logits(), [{"values": torch.cat([right, wrong]), "labels": torch.tensor([0, 0])}], predicts_tokens=False
    )
    confidence = torch.softmax(right, dim=-1).max().item()
    assert found.accuracy == 0.5
    assert found.loss == pytest.approx(-(torch.log(torch.tensor([confidence, 1 - confidence]))).mean().item())
    assert found.calibration_error == pytest.approx(confidence - 0.5)  # both answers are in one bin


def test_score_of_tokens_leaves_out_what_is_not_asked() -> None:
    logits = torch.zeros(1, 4, 5)
    logits[0, 1, 3] = 4.0  # after the second token, the fourth of the vocabulary
    labels = torch.tensor([[0, -100, 3, -100]])
    found = score(Logits(), [{"values": logits, "labels": labels}], predicts_tokens=True)
    assert found.accuracy == 1.0
    assert found.loss == pytest.approx(-torch.log_softmax(logits[0, 1], dim=-1)[3].item())


def test_sharpness_climbs_and_comes_back() -> None:
    data = DIGITS.load()
    model = DIGITS.load().build_model(0)
    some = batches(data, data.test[:32])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sharpness(model, some, predicts_tokens=False, rho=0.05)
    assert found.along_gradient > 0
    assert found.along_gradient > found.in_random_directions
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_is_repeated_to_the_bit() -> None:
    found = [run(DIGITS, METHODS["slsam"], learning_rate=1e-3, seed=1, steps=4, on_test=True) for _ in range(2)]
    for one in found:
        one.pop("seconds")
        for point in one["validation"]:
            point.pop("seconds")
    assert found[0] == found[1]
    assert sum(found[0]["updates"]) == 4 * 2
    assert found[0]["validation"][-1]["step"] == 4


def test_a_run_in_bfloat16_keeps_float32_weights() -> None:
    rough = dataclasses.replace(DIGITS, in_bfloat16=True)
    found, exact = (
        run(task, METHODS["slsam"], learning_rate=1e-3, seed=1, steps=4, on_test=True) for task in (rough, DIGITS)
    )
    assert found["price"] == pytest.approx(exact["price"], rel=0.02)
    assert found["test"]["loss"] == pytest.approx(exact["test"]["loss"], rel=0.02)
    assert found["test"]["loss"] != exact["test"]["loss"]
    # Taken in bfloat16, these rises, of the third digit of the loss, would be noise.
    for name, rise in exact["sharpness"].items():
        assert found["sharpness"][name] == pytest.approx(rise, rel=0.1, abs=1e-4)


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_methods_cost_what_their_names_say(method: str) -> None:
    price = run(DIGITS, METHODS[method], learning_rate=1e-3, seed=1, steps=6)["price"]
    low, high = {
        "adamw": (0.99, 1.01),
        "adamw_as_long": (0.99, 1.01),
        "dense_sam": (1.99, 2.01),
        "lisa": (0.4, 0.9),
        "slsam": (0.8, 1.6),
        "quarter": (0.5, 1.1),
        "previous": (0.4, 0.9),
        "single_pass": (0.6, 0.95),
        "all_previous": (0.99, 1.01),
        "budget": (0.5, 1.5),
        "adamw_price": (0.5, 1.5),
    }[method]
    assert low < price < high


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the command with runs that take no time; the smaller the learning rate, the better."""
    made: list[str] = []

    def pretend(task: tasks.Task, method: object, *, learning_rate: float, seed: int, steps: int, **_: object) -> dict:
        name = method.name  # type: ignore[attr-defined]
        made.append(name)
        scores = {"loss": learning_rate * 100 + seed, "accuracy": 0.5, "calibration_error": 0.1}
        return {
            "steps": steps,
            "price": 1.0,
            "seconds": steps * (0.5 if name == "slsam" else 1.0),
            "updates": [1, 2, 3, 4],
            "validation": [{"step": steps, "seconds": 1.0, **scores}],
            "test": scores,
            "sharpness": {"along_gradient": 0.1, "in_random_directions": 0.01},
        }

    monkeypatch.setattr(command, "run", pretend)

    def call(folder: Path, *flags: str) -> list[str]:
        made.clear()
        assert command.main(["--tasks", "digits", "--seeds", "2", "--output", str(folder), *flags]) == 0
        return list(made)

    return call


def test_a_stopped_study_goes_on(fake: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = ("--methods", "slsam", "adamw_as_long", "--stages", "tune", "final")
    made = fake(tmp_path, *flags)
    assert len(made) == 2 * len(DIGITS.learning_rates) + 2 * 2
    assert fake(tmp_path, *flags) == []
    lines = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text("\n".join(lines[:-3]) + "\n")
    assert fake(tmp_path, *flags) == made[-3:]


def test_the_wall_clock_of_another_decides_how_long(fake: Callable[..., list[str]], tmp_path: Path) -> None:
    fake(tmp_path, "--methods", "slsam", "adamw_as_long", "--stages", "tune", "final")
    steps = {run.key.method: run.found["steps"] for run in Runs(tmp_path).of("final", "digits")}
    assert steps == {"slsam": DIGITS.steps, "adamw_as_long": DIGITS.steps // 2}


def test_report_has_every_method_and_knob(fake: Callable[..., list[str]], tmp_path: Path) -> None:
    fake(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for method in METHODS.values():
        assert f"| {method.title} | 0.0003* |" in text
    for knob, changes in study.KNOBS.items():  # digits are learned in float32
        assert (f"\n| {knob} |" in text) != changes[0].needs_bfloat16
    assert (tmp_path / "digits.png").is_file()


def test_a_knob_that_its_method_excludes_is_left_out(
    fake: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend = command.run

    def refuse(*task_and_method: Any, knobs: dict[str, Any], **others: Any) -> dict[str, Any]:
        if knobs.get("rho") == 0:
            raise ValueError("no step costs so much")
        return pretend(*task_and_method, **others)

    monkeypatch.setattr(command, "run", refuse)
    fake(tmp_path, "--stages", "tune", "knobs", "--knobs", "rho", "--base", study.OFFERED[-1])
    turned = [run.key.knobs["rho"] for run in Runs(tmp_path).of("knobs", "digits") if run.key.knobs]
    assert turned == [0.01, 0.02, 0.1, 0.2] * 2
    assert "left out, no step costs so much" in capsys.readouterr().out


def test_differences_are_paired(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for method, losses in {"adamw": (1.0, 3.0), "slsam": (0.5, 2.4)}.items():
        for seed, loss in enumerate(losses):
            key = Key(stage="final", task="digits", method=method, learning_rate=1e-3, seed=seed)
            runs.add(key, {"test": {"loss": loss}})
    found = difference(runs.of("final", "digits", "slsam"), runs.of("final", "digits", "adamw"))
    assert found == Mean(pytest.approx(-0.55), pytest.approx(0.05))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "line", "says"),
    [
        (["--stages", "final"], None, "no learning rate of adamw on digits was tried yet"),
        (["--tables-only"], "{", f"{FILE}, line 1: not a run"),
        (["--tables-only"], json.dumps({"key": {"stage": "tune"}}), f"{FILE}, line 1: not a run"),
    ],
)
def test_what_cannot_be_done_is_said(
    flags: list[str], line: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if line is not None:
        (tmp_path / FILE).write_text(line + "\n")
    assert command.main(["--tasks", "digits", "--output", str(tmp_path), *flags]) == 2
    assert says in capsys.readouterr().err


def test_tables_are_of_what_there_is(tmp_path: Path) -> None:
    assert methods_table(Runs(tmp_path), "digits").count("\n") == 1
