"""Loops with Accelerate, launched by `accelerate launch` on two ranks, follow the reference."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim, DummyScheduler
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from packaging import version

import slsam_ds
from slsam_ds.integrations.accelerate import prepare
from tests.accelerate_loop import ACCUMULATION, CLIP, NUM_RANKS
from tests.command_line import make_environment
from tests.distributed.training import LlamaSetup, follow_reference, slow
from tests.models import SAMPLES, micro_batch, tiny_llama
from tests.ranks import free_port, run_on_ranks

ROOT = Path(__file__).parents[2]
SETUP = LlamaSetup(engine="local", accumulation=ACCUMULATION, clip=CLIP, slsam={"rho": 0.02})


def launch(plugin: str, module: str, *arguments: str, folder: Path) -> None:
    """Run a module on two ranks, with a plugin: "none", "fsdp2", or a ZeRO stage like "zero2"."""
    flags = ["--num_processes", str(NUM_RANKS), "--main_process_port", str(free_port()), "--mixed_precision", "no"]
    flags += ["--num_machines", "1", "--dynamo_backend", "no"]
    if plugin == "fsdp2":
        flags += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
        flags += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    elif plugin.startswith("zero"):
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed_config(int(plugin[-1]))))
        flags += ["--use_deepspeed", "--deepspeed_config_file", str(folder / "deepspeed.json")]
    else:
        flags += ["--multi_gpu"]  # several processes, also on CPUs
    environment = make_environment(folder) | {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--module", module, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def deepspeed_config(stage: int) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "slsam": {"rho": 0.02},
    }


@pytest.mark.parametrize("plugin", [slow("none"), "zero2", slow("fsdp2"), slow("zero3")])
def test_a_loop_follows_the_reference_also_from_a_checkpoint(plugin: str, tmp_path: Path) -> None:
    launch(plugin, "tests.accelerate_loop", str(tmp_path), folder=tmp_path)
    result = torch.load(tmp_path / "result.pt")
    weights, steps = follow_reference(SETUP, NUM_RANKS, SAMPLES)
    assert result["losses"] == pytest.approx([step["ascent_loss"] for step in steps], abs=1e-5)
    # As the engines' own test: float32, eps 1e-4.
    assert max((result["trained"][name] - weights[name]).abs().max().item() for name in weights) <= 1e-6
    assert all(torch.equal(result["again"][name], weight) for name, weight in result["trained"].items())


def refusal(backend: str | None, *, placeholder: bool = False) -> str:
    accelerator = Accelerator(cpu=True, dynamo_backend=backend)
    model = tiny_llama()
    optimizer = DummyOptim(model.parameters()) if placeholder else torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r".") as raised:
        prepare(accelerator, model, optimizer, slsam={"rho": 0.1} if placeholder else {"rho": 0.1, "seed": -1.5})
    return str(raised.value)


def test_what_cannot_work_is_refused() -> None:
    assert "dynamo_backend" in run_on_ranks(1, refusal, "eager")[0]
    assert "seed" in run_on_ranks(1, refusal, None)[0]
    assert "needs the DeepSpeed plugin" in run_on_ranks(1, functools.partial(refusal, placeholder=True), None)[0]


def refusal_with_deepspeed(cpu: bool) -> str:
    accelerator = Accelerator(cpu=cpu, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(2)))
    model = tiny_llama()
    with pytest.raises(ValueError, match=r".") as raised:
        prepare(accelerator, model, torch.optim.AdamW(model.parameters()), slsam={"rho": -1})
    return str(raised.value)


def test_an_accelerator_that_does_not_see_the_other_ranks_is_refused() -> None:
    """Without CUDA it does not, unless told of the CPU: all ranks would train on the same data."""
    assert all("rho" in sentence for sentence in run_on_ranks(2, refusal_with_deepspeed, True))
    counts_by_itself = version.parse(accelerate.__version__) < version.parse("1.13")  # also on the CPU
    if not torch.accelerator.is_available() and not counts_by_itself:
        for sentence in run_on_ranks(2, refusal_with_deepspeed, False):
            assert "sees 1 process where 2 train together" in sentence


def trained_by_the_json(folder: str) -> tuple[list[int], bool]:
    """One step with the optimizer that DeepSpeed's JSON brings, as `DummyOptim` asks for it."""
    section: dict[str, object] = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    config = {**deepspeed_config(2), **section, "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 2}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = tiny_llama()
    slsam, _, optimizer = prepare(accelerator, model, DummyOptim(model.parameters(), lr=1e-3))
    before = [parameter.detach().clone() for _, parameter in slsam.layers[1].parameters]
    result = slsam.step([micro_batch(1, 0, 0)], active=[1])
    moved = any(not torch.equal(old, new) for old, (_, new) in zip(before, slsam.layers[1].parameters, strict=True))
    arms = [group["arm"] for group in optimizer.param_groups]
    return arms, moved and result.active == (1,) and slsam.config.rho == 0.02


def test_the_optimizer_of_the_json_is_split_by_layer(tmp_path: Path) -> None:
    arms, stepped = run_on_ranks(1, trained_by_the_json, str(tmp_path))[0]
    assert arms == sorted(set(arms))
    assert len(arms) > 1
    assert stepped


EVERYTHING = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "slsam": {"rho": 0.02, "active_layers": 2},
}
WARMUP, STEPS = 2, 6


def trained_by_a_json_that_says_everything() -> tuple[list[float], list[tuple[int, float]], str]:
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATION, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=EVERYTHING)
    )
    model = tiny_llama()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = DummyOptim(groups, lr=1e-3)
    scheduler = DummyScheduler(optimizer, total_num_steps=STEPS, warmup_num_steps=WARMUP)
    batches = [micro_batch(step, 0, 0) for step in range(ACCUMULATION * STEPS)]
    rows = [{name: tokens[row] for name, tokens in batch.items()} for batch in batches for row in range(2)]
    loaders = [torch.utils.data.DataLoader(rows, batch_size=2) for _ in range(2)]
    slsam, model, optimizer, loader, held_out, scheduler = prepare(accelerator, model, optimizer, *loaders, scheduler)
    rates = []
    for window in slsam_ds.windows(loader, accelerator.gradient_accumulation_steps):
        assert not slsam.step(window).skipped
        optimizer.step()  # which a loop may keep: Accelerate's do nothing here
        scheduler.step()
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
    model.eval()
    with torch.no_grad():
        assert model(**next(iter(held_out))).loss.isfinite()
    model.train()
    with pytest.raises(RuntimeError) as raised:  # and what a loop must not keep
        accelerator.backward(model(**next(iter(loader))).loss)
    decays = [(group["arm"], group["weight_decay"]) for group in optimizer.param_groups]
    return rates, decays, str(raised.value)


def test_a_json_that_says_everything_with_placeholders_as_in_accelerates_example() -> None:
    rates, decays, refusal = run_on_ranks(1, trained_by_a_json_that_says_everything)[0]
    alone = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = WarmupDecayLR(alone, total_num_steps=STEPS, warmup_max_lr=1e-3, warmup_num_steps=WARMUP)
    expected = []
    for _ in range(STEPS):
        schedule.step()
        expected.append(alone.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)
    assert len(set(rates)) > 2
    assert {decay for _, decay in decays} == {0.1, 0.0}
    assert [arm for arm, _ in decays] == sorted(arm for arm, _ in decays)
    assert "slsam.step(window)" in refusal
