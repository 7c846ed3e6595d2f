"""ZeRO-3: what raises no error when it goes wrong, what stays gathered, and how models come to be sharded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slsam_ds import StepResult
from tests.distributed.test_frozen import optimizer_entries, same_bits
from tests.distributed.training import (
    ADAMW,
    LlamaSetup,
    Setup,
    Training,
    follow_reference,
    follow_samples,
    max_error,
    slow,
)
from tests.models import SAMPLES, arms_of_llama, tiny_llama, window
from tests.ranks import run_on_ranks
from tests.reference import Reference

TOLERANCE = 1e-6
ZERO3 = Setup(engine="zero3")
TWICE = (*SAMPLES, *SAMPLES)  # DeepSpeed learns the order of fetches at the first visit, and goes by it at the second


def persisting(threshold: int, **kwargs: Any) -> Setup:
    """Parameters of up to so many elements stay gathered."""
    section = ZERO3.zero_optimization(stage3_param_persistence_threshold=threshold)
    return Setup(engine="zero3", deepspeed={"zero_optimization": section}, **kwargs)


def step_others(setup: Setup) -> list[bool]:
    training = Training(setup)
    training.follow([range(6), range(6)])

    def kept() -> list[Tensor]:
        entries = [entry for entry in optimizer_entries(training) if entry[0] != 1]
        return [torch.as_tensor(value).clone() for _, master, state in entries for value in (master, *state.values())]

    before, same = kept(), []
    assert len(before) == 5 * 4  # master, two moments and a step counter for each of the other arms
    for step in (3, 4):
        training.step(training.window(step), active=[1])
        same.append(same_bits(before, kept()))
    return same


@pytest.mark.parametrize("engine", ["zero3", slow("zero3_offload")])
def test_layers_that_were_stepped_before_rest_when_they_are_not_sampled(engine: str) -> None:
    """DeepSpeed gives them a gradient of zeros, and their momentum would move them on."""
    assert run_on_ranks(2, step_others, Setup(engine=engine)) == [[True, True]] * 2


@pytest.mark.parametrize("threshold", [slow(0), 100, slow(10**6)])
def test_what_stays_gathered_does_not_hide_the_perturbation(threshold: int) -> None:
    setup = persisting(threshold)
    expected, reported = follow_reference(setup, 2, TWICE)
    for weights, results in run_on_ranks(2, follow_samples, setup, TWICE):
        assert max_error(weights, expected) <= 2 * TOLERANCE  # twenty steps
        assert [result.loss for result in results] == pytest.approx([one["loss"] for one in reported], abs=1e-5)


def gather_in_the_loss(setup: Setup) -> dict[str, Tensor]:
    """As losses do that look at weights: every parameter, in both passes."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    def loss_fn(model: Any, batch: Any) -> Tensor:
        with GatheredParameters(list(model.parameters())):
            pass
        return model(**batch).loss

    training = Training(setup)
    for step, sample in enumerate(TWICE, start=1):
        training.step(training.window(step), active=sample, loss_fn=loss_fn)
    return training.weights()


@pytest.mark.slow
def test_the_loss_may_gather_what_stays_gathered() -> None:
    setup = persisting(0, accumulation=2)
    expected, _ = follow_reference(setup, 2, TWICE)
    assert max_error(run_on_ranks(2, gather_in_the_loss, setup)[0], expected) <= 2 * TOLERANCE


def norms_of_one_step(setup: Setup) -> StepResult:
    training = Training(setup)
    return training.step(training.window(1), active=[1, 4])


@pytest.mark.parametrize("accumulation", [slow(1), 3])
@pytest.mark.parametrize("engine", ["zero3", slow("zero3_offload")])
def test_the_second_gradient_is_not_added_to_the_first(engine: str, accumulation: int) -> None:
    climbed = run_on_ranks(2, norms_of_one_step, Setup(engine=engine, accumulation=accumulation, slsam={"rho": 1e-7}))
    level = run_on_ranks(2, norms_of_one_step, Setup(engine=engine, accumulation=accumulation, slsam={"rho": 0.0}))
    assert climbed[0].grad_norms == pytest.approx(level[0].grad_norms, rel=1e-4)


def gathered(training: Training) -> list[str]:
    return [name for name, parameter in training.model.named_parameters() if parameter.numel() > 0]


class BrokenPassError(Exception):
    pass


