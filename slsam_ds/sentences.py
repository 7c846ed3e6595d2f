"""What is said to the user in one sentence: that input cannot be used, and what was probably meant."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any

EXIT_CODE = 2  # what argparse returns on a usage error


def refuse(sentence: str) -> int:
    """Print on stderr, on one line, why a command cannot use its input; returns the command's exit code."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return EXIT_CODE


def did_you_mean(given: Any, known: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6) -> str:
    """Ask whether the nearest known name was meant.

    Args:
        given: What the user wrote.
        known: What is allowed.
        otherwise: What to say where nothing is near.
        cutoff: How near it must be: 1 is the same.
    """
    near = difflib.get_close_matches(given, known, n=1, cutoff=cutoff) if isinstance(given, str) else []
    return f"did you mean {near[0]}?" if near else otherwise
