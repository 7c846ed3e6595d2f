"""Odd values, and damage to bytes and JSON values, for tests that generate bad input."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

# Numbers that float, int, JSON or NumPy cannot hold; texts that are no UTF-8, of several lines, or look like a number.
_ODD_NUMBERS = [0, -1, 2**63, 10**400, 0.0, -0.5, 1e308, float("inf"), float("nan")]
ODD_TEXTS = [
    "",
    " ",
    "\n",
    "a\nb",
    "\ud800",
    "\x85",
    "\u2028",
    "nan",
    "1e999",
    "9" * 5000,
    "null",
    "~nobody/x",
    "x" * 5000,
]
_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(_ODD_NUMBERS)
    | st.sampled_from(ODD_TEXTS)
)  # fmt: skip
values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
DEEP = "[" * 100_000


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """As it is, cut off, with some bytes changed or put in, in another encoding, or something else altogether."""
    how = draw(st.sampled_from(["none", "cut", "flip", "insert", "bom", "utf-16", "nul", "other", "empty", "twice"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    match how:
        case "cut":
            return content[:place]
        case "flip" if content:
            return content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
        case "insert":
            return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
        case "bom":
            return b"\xef\xbb\xbf" + content
        case "utf-16":
            return content.decode("utf-8", "replace").encode("utf-16", "replace")
        case "nul":
            return content[:place] + bytes(100)
        case "other":
            return draw(st.binary(max_size=60) | st.sampled_from([b"5", b"null", b"{}", b"[]", DEEP.encode()]))
        case "empty":
            return b""
        case "twice":
            return content + content
    return content


@st.composite
def damaged_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON value of which one part is another one, missing, or in a place of its own."""
    tree = copy.deepcopy(tree)
    node = tree
    while isinstance(node, (dict, list)) and node:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if draw(st.booleans()) and isinstance(node[key], (dict, list)) and node[key]:
            node = node[key]
            continue
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                node[key] = draw(values)
            case "remove":
                del node[key]
            case "add" if isinstance(node, dict):
                node[draw(st.text(max_size=5) | st.sampled_from(["a\nb", f"{key}s"]))] = draw(values)
        return tree
    return draw(values)


@st.composite
def damaged_json(draw: st.DrawFn, tree: Any) -> bytes:
    """A JSON value as a file, damaged as text or as a value."""
    if draw(st.booleans()):
        return draw(damaged_bytes(json.dumps(tree).encode()))
    return dump(draw(damaged_tree(tree))).encode()


def dump(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "9" * 5000
