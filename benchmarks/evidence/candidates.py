"""The recipes that could learn like dense SAM at AdamW's price. All are settings of one machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slsam_ds.recipes import PRESETS

Axis = Literal["learning_rate", "rho", "weight_decay", "dropout", "share"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to train.

    Attributes:
        name: On the command line.
        title: In tables.
        knobs: Of `slsam`, where they differ from the defaults; `rho` is tuned.
        axes: What is tuned.
        share: Of the task's steps, where that is not tuned.
        num_micro_batches: Into which a step's samples are divided.
        lora: Rank of the adapters that are trained in the place of the blocks' weights; 0: there are none.
        rho: Where its tuning starts.
    """

    name: str
    title: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ("learning_rate", "rho", "dropout")
    share: float = 1.0
    num_micro_batches: int = 1
    lora: int = 0
    rho: float = 0.05


_ALL: Mapping[str, Any] = {"selector": "all"}
_QUARTER: Mapping[str, Any] = {"ascent_fraction": 0.25}
_ONE: Mapping[str, Any] = {"ascent_fraction": 0.01}  # a sample at least is taken
_DEPTH: Mapping[str, Any] = {"selector": "depth"}
_PLAIN: Mapping[str, Any] = {"rho": 0.0}


def _of_preset(name: str) -> Mapping[str, Any]:
    """What it sets, but for the radius, which is tuned."""
    return {key: value for key, value in PRESETS[name].items() if key != "rho"}


def _preset(name: str, **others: Any) -> Candidate:
    return Candidate(name=name, title=f"preset {name}", knobs=_of_preset(name), **others)


def _own(name: str, title: str, *knobs: Mapping[str, Any], **others: Any) -> Candidate:
    joined = {key: value for some in knobs for key, value in some.items()}
    return Candidate(name=name, title=title, knobs=joined, **others)


def _corrected(*, every: int) -> Mapping[str, Any]:
    """In one step of so many, so many times the correction: on average it is there once a step."""
    return {"ascend_when": {"every": every}, "descend_along": {"corrected": float(every)}}


_PAPER = _of_preset("paper")

CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        _own(
            "adamw",
            "AdamW",
            _ALL,
            _PLAIN,
            axes=("learning_rate", "share", "dropout", "weight_decay"),
        ),
        _own("dense_sam", "dense SAM", _ALL),
        _own("dense_sam_half", "dense SAM, half of the steps", _ALL, share=0.5),
        _own("defaults", "SL-SAM, defaults"),
        _preset("adamw_price"),
        _preset("depth_price"),
        _preset("single_pass"),
        _own("depth_exact", "depth drawn, exact ascent, AdamW's price", _DEPTH, {"budget": 1.0}),
        _own(
            "depth_previous",
            "depth drawn (0.7), previous gradient",
            _DEPTH,
            {"active_layers": 0.7, "ascent_source": "previous"},
        ),
        _own(
            "depth_plain",
            "depth drawn (0.7), no ascent",
            _DEPTH,
            {"active_layers": 0.7},
            _PLAIN,
            axes=("learning_rate", "dropout"),
        ),
        _own("all_quarter", "all layers, ascent on a quarter", _ALL, _QUARTER),
        _own("all_eighth", "all layers, ascent on an eighth", _ALL, {"ascent_fraction": 0.125}),
        _own(
            "upper_exact",
            "upper part perturbed (0.5), all updated",
            _DEPTH,
            {"active_layers": 0.5, "update": "all"},
        ),
        _own(
            "upper_quarter",
            "the same, ascent on a quarter",
            _DEPTH,
            _QUARTER,
            {"active_layers": 0.5, "update": "all"},
        ),
        _own("late", "SAM in the last 30 %", _ALL, {"ascend_when": {"last": 0.3}}),
        _own("late_quarter", "the same, ascent on a quarter", _ALL, _QUARTER, {"ascend_when": {"last": 0.3}}),
        _own("every_second", "SAM every second step", _ALL, {"ascend_when": {"every": 2}}),
        _own("every_fourth", "SAM every fourth step", _ALL, {"ascend_when": {"every": 4}}),
        _own(
            "every_fourth_more",
            "every fourth step g + 4 (h - g)",
            _ALL,
            {"ascend_when": {"every": 4}, "descend_along": {"mixed": 4.0}},
        ),
        _own(
            "corrected",
            "g + (h - g) of a quarter",
            _of_preset("corrected"),
            num_micro_batches=4,
        ),
        _own(
            "corrected_often",
            "every second step g + 2 (h - g) of a quarter",
            _ALL,
            _QUARTER,
            _corrected(every=2),
            num_micro_batches=4,
        ),
        _own(
            "corrected_rarely",
            "every fifth step g + 5 (h - g) of a quarter",
            _of_preset("corrected_rarely"),
            num_micro_batches=4,
        ),
        _own("one_sample", "g + (h - g) of one sample", _of_preset("one_sample"), rho=0.0125),
        _own(
            "one_sample_third",
            "every third step g + 3 (h - g) of one sample",
            _ALL,
            _ONE,
            _corrected(every=3),
            rho=0.0125,
        ),
        _own(
            "one_sample_fifth",
            "every fifth step g + 5 (h - g) of one sample",
            _ALL,
            _ONE,
            _corrected(every=5),
            rho=0.0125,
        ),
        _own("previous", "all layers, previous gradient", _ALL, {"ascent_source": "previous"}),
        _own("momentum", "all layers, momentum", _ALL, {"ascent_source": "momentum"}),
        _own("random", "all layers, random direction", _ALL, {"ascent_source": "random"}, rho=0.4),
        _own("friendly", "all layers, friendly", _ALL, {"ascent_source": "friendly"}),
        _own("preconditioned", "all layers, Adam's geometry", _ALL, {"metric": "preconditioned"}, rho=0.01),
        _own(
            "preconditioned_quarter",
            "the same, ascent on a quarter",
            _ALL,
            _QUARTER,
            {"metric": "preconditioned"},
            rho=0.01,
        ),
        _own("asam", "all layers, ASAM's geometry", _ALL, {"metric": "adaptive"}, rho=0.4),
        _own("paper", "the paper's, s = 0.2", _PAPER),
        _own("paper_half", "the paper's, s = 0.5", _PAPER, {"active_layers": 0.5}),
        _own("tensors_quarter", "the paper's, s = 0.5, ascent on a quarter", _PAPER, _QUARTER, {"active_layers": 0.5}),
        _own(
            "lisa",
            "LISA: two blocks for 20 steps, what is around them always, no ascent",
            {"selector": "uniform", "active_layers": 2, "redraw_every": 20},
            {"other_parameters": "always", "update_scale": "none"},
            _PLAIN,
            axes=("learning_rate", "dropout"),
        ),
        _own(
            "badam",
            "BAdam: one layer after the other, each for 25 steps, no ascent",
            {"selector": "cyclic", "active_layers": 1, "redraw_every": 25, "update_scale": "none"},
            _PLAIN,
            axes=("learning_rate", "dropout"),
        ),
        _own("lora", "LoRA of rank 4, AdamW", _ALL, _PLAIN, axes=("learning_rate", "dropout"), lora=4),
        _own("lora_sam", "LoRA of rank 4, dense SAM", _ALL, lora=4),
        _own("lora_quarter", "LoRA of rank 4, ascent on a quarter", _ALL, _QUARTER, lora=4),
        _own(
            "lora_one_sample",
            "LoRA of rank 4, g + (h - g) of one sample",
            _ALL,
            _ONE,
            {"descend_along": {"corrected": 1.0}},
            lora=4,
            rho=0.0125,
        ),
        _own(
            "layers_at_random",
            "a fifth of the layers at random, no ascent",
            {"selector": "uniform"},
            _PLAIN,
            axes=("learning_rate", "dropout"),
        ),
    )
}
