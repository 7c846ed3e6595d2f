"""`launch/train.py` as people start it: a tiny model, a file of samples, real launchers, two ranks."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Trainer,
    TrainingArguments,
)

from slsam_ds.cli.refusal import leave_ranks
from slsam_ds.records.files import read_held_out
from tests.command_line import NUM_STEPS, ROOT, launch, make_flags, make_folder
from tests.models import NUM_BLOCKS, tiny_llama
from tests.step_records import without_times
from tests.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

NUM_ARMS = NUM_BLOCKS + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("command_line"))


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "slsam_steps.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    """The run that most tests look at: accumulation, evaluation, a checkpoint half way."""
    flags = make_flags(
        folder,
        "out",
        validation_file=folder / "validation.jsonl",
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=NUM_STEPS // 2,
    )
    return launch("deepspeed", folder, *flags, "--slsam", "active_layers=2", "rho=0.02")


def test_no_shared_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves 66 MB of it per rank and run."""
    for name, value in (("MASTER_ADDR", "nowhere"), ("MASTER_PORT", "1"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    ours, anothers = (Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_nowhere_1_{rank}") for rank in (0, 1))
    for path in (ours, anothers):
        path.touch()
    leave_ranks()
    assert not ours.exists()
    assert anothers.exists()  # which its own rank gives back
    anothers.unlink()


def test_run_ends_well(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for line in ("Held-out loss (10 samples):", "Active parameters:", "Perturbation:", "Layers active", "Outputs: out"):
        assert finished.stdout.count(line) == 1, finished.stdout  # by one rank, not by two
    assert "Traceback" not in finished.stderr
    assert "warning:" not in finished.stderr


def test_held_out_loss_falls(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert read_held_out(folder / "out") == [(0, losses[0]), (NUM_STEPS, losses[-1])]


def test_layers_are_described(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    layers = json.loads((folder / "out" / "slsam_layers.json").read_text())
    assert [layer["index"] for layer in layers] == list(range(NUM_ARMS))
    assert all(set(layer) == {"index", "name", "numel", "parameters"} for layer in layers)
    assert sum(layer["numel"] for layer in layers) == sum(p.numel() for p in tiny_llama(tied=True).parameters())


def test_steps_are_recorded(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    steps = _steps(folder / "out")
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    for step in steps:
        assert len(step["active"]) == 2
        assert len(step["probabilities"]) == NUM_ARMS
        assert sum(step["probabilities"]) == pytest.approx(2)
        assert sorted(step["grad_norms"]) == sorted(map(str, step["active"]))
        assert step["rho"] == 0.02
        assert step["skipped"] is False
        assert step["seconds"] > 0
        assert step["ascent_loss"] > 0
        assert step["loss"] > 0


def test_stock_transformers_loads_the_output(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    start, end = _weights(folder / "model"), _weights(folder / "out")
    assert end.keys() == start.keys()
    assert any(not torch.equal(start[name], end[name].float()) for name in start)
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template == CHAT_TEMPLATE


def test_resumed_run_is_the_same_run(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    """From half way: the same layers, no line twice, and the same weights to the last bit."""
    before, weights = _steps(folder / "out"), _weights(folder / "out")
    flags = make_flags(
        folder,
        "out",
        validation_file=folder / "validation.jsonl",
        gradient_accumulation_steps=2,
        resume_from_checkpoint=f"out/checkpoint-{NUM_STEPS // 2}",
    )
    resumed = launch("forked", folder, *flags, "--slsam", "active_layers=2", "rho=0.02")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = _steps(folder / "out")
    assert without_times(after) == without_times(before)
    for name, weight in _weights(folder / "out").items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.slow
def test_a_stock_trainers_checkpoint_goes_on(folder: Path) -> None:
    """By another number of ranks, too."""
    row = torch.arange(12)
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True}
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(output_dir=str(folder / "stock"), **settings),
        train_dataset=[{"input_ids": row, "labels": row}] * 8,
    ).train()
    flags = make_flags(folder, "out_of_stock", deepspeed=None, resume_from_checkpoint="stock/checkpoint-2")
    run = launch("forked", folder, *flags)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr.count("continuing after 2 steps without SL-SAM: the bandit starts anew") == 1
    assert [step["step"] for step in _steps(folder / "out_of_stock")] == list(range(3, NUM_STEPS + 1))


@pytest.mark.parametrize(
    "launcher", ["torchrun", *(pytest.param(name, marks=pytest.mark.slow) for name in ("accelerate", "python"))]
)
def test_other_launchers_work(launcher: str, folder: Path) -> None:
    run = launch(launcher, folder, *make_flags(folder, f"out_{launcher}", max_steps=2))
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(_steps(folder / f"out_{launcher}")) == 2
    _weights(folder / f"out_{launcher}")


FSDP2 = ["--fsdp", "full_shard", "--fsdp_config", str(ROOT / "ds_configs" / "fsdp2.json")]


@pytest.mark.parametrize("engine", [pytest.param([], marks=pytest.mark.slow), FSDP2], ids=["replicated", "fsdp2"])
def test_it_trains_without_deepspeed(engine: list[str], folder: Path) -> None:
    output = f"out_without_{len(engine)}"
    flags = make_flags(folder, output, max_steps=2, deepspeed=None)
    run = launch("forked", folder, *flags, *engine)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [step["skipped"] for step in _steps(folder / output)] == [False, False]
    _weights(folder / output)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_name_or_path": "encoder"}, "this model (bert) lets tokens see those after them"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 49},
            "48 samples make no batch for 1 ranks of 49",
        ),
    ],
)
def test_what_shows_when_training_starts_is_refused_and_nothing_saved(
    changes: dict[str, Any], sentence: str, folder: Path
) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    BertForMaskedLM(config).save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    run = launch("forked alone", folder, *make_flags(folder, "out_refused", deepspeed=None, **changes))
    assert run.returncode == 2, run.stdout + run.stderr
    assert f"error: {sentence}" in run.stderr
    assert not list((folder / "out_refused").glob("*.safetensors"))


@pytest.mark.slow
def test_lora_saves_adapters(folder: Path) -> None:
    run = launch("python", folder, *make_flags(folder, "out_lora", max_steps=2, peft="lora", lora_r=2))
    assert run.returncode == 0, run.stdout + run.stderr
    assert (folder / "out_lora" / "adapter_model.safetensors").is_file()
    assert len(_steps(folder / "out_lora")) == 2
    flags = make_flags(folder, "out_lora_again", max_steps=2, peft="lora", model_name_or_path="out_lora")
    run = launch("python", folder, *flags)
    assert run.returncode == 0, run.stdout + run.stderr
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("out_lora", "out_lora_again"))
    assert before.keys() == after.keys()
    # New adapters would start from the same seed, and take the very same steps.
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all((before[name] - after[name]).abs().max() < 0.03 for name in before)  # two steps at a rate of 1e-3


@pytest.mark.slow
def test_resume_with_other_knobs_is_refused(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    checkpoint = f"out/checkpoint-{NUM_STEPS // 2}"
    flags = make_flags(folder, "refused", resume_from_checkpoint=checkpoint)
    run = launch("deepspeed", folder, *flags, "--slsam", "active_layers=3")
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stderr == (
        f"error: --resume_from_checkpoint {checkpoint}: the number of active layers is 2 in the saved state and 3 "
        "here: resume with the settings of the saved run\n"
    )
