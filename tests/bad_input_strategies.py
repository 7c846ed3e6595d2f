"""What `tests.bad_inputs` tries: plausible input of every kind, and damage to it."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from torch import nn

from slsam_ds.cli.parser import build_parser
from slsam_ds.config import SLSAMConfig
from slsam_ds.records.files import LAYERS_FILE, STEPS_FILE
from slsam_ds.slsam import SLSAM
from slsam_ds.state.files import write_state
from tests.damage import DEEP, ODD_TEXTS, damaged_bytes, damaged_json, damaged_tree, dump, values
from tests.models import tiny_llama, window

ROOT = Path(__file__).parents[1]

# The `slsam` block


_KNOBS = [knob.name for knob in dataclasses.fields(SLSAMConfig)]
_VALID: dict[str, list[Any]] = {
    "rho": [0, 0.02], "active_layers": [0.5, 2], "selector": ["uniform", "cyclic", "all", "top_k", "exp3m"],
    "gamma": [0.5, "auto"], "share": [0, 0.1], "reward": ["grad_rms"], "ascent_scope": ["rank", "micro_batch"],
    "ascent_fraction": [0.5], "ascent_source": ["previous"], "mask": ["fisher", "dynamic", None],
    "mask_density": [0.2, 1], "mask_every": [3], "budget": [1.0], "update_scale": ["none"],
    "rounding": ["nearest"], "prefix_reuse": [True, "auto"], "other_parameters": ["freeze", "always"],
    "layers": [["a.*"], None], "offload_state": [True], "max_skipped_steps": [3, None], "check_weights_every": [0],
    "seed": [7],
}  # fmt: skip
_PLAUSIBLE = [value for some in _VALID.values() for value in some] + [["("], ["a{99999999999}"], [], [1], 7]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Any, list[str] | None]:
    """A block, and assignments over it or None."""
    keys = st.sampled_from(_KNOBS) | st.sampled_from(_KNOBS) | st.sampled_from(["rhoo", "a\nb", "", " "]) | st.text()
    value = st.sampled_from(_PLAUSIBLE) | values
    valid = st.fixed_dictionaries({}, optional={key: st.sampled_from(some) for key, some in _VALID.items()})
    few = st.lists(st.sampled_from(_KNOBS), max_size=3)
    some_valid = st.builds(lambda block, keys: {key: block[key] for key in keys if key in block}, valid, few)
    block = draw(some_valid | st.dictionaries(keys, value, max_size=2) | values)
    if not isinstance(block, dict) or draw(st.booleans()):
        return block, None
    texts = value.map(dump) | st.text(max_size=8) | st.sampled_from([*ODD_TEXTS, DEEP, "0.1", "all", "2"])
    separators = st.sampled_from(["=", "=", "=", "=", "", " = ", "=="])
    assignments = st.builds(lambda key, separator, text: key + separator + text, keys, separators, texts)
    return block, draw(st.lists(assignments, max_size=3))


def names_of_block(example: tuple[Any, list[str] | None]) -> Iterator[str]:
    """Keys as messages show them, or that it is no block at all."""
    block, assignments = example
    if not isinstance(block, Mapping):
        yield "slsam="
        return
    for key in [*block, *(assignment.partition("=")[0].strip() for assignment in assignments or ())]:
        yield f"slsam.{json.dumps(key)[1:-1]}"
    yield from (f"--slsam {json.dumps(assignment)[1:-1]}"[:40] for assignment in assignments or ())


# Models


@dataclass(frozen=True)
class ModelExample:
    """A small model and how its layers are asked for."""

    tree: Any
    patterns: tuple[str, ...] | None
    other_parameters: Any

    def build(self) -> nn.Module:
        """The model, on meta: nothing of it is run."""
        if self.tree == "llama":
            return _llama()
        with torch.device("meta"):
            return Root(**{f"part{index}": _build(part) for index, part in enumerate(self.tree)})


class Root(nn.Module):
    """Whatever it is given, under these names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


_SHARED = "shared"
_LEAVES = ["linear", "linear", "frozen", "norm", "scale", "empty", _SHARED]


def _build(part: Any, shared: Any = None) -> nn.Module:
    match part:
        case ("list", parts):
            return nn.ModuleList(map(_build, parts))
        case ("sequential", parts):
            return nn.Sequential(*map(_build, parts))
        case ("same", inner, count):
            return nn.ModuleList([_build(inner)] * count)
        case ("root", parts):
            return Root(**{f"inner{index}": _build(inner) for index, inner in enumerate(parts)})
        case "linear" | "frozen":
            return nn.Linear(2, 3).requires_grad_(part == "linear")
        case "norm":
            return nn.LayerNorm(2)
        case "scale":
            return _Scale()
    return nn.Identity()


def _llama() -> nn.Module:
    return tiny_llama(num_blocks=2, hidden=8)


def models() -> st.SearchStrategy[ModelExample]:
    """Module trees, and patterns that may or may not fit them."""
    parts = st.recursive(
        st.sampled_from(_LEAVES),
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["list", "sequential", "root"]), st.lists(inner, max_size=4)),
            st.tuples(
                st.sampled_from(["list", "sequential"]),
                st.integers(0, 4).flatmap(lambda n: inner.map(lambda x: [x] * n)),
            ),
            st.tuples(st.just("same"), inner, st.integers(0, 3)),
        ),
        max_leaves=8,
    )
    blocks_of = st.sampled_from([("root", ["linear", "norm"]), ("root", ["frozen", "linear"]), ("root", ["frozen"])])
    stacked = st.builds(
        lambda block, count, others: [("list", [block] * count), *others],
        blocks_of, st.integers(1, 3), st.lists(st.sampled_from(_LEAVES), max_size=2),
    )  # fmt: skip
    patterns = st.one_of(
        st.sampled_from(
            ["part0", "part1", "part0.0", r"part0\.[01]\..*", ".*weight", ".*", "", "part0.inner0", "model.layers.0"]
        ),
        st.text(alphabet="part01.*+?[](){}|^$\\w", max_size=10),
        st.text(max_size=4),
        st.sampled_from(ODD_TEXTS),
    )
    return st.builds(
        ModelExample,
        st.lists(parts, max_size=3) | stacked | st.just("llama"),
        st.none() | st.lists(patterns, max_size=3).map(tuple),
        st.sampled_from(["arms", "always", "freeze"]),
    )


# Files of samples


@dataclass(frozen=True)
class DataExample:
    """Files of samples by name, flags that name their columns, and whether the tokenizer has a chat template."""

    files: dict[str, bytes]
    columns: dict[str, str]
    has_template: bool


_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "robot", ""]) | values},
        optional={"content": st.text(max_size=8) | values, "from": values},
    ),
    max_size=3,
)
_NAMES = ["text", "prompt", "response", "messages"]
_CELLS = {
    "text": st.text(max_size=12), "prompt": st.text(max_size=12), "response": st.text(max_size=12),
    "messages": _messages,
}  # fmt: skip


@st.composite
def _rows(draw: st.DrawFn) -> list[Any]:
    names = draw(st.sampled_from([["text"], ["prompt", "response"], ["messages"], _NAMES, ["a\nb"], ["other"]]))
    row = st.fixed_dictionaries({name: _CELLS.get(name, values) for name in names})
    rows: list[Any] = draw(st.lists(row, min_size=1, max_size=4))
    for _ in range(draw(st.integers(0, 2))):  # something of another type somewhere
        place = draw(st.integers(0, len(rows) - 1))
        rows[place] = draw(damaged_tree(rows[place]))
    return rows


def _render(suffix: str, rows: list[Any]) -> bytes:
    match suffix:
        case "jsonl":
            text = "\n".join(map(dump, rows)) + "\n"
        case "json":
            text = dump(rows)
        case "csv":
            file = io.StringIO()
            writer = csv.writer(file)
            dicts = [row for row in rows if isinstance(row, dict)]
            writer.writerow(list(dicts[0]) if dicts else [])
            writer.writerows([_text(cell) for cell in row.values()] for row in dicts)
            text = file.getvalue()
        case "parquet":
            return _parquet(rows)
        case _:
            text = "\n".join(map(_text, rows))
    return text.encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else dump(value)


def _parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        pq.write_table(table, file)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):  # mixed types: as text, then
        table = pa.Table.from_pylist([{"text": dump(row)} for row in rows])
        pq.write_table(table, file)
    return file.getvalue()


@st.composite
def data_files(draw: st.DrawFn) -> DataExample:
    """Up to two files of any format."""
    files = {}
    for name in draw(st.sampled_from(["a", "a", "a", "ab"])):
        suffix = draw(st.sampled_from(["jsonl", "json", "csv", "parquet", "txt"]))
        content = _render(suffix, draw(_rows()))
        files[f"{name}.{suffix}"] = draw(damaged_bytes(content))
    columns = draw(
        st.sampled_from(
            [{}, {}, {}, {"text_column": "other"}, {"messages_column": "messages"}, {"text_column": "text"}]
        )
    )
    return DataExample(files, columns, draw(st.booleans()))


# Command lines


@dataclass(frozen=True)
class CommandExample:
    """Arguments, and files that they may name."""

    argv: list[str]
    files: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the files into a folder."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def names_of_command(example: CommandExample) -> Iterator[str]:
    """Flags without their dashes, and values."""
    for argument in [*example.argv, *example.files]:
        for part in argument.split("=", 1):
            yield part.lstrip("-").replace("-", "_")
            yield part
            yield part[:20].split("\n")[0]
        yield repr(argument)
    yield from ("belongs to no flag", "slsam", "DeepSpeed config", "the training flags")


def names_of_estimate(example: CommandExample) -> Iterator[str]:
    """As those of `names_of_command`; or what was not given."""
    return itertools.chain(names_of_command(example), ["--model: give"])


def names_of_report(example: CommandExample) -> Iterator[str]:
    """As those of `names_of_command`; or what was not given."""
    return itertools.chain(names_of_command(example), ["OUTPUT_DIR", "the --output_dir", "unrecognized arguments"])


_FLAG_VALUES = [
    "0", "1", "-1", "2", "3.5", "nan", "inf", "1e400", "true", "False", "no", "none", "steps", "epoch", "auto", "{}",
    "[1]", "5",
    '{"a": 1}', "{", "a b", "ds.json", "a.jsonl", "out", "/dev/null", "/dev/null/x", "cosine", "adamw_torch", "all",
    "rho=0.1", "seed=x", "=", "lora", "uniform", "bf16", "full_shard", "linear", "--", "-x",
]  # fmt: skip
_ODD_ARGUMENTS = [text.replace("\ud800", "\udcff") for text in ODD_TEXTS]  # bytes that are no UTF-8 come as such


@st.composite
def _command(draw: st.DrawFn, flags: list[str], usual: list[list[str]]) -> CommandExample:
    value = st.sampled_from(_FLAG_VALUES) | st.sampled_from(_FLAG_VALUES) | st.sampled_from(_ODD_ARGUMENTS)
    argv = list(draw(st.sampled_from(usual)))
    for _ in range(draw(st.integers(0, 3))):
        flag = draw(st.sampled_from(flags) | st.sampled_from(["--max_stpes", "-h", "x", "--", "-"]))
        argument = draw(value)
        argv += draw(st.sampled_from([[flag, argument], [f"{flag}={argument}"], [flag], [flag, argument, argument]]))
    json_file = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    more = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, "scheduler": {"type": "WarmupLR", "params": {}}}
    more |= {"fp16": {"enabled": False}, "hybrid_engine": {"enabled": False}, "train_batch_size": "auto"}
    content = draw(damaged_json(json_file | draw(st.sampled_from([{}, more]))))
    fsdp_file = json.loads((ROOT / "ds_configs" / "fsdp2.json").read_text())
    files = {
        "ds.json": content if draw(st.booleans()) else json.dumps(json_file).encode(),
        "fsdp.json": draw(damaged_json(fsdp_file)),
    }
    return CommandExample(argv, files)


@functools.cache
def _flags_of_training() -> list[str]:
    parser = build_parser()
    return sorted(option for action in parser._actions for option in action.option_strings)


def commands() -> st.SearchStrategy[CommandExample]:
    """Of `launch/train.py`."""
    ours = ["--train_file", "--validation_file", "--dataset_name", "--max_length", "--peft", "--lora_r", "--slsam"]
    ours += ["--streaming", "--packing", "--shuffle_buffer", "--output_dir", "--resume_from_checkpoint", "--max_steps"]
    usual = [["--deepspeed", "ds.json"], ["--deepspeed", "ds.json", "--train_file", "a.jsonl"], []]
    usual += [["--fsdp", "True", "--fsdp_config", "fsdp.json"]]
    return st.sampled_from([ours, _flags_of_training()]).flatmap(lambda flags: _command(flags, usual))


def estimates() -> st.SearchStrategy[CommandExample]:
    """Of `python -m slsam_ds.estimate`."""
    flags = ["--model", "--deepspeed", "--zero", "--fsdp", "--world_size", "--micro_batch_size", "--sequence_length"]
    flags += ["--gradient_accumulation_steps", "--dtype", "--gradient_checkpointing", "--offload_optimizer", "--peft"]
    flags += ["--lora_r", "--lora_target_modules", "--slsam", "--json"]
    return _command(flags, [["--model", "m"], ["--model", "m", "--deepspeed", "ds.json"], []])


@st.composite
def reports(draw: st.DrawFn) -> CommandExample:
    """Of `python -m slsam_ds.report`."""
    words = st.sampled_from(["run", ".", "nothing", "--to", "--to=x", "-h", "--too", *_ODD_ARGUMENTS])
    argv = draw(st.lists(words, max_size=3))
    return CommandExample(argv, {f"run/{name}": content for name, content in _saved_run().items()})


# Saved states

SAVED_KNOBS = SLSAMConfig(active_layers=2)


def saved_model() -> nn.Module:
    """The model whose run was saved."""
    return _llama()


@functools.cache
def _saved_run() -> dict[str, bytes]:
    """The files of a run of three steps that are read again: records, and a checkpoint."""
    model = saved_model()
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SAVED_KNOBS)
    records = [slsam.step(window(step, 0, 1)).to_record() | {"seconds": 1.0} for step in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "weights.bin").write_bytes(b"1234")
        write_state(folder, slsam.state_dict(), {})
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    files["trainer_state.json"] = json.dumps({"global_step": 3, "max_steps": 9, "log_history": []}).encode()
    files[STEPS_FILE] = "".join(json.dumps(record) + "\n" for record in records).encode()
    files[LAYERS_FILE] = json.dumps(slsam.layers.describe()).encode()
    return files


@dataclass(frozen=True)
class CheckpointExample:
    """A checkpoint of which a file is another one, or missing."""

    name: str
    content: bytes | None

    def write(self, folder: Path) -> None:
        """Put it into a folder, which is made."""
        folder.mkdir()
        for name, content in (_saved_run() | {self.name: self.content}).items():
            if content is not None and name not in (STEPS_FILE, LAYERS_FILE):
                (folder / name).write_bytes(content)


@st.composite
def checkpoints(draw: st.DrawFn) -> CheckpointExample:
    """Of a Trainer."""
    name = draw(st.sampled_from(["slsam_state.json", "slsam_state.json", "trainer_state.json", "weights.bin"]))
    content = _saved_run()[name]
    damaged = damaged_bytes(content) if name == "weights.bin" else damaged_json(json.loads(content))
    return CheckpointExample(name, draw(st.none() | damaged))


@st.composite
def records(draw: st.DrawFn) -> bytes:
    """Contents of `slsam_steps.jsonl`."""
    lines = _saved_run()[STEPS_FILE].decode().splitlines()
    place = draw(st.integers(0, 2))
    if draw(st.booleans()):
        lines[place] = dump(draw(damaged_tree(json.loads(lines[place]))))
    content = ("\n".join(lines) + "\n").encode()
    return draw(damaged_bytes(content)) if draw(st.booleans()) else content


def write_records(folder: Path, content: bytes) -> None:
    """A run's records as a report reads them."""
    (folder / LAYERS_FILE).write_bytes(_saved_run()[LAYERS_FILE])
    (folder / STEPS_FILE).write_bytes(content)
