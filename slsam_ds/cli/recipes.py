"""`slsam recipes`: the presets in a table, or one of them in full."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from slsam_ds.cli.estimate import main as estimate
from slsam_ds.recipes import RECIPES, Recipe
from slsam_ds.sentences import did_you_mean, refuse

_READ = {
    "code": "its code was read",
    "abstract": "its abstract was read",
    "formula alone": "neither its text nor its code was read",
    "own": "of this project",
}


_LEGEND = """
g is the gradient at the weights, and h the gradient at the perturbed weights; g' and h' are those of a part of the
window. eps is the perturbation. P is the set of layers that are perturbed, and U the set that is updated.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2, after one sentence on stderr, where there is no such preset.
    """
    parser = argparse.ArgumentParser(
        prog="slsam recipes",
        description="Show the presets: published methods and our own, each a set of settings under one name. Without "
        "NAME, list all of them.",
        epilog="To use a preset, give --slsam preset=NAME or the JSON that is printed. Measured costs are in "
        "docs/recipes.md.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="Show this preset in full.")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="With NAME: also estimate its steps on this model, as slsam estimate does.",
    )
    given = parser.parse_args(argv)
    if given.name is None:
        if given.model is not None:
            parser.error("--model needs NAME: name the preset to estimate")
        print(_table(), _LEGEND, sep="\n", end="")
        return 0
    if given.name not in RECIPES:
        return refuse(f"{given.name}: no such preset; {did_you_mean(given.name, RECIPES, 'slsam recipes lists them')}")
    print(_in_full(given.name, RECIPES[given.name]))
    if given.model is None:
        return 0
    print()
    return estimate(["--model", given.model, "--slsam", f"preset={given.name}"])


def _table() -> str:
    longest = max(map(len, RECIPES))
    return "\n".join(f"{name:<{longest}}  {recipe.formula}" for name, recipe in RECIPES.items())


def _in_full(name: str, recipe: Recipe) -> str:
    lines = [f"{name}: {recipe.formula}", f"Source: {recipe.source} ({_READ[recipe.read]})", ""]
    lines += ["The block of a DeepSpeed JSON, or of SLSAM_CONFIG without its outer key:", ""]
    lines.append(json.dumps({"slsam": {"preset": name}}))
    lines += ["", "which stands for", "", json.dumps({"slsam": dict(recipe.knobs)}, indent=2)]
    if recipe.training:
        flags = (f"--{flag} {_written(value)}" for flag, value in recipe.training.items())
        lines += ["", "Its authors train with " + " ".join(flags)]
    return "\n".join(lines)


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
