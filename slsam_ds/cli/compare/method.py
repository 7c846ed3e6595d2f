"""What is compared: a name on the command line, and the knobs that it stands for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slsam_ds.config import SLSAMConfig
from slsam_ds.recipes import RECIPES
from slsam_ds.sentences import did_you_mean

ADAMW = "adamw"
DEFAULTS = "defaults"
_PLAIN = ("selector=all", "rho=0")
"""Every layer in every step and no ascent: the engine's own optimizer step (`tests/integration/test_reports.py`)."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        name: Of its folder, and in tables.
        assignments: What `--slsam` is given.
    """

    name: str
    assignments: tuple[str, ...]

    @classmethod
    def read(cls, text: str, shared: Sequence[str] = ()) -> "Method":
        """Read one argument of the command line.

        Args:
            text: "adamw", "defaults", a preset, or KEY=VALUE[,KEY=VALUE ...].
            shared: `--slsam` of the training flags: for every method but AdamW, which has no knobs.

        Raises:
            ValueError: There is no such method, or its knobs are bad.
        """
        if text == ADAMW:
            return cls(text, _PLAIN)
        if text == DEFAULTS:
            own: tuple[str, ...] = ()
        elif text in RECIPES:
            own = (f"preset={text}",)
        elif "=" in text:
            own = tuple(text.split(","))
        else:
            allowed = f"give {ADAMW}, {DEFAULTS}, a preset that `slsam recipes` shows, or KEY=VALUE[,KEY=VALUE ...]"
            hint = did_you_mean(text, [ADAMW, DEFAULTS, *RECIPES], allowed)
            raise ValueError(f"{text}: no such method; {hint}")
        SLSAMConfig.from_assignments([*shared, *own])
        words = [*([] if text == DEFAULTS and shared else [text]), *shared]
        return cls(re.sub(r"[^\w.=,+-]+", "_", ",".join(words)), (*shared, *own))
