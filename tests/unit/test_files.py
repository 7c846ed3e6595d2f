"""Files and data sets: how they are read, and what is refused, by file and line."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from slsam_ds.cli.data import Columns, Encoder
from slsam_ds.cli.refusal import UsageError
from slsam_ds.cli.rows import Rows, read_files, read_named
from slsam_ds.cli.samples import StreamedSamples, tokenize
from tests.tokenizers import tiny_tokenizer

TEXT = Columns(kind="text", names=("text",))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _all(rows: Rows) -> list[dict[str, Any]]:
    return [located["row"] for located in Rows.read(rows.shards)]


def _encoder(max_length: int = 100) -> Encoder:
    return Encoder(tiny_tokenizer(), TEXT, max_length, "data")


def _write_texts(path: Path, num_rows: int, **broken: str) -> Path:
    """A file of JSON lines; the line `line_N` of `broken`, from 1, as given."""
    lines = [broken.get(f"line_{number}", json.dumps({"text": f"row {number}"})) for number in range(1, num_rows + 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


# Files


def test_every_format_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b2.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    Dataset.from_list(rows).to_csv(tmp_path / "c.csv")
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    names = ("a.jsonl", "b.json", "b2.json", "c.csv", "d.parquet")
    for name in names:
        read = read_files("--train_file", [str(tmp_path / name)])
        assert _all(read) == rows, name
        assert read.column_names == ["prompt", "response"]
    assert _all(read_files("--train_file", [str(tmp_path / name) for name in names])) == rows * 5


def test_columns_without_a_name_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,,\na,,\n")  # as spreadsheets write them
    (row,) = _all(read_files("--train_file", [str(tmp_path / "a.csv")]))
    assert row["text"] == "a"


def test_txt_has_a_sample_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first line\n\nsecond line\r\n")
    assert _all(read_files("--train_file", [str(path)])) == [{"text": "first line"}, {"text": "second line"}]


def test_csv_keeps_what_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,other\n"a, b\nc",1\n007\n' + "x" * 200_000 + ",2\n")
    rows = _all(read_files("--train_file", [str(path)]))
    assert rows == [
        {"text": "a, b\nc", "other": "1"},
        {"text": "007", "other": None},
        {"text": "x" * 200_000, "other": "2"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": y}\n', "line 2 is not valid JSON (Expecting value at column 10)"),
        ("a.jsonl", '{"text": "x"}\n\n[1]\n', "line 3 is not an object"),
        ("a.jsonl", '"x"\n"y"\n', "line 1 is not an object"),
        ("a.jsonl", '{"a": ' * 100_000, "line 1 is not valid JSON (nested too deeply)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', "line 2 is not UTF-8 (byte 11 of the line)"),
        ("a.jsonl", "\n\n", "holds no samples"),
        ("a.jsonl", "", "the file is empty"),
        ("a.json", '[{"text": "x"},\n {"text": }]', "line 2 is not valid JSON"),
        ("a.json", "[1, 2]", "item 1: expected a list of objects"),
        ("a.json", "[]", "holds no samples"),
        ("a.csv", "text,id,text\na,1,b\n", "the header names the column 'text' twice: rename one"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a", "text": "b"}\n',
            "line 2 is not valid JSON (an object has the key 'text' twice)",
        ),
        ("a.json", '[{"m": [{"role": "a", "role": "b"}]}]', "not valid JSON (an object has the key 'role' twice)"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 fields where the header names 2"),
        ("a.csv", 'a,b\n"1\n1",2\n1,2,3\n', "line 4 has 3 fields where the header names 2"),
        ("a.csv", 'a,b\n1,"2"x\n', "line 2 is not valid CSV"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "line 2 is not valid CSV"),
        ("a.csv", b"a,b\n1,\xe4\n", "line 2 is not UTF-8"),
        ("a.csv", "a,b\n", "holds no samples"),
        ("a.txt", b"a\n\xe4\n", "line 2 is not UTF-8"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.xlsx", "x", "unknown format; its name must end with one of .jsonl, .json, .csv, .parquet, .txt"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as refused:
        read_files("--train_file", [str(path)])
    assert str(refused.value).startswith(f"--train_file {path}: ")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.jsonl: no such file"):
        read_files("--train_file", [str(tmp_path / "nothing.jsonl")])
    with pytest.raises(UsageError, match="not a file"):
        read_files("--train_file", [str(tmp_path)])


def test_files_without_a_common_column_are_refused(tmp_path: Path) -> None:
    for name, row in (("a", '{"text": "x", "n": 1}'), ("b", '{"text": "x"}'), ("c", '{"words": "x"}')):
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    assert read_files("--train_file", [a, b]).column_names == ["text"]
    with pytest.raises(UsageError, match="the files differ in their columns"):
        read_files("--train_file", [b, c])


# Lines that are wrong far into a file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "cut o', "line 700 is not valid JSON"),
        ('{"text": 5}', "line 700: column 'text' holds int; expected text"),
        ('{"text": ["a"]}', "line 700: column 'text' holds list; expected text"),
    ],
)
def test_line_is_named_when_it_is_reached(tmp_path: Path, streaming: bool, line: str, sentence: str) -> None:
    good = _write_texts(tmp_path / "good.jsonl", 50)
    path = _write_texts(tmp_path / "a.jsonl", 900, line_700=line)
    rows = read_files("--train_file", [str(good), str(path)])  # reads the beginning only
    samples = iter(StreamedSamples(rows, _encoder(), shuffle_buffer=100, seed=0, packed=False))
    with pytest.raises(UsageError) as refused:
        deque(samples) if streaming else tokenize(rows, _encoder())
    assert str(refused.value).startswith(f"--train_file {path}: {sentence}")


def test_number_late_in_a_file_does_not_change_the_texts_around_it(tmp_path: Path) -> None:
    """`datasets` puts them in quotes: past its first 10 MB, it turns columns of mixed type into JSON."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(40_000):
            file.write(json.dumps({"text": "a" * 300 + str(number), "score": "x" if number < 39_000 else 1}) + "\n")
    rows = _all(read_files("--train_file", [str(path)]))
    assert rows[39_999] == {"text": "a" * 300 + "39999", "score": 1}


