"""`slsam estimate`: what a step will take, from a model's configuration alone."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slsam_ds.cli.arguments import ModelArguments
from slsam_ds.cli.command_line import quieten
from slsam_ds.cli.estimate_arguments import DTYPES, parse_flags, read_setup
from slsam_ds.cli.refusal import EXIT_CODE, UsageError, refusals
from slsam_ds.config import SLSAMConfig
from slsam_ds.estimate.counting import Counted, count
from slsam_ds.estimate.modes import Mode, compare
from slsam_ds.estimate.sharding import RunSetup
from slsam_ds.estimate.tables import layer_table, mode_table
from slsam_ds.model.layers import map_layers

_NOTES = """Memory is what a step holds, each at its peak, with optimizer state of every layer. The sample that takes
most decides whether a run fits; leave a tenth more for buffers, libraries and fragmentation. Traffic is payload: on a
ring of n ranks an all-reduce sends 2(n-1)/n of it, a gathering (n-1)/n. Samples without padding, fused attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take.

    Attributes:
        model: A line about the model.
        run: A line about the run.
        counted: What a micro-batch takes.
        setup: How the run is laid out.
        config: The knobs.
        modes: AdamW, dense SAM and SL-SAM.
    """

    model: str
    run: str
    counted: Counted
    setup: RunSetup
    config: SLSAMConfig
    modes: Sequence[Mode]


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where the input cannot be used, after one sentence on stderr.
    """
    try:
        given = parse_flags(sys.argv[1:] if argv is None else argv)
        quieten()
        estimate = make_estimate(given, *read_setup(given))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(_as_json(estimate) if given.json else _as_text(estimate))
    return 0


def make_estimate(
    given: argparse.Namespace, setup: RunSetup, config: SLSAMConfig, section: Mapping[str, Any]
) -> Estimate:
    """What the run that the flags describe will take.

    Args:
        given: The flags.
        setup: What `read_setup` has made of them, in three parts.
        config: The knobs.
        section: DeepSpeed's on ZeRO.

    Raises:
        UsageError: A model that cannot be used, or not with these.
    """
    counted, model, run = _count(given, setup, config, section)
    with refusals(ValueError):
        modes = compare(counted, setup, config)
    return Estimate(model=model, run=run, counted=counted, setup=setup, config=config, modes=modes)


def _count(
    given: argparse.Namespace, setup: RunSetup, config: SLSAMConfig, section: Mapping[str, Any]
) -> tuple[Counted, str, str]:
    """What a micro-batch takes, and the lines that say what was counted."""
    # Here, because they import transformers' models, for which --help need not wait.
    from slsam_ds.cli.adapters import add_lora
    from slsam_ds.cli.models import choose_max_length
    from slsam_ds.cli.weightless import WeightlessEngine, build_weightless, forward_of

    model = build_weightless(given.model, DTYPES[setup.precision])
    length = choose_max_length(given.sequence_length, model, flag="--sequence_length")
    name = type(model).__name__
    if given.peft == "lora":
        if not name.endswith(("ForCausalLM", "LMHeadModel")):
            raise UsageError(f"--peft lora: {name} is not a causal language model; estimate it whole")
        with torch.device("meta"):
            model = add_lora(
                model, ModelArguments(lora_r=given.lora_r, lora_target_modules=given.lora_target_modules)
            ).to(DTYPES[setup.precision])

    def checkpoint(again: contextlib.AbstractContextManager[Any]) -> None:
        context: dict[str, Any] = {"context_fn": lambda: (contextlib.nullcontext(), again)}
        model.gradient_checkpointing_enable({"use_reentrant": False, **context})
        model.disable_input_require_grads()  # as `SLSAMTrainer` does

    with refusals(ValueError, NotImplementedError, RuntimeError, prefix=f"--model {given.model}: "):
        layers = map_layers(model, config)
        counted = count(
            WeightlessEngine(model, layers),
            model,
            layers,
            forward_of(model, given.micro_batch_size, length),
            keeps_inputs=setup.engine == "zero3" and section.get("memory_efficient_linear", True),
            checkpoint=checkpoint if given.gradient_checkpointing else None,
        )
    engine = "FSDP2" if setup.engine == "fsdp2" else f"ZeRO-{setup.engine[-1]}"
    ranks = f"{setup.world_size} rank{'s' if setup.world_size > 1 else ''}"
    takes_tokens = model.main_input_name == "input_ids"
    samples = f"{given.micro_batch_size} x {length} tokens" if takes_tokens else f"{given.micro_batch_size} images"
    window = f"{setup.num_micro_batches} micro-batches of {samples}" if setup.num_micro_batches > 1 else samples
    checkpointed = ", gradient checkpointing" if given.gradient_checkpointing else ""
    return (
        counted,
        f"{given.model}: {name}, {counted.total:,} weights, {counted.trained:,} of them trained",
        f"{engine} on {ranks}, {window} each, {setup.precision}{checkpointed}",
    )


def _as_text(estimate: Estimate) -> str:
    counted, modes, config = estimate.counted, estimate.modes, estimate.config
    num_arms = len(counted.numels)
    perturbed, updated = modes[-1].num_perturbed, modes[-1].num_active
    active = f"{updated:.3g} of {num_arms} layers per step"
    if config.rho > 0 and (config.perturb, config.update) != ("sample", "sample"):
        active = f"perturbs {perturbed:.3g} and updates {updated:.3g} of {num_arms} layers per step, by a sample"
    if config.budget is not None:
        how = f"drawn to meet a budget of {config.budget:g}; as it learns, a bandit moves within it"
    elif config.selector == "all":
        how = "all of them"
    elif config.selector == "cyclic":
        how = "in turn"
    elif config.selector == "uniform":
        how = "every choice as likely"
    elif config.selector == "depth":
        how = "a lowest one and all above it"
    else:
        how = f"every choice as likely, as {config.selector} starts; as it learns it moves within the last column"
    return "\n\n".join(
        [
            f"Model: {estimate.model}\nRun:   {estimate.run}\nSL-SAM: rho {config.rho:g}, {active}: {how}",
            layer_table(counted),
            mode_table(modes),
            _NOTES,
        ]
    )


def _as_json(estimate: Estimate) -> str:
    counted = estimate.counted
    layers = [
        {"index": index, "name": name, "numel": numel}
        for index, (name, numel) in enumerate(zip(counted.names, counted.numels, strict=True))
    ]
    return json.dumps(
        {
            "setup": dataclasses.asdict(estimate.setup),
            "weights": {"total": counted.total, "trained": counted.trained},
            "layers": layers,
            "modes": [dataclasses.asdict(mode) for mode in estimate.modes],
        },
        indent=2,
    )
