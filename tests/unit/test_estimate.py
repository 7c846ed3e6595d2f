"""The arithmetic of an estimate, against brute force and real forwards; and its command line."""

import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ConvNextConfig,
    DeepseekV3Config,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from slsam_ds.cli.estimate import main
from slsam_ds.cli.weightless import WeightlessEngine
from slsam_ds.config import SLSAMConfig
from slsam_ds.engines.local import LocalEngine
from slsam_ds.estimate.activations import SavedActivations
from slsam_ds.estimate.counting import Counted, count
from slsam_ds.estimate.draws import Draw, find_draws
from slsam_ds.estimate.modes import Mode, compare
from slsam_ds.estimate.sharding import RunSetup
from slsam_ds.model.forward_order import example_inputs
from slsam_ds.model.layers import map_layers
from slsam_ds.pricing.cost import PriceList
from slsam_ds.protocol import ALWAYS
from tests.models import micro_batch, tiny_llama

NUM_ARMS = 7
NUMELS = (90, 40, 40, 50, 40, 40, 70)
PRICES = PriceList(base=(1.9, 1.7, 1.5, 1.2, 1.0, 0.8, 0.3), share=tuple(numel / 1000 for numel in NUMELS))


@pytest.mark.parametrize("selector", ["uniform", "exp3m", "all", "cyclic"])
@pytest.mark.parametrize("k", [1, 3, NUM_ARMS])
def test_expected_and_extreme_prices_are_those_of_all_samples(selector: Any, k: int) -> None:
    config = SLSAMConfig(selector=selector, active_layers=k)
    samples = list(itertools.combinations(range(NUM_ARMS), NUM_ARMS if selector == "all" else k))
    if selector == "cyclic":
        turns = [sorted((step * k + place) % NUM_ARMS for place in range(k)) for step in range(NUM_ARMS)]
        samples = [tuple(turn) for turn in turns]
    paid = [PRICES.of(sample) for sample in samples]
    draws = find_draws(config, NUMELS, PRICES)
    assert draws.mean(lambda draw: draw.price(PRICES)) == pytest.approx(math.fsum(paid) / len(paid))
    assert draws.range(lambda draw: draw.price(PRICES)) == pytest.approx((min(paid), max(paid)))
    assert draws.num_sampled == pytest.approx(len(samples[0]))


def test_a_budget_is_the_expected_price() -> None:
    draws = find_draws(SLSAMConfig(budget=1.1, gamma="auto"), NUMELS, PRICES)
    assert draws.mean(lambda draw: draw.price(PRICES)) == pytest.approx(1.1)
    assert math.fsum(chance for chance, _ in draws.by_lowest) == pytest.approx(1)


@pytest.mark.parametrize("size", [0.3, 2, 0.99])
def test_arms_drawn_by_themselves_are_priced_over_all_samples(size: float) -> None:
    draws = find_draws(SLSAMConfig(selector="bernoulli", active_layers=size), NUMELS, PRICES)
    chance = size / NUM_ARMS if isinstance(size, int) else size
    samples = [s for k in range(1, NUM_ARMS + 1) for s in itertools.combinations(range(NUM_ARMS), k)]
    weights = [chance ** len(s) * (1 - chance) ** (NUM_ARMS - len(s)) for s in samples]
    paid = math.fsum(w * PRICES.of(s) for w, s in zip(weights, samples, strict=True)) / math.fsum(weights)
    assert draws.mean(lambda draw: draw.price(PRICES)) == pytest.approx(paid)
    assert draws.range(lambda draw: draw.price(PRICES))[1] == pytest.approx(PRICES.of(range(NUM_ARMS)))


def test_a_depth_is_priced_with_all_that_is_above_it() -> None:
    by_price = find_draws(SLSAMConfig(selector="depth", budget=1.1), NUMELS, PRICES)
    assert by_price.mean(lambda draw: draw.price(PRICES)) == pytest.approx(1.1)
    by_size = find_draws(SLSAMConfig(selector="depth", active_layers=3), NUMELS, PRICES)
    assert by_size.num_sampled == pytest.approx(3)
    assert [draw.included for _, draw in by_size.by_lowest] == [
        (*[0.0] * arm, *[1.0] * (NUM_ARMS - arm)) for arm in range(NUM_ARMS)
    ]


def test_a_sample_spreads_as_the_policy_has_it() -> None:
    draw = Draw(2, (0.0, 0.0, 1.0, 0.5, 0.25))
    assert draw.spread("sample") == draw
    assert draw.spread("above") == Draw(2, (0.0, 0.0, 1.0, 1.0, 1.0))
    assert draw.spread("all") == Draw(0, (1.0,) * 5)
    assert draw.spread("norm_layers", (1, 4)) == Draw(1, (0.0, 1.0, 0.0, 0.0, 1.0))
    assert draw.joined(Draw.of((1, 4), 5)) == Draw(1, (0.0, 1.0, 1.0, 0.5, 1.0))