def test_samples_are_read_again_where_the_file_has_changed(tmp_path: Path) -> None:
    path = _write_texts(tmp_path / "a.jsonl", 3)
    tokenizer = tiny_tokenizer()
    for text in ("row 2", "another"):
        _write_texts(path, 3, line_2=json.dumps({"text": text}))
        encoded = tokenize(read_files("--train_file", [str(path)]), _encoder())
        assert tokenizer.decode(encoded[1]["input_ids"]) == text + "</s>"


# Data sets


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_data_sets_are_read(tmp_path: Path, streaming: bool) -> None:
    train, validation = (Dataset.from_list([{"text": f"{name} {i}"} for i in range(3)]) for name in ("t", "v"))
    train.save_to_disk(tmp_path / "one")
    DatasetDict(train=train, validation=validation).save_to_disk(tmp_path / "two")
    DatasetDict(train=train.filter(lambda row: row["text"] != "t 1"), test=train).save_to_disk(tmp_path / "filtered")
    for suffix, write in (("jsonl", Dataset.to_json), ("parquet", Dataset.to_parquet), ("csv", Dataset.to_csv)):
        (tmp_path / suffix).mkdir()
        write(train, tmp_path / suffix / f"train.{suffix}")
        write(validation, tmp_path / suffix / f"validation.{suffix}")
    for name in ("one", "two", "jsonl", "parquet", "csv", "filtered"):
        found, held_out = read_named(str(tmp_path / name), streaming=streaming)
        expected = train.to_list() if name != "filtered" else [train[0], train[2]]
        assert (found.column_names, _all(found)) == (["text"], expected), name
        if name in ("one", "filtered"):
            assert held_out is None
        else:
            assert held_out is not None
            assert _all(held_out) == validation.to_list()
        assert len(tokenize(found, _encoder())) == len(expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_that_cannot_be_used_are_one_sentence(tmp_path: Path, streaming: bool) -> None:
    table = Dataset.from_list([{"text": "x"}])
    DatasetDict(test=table).save_to_disk(tmp_path / "test_only")
    table.select([]).save_to_disk(tmp_path / "nothing")
    table.save_to_disk(tmp_path / "saved")
    table.save_to_disk(tmp_path / "damaged")
    (tmp_path / "damaged" / "data-00000-of-00001.arrow").write_bytes(b"x")
    for name, file, content in (
        ("empty", "a.bin", "x"),
        ("broken", "train.jsonl", '{"text": "x"}\n{"text": oops}\n'),
        ("torn", "train.parquet", "x"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    (tmp_path / "file.jsonl").write_text('{"text": "x"}\n')

    def refusal(name: str, config: str | None = None) -> str:
        with pytest.raises(UsageError) as refused:
            read_named(str(tmp_path / name), config, streaming=streaming)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "has no split train; it has test" in refusal("test_only")
    assert "a split that save_to_disk wrote is empty or damaged" in refusal("damaged")
    assert "empty" in refusal("nothing")  # which datasets 4.0 loads
    assert "was written by save_to_disk and has a single" in refusal("saved", "english")
    assert "No (supported) data files found" in refusal("empty")
    assert f"{tmp_path}/broken/train.jsonl: line 2 is not valid JSON" in refusal("broken")
    assert refusal("torn").startswith(f"--dataset_name {tmp_path}/torn: ")
    assert "no such folder" in refusal("missing")
    assert "files are given by --train_file" in refusal("file.jsonl")
