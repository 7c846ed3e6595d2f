"""What the update descends along, made of the gradients of both passes.

A new combination is a file with a subclass of `Combination` and an entry in `COMBINATIONS`.
"""

from collections.abc import Mapping
from typing import Any

from slsam_ds.choices import read_choice
from slsam_ds.combinations.combination import Combination
from slsam_ds.combinations.corrected import Corrected
from slsam_ds.combinations.mixed import Mixed
from slsam_ds.combinations.perturbed import Perturbed
from slsam_ds.combinations.renormalised import Renormalised

__all__ = ["COMBINATIONS", "Combination", "make_combination"]

COMBINATIONS: Mapping[str, type[Combination]] = {
    "perturbed": Perturbed,
    "renormalised": Renormalised,
    "mixed": Mixed,
    "corrected": Corrected,
}
"""The values of the knob `descend_along`."""


def make_combination(value: Any) -> Combination:
    """The combination that `descend_along` names.

    Raises:
        ValueError: A value that is not allowed.
    """
    member, argument = read_choice(value, COMBINATIONS)
    return member(argument)
