"""`launch/train.py` as people start it: a tiny model, a file of samples, real launchers, two ranks."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slsam_ds.integrations.usage import UsageError, together
from tests.models import NUM_BLOCKS, tiny_llama
from tests.ranks import free_port, run_on_ranks
from tests.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

ROOT = Path(__file__).parents[2]
NUM_ARMS = NUM_BLOCKS + 2
NUM_STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, and files of samples."""
    folder = tmp_path_factory.mktemp("command_line")
    tiny_llama(tied=True).save_pretrained(folder / "model")
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "model")
    generator = random.Random(0)
    for name, count in (("train", 48), ("validation", 10)):
        words = ["".join(generator.choices("abcdef", k=8)) for _ in range(count)]
        rows = [{"question": f"echo {word}", "answer": word} for word in words]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _launch(launcher: str, folder: Path, *flags: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    port = str(free_port())
    commands = {
        "deepspeed": ["deepspeed.launcher.runner", "--master_port", port, "--num_accelerators", "2"],
        "torchrun": ["torch.distributed.run", "--master_port", port, "--nproc_per_node", "2"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--main_process_port", port],
    }
    command = [sys.executable, "-m", *commands[launcher]] if launcher != "python" else [sys.executable]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.run(
        [*command, str(ROOT / "launch" / "train.py"), *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _flags(folder: Path, output_dir: str, **changes: Any) -> list[str]:
    flags = {
        "deepspeed": ROOT / "ds_configs" / "zero2.json",
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.jsonl",
        "prompt_column": "question",
        "response_column": "answer",
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "output_dir": output_dir,
    } | changes
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "slsam_steps.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    """The run that most tests look at: accumulation, evaluation, a checkpoint half way."""
    flags = _flags(
        folder,
        "out",
        validation_file=folder / "validation.jsonl",
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=NUM_STEPS // 2,
    )
    return _launch("deepspeed", folder, *flags, "--slsam", "active_layers=2", "rho=0.02")


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
    flags = _flags(
        folder,
        "out",
        validation_file=folder / "validation.jsonl",
        gradient_accumulation_steps=2,
        resume_from_checkpoint=f"out/checkpoint-{NUM_STEPS // 2}",
    )
    resumed = _launch("deepspeed", folder, *flags, "--slsam", "active_layers=2", "rho=0.02")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = _steps(folder / "out")
    for old, new in zip(before, after, strict=True):
        assert {**new, "seconds": 0} == {**old, "seconds": 0}
    for name, weight in _weights(folder / "out").items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "python"])
def test_other_launchers_work(launcher: str, folder: Path) -> None:
    run = _launch(launcher, folder, *_flags(folder, f"out_{launcher}", max_steps=2))
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(_steps(folder / f"out_{launcher}")) == 2
    _weights(folder / f"out_{launcher}")


def test_lora_saves_adapters(folder: Path) -> None:
    run = _launch("python", folder, *_flags(folder, "out_lora", max_steps=2, peft="lora", lora_r=2))
    assert run.returncode == 0, run.stdout + run.stderr
    assert (folder / "out_lora" / "adapter_model.safetensors").is_file()
    assert len(_steps(folder / "out_lora")) == 2


@pytest.mark.parametrize(
    ("changes", "extra", "sentence"),
    [
        ({}, ["--max_stpes", "3"], "error: --max_stpes: unknown flag; did you mean --max_steps?"),
        ({"train_file": "nothing.jsonl"}, [], "error: --train_file nothing.jsonl: no such file"),
        ({"train_file": "broken.jsonl"}, [], "error: --train_file broken.jsonl: line 2 is not valid JSON"),
        ({}, ["--slsam", "active_layers=7"], "error: slsam.active_layers=7: choose"),
    ],
    ids=["misspelt flag", "missing file", "broken file", "more layers than there are"],
)
def test_refusal_is_one_sentence_on_all_ranks(
    folder: Path, changes: dict[str, str], extra: list[str], sentence: str
) -> None:
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": oops}\n')
    run = _launch("deepspeed", folder, *_flags(folder, "refused", **changes), *extra)
    assert run.returncode == 2
    assert run.stderr.count("error: ") == 1, run.stderr
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
    assert "Failed to load" not in run.stderr + run.stdout  # what `datasets` logs before it raises
    assert not (folder / "refused" / "slsam_steps.jsonl").exists()


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
