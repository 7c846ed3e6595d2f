"""Files and data sets: how they are read, and what is refused, by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from slsam_ds.integrations.data import Columns, Encoder
from slsam_ds.integrations.rows import Rows, read_files, read_named
from slsam_ds.integrations.samples import StreamedSamples, tokenize
from slsam_ds.integrations.usage import UsageError
from tests.tokenizers import tiny_tokenizer

TEXT = Columns(kind="text", names=("text",))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _all(rows: Rows) -> list[dict[str, Any]]:
    return [located["row"] for located in Rows.read(rows.shards)]


# Files


def test_every_format_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_csv(tmp_path / "c.csv")
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        assert read_files("--train_file", [str(tmp_path / name)]).to_list() == rows, name
    everything = read_files("--train_file", [str(path) for path in sorted(tmp_path.glob("?.*"))])
    assert everything.to_list() == rows * 4


def test_txt_has_a_sample_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first line\n\nsecond line\n")
    rows = read_files("--train_file", [str(path)])
    encoded = tokenize(rows, tiny_tokenizer(), TEXT, max_length=100, source="a.txt")
    assert len(encoded) == 2  # the blank line is no sample


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": y}\n',
            r"a\.jsonl: line 2 is not valid JSON \(Expecting value at column 10\)",
        ),
        ("a.jsonl", '{"text": "x"}\n\n[1]\n', r"line 3 is not an object"),
        ("a.jsonl", '"x"\n"y"\n', r"line 1 is not an object"),
        ("a.jsonl", "\n\n", r"holds no samples"),
        ("a.jsonl", "", r"the file is empty"),
        ("a.json", '[{"text": "x"},\n {"text": }]', r"line 2 is not valid JSON"),
        ("a.json", "[1, 2]", r"expected a list of objects"),
        ("a.json", "[]", r"a\.json: "),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"line 3 has 3 fields where the header names 2"),
        ("a.csv", "a,b\n", r"holds no samples"),
        ("a.parquet", "not parquet", r"cannot be read as parquet"),
        ("a.xlsx", "x", r"unknown format; name it \.jsonl, \.json, \.csv, \.parquet, \.txt"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=sentence) as refused:
        read_files("--train_file", [str(path)])
    assert str(refused.value).startswith(f"--train_file {path}: ")
    assert "\n" not in str(refused.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.jsonl: no such file"):
        read_files("--train_file", [str(tmp_path / "nothing.jsonl")])
    with pytest.raises(UsageError, match="not a file"):
        read_files("--train_file", [str(tmp_path)])


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(UsageError, match="the files differ in their columns"):
        read_files("--train_file", [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
