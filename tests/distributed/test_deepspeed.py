"""DeepSpeed: what raises no error when it goes wrong, and what users of a DeepSpeedEngine rely on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slsam_ds
from tests.distributed.training import (
    ADAMW,
    ALSO_OFFLOADED,
    ALSO_ZERO0,
    ALSO_ZERO1,
    ALSO_ZERO3,
    LlamaSetup,
    Setup,
    Training,
    follow_reference,
    max_error,
    slow,
    whole,
)
from tests.models import SAMPLES, arms_of_llama, window
from tests.ranks import run_on_ranks

SHARDED = [ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED]
STAGES = [ALSO_ZERO0, *SHARDED]
TOLERANCE = 1e-6


def count_steps(setup: Setup) -> dict[str, Any]:
    training = Training(setup)
    training.follow(SAMPLES)
    engine = training.engine
    return {
        "global_steps": engine.global_steps,
        "micro_steps": engine.micro_steps,
        "global_samples": engine.global_samples,
        "trainable": all(parameter.requires_grad for parameter in training.model.parameters()),
        "leftover": [name for name, parameter in training.model.named_parameters() if parameter.grad is not None],
    }


@pytest.mark.parametrize("engine", STAGES)
def test_counters_keep_their_meaning(engine: str) -> None:
    counters, _ = run_on_ranks(2, count_steps, Setup(engine=engine, accumulation=3))
    steps = len(SAMPLES)
    assert counters["global_steps"] == steps
    assert counters["micro_steps"] == 3 * steps
    assert counters["global_samples"] == 2 * 2 * 3 * steps  # samples x ranks x micro-batches
    assert counters["trainable"]  # checkpoint code asks requires_grad
    assert counters["leftover"] == []


PASS_SECONDS = 0.03


def time_steps(setup: Setup) -> tuple[int, int, float, float, int]:
    """What DeepSpeed's throughput timer has counted of six steps; what the four that it times took; waits in one."""
    from deepspeed.accelerator import get_accelerator

    training = Training(setup)
    waits = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        time.sleep(PASS_SECONDS)
        return model(**batch).loss

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append(None))
        for step in range(1, 7):
            waits.clear()
            results.append(training.step(training.window(step), loss_fn, active=[2, 3]))
    timer = training.engine.tput_timer
    steps = timer.global_step_count, timer.micro_step_count
    return *steps, timer.total_elapsed_time, sum(result.seconds for result in results[2:]), len(waits)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("engine", [ALSO_ZERO0, "zero2", ALSO_ZERO3])
def test_the_throughput_timer_times_whole_steps(engine: str, accumulation: int) -> None:
    """Both passes over all micro-batches; and it waits for the device before and after the step, not within."""
    setup = Setup(engine=engine, accumulation=accumulation)
    for steps, micro_steps, elapsed, taken, num_waits in run_on_ranks(2, time_steps, setup):
        assert (steps, micro_steps) == (6, 6 * accumulation)
        assert 4 * 2 * accumulation * PASS_SECONDS <= elapsed <= taken
        assert num_waits == 2


def monitored(setup: Setup) -> None:
    Training(setup).follow(SAMPLES[:3])


def test_the_monitor_gets_what_every_step_did(tmp_path: Path) -> None:
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}}
    run_on_ranks(2, monitored, Setup(engine="zero2", deepspeed=monitor))
    files = {path.stem: path.read_text().split() for path in (tmp_path / "run").glob("*.csv")}
    for name in ("lr", "train_loss", "slsam_ascent_rise", "slsam_active_share"):
        header, *rows = files[f"Train_Samples_{name}"]
        assert [int(row.split(",")[0]) for row in rows] == [4, 8, 12], header  # samples: two on each of two ranks


def moments(setup: Setup, samples: list[list[int]]) -> dict[str, Tensor | None]:
    training = Training(setup)
    training.follow(samples)
    if training.engine is None:
        return {
            name: training.optimizer.state[parameter].get("exp_avg", None)
            for name, parameter in training.model.named_parameters()
        }
    from deepspeed.utils import safe_get_full_optimizer_state

    arms = arms_of_llama(training.model)
    stepped = {name for sample in samples for arm in sample for name in arms[arm]}
    parameters = training.model.named_parameters()
    return {
        name: safe_get_full_optimizer_state(parameter, "exp_avg") if name in stepped else None
        for name, parameter in parameters
    }


