"""What a second pass counts is taken back, in place, and nothing else is."""

from collections import defaultdict
from types import SimpleNamespace

from peft import LoraConfig, get_peft_model

from slsam_ds.integrations.side_effects import counted_once, kept_trainable
from tests.models import tiny_llama


def count(owner: SimpleNamespace) -> None:
    owner.metrics["train"]["accuracy"].append(0.5)
    owner.metrics["train"]["tokens"] = [owner.tokens + 10]
    owner.metrics["train"]["new"].append(1.0)
    owner.tokens += 10
    owner.norms.append(2.0)
    owner.note = "seen"


def make_owner() -> SimpleNamespace:
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    metrics["train"]["tokens"] = [0]
    return SimpleNamespace(metrics=metrics, tokens=0, norms=[1.0], note="")


def test_a_second_pass_is_not_counted() -> None:
    once, twice = make_owner(), make_owner()
    count(once)
    count(twice)
    containers = twice.metrics, twice.metrics["train"], twice.metrics["train"]["accuracy"], twice.norms
    with counted_once(twice):
        count(twice)
        assert twice.tokens == 20
    assert twice == once
    assert twice.metrics["train"]["unheard of"] == []  # still a defaultdict
    after = twice.metrics, twice.metrics["train"], twice.metrics["train"]["accuracy"], twice.norms
    assert all(now is then for now, then in zip(after, containers, strict=True))


def test_what_is_no_count_stays() -> None:
    owner = make_owner()
    with counted_once(owner):
        count(owner)
    assert (owner.tokens, owner.note) == (0, "seen")


def test_leaving_the_reference_pass_of_peft_does_not_make_all_adapters_trainable() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters[0].requires_grad_(False)
    with kept_trainable(model):
        with model.disable_adapter():
            pass
        assert adapters[0].requires_grad  # PEFT's doing
    assert [adapter.requires_grad for adapter in adapters] == [False] + [True] * (len(adapters) - 1)
