"""Every knob: what is refused, in which words, and that what is accepted survives a round trip."""

import copy
import dataclasses
import json
import math
import pickle
import re
from typing import Any

import pytest

from slsam_ds.config import SLSAMConfig
from slsam_ds.recipes import PRESETS

SELECTORS = '"exp3m", "uniform", "cyclic", "all", "top_k", "bernoulli", "depth"'
SCHEDULES = (
    'expected "always", {"every": a whole number of steps from 1}, {"last": a share of the run in (0, 1]}, '
    '{"probability": a probability in (0, 1]} or {"norm_above": a number from -10 to 10}'
)
ACTIVE_LAYERS = "choose a fraction in (0, 1] or a count from 1 to the number of layers"

COMBINATIONS = (
    'expected "perturbed", "renormalised", {"mixed": a number from 0 to 10} or '
    '{"corrected": a number above 0, up to 10}'
)

BAD_VALUES = [
    ("rho", -0.1, "-0.1", "choose a finite radius ≥ 0"),
    ("rho", math.inf, "Infinity", "choose a finite radius ≥ 0"),
    ("rho", math.nan, "NaN", "choose a finite radius ≥ 0"),
    ("rho", "0.05", '"0.05"', "expected a number"),
    ("rho", True, "true", "expected a number"),
    ("rho", None, "null", "expected a number"),
    ("active_layers", 0, "0", ACTIVE_LAYERS),
    ("active_layers", -3, "-3", ACTIVE_LAYERS),
    ("active_layers", 0.0, "0.0", ACTIVE_LAYERS),
    ("active_layers", 1.5, "1.5", ACTIVE_LAYERS),
    ("active_layers", math.nan, "NaN", ACTIVE_LAYERS),
    ("active_layers", "half", '"half"', "expected an integer or a number"),
    ("active_layers", True, "true", "expected an integer or a number"),
    ("granularity", "layer", '"layer"', 'expected one of "block", "tensor"'),
    ("perturb", "some", '"some"', 'expected one of "sample", "above", "all", "norm_layers"'),
    ("perturb", "norm_layers", '"norm_layers"', 'needs every tensor to be an arm; use granularity="tensor"'),
    ("update", "norm_layers", '"norm_layers"', 'expected one of "sample", "above", "all"'),
    ("update", "above", '"above"', "how likely each layer is to be updated is not known"),
    ("metric", "cosine", '"cosine"', 'expected one of "euclidean", "adaptive", "preconditioned", "by_layer"'),
    ("selector", "exp3", '"exp3"', f"expected one of {SELECTORS}"),
    ("selector", None, "null", f"expected one of {SELECTORS}"),
    ("selector", 3, "3", f"expected one of {SELECTORS}"),
    ("redraw_every", 0, "0", "choose a whole number of steps ≥ 1"),
    ("gamma", 0, "0", 'choose a number in (0, 1] or "auto"'),
    ("gamma", 1.01, "1.01", 'choose a number in (0, 1] or "auto"'),
    ("gamma", math.nan, "NaN", 'choose a number in (0, 1] or "auto"'),
    ("gamma", "automatic", '"automatic"', 'expected a number or one of "auto"'),
    ("share", -0.001, "-0.001", "choose a number in [0, 1)"),
    ("share", 1.0, "1.0", "choose a number in [0, 1)"),
    ("share", math.nan, "NaN", "choose a number in [0, 1)"),
    ("share", "no", '"no"', "expected a number"),
    ("reward", "loss", '"loss"', 'expected one of "grad_norm", "grad_rms", "grad_norm_per_cost"'),
    ("ascent_scope", "local", '"local"', 'expected one of "global", "rank", "micro_batch"'),
    ("ascent_fraction", 0, "0", "choose a number in (0, 1]"),
    ("ascent_fraction", 1.1, "1.1", "choose a number in (0, 1]"),
    ("ascent_fraction", math.nan, "NaN", "choose a number in (0, 1]"),
    ("ascent_fraction", "all", '"all"', "expected a number"),
    ("ascent_source", "next", '"next"', 'expected one of "current", "previous", "momentum", "friendly", "random"'),
    ("ascent_source", 1, "1", "expected a name"),
    ("mask", "random", '"random"', 'expected one of "fisher", "dynamic", or null'),
    ("mask", 1, "1", "expected a name or null"),
    ("mask_density", 0, "0", "choose a number in (0, 1]"),
    ("mask_density", 1.5, "1.5", "choose a number in (0, 1]"),
    ("mask_density", math.nan, "NaN", "choose a number in (0, 1]"),
    ("mask_every", 0, "0", "choose a whole number of steps ≥ 1"),
    ("mask_every", 0.5, "0.5", "expected an integer"),
    ("ascend_when", "often", '"often"', SCHEDULES),
    ("ascend_when", {"every": 0}, '{"every": 0}', SCHEDULES),
    ("ascend_when", {"every": 1.5}, '{"every": 1.5}', SCHEDULES),
    ("ascend_when", {"last": 0.0}, '{"last": 0.0}', SCHEDULES),
    ("ascend_when", {"probability": 0}, '{"probability": 0}', SCHEDULES),
    ("ascend_when", {"norm_above": "usual"}, '{"norm_above": "usual"}', SCHEDULES),
    ("ascend_when", {"norm_above": 1.0}, '{"norm_above": 1.0}', "compares gradient norms of the same layers"),
    ("ascend_when", {"last": math.nan}, '{"last": NaN}', SCHEDULES),
    ("ascend_when", {"every": 2, "last": 0.5}, '{"every": 2, "last": 0.5}', SCHEDULES),
    ("ascend_when", "every", '"every"', SCHEDULES),
    ("ascend_when", {"always": 1}, '{"always": 1}', SCHEDULES),
    ("ascend_when", None, "null", "expected a name or a mapping of a name to its argument"),
    ("descend_along", "g", '"g"', COMBINATIONS),
    ("descend_along", {"mixed": -0.1}, '{"mixed": -0.1}', COMBINATIONS),
    ("descend_along", {"mixed": True}, '{"mixed": true}', COMBINATIONS),
    ("descend_along", {"corrected": 0}, '{"corrected": 0}', COMBINATIONS),
    ("descend_along", {"corrected": 1}, '{"corrected": 1}', "corrects by a part of the window; use an ascent_fraction"),
    ("descend_along", 0.5, "0.5", "expected a name or a mapping of a name to its argument"),
    ("budget", 0, "0", "choose a number > 0, or null"),
    ("budget", -1.0, "-1.0", "choose a number > 0, or null"),
    ("budget", math.inf, "Infinity", "choose a number > 0, or null"),
    ("budget", "cheap", '"cheap"', "expected a number or null"),
    ("update_scale", "linear", '"linear"', 'expected one of "inverse_probability", "none"'),
    ("update_scale", None, "null", 'expected one of "inverse_probability", "none"'),
    ("rounding", "up", '"up"', 'expected one of "stochastic", "nearest"'),
    ("prefix_reuse", "always", '"always"', 'expected true or false or one of "auto"'),
    ("prefix_reuse", 1, "1", 'expected true or false or one of "auto"'),
    ("other_parameters", "none", '"none"', 'expected one of "arms", "always", "freeze"'),
    ("layers", (), "[]", "name at least one layer, or null"),
    ("layers", "blocks", '"blocks"', "expected a list of strings or null"),
    ("layers", (1, 2), "[1, 2]", "expected a list of strings or null"),
    ("offload_state", "cpu", '"cpu"', "true or false"),
    ("max_skipped_steps", 0, "0", "choose a whole number ≥ 1, or null"),
    ("max_skipped_steps", 2.5, "2.5", "expected an integer or null"),
    ("check_weights_every", -1, "-1", "choose a whole number ≥ 0"),
    ("check_weights_every", None, "null", "expected an integer"),
    ("seed", -1, "-1", "choose an integer from 0 to 2^63 - 1"),
    ("seed", 2**63, str(2**63), "choose an integer from 0 to 2^63 - 1"),
    ("seed", 0.5, "0.5", "expected an integer"),
    ("seed", False, "false", "expected an integer"),
]

