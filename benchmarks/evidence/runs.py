"""Runs on disk: a line of JSON each, written when the run is done, so that a stopped study goes on where it was."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.results import rounded

Stage = Literal["tune", "final", "knobs"]

FILE = "runs.jsonl"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a run is, apart from what came of it.

    Attributes:
        stage: "tune": a learning rate tried, judged by validation data; "final": judged by test data; "knobs": one
            setting changed, judged by validation data.
        task: Its name.
        method: Its name.
        learning_rate: Peak.
        seed: Of the run.
        knobs: Changed from the method's.
    """

    stage: Stage
    task: str
    method: str
    learning_rate: float
    seed: int
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = "".join(f" {name}={value}" for name, value in self.knobs.items())
        return (
            f"{self.stage} {self.task} {self.method}{changed}, learning rate {self.learning_rate:g}, seed {self.seed}"
        )

    @property
    def id(self) -> str:
        """The same for the same run, whatever the order of its knobs."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Run:
    """A run and what came of it."""

    key: Key
    found: Mapping[str, Any]

    @property
    def loss(self) -> float:
        """On the data that the run was for: test data of a final one, or validation data."""
        judged = self.found["test"] if self.key.stage == "final" else self.found["validation"][-1]
        return float(judged["loss"])

    @property
    def seconds_per_step(self) -> float:
        """Of the training alone."""
        return float(self.found["seconds"]) / int(self.found["steps"])


class Runs:
    """All runs of a folder.

    Args:
        folder: Where `runs.jsonl` is, or will be.

    Raises:
        ValueError: A line of it is damaged; the sentence names file and line.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._runs: dict[str, Run] = {}
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                run = Run(Key(**row.pop("key")), row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{self._path}, line {number}: not a run ({error}); remove the line") from None
            self._runs[run.key.id] = run

    def __contains__(self, key: Key) -> bool:
        return key.id in self._runs

    def add(self, key: Key, found: Mapping[str, Any]) -> Run:
        """Keep what came of a run, on disk too."""
        run = self._runs[key.id] = Run(key, found)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": asdict(key), **rounded(found)}) + "\n")
        return run

    def of(
        self, stage: Stage, task: str, method: str | None = None, where: Callable[[Key], bool] | None = None
    ) -> list[Run]:
        """Those of a stage and task, and of a method where one is named, in the order of their seeds."""
        found = [run for run in self._runs.values() if (run.key.stage, run.key.task) == (stage, task)]
        found = [run for run in found if method in (None, run.key.method) and (where is None or where(run.key))]
        return sorted(found, key=lambda run: run.key.seed)
