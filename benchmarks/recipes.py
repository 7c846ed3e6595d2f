"""`python -m benchmarks.recipes`: what each preset computes and costs, into docs/recipes.md.

Prices are those that steps on a random Llama of equal blocks record. They do not depend on the machine. Learning is
compared in docs/evidence.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from slsam_ds import SLSAM, SLSAMConfig, StepResult
from slsam_ds.recipes import RECIPES, Recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
NUM_STEPS, NUM_BLOCKS, WIDTH, NUM_SAMPLES, LENGTH = 30, 16, 32, 4, 16

_READ = {
    "code": "code",
    "abstract": "the abstract",
    "formula alone": "neither text nor code",
    "own": "ours",
}


def make(knobs: dict[str, Any]) -> SLSAM:
    """SL-SAM around a fresh model, the same each time. Embeddings and head are small beside the blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        attn_implementation="eager",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return SLSAM(model, optimizer, SLSAMConfig.from_dict(knobs), total_steps=NUM_STEPS)


def batch(step: int) -> dict[str, Tensor]:
    """Random tokens."""
    tokens = torch.randint(0, 64, (NUM_SAMPLES, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens}


def take_steps(knobs: dict[str, Any]) -> list[StepResult]:
    """What the steps did."""
    slsam = make(knobs)
    return [slsam.step([batch(step)]) for step in range(1, NUM_STEPS + 1)]


def row(name: str, recipe: Recipe) -> str:
    """A row of the table."""
    results = take_steps({"preset": name})
    price = mean(result.price for result in results if result.price is not None)
    numels = make({"preset": name}).layers.numels
    updated, perturbed = (share(results, numels, who) for who in ("active", "perturbed"))
    read = _READ[recipe.read]
    formula = recipe.formula.replace("|", "\\|")
    return f"| `{name}` | {formula} | {price:.2f} | {perturbed} | {updated} | {recipe.source} | {read} |"


def share(results: Sequence[StepResult], numels: Sequence[int], who: str) -> str:
    """Share of the weights that took part, on average over the steps."""
    return f"{mean(sum(numels[arm] for arm in getattr(each, who)) for each in results) / sum(numels):.0%}"


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    cells = [row(name, recipe) for name, recipe in RECIPES.items()]
    training = [
        f"- `{name}`: `{json.dumps(dict(recipe.training))}`" for name, recipe in RECIPES.items() if recipe.training
    ]
    page = _PAGE.format(num_steps=NUM_STEPS, num_blocks=NUM_BLOCKS, rows="\n".join(cells), training="\n".join(training))
    PAGE.write_text(page, encoding="utf-8")


_PAGE = """# Recipes

`python -m benchmarks.recipes` writes this page; do not edit it. `python -m slsam_ds.recipes NAME` prints one recipe in
full.

Select a recipe by `--slsam preset=NAME`, or by `"slsam": {{"preset": "NAME"}}` in the DeepSpeed JSON. Settings given
beside it take precedence. g is the gradient at the weights, and h is the gradient at the perturbed weights; g' and h'
are those of a part of the window. P is the set of arms that are perturbed, and U is the set that is updated. An arm is
a block, the embeddings, the head, or a single tensor (`granularity: tensor`).

The price is the number of FLOPs relative to a step of AdamW, as `slsam_steps.jsonl` records it. It is the mean of
{num_steps} steps on a random Llama of {num_blocks} equal blocks. P and U are mean shares of the weights.
`tests/distributed/test_presets.py` runs every recipe on every engine. The choices that a recipe consists of are
compared with a plain reference on every engine (`test_choices.py`, `test_paper.py`). The last column says which part of
the source was read. If neither its text nor its code was read, the recipe is named after its formula.

| preset | what a step computes | price | P | U | source | read |
|---|---|---|---|---|---|---|
{rows}

## Methods without a preset

| method | nearest here | what is missing |
|---|---|---|
| LookSAM (Liu et al. 2022) | `every_fifth` | it adds the part of the last ascent that is orthogonal to the gradient |
| AE-SAM (Jiang et al. 2023) | `when_steep` | the same step's gradient decides, and the threshold falls over the run |
| ESAM (Du et al. 2022) | `tensors_at_random` | it descends only on the samples whose loss rises most |
| Asynchronous SAM (arXiv 2503.11147) | `previous_gradient` | its text and code were not read |
| mu-P2 (Haas et al. 2024) | `by_layer` | its text and code were not read |
| LightSAM | `adam_geometry` | its text and code were not read |
| GCSAM | none | it centres gradients by rows of matrices, which flat shards do not keep |
| GSAM, WSAM, bSAM | none | not implemented |

## Settings of the authors

The presets do not set these. Pass them to the trainer.

{training}
"""


if __name__ == "__main__":
    main()
