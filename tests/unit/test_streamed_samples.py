"""Samples as they come: over and over, in another order each time, without those that teach nothing."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from slsam_ds.cli.data import Columns, Encoder
from slsam_ds.cli.refusal import UsageError
from slsam_ds.cli.rows import read_files
from slsam_ds.cli.samples import StreamedSamples
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def _stream(folder: Path, files: list[list[str]], **options: Any) -> StreamedSamples:
    paths = [folder / f"{index}.jsonl" for index in range(len(files))]
    for path, texts in zip(paths, files, strict=True):
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    encoder = Encoder(TOKENIZER, Columns(kind="text", names=("text",)), 32, "data")
    rows = read_files("--train_file", list(map(str, paths)))
    return StreamedSamples(rows, encoder, **{"shuffle_buffer": 10, "seed": 0, "packed": False} | options)


def _texts(samples: Any, num: int) -> list[str]:
    return [TOKENIZER.decode(sample["input_ids"]).removesuffix("</s>") for sample in itertools.islice(samples, num)]


def test_every_pass_has_all_samples_in_another_order(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(40)]
    read = _texts(_stream(tmp_path, [texts]), 120)
    passes = [read[:40], read[40:80], read[80:]]
    assert all(sorted(one) == sorted(texts) for one in passes)
    assert texts not in passes
    assert passes[0] != passes[1] != passes[2]
    assert _texts(_stream(tmp_path, [texts]), 120) == read
    assert _texts(_stream(tmp_path, [texts], seed=1), 120) != read


def test_without_a_buffer_samples_keep_their_order(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(6)]
    assert _texts(_stream(tmp_path, [texts[:2], texts[2:]], shuffle_buffer=0), 12) == texts * 2


def test_samples_without_anything_to_learn_are_dropped_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = _stream(tmp_path, [["a", " ", "b", ""]], shuffle_buffer=0)
    assert _texts(stream, 5) == ["a", "b", "a", "b", "a"]
    assert capsys.readouterr().err.count("2 of 4 samples were dropped: nothing to learn") == 1
    with pytest.raises(UsageError, match="nothing to learn in any of its 2 samples within --max_length 32"):
        next(iter(_stream(tmp_path, [[" ", ""]])))


def test_packed_rows_hold_every_sample_once_per_pass(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(40)]
    rows = list(itertools.islice(_stream(tmp_path, [texts], packed=True), 11))
    assert max(len(row["input_ids"]) for row in rows) <= 32
    read = "".join(TOKENIZER.decode(row["input_ids"]) for row in rows).split("</s>")
    assert sorted(read[:40]) == sorted(texts)


def test_workers_share_out_the_files(tmp_path: Path) -> None:
    files = [[f"file {file} row {number}" for number in range(10)] for file in range(2)]
    loader = DataLoader(_stream(tmp_path, files), batch_size=None, num_workers=2)
    assert sorted(_texts(loader, 20)) == sorted(files[0] + files[1])
