"""Knobs whose values are names, some of them with an argument: `"always"`, or `{"every": 4}`.

A member is a class with two attributes: `takes` describes its argument (None: it has none), and `accepts` tells whether
an argument will do. A new member is a class in a file of its own and one entry in the mapping of its room.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar


class Member(Protocol):
    """What `read_choice` asks of a class."""

    takes: ClassVar[str | None]

    @staticmethod
    def accepts(argument: Any) -> bool:
        """Whether the member can be made with this argument."""
        ...


M = TypeVar("M", bound=Member)


def is_number(argument: Any) -> bool:
    """Whether it is an integer or a float: a bool is neither."""
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def read_choice(value: Any, members: Mapping[str, type[M]]) -> tuple[type[M], Any]:
    """The member that a knob's value names, and its argument.

    Args:
        value: A name, or a mapping of one name to an argument.
        members: By name.

    Raises:
        ValueError: Saying what is allowed.
    """
    named = {value: None} if isinstance(value, str) else value
    if isinstance(named, Mapping) and len(named) == 1:
        ((name, argument),) = named.items()
        member = members.get(name)
        if member is not None:
            plain = isinstance(value, str)
            if plain if member.takes is None else not plain and member.accepts(argument):
                return member, argument
    raise ValueError(f"expected {allowed(members)}")


def allowed(members: Mapping[str, type[M]]) -> str:
    """Every value that a knob may have, in words."""
    shown = [f'"{name}"' if each.takes is None else f'{{"{name}": {each.takes}}}' for name, each in members.items()]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
