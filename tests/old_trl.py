"""TRL 0.24 beside transformers from 5.4: asked whether a package is there, it answers with a pair, always true."""

from importlib import metadata
from typing import Any


class Answer(tuple):
    """The pair, as true as its first part."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return bool(self[0])


def answer_old_trl() -> None:
    """Before TRL below 1.0 is imported: have it find what is installed, and nothing else, as LLaMA-Factory does."""
    try:
        if not metadata.version("trl").startswith("0."):
            return
    except metadata.PackageNotFoundError:  # in the Python that makes the environments
        return
    from transformers.utils import import_utils

    ask = import_utils._is_package_available

    def answer(*args: Any, **kwargs: Any) -> Any:
        found = ask(*args, **kwargs)
        return Answer(found) if isinstance(found, tuple) else found

    import_utils._is_package_available = answer
