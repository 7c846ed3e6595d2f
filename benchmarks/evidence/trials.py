"""Trials of candidates on long tasks: settings, what came of them, and the file that keeps both."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.results import rounded

Checkpoint = Literal["last", "best", "average"]
"""The last one; the one with the best validation loss on the way; the mean of the weights of the last quarter."""

FILE = "trials.jsonl"

TUNING_SEED = 0
MORE_TUNING_SEEDS = (1001, 1002)
"""Of the settings that were best with the first one."""
"""Settings are chosen by its trials; no seed of a reported run."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What may be tuned.

    Attributes:
        learning_rate: Peak.
        rho: Radius; 0 where there is no ascent.
        weight_decay: AdamW's.
        dropout: In the model.
        share: Of the task's steps.
    """

    learning_rate: float
    rho: float
    weight_decay: float = 0.01
    dropout: float = 0.0
    share: float = 1.0

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a run is, apart from what came of it."""

    task: str
    candidate: str
    setting: Setting
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.candidate}: {self.setting}, seed {self.seed}"

    @property
    def id(self) -> str:
        """The same for the same trial."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """A trial and what came of it."""

    trial: Trial
    found: Mapping[str, Any]

    def loss(self, checkpoint: Checkpoint, data: Literal["validation", "test"]) -> float:
        """Cross-entropy of a checkpoint."""
        return float(self.found["checkpoints"][checkpoint][data])

    @property
    def is_tuning(self) -> bool:
        """It serves to choose settings."""
        return self.trial.seed in (TUNING_SEED, *MORE_TUNING_SEEDS)

    @property
    def flops(self) -> float:
        """Of the whole run; AdamW over all of the task's steps is 1."""
        return float(self.found["flops"])

    def chosen(self) -> Checkpoint:
        """The checkpoint with the least validation loss: early stopping and averaging, for everybody."""
        names: tuple[Checkpoint, ...] = ("last", "best", "average")
        return min(names, key=lambda name: self.loss(name, "validation"))


class Trials:
    """All of a folder. Each is on disk when it is made, so that a stopped study goes on; two processes may add to it.

    Args:
        folder: Where `trials.jsonl` is, or will be.

    Raises:
        ValueError: A line of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._outcomes: dict[str, Outcome] = {}
        self.read()

    def read(self) -> None:
        """Take in what other processes have added."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                given = row.pop("trial")
                trial = Trial(**{**given, "setting": Setting(**given["setting"])})
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{self._path}, line {number}: not a trial ({error}); remove the line") from None
            self._outcomes[trial.id] = Outcome(trial, row)

    def get(self, trial: Trial) -> Outcome | None:
        """What came of a trial; None: it was not made."""
        return self._outcomes.get(trial.id)

    def add(self, trial: Trial, found: Mapping[str, Any]) -> Outcome:
        """Keep it, on disk too."""
        outcome = self._outcomes[trial.id] = Outcome(trial, found)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": asdict(trial), **rounded(found)}) + "\n")
        return outcome

    def of(self, task: str, candidate: str | None = None) -> list[Outcome]:
        """Those of a task, and of a candidate where one is named, by seed."""
        found = [one for one in self._outcomes.values() if one.trial.task == task]
        return sorted(
            (one for one in found if candidate in (None, one.trial.candidate)), key=lambda one: one.trial.seed
        )
