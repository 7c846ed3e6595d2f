"""Micro-batches: the first samples of one, and where it cannot be divided."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slsam_ds.model.micro_batches import first_samples, num_samples


@given(num_samples=st.integers(1, 64), share=st.floats(0.001, 1.0))
def test_it_takes_whole_samples_and_at_least_one(num_samples: int, share: float) -> None:
    tokens = torch.arange(3 * num_samples).view(num_samples, 3)
    batch = {"input_ids": tokens, "nested": [tokens[:, 0], (tokens,)], "name": "a string"}
    first = first_samples(batch, share)
    kept = len(first["input_ids"])
    assert kept == max(1, round(share * num_samples))
    assert torch.equal(first["input_ids"], tokens[:kept])
    assert torch.equal(first["nested"][0], tokens[:kept, 0])
    assert first["nested"][1][0].shape == (kept, 3)
    assert first["name"] == "a string"


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.zeros(1, 8)},  # packed into one row
        {"input_ids": torch.zeros(4, 8), "cu_seqlens": torch.zeros(5)},
        {"input_ids": torch.zeros(4, 8), "scale": torch.tensor(2.0)},
        {"text": ["no", "tensors"]},
        "not even a mapping",
    ],
)
def test_what_cannot_be_divided_stays_whole(batch: Any) -> None:
    assert first_samples(batch, 0.25) is batch


def test_a_whole_micro_batch_is_the_same_object() -> None:
    batch = {"input_ids": torch.zeros(2, 8)}
    assert first_samples(batch, 1.0) is batch  # by which the step knows that its hidden states can be used again


def test_nothing_is_copied() -> None:
    tokens: Tensor = torch.zeros(4, 2)
    assert first_samples({"x": tokens}, 0.5)["x"].data_ptr() == tokens.data_ptr()


def test_pairs_stay_together() -> None:
    """The rows of all chosen completions come before those of all rejected ones."""
    batch = {"input_ids": torch.arange(8).view(8, 1), "margin": torch.arange(4.0)}
    first = first_samples(batch, 0.5, 4)
    assert first["input_ids"].flatten().tolist() == [0, 1, 4, 5]
    assert first["margin"].tolist() == [0, 1]
    assert num_samples(batch, 4) == 4
    assert first_samples({"input_ids": torch.zeros(4, 1)}, 0.25, 2)["input_ids"].shape == (2, 1)  # of two pairs, one
    assert first_samples(batch, 0.5, 3) is batch  # of three samples, nobody knows which rows
    images = {"input_ids": torch.zeros(4, 8), "pixel_values": torch.zeros(8, 3, 2, 2)}  # two of each sample
    assert first_samples(images, 0.5, 4) is images