def forward(model: nn.Module) -> Callable[[], Tensor]:
    tokens = micro_batch(1, 0, 0)["input_ids"].to(next(model.parameters()).device)
    return lambda: model(input_ids=tokens, labels=tokens).loss


def count_weightless(make: Callable[[], nn.Module], config: SLSAMConfig, *, checkpointed: bool = False) -> Counted:
    with torch.device("meta"):
        model = make()

    def checkpoint(again: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), again)})

    layers = map_layers(model, config)
    return count(
        WeightlessEngine(model, layers),
        model,
        layers,
        forward(model),
        keeps_inputs=False,
        checkpoint=checkpoint if checkpointed else None,
    )


@pytest.mark.parametrize(
    ("attention", "others", "tied"),
    [("sdpa", "arms", True), ("eager", "arms", False), ("sdpa", "freeze", False), ("eager", "always", True)],
)
def test_activations_are_those_of_a_real_forward(attention: str, others: Any, tied: bool) -> None:
    def make() -> nn.Module:
        model = tiny_llama(num_blocks=5, tied=tied)
        model.config._attn_implementation = attention
        return model

    config = SLSAMConfig(other_parameters=others)
    activations = count_weightless(make, config).activations
    model = make()
    layers = map_layers(model, config)
    engine = LocalEngine(model, torch.optim.SGD(model.parameters()), layers)
    last = len(layers) - 1
    for sample in ([0], [1], [2, 3], [last], [1, last], [0, 3], range(last + 1)):
        found = real_bytes(model, engine, [ALWAYS, *sample] if others == "always" else list(sample))
        # A fused kernel on a GPU also keeps its random state, 24 bytes for each block.
        assert activations.of(tuple(sample)) == pytest.approx(found, abs=5 * 24), list(sample)


@pytest.mark.parametrize("others", ["arms", "freeze"])
def test_activations_of_single_tensors_are_at_most_those_of_their_blocks(others: Any) -> None:
    config = SLSAMConfig(granularity="tensor", other_parameters=others)
    activations = count_weightless(lambda: tiny_llama(num_blocks=3), config).activations
    model = tiny_llama(num_blocks=3)
    layers = map_layers(model, config)
    engine = LocalEngine(model, torch.optim.SGD(model.parameters()), layers)
    arms = range(len(layers))
    found = real_bytes(model, engine, list(arms))
    assert activations.of(arms) == pytest.approx(found, abs=3 * 24)
    largest_block = max(activations.most.values())
    for sample in ([0], [4], [arms[-1]], [2, 9, 12], [1, 10, 15, 20], arms[8:]):
        real = real_bytes(model, engine, list(sample))
        assert real - 3 * 24 <= activations.of(sample) <= real + 1.5 * largest_block, list(sample)


def real_bytes(model: nn.Module, engine: LocalEngine, arms: list[int]) -> int:
    engine.begin_step((), arms)
    engine.begin_descent()
    saved = SavedActivations()
    with saved.watch():
        loss = forward(model)()
    del loss
    return saved.num_bytes