ACCEPTED = [
    ("ascent_fraction", 0.25),
    ("ascent_source", "previous"),
    ("ascent_source", "momentum"),
    ("mask", "fisher"),
    ("mask", "dynamic"),
    ("mask_density", 1),
    ("mask_every", 1),
    ("ascend_when", {"every": 4}),
    ("ascend_when", {"last": 0.25}),
    ("ascent_source", "friendly"),
    ("ascent_source", "random"),
    ("ascend_when", {"probability": 0.5}),
    ("descend_along", "renormalised"),
    ("descend_along", {"mixed": 1.5}),
    ("granularity", "tensor"),
    ("selector", "bernoulli"),
    ("selector", "depth"),
    ("redraw_every", 50),
    ("perturb", "above"),
    ("perturb", "all"),
    ("update", "all"),
    ("metric", "adaptive"),
    ("metric", "preconditioned"),
    ("metric", "by_layer"),
    ("budget", 1.0),
    ("reward", "grad_norm_per_cost"),
    ("ascent_scope", "rank"),
    ("prefix_reuse", True),
    ("ascent_scope", "micro_batch"),
    ("rho", 0),
    ("rho", 2.5),
    ("active_layers", 1),
    ("active_layers", 40),
    ("active_layers", 1.0),
    ("active_layers", 1e-3),
    ("selector", "exp3m"),
    ("selector", "uniform"),
    ("selector", "cyclic"),
    ("selector", "all"),
    ("selector", "top_k"),
    ("gamma", 1),
    ("gamma", "auto"),
    ("share", 0),
    ("reward", "grad_rms"),
    ("ascent_fraction", 1),
    ("update_scale", "none"),
    ("rounding", "nearest"),
    ("prefix_reuse", False),
    ("prefix_reuse", "auto"),
    ("other_parameters", "always"),
    ("other_parameters", "freeze"),
    ("layers", ("model.layers.0", r"model\.layers\.(1|2)\..*")),
    ("offload_state", True),
    ("max_skipped_steps", 3),
    ("max_skipped_steps", None),
    ("check_weights_every", 0),
    ("seed", 2**63 - 1),
]


