"""Data larger than memory: what reading and encoding take does not grow with the file."""

import json
import resource
import subprocess
import sys
from collections import deque
from itertools import islice
from pathlib import Path

import datasets
import pytest

from slsam_ds.cli.data import Columns, Encoder
from slsam_ds.cli.refusal import UsageError
from slsam_ds.cli.rows import read_files
from slsam_ds.cli.samples import StreamedSamples, tokenize
from tests.command_line import ROOT
from tests.tokenizers import tiny_tokenizer

NUM_ROWS = 60_000
NUM_TOKENS = 60
MEGABYTE = 2**20


def _peak() -> float:
    """The most memory that this process has had, pages of mapped files included. MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _encoder() -> Encoder:
    return Encoder(tiny_tokenizer(), Columns(kind="text", names=("text",)), NUM_TOKENS, "data")


def _read(path: Path, how: str) -> None:
    encoder = _encoder()
    rows = read_files("--train_file", [str(path)])
    if how == "before training":
        tokenize(rows, encoder)
        return
    samples = islice(StreamedSamples(rows, encoder, shuffle_buffer=1000, seed=0, packed=False), NUM_ROWS)
    if how == "streamed":
        assert sum(1 for _ in samples) == NUM_ROWS
        return
    with pytest.raises(UsageError, match=f"line {NUM_ROWS} is not valid JSON"):
        deque(samples, maxlen=0)


def print_growth(path: str, how: str) -> None:
    """Print what reading the file and encoding it adds to the peak of this process. MB."""
    datasets.config.HF_DATASETS_CACHE = Path(path).with_suffix(".cache")
    _encoder()({"text": "brings in what tokenizers load when first used"}, "")
    before = _peak()
    _read(Path(path), how)
    print(_peak() - before)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of JSON lines; another one is broken at its end."""
    path = tmp_path_factory.mktemp("memory") / "large.jsonl"
    # Few texts, because the tokenizer remembers 10,000.
    texts = (f"row {number % 100} " + "a b c " * 20 for number in range(NUM_ROWS))
    lines = (json.dumps({"text": text, "notes": "x" * 5000}) for text in texts)
    with path.open("w") as file, path.with_name("broken.jsonl").open("w") as broken:
        for number, line in enumerate(lines, start=1):
            file.write(line + "\n")
            broken.write((line if number < NUM_ROWS else line[:-1]) + "\n")
    assert path.stat().st_size > 300e6
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("how", "share"), [("before training", 0.25), ("streamed", 0.1), ("broken", 0.1)])
def test_memory_does_not_grow_with_the_file(large_file: Path, how: str, share: float) -> None:
    """Encoded before training, the samples (44 MB here) lie in a file, whose pages count while there is room."""
    path = large_file if how != "broken" else large_file.with_name("broken.jsonl")
    call = f"from tests.integration.test_memory import print_growth; print_growth({str(path)!r}, {how!r})"
    child = subprocess.run([sys.executable, "-c", call], check=True, cwd=ROOT, capture_output=True, text=True)
    growth = float(child.stdout.splitlines()[-1])
    print(f"{how}: {growth:.0f} MB")
    assert growth * MEGABYTE < share * path.stat().st_size
