"""The study of long tasks: statistics against hand numbers, tuning without an edge, the screen on a toy."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.evidence import frontier, long_run, long_tasks, tuning
from benchmarks.evidence.candidates import CANDIDATES
from benchmarks.evidence.corrections import MeanCorrection, Point, captured, handed
from benchmarks.evidence.frontier_report import best, best_of_first, write_report
from benchmarks.evidence.paired import Difference, difference, reaches
from benchmarks.evidence.screen import Rows, groups_of
from benchmarks.evidence.screen_tables import FILE, write_tables
from benchmarks.evidence.transformer import Shape, SmallTransformer
from benchmarks.evidence.trials import MORE_TUNING_SEEDS, TUNING_SEED, Setting, Trial, Trials
from slsam_ds import SLSAM, SLSAMConfig

SHAPE = Shape(
    num_inputs=3, num_outputs=4, length=5, reads="patches", answers="once", width=8, num_blocks=3, num_heads=2
)


def test_differences_are_taken_seed_by_seed() -> None:
    found = difference({1: 1.0, 2: 2.0, 3: 3.5, 9: 7.0}, {1: 0.5, 2: 1.0, 3: 2.0, 4: 0.0})
    assert found == Difference(mean=1.0, error=pytest.approx(0.5 / math.sqrt(3)), num=3)  # of 0.5, 1.0 and 1.5
    assert found is not None
    assert found.upper == pytest.approx(1.0 + 2.920 * 0.5 / math.sqrt(3))  # Student's t of two degrees of freedom
    assert difference({1: 1.0}, {2: 1.0}) is None


def test_one_seed_bounds_nothing() -> None:
    found = difference({1: 0.0}, {1: 5.0})
    assert found is not None
    assert found.upper == math.inf
    assert not found.is_lower


@pytest.mark.parametrize(
    ("above_dense", "verdict"),
    [
        (0.00, True),
        (0.10, True),  # bound 0.10 + 1.895 * 0.02 / sqrt(8) = 0.113, a fifth of the gap of 1 is 0.2
        (0.19, False),  # bound 0.203
        (0.30, False),
    ],
)
def test_who_reaches_dense_sam(above_dense: float, verdict: bool) -> None:
    seeds = range(1, 9)
    spread = 0.02 * math.sqrt(7 / 8)  # of plus and minus so much, the deviation is 0.02
    dense = dict.fromkeys(seeds, 1.0)
    adamw = {seed: 2.0 + 0.001 * seed for seed in seeds}
    ours = {seed: 1.0 + above_dense + (spread if seed % 2 else -spread) for seed in seeds}
    assert reaches(ours, dense, adamw) is verdict


def test_a_task_without_headroom_decides_nothing() -> None:
    dense = {1: 1.0, 2: 1.2, 3: 0.9}
    assert reaches(dense, dense, {1: 1.1, 2: 1.0, 3: 1.0}) is None


def test_everybody_is_tuned_by_as_many_trials_and_no_winner_is_at_an_edge() -> None:
    for name, ideal in {"dense_sam": (1e-2, 0.2), "adamw": (3e-4, 0.0)}.items():
        candidate = CANDIDATES[name]
        tried: dict[Setting, float] = {}
        setting = tuning.start(candidate)
        for _ in range(14):
            far = abs(math.log(setting.learning_rate / ideal[0]))
            if ideal[1]:
                far += abs(math.log(setting.rho / ideal[1]))
            tried[setting] = far + setting.dropout
            setting = tuning.next_setting(tried, candidate)
        assert len(tried) == 14
        winner = min(tried, key=tried.__getitem__)
        assert (winner.learning_rate, winner.rho) == ideal
        assert tuning.is_enclosed(winner, tried, candidate)


def test_ladders_come_back_to_where_they_started() -> None:
    setting = tuning.start(CANDIDATES["dense_sam"])
    for step in (lambda one: next(tuning.neighbours(one, CANDIDATES["dense_sam"])),) * 3:
        setting = step(setting)
    assert setting.learning_rate == 0.03  # 0.001, 0.003, 0.01, 0.03
    plain = tuning.start(CANDIDATES["adamw"])
    assert plain.rho == 0
    assert {one.share for one in tuning.neighbours(plain, CANDIDATES["adamw"])} == {0.5, 1.0}


def _toy() -> tuple[SmallTransformer, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    windows = [{"inputs": torch.randn(8, 5, 3), "labels": torch.randint(4, (8,))} for _ in range(5)]
    return SmallTransformer(SHAPE), windows


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["inputs"]).logits, batch["labels"])


def _gradients_by_hand(rho: float) -> list[dict[str, Tensor]]:
    model, windows = _toy()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for window in windows:
        climbed = torch.autograd.grad(_loss(model, window), parameters)
        norm = torch.sqrt(sum((each.square().sum() for each in climbed), torch.zeros(())))
        with torch.no_grad():
            for parameter, each in zip(parameters, climbed, strict=True):
                parameter.add_(each, alpha=rho / float(norm))
        found.append(dict(zip(names, torch.autograd.grad(_loss(model, window), parameters), strict=True)))
        with torch.no_grad():
            for parameter, each in zip(parameters, climbed, strict=True):
                parameter.sub_(each, alpha=rho / float(norm))
    return found


def _correction(knobs: dict[str, Any]) -> tuple[dict[str, Tensor], SLSAM]:
    model, windows = _toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    slsam = SLSAM(model, optimizer, SLSAMConfig.from_dict(knobs), total_steps=100)
    for group in slsam.engine.optimizer.param_groups:
        group["lr"] = 1e-30
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mean, plain = MeanCorrection(), _gradients_by_hand(0.0)
    many = [[window] for window in windows] * 8
    for number, one in enumerate(handed(slsam, many, _loss, after=10, price_of=lambda window, result: 1.0)):
        mean.add(one.gradient, plain[number % len(plain)])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-25)  # zeros do move by that rate
    return mean.mean(), slsam


def test_the_screen_gives_dense_sam_one_and_adamw_nothing() -> None:
    delta, slsam = _correction({"selector": "all"})
    names = list(delta)
    plain, at_perturbed = _gradients_by_hand(0.0), _gradients_by_hand(0.05)
    for name in names:
        by_hand = torch.stack([h[name] - g[name] for h, g in zip(at_perturbed, plain, strict=True)]).mean(0)
        torch.testing.assert_close(delta[name], by_hand, rtol=1e-2, atol=2e-6)  # differences of float32 gradients
    for group in (names, *groups_of(slsam.layers).values()):
        itself = captured(delta, delta, group)
        assert (itself.projection, itself.cosine) == (pytest.approx(1.0), pytest.approx(1.0))
    nothing = captured(_correction({"selector": "all", "rho": 0.0})[0], delta, names)
    assert nothing.projection == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("knobs", "projection"),
    [
        ({"selector": "all", "ascend_when": {"every": 4}}, 0.25),
        ({"selector": "all", "descend_along": {"mixed": 0.5}}, 0.5),
        ({"selector": "all", "ascend_when": {"every": 4}, "descend_along": {"mixed": 4.0}}, 1.0),
        ({"selector": "uniform", "perturb": "all", "active_layers": 0.4}, 1.0),  # a layer counts where it was drawn
    ],
)
def test_the_screen_knows_what_recipes_capture(knobs: dict[str, Any], projection: float) -> None:
    delta, _ = _correction({"selector": "all"})
    found = captured(_correction(knobs)[0], delta, list(delta))
    assert found.projection == pytest.approx(projection, rel=0.15)  # the windows differ that a recipe steps on
    assert found.cosine > 0.9


def test_the_screen_goes_on_where_it_was_and_writes_tables(tmp_path: Path) -> None:
    found = {"projection": 0.5, "cosine": math.nan}
    for candidate in ("adamw", "late"):
        for point in ("early", "middle", "late"):
            row = {"task": "digits_20", "point": point, "rho": 0.05, "candidate": candidate}
            assert row not in Rows(tmp_path / FILE)
            groups = dict.fromkeys(("before", "lower", "upper", "after"), found)
            numbers = {"all": found, "in_adams_units": found, "groups": groups, "shares": {"lower": 1.0}}
            Rows(tmp_path / FILE).add({**row, "price": 1.3, **numbers})
            assert row in Rows(tmp_path / FILE)
    text = write_tables(tmp_path).read_text()
    assert text.count("| `late`: SAM in the last 30 % | 1.30 | 0.50 |  | 0.50 |  | 0.50 |  |") == 1
    assert "digits_40" not in text


def test_a_point_is_come_back_to() -> None:
    model, windows = _toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _loss(model, windows[0]).backward()
    optimizer.step()
    point = Point.of(model, optimizer, step=1)
    again = SmallTransformer(SHAPE)
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    point.put_into(again, other)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])
        assert torch.equal(point.moments[name]["exp_avg_sq"], other.state[two]["exp_avg_sq"])


def test_wrong_labels_are_as_many_as_said() -> None:
    rows = [{"label": number % 5} for number in range(50)]
    changed = long_tasks._with_wrong_labels(rows, 0.4, 5)
    assert sum(one["label"] != other["label"] for one, other in zip(rows, changed, strict=True)) == 20
    assert changed == long_tasks._with_wrong_labels(rows, 0.4, 5)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A long task that is neither long nor read from anywhere."""
    task = next(iter(long_tasks.LONG_TASKS.values()))
    _, windows = _toy()
    samples = [
        {"patches": patches, "label": int(label)}
        for window in windows
        for patches, label in zip(window["inputs"], window["labels"], strict=True)
    ]

    def build_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return SmallTransformer(SHAPE)

    data = long_tasks.Data(
        train=samples,
        validation=samples[:8],
        test=samples[8:16],
        collate=long_tasks._patches,
        build_model=build_model,
    )
    small = dataclasses.replace(task, name="tiny", steps=40, batch=8, predicts_tokens=False, load=lambda: data)
    monkeypatch.setitem(long_tasks.LONG_TASKS, "tiny", small)
    return "tiny"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several add up in no fixed order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("one_thread")