def break_in(model: nn.Module, module: str, where: str, call: int) -> Any:
    """Let a module's `call`-th forward or backward raise."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise BrokenPassError

    broken = model.get_submodule(module)
    return broken.register_forward_hook(count) if where == "forward" else broken.register_full_backward_hook(count)


def survive(setup: Setup, where: str, call: int) -> tuple[dict[str, Tensor], list[list[str]]]:
    training = Training(setup)
    training.follow([[1, 3], [1, 3], [0]])
    left, before = [gathered(training)], training.live_weights()
    hook = break_in(training.model, "model.layers.2.mlp", where, call)
    with pytest.raises(BrokenPassError):
        training.step(training.window(9), active=[1, 3])
    hook.remove()
    left.append(gathered(training))
    assert training.engine.optimizer._backward_active_depth == 0
    assert max_error(training.live_weights(), before) == 0.0
    for step, sample in enumerate(([2], [1, 3], [1, 3]), start=4):
        training.step(training.window(step), active=sample)
        left.append(gathered(training))
    return training.weights(), left


@pytest.mark.parametrize("threshold", [slow(0), 10**6])
@pytest.mark.parametrize(("where", "call"), [slow("forward", 1), ("forward", 4), ("backward", 2), slow("backward", 3)])
def test_a_pass_that_breaks_inside_the_model(where: str, call: int, threshold: int) -> None:
    setup = persisting(threshold, accumulation=2)  # two passes of two micro-batches
    expected, _ = follow_reference(setup, 2, [[1, 3], [1, 3], [0], [2], [1, 3], [1, 3]])
    for weights, left in run_on_ranks(2, survive, setup, where, call):
        assert max_error(weights, expected) <= TOLERANCE
        if threshold == 0:
            assert left == [[]] * 5


def follow_and_evaluate(setup: Setup) -> tuple[list[list[str]], list[bool], dict[str, Tensor]]:
    training = Training(setup)
    left, complete = [], []
    for step, sample in enumerate(TWICE, start=1):
        training.step(training.window(step), active=sample)
        left.append(gathered(training))
        known = training.slsam.engine._traces._known
        lowest = sample[0]
        passes = ("ascent", "descent after ascent")
        complete += [known[kind, lowest, lowest].is_complete_trace() for kind in passes]
        training.model.eval()
        with torch.no_grad():
            training.engine(**training.window(step)[0])
        training.model.train()
    return left, complete, training.weights()


@pytest.mark.parametrize("accumulation", [slow(1), 2])
def test_nothing_stays_gathered_and_every_depth_keeps_its_order_of_fetches(accumulation: int) -> None:
    setup = persisting(0, accumulation=accumulation)
    expected, _ = follow_reference(setup, 2, TWICE)
    left, complete, weights = run_on_ranks(2, follow_and_evaluate, setup)[0]
    assert left == [[]] * len(TWICE)
    assert all(complete[len(complete) // 2 :])
    assert max_error(weights, expected) <= 2 * TOLERANCE


def leave_head_out(setup: Setup) -> dict[str, Tensor]:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[2].square().mean()

    training = Training(setup)
    training.step(training.window(1), active=[2, 4, 5])
    training.step(training.window(2), active=[2, 4, 5], loss_fn=loss_fn)  # blocks above 2 take no part
    return training.weights()


@pytest.mark.parametrize("engine", ["zero3", slow("zero3_offload")])
def test_what_takes_no_part_has_no_gradient_left_from_the_step_before(engine: str) -> None:
    expected = run_on_ranks(2, leave_head_out, LlamaSetup(engine="local", accumulation=2))[0]
    assert (
        max_error(run_on_ranks(2, leave_head_out, LlamaSetup(engine=engine, accumulation=2))[0], expected) <= TOLERANCE
    )


def whole_gradients(setup: Setup) -> list[int]:
    """Elements of whole gradients that are held when the last backward of a pass has ended."""
    training = Training(setup)
    engine, held = training.slsam.engine, []
    stock = engine.reduce

    def reduce() -> Any:
        held.append(sum(p.grad.numel() for p in training.model.parameters() if p.grad is not None))
        return stock()

    engine.reduce = reduce
    training.follow([[0, 2], range(6)])
    return held


@pytest.mark.parametrize("accumulation", [slow(1), 3])
def test_whole_gradients_do_not_pile_up(accumulation: int) -> None:
    assert run_on_ranks(2, whole_gradients, Setup(engine="zero3", accumulation=accumulation))[0] == [0] * 4


def keep_less(setup: Setup) -> tuple[dict[str, Tensor], list[int]]:
    """Ranks that may keep hidden states of two micro-batches, and of none or one."""
    from slsam_ds.model import prefix

    training = Training(setup)
    room = 2 - training.rank
    prefix.Prefix.__init__.__kwdefaults__["max_bytes"] = room * 2 * 12 * 32 * 4
    runs, block = [0], training.model.get_submodule("model.layers.0")
    block.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for step in (1, 2, 3):
        training.step(training.window(step), active=[4, 5])
    return training.weights(), runs


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_ranks_reuse_the_same_prefixes(engine: str) -> None:
    """Else one would gather for blocks that another leaves out, and wait for ever."""
    setup = Setup(engine=engine, accumulation=3)
    expected, _ = follow_reference(setup, 2, [[4, 5]] * 3)
    for weights, runs in run_on_ranks(2, keep_less, setup):
        assert max_error(weights, expected) <= TOLERANCE
        # Three ascend, and two of them run the blocks again; before the first descent the prefix is tried.
        assert runs == [3 * (3 + 2) + 1]


SETTINGS: dict[str, dict[str, Any]] = {
    "overlapped": {"overlap_comm": True},
    "no prefetch": {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    "little prefetch": {"stage3_prefetch_bucket_size": 3000, "stage3_max_live_parameters": 9000},
    "several sub-groups per layer": {"sub_group_size": 700},
    "small buckets": {"reduce_bucket_size": 1000},
    "scattered gradients": {"contiguous_gradients": False},
    "all-reduce": {"reduce_scatter": False},
    "optimizer offloaded": {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 700},
    "parameters offloaded": {"offload_param": {"device": "cpu"}},
    "leaf modules": {"stage3_module_granularity_threshold": 3000},
}


@pytest.mark.parametrize("name", [*list(SETTINGS)[:2], *map(slow, list(SETTINGS)[2:])])
def test_deepspeed_settings_change_nothing(name: str) -> None:
    section = ZERO3.zero_optimization(**SETTINGS[name])
    # Of the smaller model, DeepSpeed would make one leaf.
    make = LlamaSetup if name == "leaf modules" else Setup
    setup = make(engine="zero3", accumulation=2, deepspeed={"zero_optimization": section})
    expected, _ = follow_reference(setup, 2, SAMPLES)
    assert max_error(run_on_ranks(2, follow_samples, setup)[0][0], expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_uneven_shards(accumulation: int) -> None:
    """Three ranks: the last shard of most parameters is shorter, and of small ones empty."""
    setup = persisting(0, accumulation=accumulation, model={"hidden": 8})
    expected, _ = follow_reference(setup, 3, SAMPLES)
    per_rank = run_on_ranks(3, follow_samples, setup)
    for weights, results in per_rank:
        assert max_error(weights, expected) <= TOLERANCE
        assert [result.grad_norms for result in results] == [result.grad_norms for result in per_rank[0][1]]


class BornSharded(LlamaSetup):
    def build_model(self) -> nn.Module:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=self.deepspeed_config()):
            return super().build_model()


class LoadedSharded(LlamaSetup):
    """As Hugging Face's Trainer has models loaded, once its TrainingArguments name a ZeRO-3 configuration."""

    folder: str

    def build_model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM
        from transformers.integrations import HfDeepSpeedConfig

        config = HfDeepSpeedConfig(self.deepspeed_config())
        model = AutoModelForCausalLM.from_pretrained(
            self.model["folder"], dtype=self.dtype, attn_implementation="eager"
        )
        del config
        return model.train()


