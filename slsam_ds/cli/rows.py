"""Samples as their owner keeps them: files and data sets, as rows that know where they are from."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from slsam_ds.cli.files import Numbered, check_file, read_rows, without_fillers
from slsam_ds.cli.refusal import UsageError, path_of, refusals
from slsam_ds.integrations.console import one_line

_NUM_PEEKED = 100  # rows of a file that tell its columns


class Shard(Protocol):
    """A part of the samples that is read in one go."""

    def read(self) -> Iterator[Numbered]:
        """Its rows, each with where it is, for messages."""

    def key(self) -> object:
        """Changes with its content: names it in the cache of `datasets`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples, read when they are iterated over.

    Attributes:
        source: What to call them in messages.
        column_names: Of every row, as far as the first ones tell.
        shards: What they are made of.
    """

    source: str
    column_names: Sequence[str]
    shards: Sequence[Shard]

    @staticmethod
    def of_table(source: str, table: Dataset | IterableDataset) -> "Rows":
        """The rows of a data set in memory, on disk or behind a stream."""
        count = table.num_shards if isinstance(table, IterableDataset) else 1
        parts = [table] if count == 1 else [table.shard(num_shards=count, index=index) for index in range(count)]
        titles = [source if count == 1 else f"{source}, part {index + 1} of {count}" for index in range(count)]
        shards = [_TableShard(title, part) for title, part in zip(titles, parts, strict=True)]
        names = table.column_names
        if names is None:  # of some streams
            names = list(next((row for _, row in shards[0].read()), {}))
        return Rows(source, names, shards)

    def cache_key(self) -> str:
        """The same for the same content."""
        return str(Hasher.hash([shard.key() for shard in self.shards]))

    @staticmethod
    def read(shards: Iterable[Shard]) -> Iterator[dict[str, Any]]:
        """For the generators of `datasets`, which hand out shards to processes: `{"where": ..., "row": {...}}`.

        Raises:
            UsageError: When a malformed row is reached.
        """
        for shard in shards:
            for where, row in shard.read():
                yield {"where": where, "row": row}


def read_files(flag: str, files: Sequence[str]) -> Rows:
    """Files of samples, one after the other; see `slsam_ds.cli.files` for the formats, which may be mixed.

    Args:
        flag: The flag that named the files, for messages.
        files: Paths.

    Raises:
        UsageError: A file that is missing, empty, of an unknown format, or malformed at its beginning; files without
            a common column.
    """
    return _of_files(flag, f"{flag} {' '.join(files)}", [path_of(f"{flag} {name}", name) for name in files])


def read_named(name: str, config: str | None = None, *, streaming: bool = False) -> tuple[Rows, Rows | None]:
    """A data set from the hub or a local folder, of data files or as `save_to_disk` wrote it.

    Args:
        name: Hub id or folder.
        config: One of its configurations.
        streaming: Do not bring it to this machine first.

    Returns:
        Its splits `train` and `validation`; None where it has no `validation`.

    Raises:
        UsageError: It cannot be loaded, or has no split `train`, or one that is empty.
    """
    flag = f"--dataset_name {name}"
    folder = path_of(flag, name)
    if folder.is_file():
        raise UsageError(f"{flag}: expected a folder or a hub id; files are given by --train_file")
    if not folder.exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise UsageError(f"{flag}: no such folder")
    failures = (ValueError, OSError, RuntimeError, ImportError, DatasetGenerationError)
    with refusals(*failures, prefix=f"{flag}: "):
        if _is_saved(folder):
            if config is not None:
                raise UsageError(
                    f"--dataset_config_name {config}: {name} was written by save_to_disk and has a single configuration"
                )
            splits = _load_saved(flag, folder)
        else:
            given = str(folder) if folder.is_dir() else name
            splits = _json_files(given, config) or load_dataset(given, config, streaming=streaming)
    if "train" not in splits:
        raise UsageError(f"{flag}: has no split train; it has {', '.join(map(str, splits))}")
    rows = {
        split: _of_files(flag, flag, part) if isinstance(part, list) else Rows.of_table(flag, part)
        for split, part in splits.items()
        if split in ("train", "validation")
    }
    if next(Rows.read(rows["train"].shards), None) is None:
        raise UsageError(f"{flag}: its split train is empty")
    return rows["train"], rows.get("validation")


@dataclass(frozen=True, slots=True)
class _FileShard:
    flag: str
    path: Path

    def read(self) -> Iterator[Numbered]:
        return read_rows(self.flag, self.path)

    def key(self) -> object:
        status = self.path.stat()
        return str(self.path.resolve()), status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class _TableShard:
    source: str
    table: Any

    def read(self) -> Iterator[Numbered]:
        try:
            for number, row in enumerate(self.table, start=1):
                yield f"{self.source}, sample {number}", without_fillers(row)
        except Exception as error:  # whatever the format's reader raises on a malformed file
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            raise UsageError(f"{self.source}: cannot be read ({one_line(error)})") from error

    def key(self) -> object:
        # Nobody knows whether what is behind a stream has changed.
        return uuid4().hex if isinstance(self.table, IterableDataset) else Hasher.hash(self.table)


def _of_files(flag: str, source: str, paths: Sequence[Path]) -> Rows:
    columns: list[list[str]] = []
    for path in paths:
        check_file(flag, path)
        names = dict.fromkeys(name for _, row in islice(read_rows(flag, path), _NUM_PEEKED) for name in row)
        if not names:
            raise UsageError(f"{flag} {path}: the file holds no samples")
        columns.append(list(names))
    common = [name for name in columns[0] if all(name in names for names in columns)]
    if not common:
        path, other = next((path, names) for path, names in zip(paths, columns, strict=True) if names != columns[0])
        raise UsageError(
            f"{flag}: the files differ in their columns: {paths[0]} has {', '.join(columns[0])}; {path} has "
            f"{', '.join(other)}"
        )
    return Rows(source, common, [_FileShard(flag, path) for path in paths])


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def _load_saved(flag: str, folder: Path) -> Mapping[str, Dataset]:
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # IndexError, where a split is empty
        raise UsageError(f"{flag}: a split that save_to_disk wrote is empty or damaged ({one_line(error)})") from error
    return saved if isinstance(saved, DatasetDict) else {"train": saved}


def _json_files(name: str, config: str | None) -> dict[str, list[Path]] | None:
    """The JSON files of a local folder, by split: our own reader knows their lines. None: it holds something else."""
    builder = load_dataset_builder(name, config).config
    if not Path(name).is_dir() or getattr(builder, "field", "") is not None:  # only JSON has fields
        return None
    splits = {str(split): [Path(file) for file in files] for split, files in (builder.data_files or {}).items()}
    suffixes = {path.suffix.lower() for paths in splits.values() for path in paths}
    return splits if suffixes <= {".json", ".jsonl"} else None
