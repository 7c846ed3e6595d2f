"""What two runs of the same training must have written alike."""

from collections.abc import Iterable, Mapping
from typing import Any


def without_times(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of `slsam_steps.jsonl` less how long things took."""
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in records]