@pytest.mark.parametrize("engine", SHARDED)
def test_optimizer_state_is_linked_when_a_layer_is_first_selected(engine: str) -> None:
    """DeepSpeed links all groups at the first step only; universal checkpoints read these links."""
    samples = [[1], [1, 4], [2]]
    expected = run_on_ranks(2, moments, Setup(engine="local"), samples)[0]
    found = run_on_ranks(2, moments, Setup(engine=engine), samples)[0]
    for name, moment in expected.items():
        if moment is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], moment, atol=1e-7, rtol=0)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def train_decay_groups(engine: str) -> tuple[dict[str, Tensor], list[tuple[int, int, float]]]:
    setup = Setup(engine=engine)
    model = setup.build_model()
    optimizer = torch.optim.AdamW(decay_groups(model), lr=1e-3, eps=1e-4)
    if engine == "local":
        slsam = slsam_ds.SLSAM(model, optimizer)
        step, rank = slsam.step, slsam.engine.ranks.rank
    else:
        wrapped, *_ = slsam_ds.initialize(model=model, optimizer=optimizer, config=setup.deepspeed_config())
        step, rank = wrapped.train_step, wrapped.slsam.engine.ranks.rank
    groups = [(group["arm"], len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    for index, sample in enumerate(SAMPLES, start=1):
        step(window(index, rank, 1), active=sample)
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}, groups


@pytest.mark.parametrize("engine", STAGES)
def test_weight_decay_groups_are_split_by_layer(engine: str) -> None:
    expected, groups = run_on_ranks(2, train_decay_groups, "local")[0]
    weights, sharded_groups = run_on_ranks(2, train_decay_groups, engine)[0]
    assert max_error(weights, expected) <= TOLERANCE
    # Embedding and head have no vector or one more: two groups where weight decay differs, never an empty one.
    assert [arm for arm, _, _ in groups] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all(length > 0 for _, length, _ in groups)
    assert [group[::2] for group in sharded_groups] == [group[::2] for group in groups]


def follow_schedule(setup: Setup, when: str) -> tuple[list[float], dict[str, Tensor]]:
    make: Callable[[Any], Any] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(  # noqa: E731
        optimizer, lambda step: 1 / (1 + step)
    )
    model = setup.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    scheduler = make(optimizer) if when == "built before" else make
    engine, _, _, scheduler = slsam_ds.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=setup.deepspeed_config()
    )
    rates = []
    for index, sample in enumerate(SAMPLES, start=1):
        rates.append(engine.get_lr()[0])
        assert len(set(engine.get_lr())) == 1
        engine.train_step(window(index, torch.distributed.get_rank(), 1), active=sample)
    return rates, {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("when", [slow("built before"), "built by DeepSpeed"])
@pytest.mark.parametrize("engine", STAGES)
def test_schedulers_drive_the_groups_that_step(engine: str, when: str) -> None:
    setup = Setup(engine=engine)
    rates, weights = run_on_ranks(2, follow_schedule, setup, when)[0]
    assert rates == pytest.approx([1e-3 / (1 + step) for step in range(len(SAMPLES))])
    scales = [dict.fromkeys(range(6), 1 / (1 + step)) for step in range(len(SAMPLES))]
    expected, _ = follow_reference(setup, 2, SAMPLES, scales)
    assert max_error(weights, expected) <= TOLERANCE


SETTINGS = {
    "round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "overlapped": {"zero_optimization": {"stage": 2, "overlap_comm": True}},
    "small buckets": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}},
    "scattered stage 1": {"zero_optimization": {"stage": 1, "reduce_scatter": True, "contiguous_gradients": False}},
    "timers": {"wall_clock_breakdown": True},
}


def follow_live(setup: Setup) -> dict[str, Tensor]:
    training = Training(setup)
    training.follow(SAMPLES)
    return training.live_weights()  # DeepSpeed's own readers of masters do not know round_robin_gradients


@pytest.mark.parametrize("name", [*list(SETTINGS)[:2], *map(slow, list(SETTINGS)[2:])])
def test_deepspeed_settings_change_nothing(name: str) -> None:
    setup = Setup(engine="zero2", accumulation=2, deepspeed=SETTINGS[name])
    expected, _ = follow_reference(setup, 2, SAMPLES)
    weights = run_on_ranks(2, follow_live, setup)[0]
    assert max_error(weights, expected) <= TOLERANCE


