"""Several samples to a row of `max_length`, none of which sees another: full rows instead of padding.

Position numbers restart with every sample, from which transformers makes an attention mask that ends at its beginning.
It does so for most models, but neither for all (as of transformers 5.24, OPT, BLOOM and Mamba look back into the sample
before; Falcon did up to 5.23) nor with a key-value cache. The model is therefore tried before the first step, in
`slsam_ds.cli.probes`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slsam_ds.cli.labels import IGNORED

PACK_BATCH = 1000
"""Samples that are packed among each other."""


def pack(samples: Mapping[str, Sequence[list[int]]], max_length: int) -> dict[str, list[list[int]]]:
    """Join samples: the longest first, each into the fullest row that has room for it. None is split.

    Args:
        samples: `input_ids` and `labels`, each at most `max_length` long.
        max_length: Of a row. Tokens.

    Returns:
        `input_ids`, `labels` and `position_ids` of every row, in the order of their first samples. A sample's first
        label is ignored: it would be predicted from the sample before.
    """
    lengths = [len(ids) for ids in samples["input_ids"]]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = [row for row, left in enumerate(room) if left >= lengths[index]]
        if not fitting:
            rows.append([])
            room.append(max_length)
            fitting = [len(rows) - 1]
        best = min(fitting, key=room.__getitem__)
        rows[best].append(index)
        room[best] -= lengths[index]
    rows = sorted((sorted(row) for row in rows), key=lambda row: row[0])
    ids, labels = samples["input_ids"], samples["labels"]
    return {
        "input_ids": [[token for index in row for token in ids[index]] for row in rows],
        "labels": [[label for index in row for label in (IGNORED, *labels[index][1:])] for row in rows],
        "position_ids": [[place for index in row for place in range(lengths[index])] for row in rows],
    }


class PackedCollator:
    """Rows, packed or of one sample, to a batch.

    There is no attention mask, which would make transformers overlook the samples: every token of padding is, by its
    position 0, a sample of its own.

    Args:
        pad_token_id: Of the tokenizer.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._padding = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0}

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids`, shape (rows, longest)."""
        length = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {name: [] for name in self._padding}
        for row in rows:
            row = {"position_ids": range(len(row["input_ids"])), **row}
            for name, padding in self._padding.items():
                batch[name].append([*row[name], *[padding] * (length - len(row[name]))])
        return {name: torch.tensor(values) for name, values in batch.items()}