def refused(key: str, value: Any, shown: str, allowed: str) -> None:
    """The value is refused from Python in one sentence: the key, the value as JSON, what is allowed."""
    with pytest.raises(ValueError, match=rf"^slsam\.{key}={re.escape(shown)}: .*{re.escape(allowed)}") as caught:
        SLSAMConfig(**{key: value})
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("key", "value", "shown", "allowed"), BAD_VALUES)
def test_a_bad_value_is_refused_in_one_sentence(key: str, value: Any, shown: str, allowed: str) -> None:
    refused(key, value, shown, allowed)


@pytest.mark.parametrize("knob", [{"selector": "uniform"}, {"layers": ("model.layers.0",)}])
def test_a_budget_chooses_the_layers_itself(knob: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^slsam\.{next(iter(knob))}=.*: slsam.budget"):
        SLSAMConfig(budget=1.0, **knob)


@pytest.mark.parametrize("source", ["previous", "momentum"])
@pytest.mark.parametrize("knob", [{"ascent_scope": "rank"}, {"ascent_fraction": 0.5}])
def test_a_single_pass_has_no_ascent_to_set(knob: dict[str, Any], source: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^slsam\.{next(iter(knob))}=.*: ascent_source=\"{source}\" has no ascent pass"
    ):
        SLSAMConfig(ascent_source=source, **knob)


@pytest.mark.parametrize(
    ("knob", "needed"),
    [
        ({"ascent_source": "previous"}, 'ascent_source="current"'),
        ({"ascent_source": "momentum"}, 'ascent_source="current"'),
        ({"ascent_scope": "rank"}, 'ascent_scope="global"'),
    ],
)
def test_a_renormalised_descent_needs_the_gradient_at_the_weights(knob: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=rf'^slsam\.descend_along="renormalised": needs the gradient.*use {needed}$'):
        SLSAMConfig(descend_along="renormalised", **knob)


def test_a_correction_is_by_one_part_of_the_window() -> None:
    knobs = {"descend_along": {"corrected": 1.0}, "ascent_fraction": 0.1}
    assert SLSAMConfig(ascent_scope="rank", **knobs).descends_on_part
    with pytest.raises(ValueError, match=r'^slsam\.descend_along=.*: corrects by one part.*"global", or "rank"$'):
        SLSAMConfig(ascent_scope="micro_batch", **knobs)


def test_every_knob_is_tested() -> None:
    knobs = {field.name for field in dataclasses.fields(SLSAMConfig)}
    assert {key for key, *_ in BAD_VALUES} == knobs
    assert {key for key, *_ in ACCEPTED} == knobs


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^slsam\.layers: 'blocks\.\(' is not a regular expression"):
        SLSAMConfig(layers=("fine", "blocks.("))


@pytest.mark.parametrize(("key", "value"), ACCEPTED)
def test_an_accepted_value_survives_json(key: str, value: Any) -> None:
    config = SLSAMConfig(**{key: value})
    assert getattr(config, key) == value
    assert SLSAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_defaults_are_the_documented_ones() -> None:
    assert SLSAMConfig().to_dict() == {
        "rho": 0.05,
        "active_layers": 0.2,
        "granularity": "block",
        "selector": "exp3m",
        "redraw_every": 1,
        "perturb": "sample",
        "update": "sample",
        "gamma": 0.1,
        "share": 0.001,
        "reward": "grad_norm",
        "ascent_scope": "global",
        "ascent_fraction": 1.0,
        "ascent_source": "current",
        "metric": "euclidean",
        "mask": None,
        "mask_density": 0.5,
        "mask_every": 100,
        "ascend_when": "always",
        "descend_along": "perturbed",
        "budget": None,
        "update_scale": "inverse_probability",
        "rounding": "stochastic",
        "prefix_reuse": "auto",
        "other_parameters": "arms",
        "layers": None,
        "offload_state": False,
        "max_skipped_steps": 25,
        "check_weights_every": 100,
        "seed": 0,
    }
    assert SLSAMConfig.from_dict({}) == SLSAMConfig()


def test_a_config_is_frozen() -> None:
    config = SLSAMConfig(layers=("a",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rho = 0.1  # type: ignore[misc]
    config.to_dict()["layers"].append("b")
    assert config.layers == ("a",)
    assert hash(config) == hash(SLSAMConfig(layers=("a",)))


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"mask": "dynamic", "rho": 0}, 'mask="dynamic": with rho=0 there is no perturbation to mask; use null, or'),
        (
            {"mask": "fisher", "ascent_scope": "rank"},
            'ascent_scope="rank": mask="fisher" is one mask for all ranks; use',
        ),
        (
            {"mask": "fisher", "ascent_source": "momentum"},
            'ascent_source="momentum": mask="fisher" goes by squared gradients; use one of "current", "previous", '
            '"friendly", or mask="dynamic"',
        ),
    ],
)
def test_a_mask_of_nothing_is_refused(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"slsam.{sentence}")) as caught:
        SLSAMConfig(**knobs)
    assert "\n" not in str(caught.value)


