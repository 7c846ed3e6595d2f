"""A run's records as arrays, checked: what every report is computed from."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slsam_ds.records.files import LAYERS_FILE, STEPS_FILE, iterate_steps, read_held_out

Floats = NDArray[np.floating[Any]]

_NUMBERS = (
    "loss", "ascent_loss", "rho", "perturbation_norm", "perturbation_projection", "mask_density", "price", "seconds",
    "reduced_bytes", "gathered_bytes", "gradient_bytes", "activation_bytes",
)  # fmt: skip
# Records of 0.1.0 lack the first, those of runs without a mask the second, and without `--measure` the others.
_OPTIONAL = (
    "price", "mask_density", "reduced_bytes", "gathered_bytes", "gradient_bytes", "activation_bytes",
)  # fmt: skip


class RecordsError(ValueError):
    """The records are missing, or are not what slsam_ds writes. The message is one sentence for the user."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunHistory:
    """T steps of L layers. Where a record holds null, or nothing about a layer, there is NaN.

    Attributes:
        names: Name of every layer.
        numels: Its weights. Shape (L,), int64.
        steps: Numbers of the steps, ascending. Shape (T,), int64.
        active: Which layers a step updated. Shape (T, L), bool.
        perturbed_layers: Which it perturbed. Shape (T, L), bool.
        probabilities: Inclusion probabilities. Shape (T, L), float32.
        grad_norms: Descent-gradient norms of the active layers. Shape (T, L), float32.
        skipped: Steps that changed nothing. Shape (T,), bool.
        loss: Mean loss at the perturbed point. This and all below: shape (T,), float64.
        ascent_loss: Mean loss at the weights themselves.
        rho: Radius asked for.
        perturbation_norm: Radius reached.
        perturbation_projection: Share of the perturbation that reached the weights.
        mask_density: Share of the perturbed layers' elements that the mask let move.
        price: FLOPs relative to a step of AdamW.
        seconds: Wall-clock time.
        reduced_bytes: That the first rank handed to reductions.
        gathered_bytes: That it received by gatherings.
        gradient_bytes: Of gradients that it held at once, at most.
        activation_bytes: That a micro-batch's forward saved for its backward, at most.
        held_out: Held-out losses: after which step, and the loss. Ascending.
    """

    names: tuple[str, ...]
    numels: NDArray[np.int64]
    steps: NDArray[np.int64]
    active: NDArray[np.bool_]
    perturbed_layers: NDArray[np.bool_]
    probabilities: Floats
    grad_norms: Floats
    skipped: NDArray[np.bool_]
    loss: Floats
    ascent_loss: Floats
    rho: Floats
    perturbation_norm: Floats
    perturbation_projection: Floats
    mask_density: Floats
    price: Floats
    seconds: Floats
    reduced_bytes: Floats
    gathered_bytes: Floats
    gradient_bytes: Floats
    activation_bytes: Floats
    held_out: tuple[tuple[int, float], ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def perturbed(self) -> NDArray[np.bool_]:
        """Steps that moved the weights before the descent: by `ascend_when` not all do. Shape (T,)."""
        perturbed: NDArray[np.bool_] = (self.rho > 0) & (self.perturbation_norm != 0) & ~self.skipped
        return perturbed

    @property
    def perturbs_others(self) -> bool:
        """Whether there are steps that perturb other layers than they update."""
        climbs = self.rho > 0
        return bool((self.perturbed_layers[climbs] != self.active[climbs]).any())

    @property
    def loss_at_weights(self) -> Floats:
        """The loss that compares to any other optimizer's: before the ascent where there was one. Shape (T,)."""
        return np.where(np.isnan(self.ascent_loss), self.loss, self.ascent_loss)

    @classmethod
    def from_records(cls, layers: Any, steps: Iterable[Any], held_out: Iterable[tuple[int, float]] = ()) -> Self:
        """Check records and put them into arrays.

        Args:
            layers: The contents of `slsam_layers.json`.
            steps: The records of `slsam_steps.jsonl`; may be read as they are needed.
            held_out: As the attribute.

        Raises:
            RecordsError: They are not such records, do not belong together, or there is none.
        """
        names, numels = _read_layers(layers)
        rows = []
        for line, record in enumerate(steps, start=1):
            try:
                rows.append(_Row.read(record, len(names)))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise RecordsError(f"{STEPS_FILE}, line {line}: not a record of these layers ({problem})") from None
            if len(rows) > 1 and rows[-2].step >= rows[-1].step:
                raise RecordsError(
                    f"{STEPS_FILE}, line {line}: step {rows[-1].step} after step {rows[-2].step}; "
                    "did two runs write into one folder?"
                )
        if not rows:
            raise RecordsError(f"{STEPS_FILE}: holds no step yet, or was not written by slsam_ds")
        numbers = np.array([row.numbers for row in rows])
        return cls(
            names=names,
            numels=numels,
            steps=np.array([row.step for row in rows]),
            active=np.stack([row.active for row in rows]),
            perturbed_layers=np.stack([row.perturbed for row in rows]),
            probabilities=np.stack([row.probabilities for row in rows]),
            grad_norms=np.stack([row.grad_norms for row in rows]),
            skipped=np.array([row.skipped for row in rows]),
            held_out=tuple(held_out),
            **dict(zip(_NUMBERS, numbers.T, strict=True)),
        )


def read_history(output_dir: str | Path) -> RunHistory:
    """The run whose files are in a folder, as far as it has come.

    Raises:
        RecordsError: There is no such folder, it lacks the files, or they are not what slsam_ds writes.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise RecordsError(f"{folder}: no such folder; give the --output_dir of a run")
    for name in (LAYERS_FILE, STEPS_FILE):
        if not (folder / name).is_file():
            runs = " ".join(str(path.parent) for path in sorted(folder.glob(f"*/{LAYERS_FILE}")))
            hint = f"its runs are {runs}" if runs else "give the --output_dir of a run that has started to train"
            raise RecordsError(f"{folder}: holds no {name}; {hint}")
    try:
        layers = json.loads((folder / LAYERS_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not JSON, or not even text
        raise RecordsError(f"{folder / LAYERS_FILE}: not JSON; was it written by slsam_ds?") from None
    try:
        return RunHistory.from_records(layers, iterate_steps(folder), read_held_out(folder))
    except RecordsError as error:
        raise RecordsError(f"{folder}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Row:
    """One record, as small as it gets: there may be many, of many layers."""

    step: int
    active: NDArray[np.bool_]
    perturbed: NDArray[np.bool_]
    probabilities: Floats
    grad_norms: Floats
    skipped: bool
    numbers: tuple[float, ...]

    @classmethod
    def read(cls, record: Mapping[str, Any], num_layers: int) -> Self:
        """Raises one of the errors that `from_records` turns into a sentence, on what is not a record."""
        if not isinstance(record, Mapping):
            raise ValueError("not a JSON object")
        probabilities = np.array(record["probabilities"], dtype=np.float32)
        if probabilities.shape != (num_layers,):
            raise ValueError(f"{probabilities.size} probabilities for {num_layers} layers")
        active, perturbed = np.zeros((2, num_layers), dtype=bool)
        active[_checked_arms(record["active"], num_layers)] = True
        climbs = _number(record["rho"]) > 0  # records of 0.1.0 do not name the perturbed layers: they were these
        perturbed[_checked_arms(record.get("perturbed", record["active"] if climbs else []), num_layers)] = True
        grad_norms = np.full(num_layers, np.nan, dtype=np.float32)
        arms = _checked_arms([int(arm) for arm in record["grad_norms"]], num_layers)
        grad_norms[arms] = [_number(norm) for norm in record["grad_norms"].values()]
        return cls(
            step=int(record["step"]),
            active=active,
            perturbed=perturbed,
            probabilities=probabilities,
            grad_norms=grad_norms,
            skipped=bool(record["skipped"]),
            numbers=tuple(_number(record.get(name) if name in _OPTIONAL else record[name]) for name in _NUMBERS),
        )


def _read_layers(layers: Any) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    try:
        names = tuple(str(layer["name"]) for layer in layers)
        numels = np.array([int(layer["numel"]) for layer in layers], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise RecordsError(f"{LAYERS_FILE}: not a list of layers; was it written by slsam_ds?") from None
    if not names or numels.min() < 1:
        raise RecordsError(f"{LAYERS_FILE}: lists no layers with weights; was it written by slsam_ds?")
    return names, numels


def _checked_arms(arms: Sequence[int], num_layers: int) -> list[int]:
    for arm in arms:
        if not isinstance(arm, int) or not 0 <= arm < num_layers:
            raise ValueError(f"layer {arm!r} of {num_layers}")
    return list(arms)


def _number(value: Any) -> float:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan
