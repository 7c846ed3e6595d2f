"""Samples as their owner keeps them: files and data sets, read into rows and columns."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from slsam_ds.integrations.usage import UsageError, one_line, refusals

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_files(flag: str, files: Sequence[str]) -> Dataset:
    """Read files of samples, one after the other. A txt file has one column, `text`, and a row per line.

    Args:
        flag: The flag that named the files, for messages.
        files: Paths; formats may be mixed where the columns agree.

    Raises:
        UsageError: A file that is missing, empty, of an unknown format or not readable, with the line where possible;
            files whose columns do not agree.
    """
    tables = [_read_file(flag, Path(name).expanduser()) for name in files]
    for name, table in zip(files, tables, strict=True):
        if sorted(table.column_names) != sorted(tables[0].column_names):
            raise UsageError(
                f"{flag}: the files differ in their columns: {files[0]} has {', '.join(tables[0].column_names)}; "
                f"{name} has {', '.join(table.column_names)}"
            )
    with refusals(ValueError, TypeError, prefix=f"{flag}: the files' columns differ in type: "):
        # Casting, because readers of different formats have different types for the same text.
        return concatenate_datasets([table.cast(tables[0].features) for table in tables]) if tables[1:] else tables[0]


def read_named(name: str, config: str | None = None) -> tuple[Dataset, Dataset | None]:
    """Load a data set from the hub or a local folder.

    Returns:
        Its splits `train` and `validation`; None where it has no `validation`.

    Raises:
        UsageError: It cannot be loaded, or has no split `train`.
    """
    failures = (ValueError, OSError, RuntimeError, ImportError, DatasetGenerationError)
    with refusals(*failures, prefix=f"--dataset_name {name}: "):
        splits = load_dataset(name, config)
    if not isinstance(splits, DatasetDict) or "train" not in splits:
        raise UsageError(f"--dataset_name {name}: has no split train; it has {', '.join(map(str, splits))}")
    if not len(splits["train"]):
        raise UsageError(f"--dataset_name {name}: its split train is empty")
    return splits["train"], splits.get("validation")


def _read_file(flag: str, path: Path) -> Dataset:
    if not path.exists():
        raise UsageError(f"{flag} {path}: no such file")
    if not path.is_file():
        raise UsageError(f"{flag} {path}: not a file")
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"{flag} {path}: unknown format; name it {', '.join(_FORMATS)}")
    if path.stat().st_size == 0:
        raise UsageError(f"{flag} {path}: the file is empty")
    try:
        rows = load_dataset(_FORMATS[path.suffix.lower()], data_files=str(path), split="train")
    except Exception as error:  # pandas, pyarrow and datasets each have their own types for a malformed file
        raise UsageError(f"{flag} {path}: {_explain(path, error)}") from error
    if not len(rows):
        raise UsageError(f"{flag} {path}: the file holds no samples")
    if "json" in path.suffix.lower() and rows.column_names == ["text"]:
        _check_objects(flag, path)
    return rows


def _explain(path: Path, error: BaseException) -> str:
    """Why the file could not be read, with the line where it goes wrong."""
    kind = path.suffix.lower()
    found = None
    if kind in (".json", ".jsonl"):
        found = _explain_json(path, lines=kind == ".jsonl")
    elif kind == ".csv":
        found = _explain_csv(path)
    if found is not None:
        return found
    while error.__cause__ is not None:
        error = error.__cause__
    if "corresponds to no data" in str(error):
        return "the file holds no samples"
    return f"cannot be read as {kind[1:]} ({one_line(error)})"


def _explain_json(path: Path, *, lines: bool) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    if not text.strip():
        return "the file holds no samples"
    if not lines:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip().startswith("["):
                return f"line {error.lineno} is not valid JSON ({error.msg} at column {error.colno})"
        else:
            is_table = isinstance(value, dict) or (isinstance(value, list) and all(isinstance(i, dict) for i in value))
            return None if is_table else "expected a list of objects, like [{...}, {...}]"
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            return f"line {number} is not valid JSON ({error.msg} at column {error.colno})"
        if not isinstance(value, dict):
            return f"line {number} is not an object, like {{...}}"
    return None


def _explain_csv(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            width = len(next(reader, []))
            for row in reader:
                if len(row) > width:
                    return f"line {reader.line_num} has {len(row)} fields where the header names {width}"
    except (UnicodeDecodeError, csv.Error) as error:
        return f"cannot be read as csv ({one_line(error)})"
    return None


def _check_objects(flag: str, path: Path) -> None:
    """Refuse bare JSON strings, which `datasets` reads as a column `text`."""
    problem = _explain_json(path, lines=path.suffix.lower() == ".jsonl")
    if problem is not None:
        raise UsageError(f"{flag} {path}: {problem}")