def test_a_trial_keeps_three_checkpoints(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_run, "_AVERAGED_EVERY", 1)
    setting = Setting(learning_rate=1e-2, rho=0.05, dropout=0.1, share=0.5)
    trial = Trial(task=tiny, candidate="dense_sam", setting=setting, seed=1)
    found = long_run.run_trial(trial)
    assert found["steps"] == 20
    assert found["price"] == pytest.approx(2.0, abs=0.02)
    assert found["flops"] == pytest.approx(1.0, abs=0.02)  # half of the steps at twice the price
    losses = [point["loss"] for point in found["curve"]]
    assert len(losses) == 20
    assert found["checkpoints"]["best"]["validation"] == min(losses)
    assert found["checkpoints"]["last"]["validation"] == losses[-1]
    assert found["checkpoints"]["average"]["validation"] != losses[-1]
    again = long_run.run_trial(trial)
    assert again["checkpoints"] == found["checkpoints"]


@pytest.mark.usefixtures("one_thread")
def test_adapters_are_priced_as_a_share_of_adamw_on_all_weights(tiny: str) -> None:
    setting = Setting(learning_rate=1e-2, rho=0.05, share=0.1)
    found = {
        name: long_run.run_trial(Trial(task=tiny, candidate=name, setting=setting, seed=1))
        for name in ("lora", "lora_sam")
    }
    assert 1.1 < found["lora"]["price"] < 1.5  # in a model as narrow as this, adapters cost more than they save
    assert found["lora_sam"]["price"] == pytest.approx(2 * found["lora"]["price"], rel=0.02)


