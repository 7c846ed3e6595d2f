"""Nests stay of their kind, with what their attributes say."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import BatchEncoding, BatchFeature
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.model.micro_batches import first_samples, to_device
from slsam_ds.model.nests import map_tensors, tensors_in

CPU = torch.device("cpu")


class Pair(NamedTuple):
    x: Tensor
    name: str


class Features(namedtuple("Features", ["x", "y"])):
    """As PackedSequence is one: a named tuple with a constructor of its own."""

    def __new__(cls, x: Tensor) -> "Features":
        return super().__new__(cls, x, 2 * x)


@dataclass(frozen=True, slots=True)
class Sample:
    x: Tensor
    weight: float = 1.0


def rows() -> Tensor:
    return torch.arange(8.0).view(4, 2)


NESTS: dict[str, Any] = {
    "named tuple": lambda: Pair(rows(), "a"),
    "named tuple with a constructor": lambda: Features(rows()),
    "dataclass": lambda: Sample(rows(), 0.5),
    "batch encoding": lambda: BatchEncoding({"x": rows()}),
    "batch feature": lambda: BatchFeature({"x": rows()}),
    "model output": lambda: BaseModelOutput(last_hidden_state=rows()),
    "ordered": lambda: OrderedDict(x=rows(), name="a"),
    "nested": lambda: [{"x": (Pair(rows(), "a"), Sample(rows()))}],
}


@pytest.mark.parametrize("name", NESTS)
def test_a_nest_stays_of_its_kind(name: str) -> None:
    nest = NESTS[name]()
    for changed in (map_tensors(nest, lambda tensor: tensor + 1), first_samples(nest, 0.5), to_device(nest, CPU)):
        assert type(changed) is type(nest)
    assert all(len(tensor) == 2 for tensor in tensors_in(first_samples(nest, 0.5)))
    assert all(len(tensor) == 4 for tensor in tensors_in(nest))  # nothing was written into it


def test_attributes_can_still_be_asked_for() -> None:
    assert first_samples(Pair(rows(), "a"), 0.5).name == "a"
    assert torch.equal(first_samples(Sample(rows(), 0.5), 0.5).x, rows()[:2])
    assert first_samples(BatchEncoding({"x": rows()}), 0.25).x.shape == (1, 2)
    assert first_samples(BaseModelOutput(last_hidden_state=rows()), 0.25).last_hidden_state.shape == (1, 2)
    assert first_samples(BaseModelOutput(last_hidden_state=rows()), 0.25)[0].shape == (1, 2)


def test_a_mapping_that_cannot_be_written_to_becomes_a_dict() -> None:
    assert first_samples(MappingProxyType({"x": rows()}), 0.25)["x"].shape == (1, 2)


def test_a_packed_sequence_moves_and_is_not_divided() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    assert first_samples({"x": packed}, 0.5)["x"] is packed
    moved = to_device({"x": packed}, torch.device("meta"))["x"]
    assert isinstance(moved, PackedSequence)
    assert moved.data.is_meta
    assert moved.batch_sizes.device == CPU  # where it must be


class Output(NamedTuple):
    hidden: Tensor
    note: str


class Tagged(nn.Module):
    """A block that takes and gives what is asked for by attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(2, 2), kind

    def forward(self, hidden: Tensor) -> Any:
        hidden = self.linear(hidden)
        return Output(hidden, "x") if self.kind == "named tuple" else BaseModelOutput(last_hidden_state=hidden)


class Packed(nn.Module):
    """A block over a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 2)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        out: PackedSequence = self.lstm(packed)[0]
        return out


class Stack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.blocks = nn.ModuleList(Packed() if kind == "packed" else Tagged(kind) for _ in range(4))

    def forward(self, x: Any) -> CausalLMOutput:
        for block in self.blocks:
            out = block(x)
            x = {"named tuple": "hidden", "model output": "last_hidden_state"}.get(self.kind)
            x = out if x is None else getattr(out, x)
        hidden = x.data if self.kind == "packed" else x
        return CausalLMOutput(loss=hidden.square().mean())


@pytest.mark.parametrize("kind", ["named tuple", "model output", "packed"])
def test_blocks_may_put_out_any_nest(kind: str) -> None:
    found = []
    for reuse in (True, False):
        model = Stack(kind)
        ran: list[int] = []
        model.blocks[0].register_forward_hook(lambda *_: ran.append(0))  # noqa: B023
        slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), SLSAMConfig(prefix_reuse=reuse))
        x = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]) if kind == "packed" else rows()
        batch = BatchEncoding({"x": x}) if kind == "model output" else {"x": x}
        for _ in range(3):
            result = slsam.step([batch], active=[3])
        found.append(result.loss)
        # The third time, and the fourth in the trial, the first block runs in one pass only.
        assert len(ran) == (4 if reuse else 6)
    assert found[0] == found[1]