def test_checkpointed_blocks_are_computed_again_one_by_one() -> None:
    def make(num_blocks: int) -> tuple[nn.Module, LocalEngine]:
        model = tiny_llama(num_blocks=num_blocks)
        return model, LocalEngine(model, torch.optim.SGD(model.parameters()), map_layers(model, SLSAMConfig()))

    everything = list(range(7))
    block = real_bytes(*make(5), everything) - real_bytes(*make(4), everything[:-1])
    model, engine = make(5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    activations = count_weightless(lambda: tiny_llama(num_blocks=5), SLSAMConfig(), checkpointed=True).activations
    for sample in (everything, [0], [4], [6]):
        assert activations.of(sample) == pytest.approx(real_bytes(model, engine, sample) + block, rel=0.01), sample


def counted_llama() -> Counted:
    return count_weightless(lambda: tiny_llama(num_blocks=8), SLSAMConfig())


def test_what_sl_sam_takes_of_what_dense_sam_takes() -> None:
    counted = counted_llama()
    config = SLSAMConfig(selector="uniform", active_layers=2)
    share = 2 / len(counted.numels)
    for engine in ("zero0", "zero1", "zero2", "zero3", "fsdp2"):
        adamw, dense, sparse = compare(counted, RunSetup(engine=engine, world_size=4), config)
        assert adamw.price.mean == pytest.approx(1)
        assert dense.price.mean == pytest.approx(2)
        assert sparse.price.lowest < sparse.price.mean < sparse.price.highest < 2
        assert sparse.reduced.mean == pytest.approx(share * dense.reduced.mean)
        assert dense.reduced.mean == pytest.approx(2 * adamw.reduced.mean)
        assert sparse.gathered.mean <= dense.gathered.mean
        assert sparse.memory["total"].highest < dense.memory["total"].mean
        parts = ("weights", "kept", "gradients", "optimizer", "activations")
        assert sparse.memory["total"].mean == pytest.approx(sum(sparse.memory[part].mean for part in parts))


def test_a_schedule_pays_for_the_ascents_that_it_takes() -> None:
    counted, setup = counted_llama(), RunSetup(engine="zero2", world_size=4)

    def sparse(**knobs: Any) -> Mode:
        return compare(counted, setup, SLSAMConfig(selector="uniform", active_layers=2, **knobs))[-1]

    never, always, some = sparse(rho=0.0), sparse(), sparse(ascend_when={"every": 4})
    for read in (lambda mode: mode.price, lambda mode: mode.reduced, lambda mode: mode.gathered):
        assert read(some).mean == pytest.approx(0.25 * read(always).mean + 0.75 * read(never).mean)
        assert (read(some).lowest, read(some).highest) == (read(never).lowest, read(always).highest)
    assert some.memory == always.memory  # at its peak, which is in a step that climbs
    assert sparse(ascend_when={"last": 0.25}).price.mean == pytest.approx(some.price.mean)


def test_a_direction_costs_what_it_runs_and_keeps() -> None:
    counted, setup = counted_llama(), RunSetup(engine="zero2", world_size=4)
    single, previous, momentum = (
        compare(counted, setup, SLSAMConfig(selector="uniform", active_layers=2, **knobs))[-1]
        for knobs in ({"rho": 0.0}, {"ascent_source": "previous"}, {"ascent_source": "momentum"})
    )
    assert single.price == previous.price == momentum.price
    assert previous.gathered.mean == momentum.gathered.mean > single.gathered.mean  # perturbed weights travel
    assert momentum.memory["optimizer"] == single.memory["optimizer"]
    per_rank = 2 * counted.trained / 4  # in bf16
    assert previous.memory["optimizer"].mean == pytest.approx(momentum.memory["optimizer"].mean + per_rank)


def test_a_mask_is_a_bit_for_each_weight_and_costs_nothing_else() -> None:
    counted, setup = counted_llama(), RunSetup(engine="zero2", world_size=4)
    plain, masked = (
        compare(counted, setup, SLSAMConfig(selector="uniform", active_layers=2, **knobs))[-1]
        for knobs in ({}, {"mask": "fisher", "ascend_when": {"every": 1}})
    )
    assert masked.price == plain.price
    assert masked.memory["optimizer"].mean == pytest.approx(plain.memory["optimizer"].mean + counted.trained / 8 / 4)


def test_a_renormalised_descent_costs_no_more() -> None:
    """It reads the norm of the ascent gradient, which the ascent has found of all that is updated."""
    counted = counted_llama()
    for engine in ("zero2", "zero3", "fsdp2"):
        setup = RunSetup(engine=engine, world_size=4)
        plain, renormalised = (
            compare(counted, setup, SLSAMConfig(selector="uniform", active_layers=2, **knobs))[-1]
            for knobs in ({}, {"descend_along": "renormalised"})
        )
        assert renormalised == plain


def test_a_budget_is_met_over_a_schedule() -> None:
    """A mean over all steps: those that ascend cost more, the others less."""
    config = SLSAMConfig(budget=1.0, ascend_when={"every": 2})
    sparse = compare(counted_llama(), RunSetup(engine="zero2", world_size=4), config)[-1]
    assert sparse.price.mean == pytest.approx(1.0)


def test_more_ranks_hold_less_where_it_is_sharded() -> None:
    counted = counted_llama()
    for engine, kinds in {"zero1": {"optimizer"}, "zero3": {"optimizer", "gradients"}, "fsdp2": {"optimizer"}}.items():
        one, eight = (compare(counted, RunSetup(engine=engine, world_size=n), SLSAMConfig())[1] for n in (1, 8))
        for kind in kinds:
            assert eight.memory[kind].mean == pytest.approx(one.memory[kind].mean / 8)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    tiny_llama().config.save_pretrained(tmp_path)
    return tmp_path / "config.json"


@pytest.fixture(autouse=True)
def _let_others_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slsam_ds.cli.estimate.quieten", lambda: None)


def test_the_command_prints_a_table(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(config_file), "--zero", "3", "--world-size", "8", "--slsam", "active_layers=2"]) == 0
    printed = capsys.readouterr().out
    for expected in ("ZeRO-3 on 8 ranks", "2 of 6 layers", "AdamW", "dense SAM", "1-4", "activations", "gathered"):
        assert expected in printed


