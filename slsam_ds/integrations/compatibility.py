"""What the supported versions of transformers and datasets do differently, each difference in one function.

Where one way is right with all of them, it is taken, and no version is asked for. Imports nothing that takes seconds.
"""

from importlib import metadata

from packaging import version


def checkpointing_flag() -> str:
    """What `TrainingArguments` calls activation checkpointing; from 5.23 on the older name is deprecated."""
    return "activation_checkpointing" if _is_from("transformers", "5.23") else "gradient_checkpointing"


def named_in_cache(name: str) -> dict[str, str]:
    """How `Dataset.from_generator` is told the name of what it makes; before 4.3, it is a hash of all arguments."""
    return {"fingerprint": name} if _is_from("datasets", "4.3") else {}


def _is_from(package: str, first: str) -> bool:
    return version.parse(metadata.version(package)) >= version.parse(first)