def test_masks_go_with_what_they_can_mask() -> None:
    for source in ("current", "previous", "friendly"):
        SLSAMConfig(mask="fisher", ascent_source=source)
    for more in ({"ascent_source": "momentum"}, {"granularity": "tensor", "perturb": "norm_layers"}, {"budget": 1.0}):
        SLSAMConfig(mask="dynamic", **more)


# From a block


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("roh", r"did you mean rho\?"),
        ("active_layer", r"did you mean active_layers\?"),
        ("zzz", "known keys are preset, rho, active_layers, .*, seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=rf"^slsam\.{key}: unknown key; {suggestion}$"):
        SLSAMConfig.from_dict({"rho": 0.1, key: 1})


@pytest.mark.parametrize(("block", "shown"), [([1], "[1]"), ("rho=1", '"rho=1"'), (None, "null"), (True, "true")])
def test_a_block_that_is_no_mapping_is_refused(block: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^slsam={re.escape(shown)}: expected a block of keys and values"):
        SLSAMConfig.from_dict(block)


def test_a_json_list_of_layers_is_taken_but_not_kept() -> None:
    names = ["a", "b"]
    config = SLSAMConfig.from_dict({"layers": names})
    names.append("c")
    assert config.layers == ("a", "b")
    assert config.to_dict()["layers"] == ["a", "b"]


# From the command line


def test_assignments_are_json_or_plain_strings_and_lie_over_the_block() -> None:
    base = {"rho": 0.5, "seed": 3}
    assignments = ["rho=0.02", "selector=uniform", "active_layers=3", 'layers=["x=1", "y"]', "prefix_reuse=false"]
    config = SLSAMConfig.from_assignments(assignments, base)
    assert config == SLSAMConfig(
        rho=0.02, selector="uniform", active_layers=3, layers=("x=1", "y"), prefix_reuse=False, seed=3
    )
    assert isinstance(config.active_layers, int)
    assert base == {"rho": 0.5, "seed": 3}


def test_the_last_assignment_wins() -> None:
    assert SLSAMConfig.from_assignments(["rho=0.02", "gamma=auto", "rho=0.03"]).rho == 0.03
    assert SLSAMConfig.from_assignments([]) == SLSAMConfig()
    assert SLSAMConfig.from_assignments([" rho =0.03", "budget=null"]).rho == 0.03


@pytest.mark.parametrize("assignment", ["rho", "=3", "", "rho:0.1"])
def test_an_assignment_without_key_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(ValueError, match=f"^--slsam {assignment}: expected KEY=VALUE"):
        SLSAMConfig.from_assignments([assignment])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("roh=0.1", r"slsam\.roh: unknown key; did you mean rho"),
        ("rho=", r'slsam\.rho="": expected a number'),
        ("rho=abc", r'slsam\.rho="abc": expected a number'),
        ("rho=-1", r"slsam\.rho=-1: choose a finite radius"),
        ("rho=NaN", r"slsam\.rho=NaN: choose a finite radius"),
        ("budget=-1", r"slsam\.budget=-1: choose a number > 0"),
    ],
)
def test_assignments_are_refused_like_any_other_source(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLSAMConfig.from_assignments([assignment])


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_knobs_it_stands_for(name: str) -> None:
    config = SLSAMConfig.from_dict({"preset": name, "rho": 0.02})
    assert config == SLSAMConfig(**{**PRESETS[name], "rho": 0.02})
    assert "preset" not in config.to_dict()
    assert config != SLSAMConfig(rho=0.02)


def test_knobs_beside_a_preset_win() -> None:
    config = SLSAMConfig.from_dict({"preset": "adamw_price", "ascent_fraction": 0.5, "active_layers": 3})
    assert (config.ascent_fraction, config.active_layers, config.budget) == (0.5, 3, None)


@pytest.mark.parametrize(
    "base",
    [
        {"active_layers": 0.2, "ascent_fraction": 0.5, "budget": 0.8},
        {"preset": "adamw_price"},
        {"active_layers": 0.2, "ascent_scope": "rank"},
    ],
)
def test_an_assigned_preset_lies_over_the_whole_block(base: dict[str, Any]) -> None:
    config = SLSAMConfig.from_assignments(["preset=single_pass"], {**base, "rho": 0.01})
    assert config == SLSAMConfig(**PRESETS["single_pass"], rho=0.01)


def test_assigned_layers_take_the_place_of_a_budget_below() -> None:
    for base in ({"budget": 1.0}, {"preset": "adamw_price"}):
        config = SLSAMConfig.from_assignments(["active_layers=4"], base)
        assert (config.active_layers, config.budget) == (4, None)
    assert SLSAMConfig.from_assignments(["budget=1.2"], {"active_layers": 4}).budget == 1.2


@pytest.mark.parametrize(("name", "shown"), [("fast", '"fast"'), (1, "1"), (None, "null"), (["single_pass"], r"\[")])
def test_an_unknown_preset_is_refused(name: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=rf'^slsam\.preset={shown}.*: expected one of "single_pass", "adamw_price", '):
        SLSAMConfig.from_dict({"preset": name})


# Number of active arms


@pytest.mark.parametrize(
    ("active_layers", "num_arms", "expected"),
    [(0.2, 10, 2), (0.2, 32, 6), (0.2, 1, 1), (0.01, 10, 1), (1.0, 7, 7), (1, 7, 1), (7, 7, 7), (0.99, 200, 198)],
)
def test_num_active(active_layers: float, num_arms: int, expected: int) -> None:
    assert SLSAMConfig(active_layers=active_layers).num_active(num_arms) == expected


def test_the_integer_1_is_one_layer_and_the_float_is_all_of_them() -> None:
    assert SLSAMConfig.from_dict(json.loads('{"active_layers": 1}')).num_active(9) == 1
    assert SLSAMConfig.from_dict(json.loads('{"active_layers": 1.0}')).num_active(9) == 9


def test_the_selector_all_activates_all_whatever_active_layers_says() -> None:
    assert SLSAMConfig(selector="all", active_layers=2).num_active(9) == 9


def test_more_active_layers_than_arms_are_refused() -> None:
    message = "slsam.active_layers=8: choose a fraction in (0, 1] or a count from 1 to 7"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SLSAMConfig(active_layers=8).num_active(7)


def test_a_misspelt_preset_has_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r'^slsam\.preset="adamw-price": did you mean adamw_price\?$'):
        SLSAMConfig.from_dict({"preset": "adamw-price"})


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"preset": "sam"}, r'takes no preset: use SLSAMConfig\.from_dict\(\{"preset": \.\.\.\}\)'),
        ({"rhoo": 0.1}, "has no setting 'rhoo'; did you mean rho"),
    ],
)
def test_an_unknown_keyword_gets_a_sentence(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        SLSAMConfig(**knobs)


def test_settings_are_copied_pickled_and_replaced() -> None:
    config = SLSAMConfig(rho=0.01, layers=("a", "b"))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config


def test_a_summary_names_what_is_not_at_its_default() -> None:
    assert SLSAMConfig().summary() == "defaults"
    config = SLSAMConfig(rho=0.01, selector="uniform")
    assert config.summary() == 'rho=0.01 selector="uniform" (else defaults)'
    assert SLSAMConfig.from_assignments(config.summary().split()[:2]) == config
