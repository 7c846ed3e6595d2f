"""What a step costs by the clock and in FLOPs, against AdamW and dense SAM: one model and engine, one run, interleaved.

    python -m benchmarks.step_cost               # ZeRO-2 on two ranks of this machine; a Markdown table

Every mode trains a model of its own on the same data. Rounds take one step of each in turn, so that whatever else the
machine does falls on all of them alike. FLOPs are those of the steps timed, by the price list counted on this model.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import slsam_ds
from slsam_ds.cost import Passes
from tests.ranks import run_on_ranks

NUM_WARMUP = 2

MODES: dict[str, dict[str, Any]] = {
    "AdamW": {"selector": "all", "rho": 0.0},
    "dense SAM": {"selector": "all"},
    "LISA-like": {"selector": "uniform", "rho": 0.0},
    "SL-SAM": {"selector": "uniform"},
    "SL-SAM, ascent_fraction 0.25": {"selector": "uniform", "ascent_fraction": 0.25},
    "SL-SAM, ascent_source previous": {"selector": "uniform", "ascent_source": "previous"},
    "SL-SAM, bandit": {},
    "SL-SAM, budget 1.0": {"budget": 1.0},
}
"""Knobs of each mode beside `active_layers`."""


@dataclass(kw_only=True)
class Measured:
    """What one mode took, step by step, on rank 0."""

    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)


def make_engine(arguments: argparse.Namespace, knobs: dict[str, Any]) -> Any:
    """A model like SmolLM's, smaller, inside its own DeepSpeedEngine."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=arguments.hidden,
            intermediate_size=2 * arguments.hidden + arguments.hidden * 7 // 10,
            num_hidden_layers=arguments.blocks,
            num_attention_heads=arguments.hidden // 64,
            use_cache=False,
        )
    )
    config = {
        "train_micro_batch_size_per_gpu": arguments.batch,
        "zero_optimization": {"stage": arguments.zero},
        "slsam": {"active_layers": arguments.active, "rho": 0.02, **knobs},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = slsam_ds.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def make_window(arguments: argparse.Namespace, step: int) -> list[dict[str, torch.Tensor]]:
    """Tokens that can be learned: each is the one before plus a constant of the sample."""
    generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
    start, stride = torch.randint(1, 97, (2, arguments.batch, 1), generator=generator)
    tokens = (start + stride * torch.arange(arguments.length)) % 8192
    return [{"input_ids": tokens, "labels": tokens}]


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Measured], int]:
    """Run on every rank: rounds of one step of each mode. What each took, and the number of weights."""
    engines = {name: make_engine(arguments, knobs) for name, knobs in MODES.items()}
    # Counts the prices, on a model of its own.
    counting = make_engine(arguments, {"reward": "grad_norm_per_cost"})
    counting.train_step(make_window(arguments, 0))
    found = {name: Measured() for name in MODES}
    for step in range(1, arguments.rounds + NUM_WARMUP + 1):
        for name, engine in engines.items():
            torch.distributed.barrier()
            started = time.perf_counter()
            result = engine.train_step(make_window(arguments, step))
            torch.distributed.barrier()
            seconds = time.perf_counter() - started
            if step > NUM_WARMUP:
                passes = Passes.of(engine.slsam.config, 1, reuses_prefix=engine.slsam._reuses_prefix)
                found[name].seconds.append(seconds)
                found[name].flops.append(counting.slsam._costs.prices(passes).of(result.active))
    return found, sum(parameter.numel() for parameter in engines["AdamW"].module.parameters())


def table(found: dict[str, Measured]) -> str:
    """Markdown: median and quartiles of a step's time, and ratios of means."""
    rows = [
        "| mode | s per step | time / AdamW | time / dense SAM | FLOPs / AdamW | time ratio / FLOP ratio |",
        "|" + "---|" * 6,
    ]
    adamw, dense = found["AdamW"], found["dense SAM"]
    for name, mode in found.items():
        # Means: what a run pays. Layers are drawn anew each step, and a median would favour the cheap draws.
        against = statistics.mean(mode.seconds) / statistics.mean(adamw.seconds)
        against_dense = statistics.mean(mode.seconds) / statistics.mean(dense.seconds)
        low, middle, high = statistics.quantiles(mode.seconds, n=4)
        flops = statistics.mean(mode.flops)
        rows.append(
            f"| {name} | {middle:.2f} ({low:.2f}-{high:.2f}) | {against:.2f} | {against_dense:.2f} | {flops:.2f} | "
            f"{against / flops:.2f} |"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world_size", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=16, help="layers of the model (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=320, help="width of the model (default: %(default)s)")
    parser.add_argument("--active", type=float, default=0.2, help="share of layers per step (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples per rank (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens per sample (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each mode (default: %(default)s)")
    arguments = parser.parse_args(argv)
    found, num_weights = run_on_ranks(arguments.world_size, measure, arguments, timeout=3600)[0]
    print(
        f"{num_weights / 1e6:.1f}M weights in {arguments.blocks} layers, {arguments.active:g} of them active, ZeRO-"
        f"{arguments.zero}, {arguments.world_size} ranks of one thread, {arguments.batch} x {arguments.length} tokens "
        f"each, float32, {arguments.rounds} rounds; {platform.processor() or platform.machine()}, torch "
        f"{torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
