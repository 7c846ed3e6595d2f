"""A model that the user has compiled: block by block it is used, as a whole it is refused."""

import pytest
import torch

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.assembly import split_by_layer
from tests.models import tiny_llama, window


def whole() -> torch.nn.Module:
    return torch.compile(tiny_llama(), backend="eager")


def inner() -> torch.nn.Module:
    model = tiny_llama()
    model.model = torch.compile(model.model, backend="eager")
    return model


def in_place() -> torch.nn.Module:
    model = tiny_llama()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("make", [whole, inner, in_place])
@pytest.mark.parametrize("layers", [None, [r".*layers\.0\..*", r".*layers\.1\..*"]])
def test_a_graph_of_several_layers_is_refused(make, layers) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"torch.compile around the model: .* block.forward = torch.compile"):
        split_by_layer(make(), None, SLSAMConfig.of({"layers": layers}))


def test_a_graph_of_each_block_is_used() -> None:
    results = []
    for compiled in (False, True):
        model = tiny_llama()
        if compiled:
            for block in model.model.layers:
                block.forward = torch.compile(block.forward, backend="eager")
        slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), {"seed": 2})
        results.append([slsam.step(window(step, 0, 1)).loss for step in range(1, 4)])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
