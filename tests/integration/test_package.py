"""The source archive and the wheel, for people without the repository: built, installed, and run elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

import slsam_ds
from tests.command_line import ONE_THREAD, ROOT, make_flags, make_folder
from tests.ranks import free_port

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

data = [{"input_ids": row, "labels": row} for row in torch.arange(12).repeat(4, 1)]
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, use_cache=False, **sizes))
args = TrainingArguments("output", max_steps=2, save_strategy="no", report_to="none", use_cpu=True)
Trainer(model=model, args=args, train_dataset=data).train()
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """What `python -m build` would put into `target`."""
    call = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    done = subprocess.run(call, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "importable" not in done.stderr  # data that setuptools takes for packages
    return target / done.stdout.splitlines()[-1]


def install(wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel, and with this one's packages for those that it needs.

    Returns:
        Where its programs are.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    where = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = folder / "lib" / where / "site-packages" / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib"))
    call = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run([*call, "--ignore-installed"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.slow
def test_it_installs_and_runs_without_the_repository(tmp_path: Path) -> None:
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unwanted)
    archive = build("sdist", source, tmp_path)
    assert archive.name == f"slsam_ds-{slsam_ds.__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        assert not [member.name for member in opened if member.issym() or member.islnk()]
        opened.extractall(tmp_path / "archive")
    (unpacked,) = (tmp_path / "archive").iterdir()
    shutil.rmtree(source)
    programs = install(build("wheel", unpacked, tmp_path), tmp_path / "fresh")

    (tmp_path / "elsewhere").mkdir()
    folder = make_folder(tmp_path / "elsewhere")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", **ONE_THREAD}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    assert run("slsam", "--version") == f"slsam-ds {slsam_ds.__version__}\n"
    found = run(str(programs / "python"), "-c", "import slsam_ds; print(slsam_ds.__file__)")
    assert str(tmp_path / "fresh") in found
    for command in ("run", "train", "report", "estimate", "recipes", "doctor", "to_stock"):
        assert "usage: " in run("slsam", command, "--help")
    assert '"preset": "sam"' in run("slsam", "recipes", "sam")
    flags = ["--model", "model", "--deepspeed", "zero3", "--world_size", "8"]
    assert "ZeRO-3 on 8 ranks" in run("slsam", "estimate", *flags)
    assert "zero2: ZeRO-2 in bf16 is supported" in run("slsam", "doctor", "--deepspeed", "zero2", "--model", "model")
    run("slsam", "train", *make_flags(folder, "out", deepspeed="zero2", max_steps=2, slsam="active_layers=1"))
    assert "slsam_steps.jsonl" in os.listdir(folder / "out")
    assert "Active parameters" in run("slsam", "report", "out")
    launcher = [str(programs / "python"), "-m", "torch.distributed.run", "--master_port", str(free_port())]
    flags = make_flags(folder, "out2", deepspeed="zero3", max_steps=1, slsam="active_layers=1")
    run(*launcher, "--nproc_per_node", "2", "-m", "slsam_ds.train", *flags)
    assert "slsam_steps.jsonl" in os.listdir(folder / "out2")
    (folder / "script.py").write_text(SCRIPT)
    run("slsam", "run", "--slsam", "active_layers=1", "--", "script.py")
    assert "slsam_steps.jsonl" in os.listdir(folder / "output")
