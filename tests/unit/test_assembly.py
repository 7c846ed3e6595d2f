"""What comes before an engine is built, whoever builds it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DummyOptim

from slsam_ds.assembly import split_by_layer
from slsam_ds.config import SLSAMConfig
from slsam_ds.integrations.support import block_of
from slsam_ds.model.param_groups import regroup
from tests.models import tiny_llama


def arms_of(groups: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(group["arm"], len(group["params"])) for group in groups]


def test_a_placeholder_is_split_like_the_optimizer_that_it_stands_for() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    placeholder = DummyOptim(parameter for parameter in model.parameters())  # may be read once
    layers = split_by_layer(model, optimizer, SLSAMConfig())
    split_by_layer(model, placeholder, SLSAMConfig())
    assert arms_of(placeholder.params) == arms_of(optimizer.param_groups)
    assert [arm for arm, _ in arms_of(placeholder.params)] == list(range(len(layers)))
    regroup(placeholder, layers)
    assert arms_of(placeholder.params) == arms_of(optimizer.param_groups)


def test_a_placeholder_must_hold_all_that_is_trained() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="in none of the optimizer's groups"):
        split_by_layer(model, DummyOptim(list(model.parameters())[1:]), SLSAMConfig())


def test_the_block_of_a_json_is_taken_out_once_and_found_again() -> None:
    def found(plugin: SimpleNamespace | None) -> dict[str, object] | None:
        return block_of(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))  # type: ignore[arg-type]

    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, "slsam": {"rho": 0.02}})
    assert found(plugin) == {"rho": 0.02}
    assert "slsam" not in plugin.deepspeed_config
    assert found(plugin) == {"rho": 0.02}
    assert found(SimpleNamespace(deepspeed_config={})) is None
    assert found(None) is None
