"""What the doctor has found, one thing at a time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing.

    Attributes:
        verdict: "ok"; "note": it works, and there is something to know; "problem": it will not work.
        what: It is, on one line.
        remedy: What to do; empty where there is nothing.
    """

    verdict: Verdict
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<7}  {self.what}" + (f"; {self.remedy}" if self.remedy else "")


def any_problem(findings: Sequence[Finding]) -> bool:
    """Whether something will not work."""
    return any(finding.verdict == "problem" for finding in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each, and one that counts them."""
    counts = Counter(finding.verdict for finding in findings)
    told = [f"{counts[kind]} {kind}{'s' if counts[kind] > 1 else ''}" for kind in ("problem", "note") if counts[kind]]
    return "\n".join([*map(str, findings), "", ", ".join(told) or "no problems"])
