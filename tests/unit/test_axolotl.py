"""The plugin for axolotl, against a stand-in for its base class: axolotl itself is no dependency of the tests."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest

from slsam_ds.config import SLSAMConfig


@pytest.fixture
def plugin_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    yield importlib.import_module("slsam_ds.integrations.axolotl")
    del sys.modules["slsam_ds.integrations.axolotl"]


def test_axolotl_finds_the_model_of_its_settings(plugin_module: Any) -> None:
    module, _, name = plugin_module.SLSAMPlugin().get_input_args().rpartition(".")
    model = getattr(importlib.import_module(module), name)
    assert model(slsam={"rho": 0.02}).model_dump() == {"slsam": {"rho": 0.02}}
    assert model().slsam is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"slsam": {"rh": 1}}, "did you mean rho?"),
        ({"slsam": "rho"}, 'slsam="rho": expected a block'),
        ({"rl": "grpo"}, "rl: grpo: generates its data while it steps"),
        ({"relora": True}, "relora: True: restarts or freezes"),
        ({"lisa_n_layers": 4}, "lisa_n_layers: 4: restarts or freezes"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2: not supported"),
    ],
)
def test_what_it_cannot_follow_is_refused_at_once(
    settings: Mapping[str, Any], sentence: str, plugin_module: Any
) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        plugin_module.SLSAMPlugin().register(settings)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "block", "knobs"),
    [
        ({"slsam": {"rho": 0.02}, "rl": "dpo"}, {"rho": 0.3}, SLSAMConfig(rho=0.02)),
        ({"context_parallel_size": 1}, {"rho": 0.3}, SLSAMConfig(rho=0.3)),
        ({"slsam": None}, None, SLSAMConfig()),
    ],
)
def test_trainers_get_the_knobs_of_the_yaml_else_of_the_json(
    settings: Mapping[str, Any], block: Any, knobs: SLSAMConfig, plugin_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(plugin_module, "convert_trainers", chosen.append)
    plugin = plugin_module.SLSAMPlugin()
    plugin.register(settings)
    plugin.pre_model_load(settings)
    assert [choose(block) for choose in chosen] == [knobs]
