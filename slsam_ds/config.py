"""Every knob of SL-SAM, validated once.

One dataclass feeds Python, the `slsam` block of a DeepSpeed JSON, the command line (`--slsam KEY=VALUE`) and the
saved run record.
"""

import contextlib
import dataclasses
import json
import re
import reprlib
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch

from slsam_ds.choices import is_number, read_choice
from slsam_ds.combinations import COMBINATIONS
from slsam_ds.directions import DIRECTIONS
from slsam_ds.masks import MASKS
from slsam_ds.metrics import METRICS
from slsam_ds.recipes import PRESETS
from slsam_ds.schedules import SCHEDULES
from slsam_ds.sentences import did_you_mean

Granularity = Literal["block", "tensor"]
SelectorName = Literal["exp3m", "uniform", "cyclic", "all", "top_k", "bernoulli", "depth"]
Spread = Literal["sample", "above", "all"]
PerturbSpread = Literal["sample", "above", "all", "norm_layers"]
Reward = Literal["grad_norm", "grad_rms", "grad_norm_per_cost"]
AscentScope = Literal["global", "rank", "micro_batch"]
UpdateScale = Literal["inverse_probability", "none"]
Rounding = Literal["stochastic", "nearest"]
OtherParameters = Literal["arms", "always", "freeze"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SLSAMConfig:
    """The settings of SL-SAM. Immutable; every combination is checked at construction.

    Raises:
        ValueError: A setting is not valid. The message names the key, the value given and what is allowed.
    """

    rho: float = 0.05
    """Perturbation radius in parameter units (L2 norm over the active layers). 0 disables the ascent pass."""

    active_layers: int | float = 0.2
    """Number of active layers per step: a fraction in (0, 1] of all layers, or a whole number of layers. With the
    selectors "bernoulli" and "depth" this is the expected number."""

    granularity: Granularity = "block"
    """What counts as one layer (one arm of the bandit): a "block" of the model, or a single parameter "tensor"."""

    selector: SelectorName = "exp3m"
    """How layers are chosen. "exp3m": by a bandit that draws a fixed number of layers. "uniform": at random, all
    equally likely. "cyclic": in turn. "all": all layers in every step. "top_k": those whose last known gradient norms
    are largest. "bernoulli": each layer independently, by the bandit of the SL-SAM paper. "depth": a lowest layer is
    drawn, and it and all layers above it are chosen."""

    redraw_every: int = 1
    """Number of steps for which the same layers stay selected before new ones are drawn."""

    perturb: PerturbSpread = "sample"
    """Which layers are perturbed. "sample": those that were drawn. "above": the lowest one drawn and all layers above
    it. "all": all layers. "norm_layers": the weights of the normalisation layers."""

    update: Spread = "sample"
    """Which layers are updated: "sample", "above" or "all", as for `perturb`."""

    gamma: float | Literal["auto"] = 0.1
    """Exploration of EXP3 in (0, 1]: each of the L layers keeps a probability of at least k·gamma/L, where k is the
    number drawn per step. "auto" computes gamma from the length of the run, which must be known."""

    share: float = 0.001
    """Sharing of EXP3.S in [0, 1): how fast the bandit forgets old rewards."""

    reward: Reward = "grad_norm"
    """What the bandit maximises. "grad_norm": the norm of the layer's gradient in the descent pass. "grad_rms": that
    norm divided by the square root of the layer's number of weights. "grad_norm_per_cost": that norm divided by the
    cost of a step on this layer alone."""

    ascent_scope: AscentScope = "global"
    """What the ascent gradient is averaged over: the whole window on all ranks ("global"), the whole window on each
    "rank" by itself, or each "micro_batch" by itself. The last two give every rank its own perturbation."""

    ascent_fraction: float = 1.0
    """Fraction of the window's samples that the ascent pass uses, in (0, 1]. At least one sample per rank is used."""

    ascent_source: str = "current"
    """Direction of the perturbation. "current": the gradient of an ascent pass over the window. "friendly": the same
    gradient minus its running mean. The other values need no ascent pass. "previous": the gradient of the layer's last
    update. "momentum": the optimizer's first moment. "random": a new random direction in every step. With "previous"
    and "momentum", a layer is not perturbed the first time it is selected."""

    metric: str = "euclidean"
    """Geometry in which rho is measured. "euclidean": the L2 norm. "adaptive": large weights are perturbed more (ASAM).
    "preconditioned": weights whose gradients were large, by Adam's second moment, are perturbed less. "by_layer": each
    layer by itself; rho is a fraction of the norm of its weights."""

    mask: str | None = None
    """Which elements of the perturbed layers are perturbed (Sparse SAM). null: all. "fisher": those with the largest
    squared gradients. "dynamic": a random subset, in which elements with small gradients are replaced over time."""

    mask_density: float = 0.5
    """Fraction of the elements that the mask selects, in (0, 1]."""

    mask_every: int = 100
    """Number of steps after which a layer's mask is computed again."""

    ascend_when: str | dict[str, Any] = "always"
    """Which steps are perturbed; in the others rho is 0. "always": all steps. {"every": m}: one step in m.
    {"last": f}: the last fraction f of the run. {"probability": q}: each step with probability q. {"norm_above": c}:
    steps that follow one whose squared gradient norm was at least c standard deviations above its
    running mean."""

    descend_along: str | dict[str, Any] = "perturbed"
    """The gradient that the optimizer gets, made of the gradient g at the weights and h at the perturbed weights.
    "perturbed": h. "renormalised": h, scaled to the norm of g. {"mixed": a}: (1 - a) g + a h. {"corrected": c}: g of
    the whole window, plus c (h - g) of `ascent_fraction` of it; this costs little more than the base optimizer."""

    budget: float | None = None
    """Expected FLOPs of a step, relative to a step of AdamW on the same parameters. Replaces `active_layers`."""

    update_scale: UpdateScale = "inverse_probability"
    """How the learning rate of an updated layer is scaled. "inverse_probability": by min(1/p, 10), where p is the
    probability that the layer was updated in this step. "none": not at all."""

    rounding: Rounding = "stochastic"
    """How the perturbed weights are rounded to low precision (bf16, fp16): "stochastic" or "nearest"."""

    prefix_reuse: bool | Literal["auto"] = "auto"
    """Whether the forward of the descent pass starts at the lowest active layer and reuses what the ascent pass
    computed below it. "auto": wherever the result is exact."""

    other_parameters: OtherParameters = "arms"
    """What happens to parameters outside of the blocks (embeddings, final norm, head). "arms": they form two layers,
    one before and one after the blocks, which are selected like the others. "always": they are trained in every step.
    "freeze": they are not trained."""

    layers: tuple[str, ...] | None = None
    """The layers, each as a module path or a regular expression over parameter names. None: the layers are found from
    the model's structure."""

    offload_state: bool = False
    """Whether a layer's optimizer state, master weights and previous gradient stay on the CPU between the steps that
    select the layer."""

    max_skipped_steps: int | None = 25
    """Stop with an error after this many consecutive steps whose loss or gradient was not finite; null: never."""

    check_weights_every: int = 100
    """Number of steps between two comparisons of the ranks' weights by checksum, where every rank holds all weights;
    0: never."""

    seed: int = 0
    """Seed of the selection and of stochastic rounding."""

    def __new__(cls, *args: Any, **knobs: Any) -> Self:
        """Refuse an unknown keyword before the generated `__init__` would, with the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        if "preset" in knobs:
            raise TypeError('SLSAMConfig() takes no preset: use SLSAMConfig.from_dict({"preset": ...})')
        for name in knobs:
            if name not in known:
                raise TypeError(
                    f"SLSAMConfig() has no setting {name!r}; {did_you_mean(name, known, 'see docs/settings.md')}"
                )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self, "rho", 0 <= self.rho <= _LARGEST, "choose a finite radius ≥ 0 (0.01 to 0.1 is usual)")
        if isinstance(self.active_layers, int):
            _require(self, "active_layers", self.active_layers >= 1, _ACTIVE_LAYERS_HINT)
        else:
            _require(self, "active_layers", 0 < self.active_layers <= 1, _ACTIVE_LAYERS_HINT)
        if self.gamma != "auto":
            _require(self, "gamma", 0 < self.gamma <= 1, 'choose a number in (0, 1] or "auto"')
        _require(self, "share", 0 <= self.share < 1, "choose a number in [0, 1)")
        _require(self, "ascent_fraction", 0 < self.ascent_fraction <= 1, "choose a number in (0, 1]")
        _require(self, "redraw_every", self.redraw_every >= 1, "choose a whole number of steps ≥ 1")
        if self.max_skipped_steps is not None:
            _require(self, "max_skipped_steps", self.max_skipped_steps >= 1, "choose a whole number ≥ 1, or null")
        _require(self, "check_weights_every", self.check_weights_every >= 0, "choose a whole number ≥ 0; 0 is never")
        _require(self, "seed", 0 <= self.seed < 2**63, "choose an integer from 0 to 2^63 - 1")
        if self.budget is not None:
            _require(self, "budget", 0 < self.budget <= _LARGEST, "choose a number > 0, or null")
        if self.layers is not None:
            _require(self, "layers", len(self.layers) > 0, "name at least one layer, or null to find them in the model")
            for pattern in self.layers:
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as error:
                    raise ValueError(f"slsam.layers: {pattern!r} is not a regular expression ({error})") from None
        _require(self, "ascent_source", self.ascent_source in DIRECTIONS, f"expected {_one_of(DIRECTIONS)}")
        _require(self, "metric", self.metric in METRICS, f"expected {_one_of(METRICS)}")
        for name, members in (("ascend_when", SCHEDULES), ("descend_along", COMBINATIONS)):
            try:
                read_choice(getattr(self, name), members)
            except ValueError as error:
                _require(self, name, False, str(error))
        direction, (combination, _) = DIRECTIONS[self.ascent_source], read_choice(self.descend_along, COMBINATIONS)
        if read_choice(self.ascend_when, SCHEDULES)[0].compares_norms:
            reason = 'compares gradient norms of the same layers; use update="all" or selector="all"'
            _require(self, "ascend_when", self.update == "all" or self.selector == "all", reason)
        if not direction.needs_pass:
            for name, needed in (("ascent_scope", "global"), ("ascent_fraction", 1.0)):
                reason = f'ascent_source="{self.ascent_source}" has no ascent pass; use {_shown(needed)}'
                _require(self, name, getattr(self, name) == needed, reason)
        if direction.for_all_ranks:
            reason = f'ascent_source="{self.ascent_source}" is one direction for all ranks; use "global"'
            _require(self, "ascent_scope", self.ascent_scope == "global", reason)
        if combination.reads_ascent:
            reason = "needs the gradient at the weights over the whole window and all ranks; use"
            _require(self, "descend_along", direction.needs_pass, f'{reason} ascent_source="current"')
            if not combination.takes_part:
                _require(self, "descend_along", self.ascent_scope == "global", f'{reason} ascent_scope="global"')
        if combination.takes_part:
            reason = 'corrects by one part of the window; use ascent_scope="global", or "rank"'
            _require(self, "descend_along", self.ascent_scope != "micro_batch", reason)
            reason = 'corrects by a part of the window; use an ascent_fraction below 1, or {"mixed": a}'
            _require(self, "descend_along", self.ascent_fraction < 1, reason)
        self._check_mask()
        self._check_spread()

    def _check_mask(self) -> None:
        """There is something to mask, and the mask is that of all ranks."""
        _require(self, "mask_density", 0 < self.mask_density <= 1, "choose a number in (0, 1]")
        _require(self, "mask_every", self.mask_every >= 1, "choose a whole number of steps ≥ 1")
        if self.mask is None:
            return
        _require(self, "mask", self.mask in MASKS, f"expected {_one_of(MASKS)}, or null")
        _require(self, "mask", self.rho > 0, "with rho=0 there is no perturbation to mask; use null, or a larger rho")
        reason = f'mask="{self.mask}" is one mask for all ranks; use "global"'
        _require(self, "ascent_scope", self.ascent_scope == "global", reason)
        if MASKS[self.mask].asks_for_gradient:
            fit = [name for name, direction in DIRECTIONS.items() if direction.is_gradient]
            reason = f'mask="{self.mask}" goes by squared gradients; use {_one_of(fit)}, or mask="dynamic"'
            _require(self, "ascent_source", self.ascent_source in fit, reason)

    def _check_spread(self) -> None:
        """Who is drawn, perturbed and updated must go together."""
        if self.budget is not None:
            budget = f"slsam.budget={_shown(self.budget)}, which a preset may have set,"
            reason = f'{budget} chooses the layers; use "exp3m" or "depth", or budget=null'
            _require(self, "selector", self.selector in ("exp3m", "depth"), reason)
            _require(
                self,
                "layers",
                self.layers is None,
                f"{budget} needs layers found in the model; use null, or budget=null",
            )
            for name in ("perturb", "update"):
                _require(
                    self,
                    name,
                    getattr(self, name) == "sample",
                    f'{budget} chooses these layers; use "sample", or budget=null',
                )
        if self.perturb == "norm_layers":
            reason = 'needs every tensor to be an arm; use granularity="tensor"'
            _require(self, "perturb", self.granularity == "tensor", reason)
        if self.update == "above":
            known = self.update_scale == "none" or self.selector == "all"
            reason = 'how likely each layer is to be updated is not known; use selector="depth", or update_scale="none"'
            _require(self, "update", known, reason)

    @classmethod
    def of(
        cls, knobs: "SLSAMConfig | Mapping[str, Any] | None", block: Mapping[str, Any] | None = None
    ) -> "SLSAMConfig":
        """The knobs that a caller gives: these, else a block's, else the defaults.

        Raises:
            ValueError: As `from_dict`.
        """
        return knobs if isinstance(knobs, SLSAMConfig) else cls.from_dict(knobs if knobs is not None else block or {})

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> Self:
        """Build from a JSON-like mapping (lists become tuples). Its key `preset` names one of `PRESETS`.

        Raises:
            ValueError: An unknown key (with the nearest known one) or preset, or a value `SLSAMConfig` refuses.
        """
        if not isinstance(block, Mapping):
            raise ValueError(f'slsam={_shown(block)}: expected a block of keys and values, like {{"rho": 0.05}}')
        block = _with_preset(block)
        known = ["preset", *(field.name for field in dataclasses.fields(cls))]
        for key in block:
            if key not in known:
                hint = did_you_mean(key, known, f"known keys are {', '.join(known)}")
                raise ValueError(f"slsam.{_escaped(str(key))}: unknown key; {hint}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in block.items()
        }
        return cls(**values)

    @classmethod
    def from_assignments(cls, assignments: Iterable[str], base: Mapping[str, Any] | None = None) -> Self:
        """Build from `KEY=VALUE` strings laid over a base block. Values are JSON; what is not JSON is a plain string.

        A preset among them wins over knobs of the base block, and `active_layers` over its budget.

        Raises:
            ValueError: As `from_dict`, or an assignment without "=".
        """
        block: dict[str, Any] = {}
        for assignment in assignments:
            key, separator, text = assignment.partition("=")
            if not separator or not key:
                raise ValueError(f"--slsam {_escaped(assignment)}: expected KEY=VALUE, like --slsam rho=0.02")
            try:
                block[key.strip()] = json.loads(text)
            except (ValueError, RecursionError):
                block[key.strip()] = text
        return cls.from_dict(_laid_over(_with_preset(base or {}), _with_preset(block)))

    def to_dict(self) -> dict[str, Any]:
        """The knobs as JSON-serialisable values; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def summary(self) -> str:
        """What is not at its default, in one line, as `--slsam` takes it."""
        defaults = SLSAMConfig().to_dict()
        changed = [f"{name}={json.dumps(value)}" for name, value in self.to_dict().items() if value != defaults[name]]
        return " ".join([*changed, "(else defaults)"]) if changed else "defaults"

    @property
    def has_ascent_pass(self) -> bool:
        """Whether there are steps that begin with a forward and backward at the weights."""
        return self.rho > 0 and DIRECTIONS[self.ascent_source].needs_pass

    @property
    def descends_on_part(self) -> bool:
        """Whether a step that ascends takes `ascent_fraction` of the window for the descent, and all for the ascent."""
        return self.has_ascent_pass and read_choice(self.descend_along, COMBINATIONS)[0].takes_part

    @property
    def kept(self) -> dict[str, torch.dtype]:
        """What the optimizer's state holds besides its own when it is saved or loaded: see `Direction.kept`."""
        return {**DIRECTIONS[self.ascent_source].kept, **(MASKS[self.mask].kept if self.mask is not None else {})}

    @property
    def state_home(self) -> torch.device | None:
        """Where the optimizer's state waits: see `Engine.optimizer_state_home`."""
        return torch.device("cpu") if self.offload_state else None

    def num_active(self, num_arms: int) -> int:
        """How many of `num_arms` arms a step activates: at least 1.

        Raises:
            ValueError: A whole number of active layers larger than `num_arms`.
        """
        if self.selector == "all":
            return num_arms
        return max(1, round(self.expected_active(num_arms)))

    def expected_active(self, num_arms: int) -> float:
        """How many of `num_arms` arms a step activates on average, where that need not be a whole number.

        Raises:
            ValueError: As `num_active`.
        """
        if isinstance(self.active_layers, int):
            if self.active_layers > num_arms:
                raise ValueError(
                    f"slsam.active_layers={_shown(self.active_layers)}: "
                    f"choose a fraction in (0, 1] or a count from 1 to {num_arms}"
                )
            return self.active_layers
        return self.active_layers * num_arms


_LARGEST = sys.float_info.max  # JSON may hold larger integers
_LONGEST = 200  # characters of a value in a message
_ACTIVE_LAYERS_HINT = "choose a fraction in (0, 1] or a count from 1 to the number of layers"


def _require(config: SLSAMConfig, name: str, condition: bool, allowed: str) -> None:
    if not condition:
        raise ValueError(f"slsam.{name}={_shown(getattr(config, name))}: {allowed}")


def _shown(value: Any) -> str:
    """The value as the user would write it in JSON, on one line; shortened where it is long."""
    for write in (json.dumps, reprlib.repr):
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            text = " ".join(write(value).splitlines())
            return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"a {type(value).__name__}"


def _with_preset(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block with its preset's knobs in place of the preset's name."""
    given = dict(block)
    if "preset" not in given:
        return given
    name = given.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"slsam.preset={_shown(name)}: {did_you_mean(name, PRESETS, f'expected {_one_of(PRESETS)}')}")
    return _laid_over(PRESETS[name], given)


def _laid_over(block: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the upper one's knobs first. `active_layers` there takes the place of a budget below."""
    kept = {key: value for key, value in block.items() if key != "budget" or "active_layers" not in above}
    return {**kept, **above}


def _escaped(text: str) -> str:
    """On one line."""
    return _shown(text)[1:].removesuffix('"')


def _check_types(config: SLSAMConfig) -> None:
    for name, hint in get_type_hints(SLSAMConfig).items():
        value = getattr(config, name)
        if not _matches(value, hint):
            raise ValueError(f"slsam.{name}={_shown(value)}: expected {_described(hint)}")


def _matches(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is dict:
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if hint is float:  # an integer is a fine float
        return is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(option) for option in get_args(hint))
    if origin is Literal:
        return _one_of(get_args(hint))
    if origin is tuple:
        return "a list of strings"
    if origin is dict:
        return "a mapping of a name to its argument"
    names = {float: "a number", int: "an integer", str: "a name", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def _one_of(choices: Iterable[str]) -> str:
    return "one of " + ", ".join(f'"{choice}"' for choice in choices)
