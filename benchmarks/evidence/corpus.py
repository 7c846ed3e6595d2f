"""Texts made of what is installed: what the authors of libraries wrote about their functions.

Nothing is downloaded, and nothing of it is in the repository. Whole files are for training or held out, so that no
function is judged by its neighbour.
"""

import ast
import copy
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slsam_ds.cli.demo import read_module

LIBRARIES = ("datasets", "deepspeed", "matplotlib", "numpy", "sklearn", "stdlib", "torch", "transformers")

Part = Literal["train", "validation", "test"]

_MIN_LENGTH, _MAX_LENGTH = 25, 200  # characters of a sentence
_SKIPPED = frozenset(
    {"tests", "test", "testing", "_testing", "__pycache__", "site-packages", "dist-packages", "idlelib"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Documented:
    """A function and the first sentence about it.

    Attributes:
        library: One of `LIBRARIES`.
        part: What its file is for.
        name: Of the function.
        header: Its `def` line, without types.
        sentence: The first sentence of its docstring, on one line.
    """

    library: str
    part: Part
    name: str
    header: str
    sentence: str


def documented(libraries: Collection[str] = LIBRARIES) -> Iterator[Documented]:
    """Documented functions, each sentence once; library by library, the files of each in an order that means nothing.

    Raises:
        ModuleNotFoundError: A library is not installed.
    """
    seen: set[str] = set()
    for library in libraries:
        root = _root(library)
        files = sorted(_files(root), key=lambda path: _digest(f"{library}/{path.relative_to(root)}"))
        for path in files:
            part = _part(f"{library}/{path.relative_to(root)}")
            for node in _functions(path):
                sentence = _first_sentence(ast.get_docstring(node) or "")
                if sentence is None or sentence in seen:
                    continue
                seen.add(sentence)
                yield Documented(library=library, part=part, name=node.name, header=_header(node), sentence=sentence)


def masked(sentence: str) -> str:
    """The sentence without the names of libraries."""
    return re.sub(
        "|".join((*LIBRARIES, "pytorch", "scikit-learn", "hugging ?face")), "it", sentence, flags=re.IGNORECASE
    )


def _root(library: str) -> Path:
    if library == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    return folder_of(library)


def folder_of(package: str) -> Path:
    """Where an installed package is, found without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is needed for this task's data or model and not installed: make install")
    return Path(spec.origin).parent


def _files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            yield path


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    _, tree = read_module(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def _first_sentence(docstring: str) -> str | None:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    in_range = _MIN_LENGTH <= len(sentence) <= _MAX_LENGTH
    return sentence if in_range and sentence.isascii() else None


def _header(node: ast.FunctionDef) -> str:
    """What stands in its `def` line, without types."""
    arguments = copy.deepcopy(node.args)
    for one in ast.walk(arguments):
        if isinstance(one, ast.arg):
            one.annotation = None
    return f"def {node.name}({ast.unparse(arguments)}):"


def _part(name: str) -> Part:
    """Of 10 files 6 are for training, and 2 each for validation and test."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.6 else "validation" if share < 0.8 else "test"


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"order {name}".encode()).digest()
