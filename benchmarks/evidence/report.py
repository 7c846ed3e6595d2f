"""The report: tables and pictures of all runs there are, in one Markdown file."""

from collections import Counter
from pathlib import Path

from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.runs import FILE, Run, Runs
from benchmarks.evidence.study import OFFERED
from benchmarks.evidence.tables import has_knobs, knobs_table, layers_table, methods_table, tuning_table, verdicts
from benchmarks.evidence.tasks import TASKS, Task

REPORT = "README.md"

_METHODS = "\n".join(f"- `{method.name}`: {method.title}" for method in METHODS.values())

_INTRODUCTION = f"""# Evidence

Written by `python -m benchmarks.evidence` (`make evidence`); do not edit. Every run is a line of [`{FILE}`]({FILE}).
A row's runs are made again, its learning rate tuned anew, by

<!-- test: skip takes hours -->
```bash
python -m benchmarks.evidence --tasks TASK --methods METHOD --stages tune final --output outputs/mine
python -m benchmarks.evidence --tasks TASK --methods METHOD --base METHOD --stages tune knobs --knobs KNOB \\
    --output outputs/mine
```

where KNOB is what the first column of a table of knobs says, and METHOD one of these, here with what tables call it:

{_METHODS}

Every method has its own learning rate: of its task's grid the best by validation loss, after one run each (with `*`:
the grid's smallest or largest). Final runs are judged once, by test data. Losses are cross-entropies in nats; ± is the
standard error over seeds; differences are taken seed by seed. FLOPs are of whole runs, by the price list that
`slsam_ds` counts; time is wall clock of the steps, against AdamW's run of the same seed, median. The rise along the
gradient is that of the loss of some test samples (64; 4 of a language model's) at radius 0.05; in random directions,
at radius 0.5; both in float32.

Here are real models in short runs. A study of small models in long runs asks whether recipes learn as well as dense SAM
where that can be seen: its rules are in [`RULES.md`](RULES.md). `make evidence-screen` and `make evidence-frontier`
make its runs and write `screen.md` and `frontier.md` beside this page.
"""


def write_report(folder: Path, runs: Runs) -> Path:
    """Report and pictures.

    Returns:
        The report's path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from benchmarks.evidence.figures import draw_curves

    parts = [_INTRODUCTION, "## The defaults and the presets\n\n" + verdicts(runs)]
    for name, task in TASKS.items():
        tuned, finals = runs.of("tune", name), runs.of("final", name)
        if not tuned:
            continue
        setup = f"{task.steps} steps of {task.batch} samples{_precision(task)}"
        parts.append(f"## {name}: {task.title}\n\n{setup}. {_machines(tuned + finals)}")
        parts.append("Validation loss at each learning rate, one run each:\n\n" + tuning_table(runs, name))
        if finals:
            picture = f"{name}.png"
            draw_curves(folder / picture, runs, name)
            parts += [methods_table(runs, name), f"![{picture}]({picture})"]
            parts.append("Which layers were updated, as shares of all draws:\n\n" + layers_table(runs, name))
        for base in OFFERED:
            if has_knobs(runs, name, base):
                title = METHODS[base].title
                parts.append(f"{title}: one knob turned, on validation data:\n\n" + knobs_table(runs, name, base))
    path = folder / REPORT
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return path


def _precision(task: Task) -> str:
    return ", autocast to bfloat16" if task.in_bfloat16 else ", float32"


def _machines(runs: list[Run]) -> str:
    machines = Counter(run.found["machine"] for run in runs)
    return "; ".join(f"{count} runs on {machine}" for machine, count in machines.items())
