"""The few numbers of a step that people plot."""

import math
from typing import Any

import pytest

from slsam_ds.records.metrics import MetricMeans, step_metrics

RECORD: dict[str, Any] = {
    "active": [0, 2],
    "probabilities": [0.5, 0.5, 0.5, 0.5],
    "ascent_loss": 2.0,
    "loss": 2.25,
    "perturbation_norm": 0.06,
    "perturbation_projection": 0.99,
    "skipped": False,
    "price": 1.2,
    "ascent_seconds": 1.5,
    "descent_seconds": 2.5,
}
NUMELS = (100, 200, 300, 400)


def test_a_step_of_two_passes_has_them_all() -> None:
    assert step_metrics(RECORD, NUMELS) == pytest.approx(
        {
            "slsam/active_share": 0.4,
            "slsam/selection_entropy": 1.0,
            "slsam/skipped": 0.0,
            "slsam/price": 1.2,
            "slsam/ascent_seconds": 1.5,
            "slsam/descent_seconds": 2.5,
            "slsam/ascent_rise": 0.25,
            "slsam/perturbation_norm": 0.06,
            "slsam/perturbation_projection": 0.99,
        }
    )


def test_what_was_not_measured_is_absent() -> None:
    one_pass = step_metrics({**RECORD, "ascent_loss": None, "perturbation_projection": None}, NUMELS)
    assert set(one_pass) == {
        f"slsam/{name}" for name in ("active_share", "selection_entropy", "skipped", "price", "descent_seconds")
    }
    skipped = step_metrics({**RECORD, "skipped": True, "loss": math.nan}, NUMELS)
    assert set(skipped) == {f"slsam/{name}" for name in ("active_share", "selection_entropy", "skipped", "price")}
    assert skipped["slsam/skipped"] == 1.0
    assert "slsam/price" not in step_metrics({**RECORD, "price": None}, NUMELS)
    old = {key: value for key, value in RECORD.items() if key != "price"}
    assert "slsam/price" not in step_metrics(old, NUMELS)


def test_a_direction_without_a_pass_of_its_own_perturbs_too() -> None:
    metrics = step_metrics({**RECORD, "ascent_loss": None}, NUMELS)
    assert metrics["slsam/perturbation_norm"] == RECORD["perturbation_norm"]
    assert "slsam/ascent_rise" not in metrics


@pytest.mark.parametrize(
    ("probabilities", "entropy"), [([1.0, 0.0, 0.0], 0.0), ([1.0, 1.0, 0.0], math.log(2) / math.log(3)), ([1.0], 0.0)]
)
def test_entropy_says_how_open_the_choice_is(probabilities: list[float], entropy: float) -> None:
    record = {**RECORD, "active": [0], "probabilities": probabilities}
    assert step_metrics(record, [1] * len(probabilities))["slsam/selection_entropy"] == pytest.approx(entropy)


def test_means_are_over_the_steps_that_measured_it_and_start_over() -> None:
    means = MetricMeans()
    means.add({"a": 1.0, "b": 4.0})
    means.add({"a": 3.0})
    assert means.take() == {"a": 2.0, "b": 4.0}
    assert means.take() == {}
