"""From rows to samples to train on: all of them before training, or one after the other as it goes on."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from slsam_ds.cli.data import Encoder
from slsam_ds.cli.labels import IGNORED
from slsam_ds.cli.packing import PACK_BATCH, pack
from slsam_ds.cli.refusal import UsageError
from slsam_ds.cli.rows import Rows, Shard
from slsam_ds.integrations.compatibility import named_in_cache
from slsam_ds.integrations.console import warn

# Said, not inferred: a batch of dropped samples alone would give a column of no type.
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64")), "lost_turns": Value("int32")})


def tokenize(rows: Rows, encoder: Encoder) -> Dataset:
    """Encode every row into a file of the cache; drop, and count aloud, those with nothing left to learn.

    Returns:
        `input_ids` and `labels`, on disk: memory holds a thousand samples at a time.

    Raises:
        UsageError: A malformed row, or no row with anything to learn.
    """
    key = str(Hasher.hash((rows.cache_key(), encoder, _FEATURES)))
    try:
        encoded = Dataset.from_generator(
            _encode_all,
            features=_FEATURES,
            gen_kwargs={"shards": rows.shards, "encoder": encoder, "key": key},
            **named_in_cache(key),
        )
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UsageError) else error from None
    kept = encoded.filter(_has_labels, input_columns="labels")
    _tell_dropped(rows.source, encoder.max_length, num_samples=len(encoded), num_kept=len(kept))
    _tell_lost(rows.source, sum(kept["lost_turns"]))
    return kept.remove_columns("lost_turns")


def pack_all(samples: Dataset, max_length: int) -> Dataset:
    """Several samples to a row; see `slsam_ds.cli.packing`."""
    names = samples.column_names
    return samples.map(partial(pack, max_length=max_length), batched=True, batch_size=PACK_BATCH, remove_columns=names)


class StreamedSamples(torch.utils.data.IterableDataset):
    """Samples that are read, shuffled and encoded as training goes on; over and over, in another order each time.

    Endless, so that the trainer, which counts batches to find the place to resume from, sees one epoch. Not a
    `datasets.IterableDataset`, of which accelerate would give each rank other files: ranks would run out of samples at
    different times. This way every rank reads all, and takes its own of each global batch.

    Args:
        rows: What to read.
        encoder: From row to sample.
        shuffle_buffer: Rows held in memory, of which the next one is drawn; 0 or 1: in their order.
        seed: Of the order.
        packed: Put several samples into a row.
    """

    def __init__(self, rows: Rows, encoder: Encoder, *, shuffle_buffer: int, seed: int, packed: bool) -> None:
        self._source = rows.source
        self._encoder = encoder
        stream = IterableDataset.from_generator(Rows.read, gen_kwargs={"shards": list(rows.shards)})
        self._stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer > 1 else stream
        self._packed = packed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self._stream.set_epoch(epoch)
            samples = self._encoded(first=epoch == 0)
            yield from self._pack(samples) if self._packed else samples

    def _encoded(self, *, first: bool) -> Iterator[dict[str, Any]]:
        num_samples = num_kept = num_lost = 0
        for located in self._stream:
            num_samples += 1
            sample = self._encoder(located["row"], located["where"])
            if _has_labels(sample["labels"]):
                num_kept += 1
                num_lost += sample.pop("lost_turns")
                yield sample
        if first:  # what the later passes would only say again
            _tell_dropped(self._source, self._encoder.max_length, num_samples=num_samples, num_kept=num_kept)
            _tell_lost(self._source, num_lost)

    def _pack(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while batch := list(islice(samples, PACK_BATCH)):
            columns = {name: [sample[name] for sample in batch] for name in batch[0]}
            packed = pack(columns, max_length=self._encoder.max_length)
            yield from ({name: packed[name][row] for name in packed} for row in range(len(packed["input_ids"])))


def _encode_all(shards: Sequence[Shard], encoder: Encoder, key: str) -> Iterator[Mapping[str, Any]]:
    """The samples; the key tells `datasets` alone whether it has made them before."""
    for located in Rows.read(shards):
        yield encoder(located["row"], located["where"])


def _has_labels(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])  # the first token is never predicted


def _tell_dropped(source: str, max_length: int, *, num_samples: int, num_kept: int) -> None:
    if not num_kept:
        raise UsageError(
            f"{source}: nothing to learn in any of its {num_samples} samples within --max_length {max_length}: what "
            "should be learned is empty, or cut away"
        )
    if num_kept < num_samples:
        reason = f"nothing to learn within --max_length {max_length}"
        warn(f"{source}: {num_samples - num_kept} of {num_samples} samples were dropped: {reason}")


def _tell_lost(source: str, num_turns: int) -> None:
    if num_turns:
        warn(
            f"{source}: {num_turns} assistant turns are left out of the loss: the chat template writes them "
            "differently in a longer conversation; use a template that marks them with {% generation %}"
        )
