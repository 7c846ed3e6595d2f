"""Input of every kind, good and damaged: it is accepted, or refused with one sentence; nothing else may happen.

`python -m tests.bad_inputs --examples 1000` counts; `tests/unit/test_bad_inputs.py` tries some of each kind.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slsam_ds.cli.arguments import DataArguments
from slsam_ds.cli.command_line import quieten
from slsam_ds.cli.estimate_arguments import parse_flags, read_setup
from slsam_ds.cli.finetune import read_samples
from slsam_ds.cli.refusal import UsageError
from slsam_ds.cli.rows import Rows
from slsam_ds.cli.settings import read_settings
from slsam_ds.config import SLSAMConfig
from slsam_ds.integrations.checkpoints import check_complete, last_complete_checkpoint
from slsam_ds.model.layers import map_layers
from slsam_ds.records.files import STEPS_FILE, StepWriter, read_steps
from slsam_ds.report import command as report
from slsam_ds.report.history import read_history
from slsam_ds.selectors import make_selector
from slsam_ds.slsam import SLSAM
from slsam_ds.state.files import check_contents, check_state, read_state
from tests import bad_input_strategies as strategies
from tests.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

_LIMIT = 20.0  # seconds of computing: what takes longer is as good as hung

Outcome = Literal["accepted", "refused"]


class BrokenError(AssertionError):
    """Neither accepted nor refused with one sentence that names what was given."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of input.

    Attributes:
        examples: What to try.
        use: Puts an example to its use, in an empty folder.
        refusals: How it may refuse.
        names: What a refusal may name, of the example.
    """

    examples: st.SearchStrategy[Any]
    use: Callable[[Any, Path], None]
    refusals: tuple[type[Exception], ...]
    names: Callable[[Any], Iterable[str]]


def attempt(kind: str, example: Any) -> Outcome:
    """Use an example as a run would.

    Raises:
        BrokenError: It ended in any other way than it should.
    """
    how = KINDS[kind]
    here = os.getcwd()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ), contextlib.ExitStack() as stack:
        stack.callback(os.chdir, here)
        os.chdir(folder)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            with _limited():
                how.use(example, Path(folder))
        except how.refusals as error:
            sentence = str(error)
        except SystemExit as error:  # of argparse, which prints how the command is used, and then the sentence
            if error.code in (0, None):
                return "accepted"
            if error.code != 2:
                raise BrokenError(f"exit code {error.code!r}") from error
            sentence = printed.getvalue().strip("\n").split("\n")[-1]
        except Exception as error:
            raise BrokenError(f"{type(error).__name__}: {error}") from error
        else:
            return "accepted"
    if not sentence.strip() or len(sentence.splitlines()) != 1:
        raise BrokenError(f"not one line: {sentence!r}")
    if not any(name and name in sentence for name in how.names(example)):
        raise BrokenError(f"does not name what was given: {sentence!r}")
    return "refused"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Within, computing for too long raises. By its own timer: pytest-timeout has the one of the wall clock."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"hung: computes for more than {_LIMIT:g} seconds")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


# What becomes of an example


def _use_block(example: Any, folder: Path) -> None:
    block, assignments = example
    config = SLSAMConfig.from_dict(block) if assignments is None else SLSAMConfig.from_assignments(assignments, block)
    assert SLSAMConfig.from_dict(config.to_dict()) == config
    if config.budget is None:
        make_selector(config, 6, total_steps=10).sample(1)


def _use_layers(example: strategies.ModelExample, folder: Path) -> None:
    config = SLSAMConfig(layers=example.patterns, other_parameters=example.other_parameters)
    layer_map = map_layers(example.build(), config)
    layer_map.fingerprint()
    make_selector(config, len(layer_map))


def _use_files(example: strategies.DataExample, folder: Path) -> None:
    for name, content in example.files.items():
        (folder / name).write_bytes(content)
    data = DataArguments(train_file=[str(folder / name) for name in example.files], **example.columns)
    samples, _ = read_samples(data)
    encode = samples.encoder(tiny_tokenizer(chat_template=CHAT_TEMPLATE if example.has_template else None), 64)
    for located in Rows.read(samples.rows.shards):
        encode(located["row"], located["where"])


def _use_command(example: strategies.CommandExample, folder: Path) -> None:
    example.write(folder)
    read_settings(example.argv)


def _use_estimate(example: strategies.CommandExample, folder: Path) -> None:
    example.write(folder)
    read_setup(parse_flags(example.argv))


def _use_report(example: strategies.CommandExample, folder: Path) -> None:
    example.write(folder)
    with mock.patch.object(report, "write_report"):
        sys.exit(report.main(example.argv))


def _use_checkpoint(example: strategies.CheckpointExample, folder: Path) -> None:
    checkpoint = folder / "checkpoint-3"
    example.write(checkpoint)
    last_complete_checkpoint(folder)  # whatever is wrong, it only looks for an older one
    check_complete(checkpoint)
    model = strategies.saved_model()
    slsam = SLSAM(model, torch.optim.AdamW(model.parameters()), strategies.SAVED_KNOBS)
    check_state(checkpoint, slsam.layers, slsam.config, {})
    check_contents(checkpoint, rank=0, num_ranks=1)
    slsam.load_state_dict(read_state(checkpoint))
    slsam.selector.sample(slsam.num_steps + 1)
    flags = ["--use_cpu", "--bf16", "False", "--output_dir", str(folder), "--max_steps", "9"]
    with contextlib.suppress(UsageError):
        read_settings([*flags, "--resume_from_checkpoint", "true"])
    read_settings([*flags, "--resume_from_checkpoint", str(checkpoint)])


def _use_records(example: bytes, folder: Path) -> None:
    strategies.write_records(folder, example)
    StepWriter(folder / "resumed", first_step=1).close()
    report.describe(read_history(folder))


def _resume_records(example: bytes, folder: Path) -> None:
    (folder / STEPS_FILE).write_bytes(example)
    StepWriter(folder, first_step=3).close()
    assert [record["step"] for record in read_steps(folder)] in ([], [1], [2], [1, 2])


KINDS: dict[str, Kind] = {
    "config block": Kind(strategies.blocks(), _use_block, (ValueError,), strategies.names_of_block),
    "layer map": Kind(strategies.models(), _use_layers, (ValueError,), lambda example: ("slsam.layers", "Root")),
    "data file": Kind(strategies.data_files(), _use_files, (UsageError,), lambda example: example.files),
    "launch/train.py": Kind(strategies.commands(), _use_command, (UsageError,), strategies.names_of_command),
    "slsam_ds.estimate": Kind(strategies.estimates(), _use_estimate, (UsageError,), strategies.names_of_estimate),
    "slsam_ds.report": Kind(strategies.reports(), _use_report, (), strategies.names_of_report),
    "checkpoint": Kind(
        strategies.checkpoints(), _use_checkpoint, (ValueError, UsageError), lambda example: ("checkpoint-3",)
    ),
    "step records": Kind(strategies.records(), _use_records, (ValueError,), lambda example: (STEPS_FILE,)),
    "step records, resumed": Kind(strategies.records(), _resume_records, (), lambda example: ()),
}


def trying(num_examples: int) -> settings:
    """The same examples every time; none is made smaller, none is kept."""
    return settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def count(examples: int) -> dict[str, dict[str, int]]:
    """Try so many examples of each kind: how many were accepted, refused, and broken. Prints those."""
    return {kind: _count(kind, examples) for kind in KINDS}


def _count(kind: str, examples: int) -> dict[str, int]:
    quieten()
    tally = Counter(tried=0, accepted=0, refused=0, broken=0)

    @trying(examples)
    @given(KINDS[kind].examples)
    def one(example: Any) -> None:
        tally["tried"] += 1
        try:
            tally[attempt(kind, example)] += 1
        except BrokenError as error:
            tally["broken"] += 1
            print(f"{kind}: {str(error)[:500]}\n    of {repr(example)[:1000]}", file=sys.stderr, flush=True)

    one()
    return dict(tally)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: a table of counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.bad_inputs", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    given_flags = parser.parse_args(argv)
    print("| input | tried | accepted | refused | broken |\n|---|---|---|---|---|", flush=True)
    num_broken = 0
    for kind in given_flags.kinds:
        tally = _count(kind, given_flags.examples)
        num_broken += tally["broken"]
        print(f"| {kind} | {' | '.join(str(number) for number in tally.values())} |", flush=True)
    return min(num_broken, 1)


if __name__ == "__main__":
    sys.exit(main())