def test_the_command_reads_a_deepspeed_configuration(config_file: Path, tmp_path: Path, capsys: Any) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_max_reuse_distance": 5000}
    deepspeed = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "slsam": {"active_layers": 3},
    }
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed))
    flags = ["--deepspeed", str(tmp_path / "ds.json"), "--gradient_accumulation_steps", "2", "--gradient_checkpointing"]
    assert main(["--model", str(config_file.parent), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["setup"] == {
        "engine": "zero3",
        "world_size": 1,
        "num_micro_batches": 2,
        "precision": "bf16",
        "offload_optimizer": True,
        "offload_parameters": False,
        "reuse_distance": 5000,
    }
    assert [mode["name"] for mode in found["modes"]] == ["AdamW", "dense SAM", "SL-SAM"]
    assert found["modes"][-1]["num_active"] == pytest.approx(3)
    assert found["weights"]["total"] == sum(layer["numel"] for layer in found["layers"])


def test_the_command_adapts_by_lora(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(config_file), "--fsdp", "--peft", "lora", "--lora_r", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["weights"]["trained"] < found["weights"]["total"] / 4
    assert len(found["layers"]) == 4


VISION: dict[str, Any] = {"num_labels": 3}
OTHER_SHAPES: dict[str, tuple[PreTrainedConfig, int]] = {
    "ResNetForImageClassification": (
        ResNetConfig(**VISION, embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1]),
        224,
    ),
    "SwinForImageClassification": (SwinConfig(**VISION, embed_dim=12, depths=[1, 1, 2, 1]), 224),
    "ConvNextForImageClassification": (
        ConvNextConfig(**VISION, image_size=64, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1]),
        64,
    ),
    "DeepseekV3ForCausalLM": (
        DeepseekV3Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
            first_k_dense_replace=1,
        ),
        16,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*itertools.product(OTHER_SHAPES, ["bf16"]), ("ResNetForImageClassification", "fp32")],
)
def test_models_of_other_shapes_are_estimated(
    architecture: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pyramids of images, of a size of their own or not; heads whose values are smaller than their queries; experts."""
    config, size = OTHER_SHAPES[architecture]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    flags = ["--sequence_length", str(size)] if "CausalLM" in architecture else []
    assert main(["--model", str(tmp_path), "--zero", "2", "--dtype", dtype, "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    model = getattr(transformers, architecture)(config).eval()
    assert found["weights"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    inputs = torch.zeros(1, size, dtype=torch.long) if flags else torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:  # with a graph: on the CPU, fused attention is not counted
        model(inputs)
    # Backward takes twice as much; once for the first layer, whose input needs no gradient (half of this ResNet), and
    # two and a half times for fused attention, which computes scores again.
    assert 2 < found["modes"][0]["flops"]["mean"] / counter.get_total_flops() < 3.5


def test_models_that_take_something_else_are_refused_in_a_true_sentence() -> None:
    with torch.device("meta"):
        model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(num_hidden_layers=1))
    with pytest.raises(
        ValueError,
        match="Wav2Vec2ForSequenceClassification: its main input is input_values; supported are input_ids and",
    ):
        example_inputs(model)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--zero", "2"], "--model: give a folder"),
        (["--model", "/nowhere/model"], "--model /nowhere/model: no such folder or file"),
        (["--model", "CONFIG", "--slsam", "rh=1"], "slsam.rh: unknown key; did you mean rho?"),
        (["--model", "CONFIG", "--slsam", "active_layers=9"], "slsam.active_layers=9: choose a fraction"),
        (["--model", "CONFIG", "--slsam", "budget=9"], "slsam.budget=9: with these settings a step costs from"),
        (["--model", "CONFIG", "--zero", "4"], "--zero: invalid choice: 4"),
        (["--model", "CONFIG", "--world_size", "0"], "--world_size 0: choose a number of at least 1"),
        (["--model", "CONFIG", "--worldsize", "2"], "did you mean --world_size?"),
        (["--model", "CONFIG", "--fsdp", "--zero", "2"], "--fsdp excludes --zero"),
        (["--model", "CONFIG", "--sequence_length", "999"], "--sequence_length 999: choose from 2 to"),
        (["--model", "CONFIG", "--deepspeed", "none.json"], "DeepSpeed configuration none.json: cannot be read"),
        (["--model", "CONFIG", "--fsdp", "--dtype", "fp16"], "fp16: needs ZeRO"),
        (["--model", "CONFIG", "--zero", "3", "--slsam", "ascent_scope=rank"], "needs whole weights on every rank"),
        (["--model", "CONFIG", "--slsam", 'layers=["model.layers.0"]'], "slsam.layers names the layers"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    flags: list[str], sentence: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file) if flag == "CONFIG" else flag for flag in flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
