"""What cannot be used is refused before training: one sentence, printed once, exit code 2 on every rank."""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pytest

from slsam_ds.cli.command_line import quieten
from slsam_ds.cli.finetune import build_trainer
from slsam_ds.cli.refusal import UsageError, together
from slsam_ds.cli.settings import read_settings
from tests.command_line import ROOT, launch, make_flags, make_folder
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, files of samples, and things that cannot be used."""
    folder = make_folder(tmp_path_factory.mktemp("refusals"))
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": oops}\n')
    rows = ['{"question": "a", "answer": "b"}'] * 150
    (folder / "late.jsonl").write_text("\n".join([*rows, '{"question": "a", "answer": 5}', *rows]))
    (folder / "empty.jsonl").write_text("")
    shutil.copytree(folder / "model", folder / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, section, change in (
        ("block.json", "slsam", {"activ_layers": 2}),
        ("key.json", "zero_optimization", {"reduce_buckt_size": 1000}),
        ("stage.json", "zero_optimization", {"stage": 4}),
    ):
        config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
        config[section] |= change
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "extra", "sentence"),
    [
        ({"train_file": "broken.jsonl"}, [], "error: --train_file broken.jsonl: line 2 is not valid JSON"),
        pytest.param(
            {}, ["--slsam", "active_layers=7"], "error: slsam.active_layers=7: choose", marks=pytest.mark.slow
        ),
    ],
    ids=["early", "late"],
)
def test_launched_run_ends_with_one_sentence(
    folder: Path, changes: dict[str, str], extra: list[str], sentence: str
) -> None:
    run = launch("deepspeed", folder, *make_flags(folder, "refused", **changes), *extra)
    _assert_refused(run, sentence)
    assert not (folder / "refused" / "slsam_steps.jsonl").exists()


def _assert_refused(run: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stderr.count("error: ") == 1, run.stderr
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
    assert "Failed to load" not in run.stderr + run.stdout  # what `datasets` logs before it raises


def _refuse_each(folder: str, runs: list[list[str]]) -> list[tuple[Any, str]]:
    """For each list of flags, what `launch/train.py` does up to training: the exit code, and what is printed."""
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate warns
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    quieten()
    outcomes = []
    for argv in runs:
        with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as left:
            build_trainer(together(functools.partial(read_settings, argv)))
        outcomes.append((left.value.code, printed.getvalue()))
    return outcomes


@pytest.mark.parametrize("world_size", [1, 2])
def test_everything_that_cannot_be_is_refused_before_training(world_size: int, folder: Path) -> None:
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({}, ["--lerning_rate", "1"], "--lerning_rate: unknown flag; did you mean --learning_rate?"),
        ({"train_file": "nothing.jsonl"}, [], "--train_file nothing.jsonl: no such file"),
        ({"train_file": "empty.jsonl"}, [], "--train_file empty.jsonl: the file is empty"),
        (
            {"train_file": "late.jsonl"},
            [],
            "--train_file late.jsonl: line 151: column 'answer' holds int; expected text",
        ),
        ({"train_file": "late.jsonl", "max_steps": -1}, ["--streaming"], "--streaming: the number of samples is not"),
        ({"response_column": "reply"}, [], "no column 'reply'; there are: question, answer"),
        ({"model_name_or_path": "weightless"}, [], "--model_name_or_path weightless: the folder holds no weights"),
        ({}, ["--slsam", "active_layers=0"], "slsam.active_layers=0: choose"),
        ({"deepspeed": "block.json"}, [], "slsam.activ_layers: unknown key; did you mean active_layers?"),
        ({"deepspeed": "key.json"}, [], "zero_optimization.reduce_buckt_size: unknown key; did you mean reduce_buc"),
        ({"deepspeed": "stage.json"}, [], "zero_optimization.stage=4: choose 0, 1, 2 or 3"),
        ({"resume_from_checkpoint": "out"}, [], "--resume_from_checkpoint out: not a checkpoint of a Trainer"),
        ({"output_dir": "/proc/self"}, [], "--output_dir /proc/self: cannot be written to"),
        ({}, ["--eval_strategy", "steps"], "--eval_strategy steps: there is nothing to evaluate on: give --val"),
    ]
    runs = [[*make_flags(folder, **({"output_dir": "refused"} | changes)), *extra] for changes, extra, _ in cases]
    first, *others = run_on_ranks(world_size, _refuse_each, str(folder), runs, timeout=120)
    for (_, _, sentence), (code, printed) in zip(cases, first, strict=True):
        assert code == 2
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1
        assert sentence in printed
    for rank in others:
        assert rank == [(2, "")] * len(cases)


def _refuse_on(ranks: list[int]) -> tuple[Any, str]:
    """What `together` does on this rank when it is refused on some: the exit code, and what is printed."""
    rank = int(os.environ["RANK"])
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate warns

    def build() -> None:
        if rank in ranks:
            raise UsageError("no such file")

    with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as left:
        together(build)
    return left.value.code, printed.getvalue()


def test_refusal_on_one_rank_stops_all() -> None:
    results = run_on_ranks(2, _refuse_on, [1], timeout=60)
    assert results == [(2, "error: no such file (rank 1 of 2)\n"), (2, "")]