def train_checkpointed(setup: Setup, reentrant: bool) -> dict[str, Tensor]:
    training = Training(setup)
    training.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # as Hugging Face's Trainer does: else a frozen embedding cuts the graph
        training.model.enable_input_require_grads()
    training.follow(SAMPLES)
    return training.weights()


@pytest.mark.parametrize("reentrant", [slow(False), True])
@pytest.mark.parametrize("engine", STAGES)
def test_gradient_checkpointing(engine: str, reentrant: bool) -> None:
    setup = LlamaSetup(engine=engine, accumulation=2)
    expected, _ = follow_reference(setup, 2, SAMPLES)
    assert max_error(run_on_ranks(2, train_checkpointed, setup, reentrant)[0], expected) <= TOLERANCE


def accumulate_in_float32(setup: Setup) -> tuple[dict[str, Tensor], list[float]]:
    training = Training(setup)
    results = training.follow(SAMPLES)
    return training.weights(), [result.loss for result in results]


def test_float32_accumulation_of_bf16_gradients() -> None:
    setup = Setup(
        engine="zero2",
        dtype=torch.bfloat16,
        accumulation=3,
        deepspeed={"data_types": {"grad_accum_dtype": "fp32"}},
    )
    exact, _ = follow_reference(Setup(engine="zero2", accumulation=3), 2, SAMPLES)
    weights, losses = run_on_ranks(2, accumulate_in_float32, setup)[0]
    assert max_error(weights, exact) < 0.01  # bf16 forward: it follows, roughly
    assert losses[-1] < losses[0]


FUSED = {"optimizer": {"type": "AdamW", "params": dict(ADAMW)}}
"""DeepSpeed's own AdamW, in whose wrapper master weights and gradients lie flat."""


def follow_fused(setup: Setup) -> tuple[dict[str, Tensor], dict[int, int], str]:
    model = setup.build_model()
    engine, *_ = slsam_ds.initialize(model=model, config=setup.deepspeed_config())
    for index, sample in enumerate(SAMPLES, start=1):
        engine.train_step(window(index, torch.distributed.get_rank(), setup.accumulation), active=sample)
    inner = engine.optimizer.optimizer
    steps = {group["arm"]: int(inner.state[group["params"][0]]["step"]) for group in inner.param_groups}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return weights, steps, type(engine.optimizer).__name__


@pytest.mark.slow
def test_stage_0_with_deepspeeds_fused_adam() -> None:
    """Its state is made by a step on zeros, which must not count, and its norm's masks by its first step."""
    setup = Setup(engine="zero0", dtype=torch.bfloat16, accumulation=2, deepspeed=FUSED)
    torch_adam = Setup(engine="zero0", dtype=torch.bfloat16, accumulation=2)
    expected = run_on_ranks(2, follow_live, torch_adam)[0]
    weights, steps, wrapper = run_on_ranks(2, follow_fused, setup)[0]
    assert wrapper == "FP16_Optimizer"
    assert max_error(weights, expected) <= 0.002  # an ulp of bf16 where rounding differs
    assert steps == {arm: sum(arm in sample for sample in SAMPLES) for arm in range(6)}


def refuse(setup: Setup, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        Training(setup, **kwargs)
    return str(raised.value)


def refuse_changed_layout(setup: Setup, name: str) -> str:
    """As if a new DeepSpeed had renamed one of its structures."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    stock = DeepSpeedZeroOptimizer.__init__

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        delattr(self, name)

    DeepSpeedZeroOptimizer.__init__ = changed
    return refuse(setup)


def test_an_unknown_deepspeed_layout_is_refused() -> None:
    message = run_on_ranks(1, refuse_changed_layout, Setup(engine="zero2"), "params_in_partition")[0]
    assert "params_in_partition" in message


def refuse_pipeline(setup: Setup) -> str:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")
    model = PipelineModule(layers=[nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1, loss_fn=nn.MSELoss())
    with pytest.raises(ValueError, match=r".") as raised:
        slsam_ds.initialize(model=model, config=setup.deepspeed_config(), slsam={"layers": ["0", "1"]})
    return str(raised.value)


def test_what_orders_its_own_passes_is_refused() -> None:
    assert "pipeline parallelism is not supported" in run_on_ranks(1, refuse_pipeline, Setup(engine="zero1"))[0]
    hybrid = Setup(engine="zero2", deepspeed={"hybrid_engine": {"enabled": True}})
    assert "hybrid_engine.enabled=true: not supported" in run_on_ranks(1, refuse, hybrid)[0]