def follow_from_birth(setup: Setup) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    training = Training(setup)
    first, held = training.weights(), sum(parameter.ds_tensor.numel() for parameter in training.model.parameters())
    training.follow(SAMPLES)
    return first, training.weights(), held


@pytest.mark.parametrize("make", [BornSharded, LoadedSharded])
def test_models_that_never_were_whole(make: Callable[..., Setup], tmp_path: Path) -> None:
    plain = tiny_llama()
    plain.save_pretrained(tmp_path)
    setup = make(engine="zero3", model={"folder": str(tmp_path)} if make is LoadedSharded else {})
    first, last, held = run_on_ranks(2, follow_from_birth, setup)[0]
    assert held * 2 == plain.num_parameters()
    if make is LoadedSharded:
        assert max_error(first, dict(plain.named_parameters())) == 0.0
    plain.load_state_dict(first)
    reference = Reference(plain, arms_of_llama(plain), **ADAMW)
    for step, sample in enumerate(SAMPLES, start=1):
        reference.step(list(sample), [window(step, rank, 1)[0] for rank in range(2)])
    assert max_error(last, dict(plain.named_parameters())) <= TOLERANCE


def refuse_changed_layout(setup: Setup, name: str) -> str:
    """As if a new DeepSpeed had renamed one of its structures."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    stock = DeepSpeedZeroOptimizer_Stage3.__init__

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        delattr(self, name)

    DeepSpeedZeroOptimizer_Stage3.__init__ = changed
    with pytest.raises(ValueError, match=name) as raised:
        Training(setup)
    return str(raised.value)


@pytest.mark.parametrize("name", ["fp16_partitioned_groups_flat", "averaged_gradients", "grad_position"])
def test_an_unknown_deepspeed_layout_is_refused(name: str) -> None:
    message = run_on_ranks(1, refuse_changed_layout, ZERO3, name)[0]
    assert "DeepSpeedZeroOptimizer_Stage3" in message