def test_a_study_is_tuned_reported_and_not_made_twice(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Trial] = []

    def pretend(trial: Trial) -> dict[str, Any]:
        made.append(trial)
        loss = trial.setting.learning_rate + (0.0 if trial.candidate == "dense_sam" else 1.0) + 0.01 * trial.seed
        checkpoint = {"validation": loss, "test": loss, "accuracy": 0.5}
        return {"flops": 1.0, "checkpoints": dict.fromkeys(("last", "best", "average"), checkpoint)}

    monkeypatch.setattr(frontier, "run_trial", pretend)
    flags = ["--tasks", tiny, "--candidates", "adamw", "dense_sam", "--output", str(tmp_path)]
    assert frontier.main([*flags, "--trials", "4", "--seeds", "3"]) == 0
    tuned = [trial for trial in made if trial.seed == TUNING_SEED]
    assert len(tuned) == 2 * 4
    again = [trial for trial in made if trial.seed in MORE_TUNING_SEEDS]
    assert len(again) == 2 * 3 * 2  # the best three, with two seeds more
    of_adamw = {trial.setting.share for trial in made if trial.candidate == "adamw" and 0 < trial.seed < 4}
    assert of_adamw == {0.125, 0.25, 0.5, 1.0}
    made.clear()
    assert frontier.main([*flags, "--trials", "4", "--seeds", "3"]) == 0
    assert made == []
    trials = Trials(tmp_path)
    assert best(trials, tiny, "dense_sam").learning_rate < 1e-3
    text = write_report(tmp_path, trials).read_text()
    assert "| 3 | 1.0201 | 0.0201 | -1.0000 ± 0.0000 | yes |" in text
    assert (tmp_path / "frontier-tiny.png").is_file()
    # A second look, somewhere else, at the settings that were found.
    flags[-1] = str(tmp_path / "quick")
    assert frontier.main([*flags, "--trials", "0", "--seeds", "1", "--tuned-in", str(tmp_path)]) == 0
    assert {trial.seed for trial in made} == {1}
    assert best(Trials(tmp_path / "quick"), tiny, "dense_sam") == best(trials, tiny, "dense_sam")
    assert f"| `dense_sam`: {CANDIDATES['dense_sam'].title} |" in capsys.readouterr().out


