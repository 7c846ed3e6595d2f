"""Files of samples, read a row at a time, so that a row that is wrong is known by its file and line.

Not through `datasets`, but for parquet: it guesses types from the first 10 MB of a file and bends what follows to them
(datasets 5.2: one number in a later chunk of a text column puts every other text of that chunk in quotes, without a
word), and where it fails it reads the file again, whole.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

from slsam_ds.cli.refusal import UsageError
from slsam_ds.integrations.console import one_line

Numbered = tuple[str, dict[str, Any]]
"""Where in the file a row is ("line 7"), and the row."""

_LONGEST_FIELD = 2**31 - 1  # of a CSV file; the module's own limit is 131,072 characters


def read_rows(flag: str, path: Path) -> Iterator[Numbered]:
    """Every row of a file, with where it is: `("--train_file a.jsonl: line 7", row)`.

    Args:
        flag: The flag that named the file, for messages.
        path: JSON lines, JSON (lines, or one list, which is read whole), CSV, parquet or txt (a row `text` per line).

    Raises:
        UsageError: When the place is reached where the file is malformed.
    """
    named = f"{flag} {path}: "
    try:
        for where, row in _READERS[path.suffix.lower()](path):
            yield named + where, row
    except UsageError as error:
        raise UsageError(named + str(error)) from error
    except OSError as error:
        raise UsageError(f"{named}cannot be read ({one_line(error)})") from error


def check_file(flag: str, path: Path) -> None:
    """Refuse what can be told without reading.

    Raises:
        UsageError: A file that is missing, empty or of an unknown format.
    """
    if not path.exists():
        raise UsageError(f"{flag} {path}: no such file")
    if not path.is_file():
        raise UsageError(f"{flag} {path}: not a file")
    if path.suffix.lower() not in _READERS:
        raise UsageError(f"{flag} {path}: unknown format; its name must end with one of {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise UsageError(f"{flag} {path}: the file is empty")


def without_fillers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow's, its structs without the keys that it fills in, empty, so that all in a column are alike."""
    return {name: _without_empty_keys(value) for name, value in row.items()}


def _without_empty_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_empty_keys(item) for key, item in value.items() if item is not None}
    return [_without_empty_keys(item) for item in value] if isinstance(value, list) else value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines, from 1, with the ends that they have."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"line {number} is not UTF-8 (byte {error.start + 1} of the line)") from error


def _read_txt(path: Path) -> Iterator[Numbered]:
    for number, line in _lines(path):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def _read_json_lines(path: Path) -> Iterator[Numbered]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = _parse(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number} is not valid JSON ({_reason(error)})") from error
        if not isinstance(row, dict):
            raise UsageError(f"line {number} is not an object, like {{...}}")
        yield f"line {number}", row


def _read_json(path: Path) -> Iterator[Numbered]:
    first = next((line.lstrip()[0] for _, line in _lines(path) if line.strip()), "")
    if first != "[":
        yield from _read_json_lines(path)
        return
    try:
        rows = _parse("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise UsageError(f"line {error.lineno} is not valid JSON ({_reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON ({_reason(error)})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UsageError(f"item {number}: expected a list of objects, like [{{...}}, {{...}}]")
        yield f"item {number}", row


def _read_csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    end = 0  # a row may have line breaks within its quotes
    try:
        header = next(reader, [])
        end = reader.line_num
        if repeated := _repeated([name for name in header if name]):  # spreadsheets leave columns without names
            raise UsageError(f"the header names the column {repeated!r} twice: rename one")
        for fields in reader:
            start, end = end + 1, reader.line_num
            if len(fields) > len(header):
                raise UsageError(f"line {start} has {len(fields)} fields where the header names {len(header)}")
            if fields:
                yield f"line {start}", dict(zip(header, [*fields, *[None] * (len(header) - len(fields))], strict=True))
    except csv.Error as error:
        raise UsageError(f"line {end + 1} is not valid CSV ({one_line(error)})") from error


def _read_parquet(path: Path) -> Iterator[Numbered]:
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", without_fillers(row)
    except Exception as error:  # pyarrow and datasets each have their own types for a malformed file
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        raise UsageError(f"cannot be read as parquet ({one_line(error)})") from error


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object_of)


class _RepeatedKeyError(ValueError):
    """An object names a key twice; JSON's own reader would take the last one."""


def _object_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _RepeatedKeyError(f"an object has the key {_repeated([key for key, _ in pairs])!r} twice")
    return made


def _repeated(names: Sequence[str]) -> str:
    """The first name that comes again; empty where there is none."""
    return next((name for place, name in enumerate(names) if name in names[:place]), "")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, _RepeatedKeyError):
        return str(error)
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"


_READERS: Mapping[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
