"""Members of enums in pickles, which must be read without letting the pickle run code."""

import enum
import pickle
from typing import Any


def enum_member(kind: Any, name: Any) -> enum.Enum:
    """Stands in for `getattr` in a restricted unpickler.

    Python 3.11.0 to 3.11.3 pickle a member as `getattr(TheEnum, "MEMBER")`, all others as `TheEnum(value)`.

    Args:
        kind: The enum.
        name: The name of one of its members.

    Raises:
        pickle.UnpicklingError: It is something else.
    """
    if isinstance(kind, enum.EnumType) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"Unsupported global: GLOBAL builtins.getattr of {kind!r}, which is no enum's member")
