"""Streamed and packed training as people start it: which rank sees what, resume, and lines that are wrong."""

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from slsam_ds.cli.command_line import quieten
from slsam_ds.cli.finetune import build_trainer, train
from slsam_ds.cli.settings import read_settings
from slsam_ds.records.files import read_steps
from tests.command_line import NUM_STEPS, ROOT, launch, make_flags, make_folder
from tests.ranks import run_on_ranks
from tests.step_records import without_times

STREAMING = ["--streaming", "--shuffle_buffer", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("streaming"))


def _enter(folder: str) -> None:
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate warns
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    quieten()


def _first_batches(folder: str, argv: list[str], num_batches: int) -> list[list[list[int]]]:
    """The token ids, without padding, that this rank would train on."""
    _enter(folder)
    batches = iter(build_trainer(read_settings(argv)).get_train_dataloader())
    return [
        [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        for batch in (next(batches) for _ in range(num_batches))
    ]


def test_ranks_share_out_what_one_process_would_see(folder: Path) -> None:
    """Of two files, too, of which accelerate would give each rank one."""
    second = [json.dumps({"question": f"say {i}", "answer": f"{i}"}) for i in range(30)]
    (folder / "second.jsonl").write_text("\n".join(second))
    flags = make_flags(folder, "windows")
    flags.insert(flags.index("--train_file") + 2, "second.jsonl")
    argv = [*flags, *STREAMING]
    num_batches = 30  # of 4 samples: the 78 are read through once and begun again
    (alone,) = run_on_ranks(1, _first_batches, str(folder), argv, 2 * num_batches)
    ranks = run_on_ranks(2, _first_batches, str(folder), argv, num_batches)
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == alone
    samples = [sample for batch in alone for sample in batch]
    first, again = samples[:78], samples[78:]
    assert len({tuple(sample) for sample in first}) == 78
    assert all(sample in first for sample in again)
    assert again != first[: len(again)]


def _train(folder: str, argv: list[str]) -> None:
    _enter(folder)
    settings = read_settings(argv)
    train(build_trainer(settings), settings)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_streamed_and_packed_run_resumes_as_the_same_run(stage: int, folder: Path) -> None:
    """Its 48 samples are read through more than once: 6 steps of 2 ranks x 4 rows x some 2 samples."""
    out = f"out{stage}"
    options = {"deepspeed": ROOT / "ds_configs" / f"zero{stage}.json", "max_length": 64, "logging_steps": 1}
    flags = make_flags(folder, out, per_device_train_batch_size=4, save_strategy="steps", save_steps=3, **options)
    flags += [*STREAMING, "--packing", "--validation_file", str(folder / "validation.jsonl")]
    run_on_ranks(2, _train, str(folder), flags)
    steps, weights = read_steps(folder / out), AutoModelForCausalLM.from_pretrained(folder / out).state_dict()
    assert len(steps) == NUM_STEPS
    run_on_ranks(2, _train, str(folder), [*flags, "--resume_from_checkpoint", f"{out}/checkpoint-3"])
    assert without_times(read_steps(folder / out)) == without_times(steps)
    for name, weight in AutoModelForCausalLM.from_pretrained(folder / out).state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.slow
def test_broken_line_ends_the_run_when_it_is_reached(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines() * 4
    lines[160] = '{"question": "a", "answer": '
    (folder / "broken.jsonl").write_text("\n".join(lines))
    flags = make_flags(folder, "broken", train_file="broken.jsonl", max_steps=100)
    run = launch("deepspeed", folder, *flags, *STREAMING)
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stderr.count("error: ") == 1, run.stderr
    assert (
        "\nerror: --train_file broken.jsonl: line 161 is not valid JSON (Expecting value at column 29)\n" in run.stderr
    )
    assert "Traceback" not in run.stderr
    assert len(read_steps(folder / "broken")) > 10