def test_a_setting_that_was_lucky_once_is_not_chosen(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    lucky, steady, last = (Setting(learning_rate=rate, rho=0.1) for rate in (1e-3, 3e-3, 1e-2))
    for setting, of_first, of_more in ((lucky, 0.5, 2.0), (steady, 1.0, 1.0), (last, 1.5, None)):
        for seed in (TUNING_SEED, *MORE_TUNING_SEEDS):
            loss = of_first if seed == TUNING_SEED else of_more
            if loss is not None:
                trial = Trial(task="digits_40", candidate="dense_sam", setting=setting, seed=seed)
                checkpoint = {"validation": loss, "test": loss, "accuracy": 0.5}
                trials.add(trial, {"flops": 1.0, "checkpoints": dict.fromkeys(("last", "best", "average"), checkpoint)})
    assert best_of_first(trials, "digits_40", "dense_sam", 2) == [lucky, steady]
    assert best(trials, "digits_40", "dense_sam") == steady


@pytest.mark.slow
@pytest.mark.parametrize("name", list(long_tasks.LONG_TASKS))
def test_tasks_build(name: str) -> None:
    task = long_tasks.LONG_TASKS[name]
    data = task.load()
    assert len(data.train) >= task.batch
    assert data.validation
    assert data.test
    model = data.build_model(0)
    batch = data.collate(list(data.train[: task.batch]))
    loss = long_run.loss_of(task)(model, batch)
    assert loss.isfinite()
    assert task.steps >= 1000
