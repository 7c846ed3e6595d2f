"""Docstrings as they are written in the package: Google style, with code in Markdown's backticks and fences."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.roles import XRefRole
from typing_extensions import is_protocol

from slsam_ds import SLSAMConfig

_FENCE = "```"
_NAPOLEON = Config(napoleon_use_ivar=True, napoleon_attr_annotations=True)

_DEFAULTS = {f"slsam_ds.SLSAMConfig.{knob.name}": knob.default for knob in dataclasses.fields(SLSAMConfig)}
"""Of the configuration's fields. Its class has slots, where autodoc finds no defaults."""


class _Docstring(GoogleDocstring):
    """Types are in the annotations: what a section on the returned value says up to its first colon is none."""

    def _consume_returns_section(self, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
        lines = self._dedent(self._consume_to_next_section())
        return [("", "", lines)] if lines else []


class CodeRole(XRefRole):
    """What stands in single backticks: code, and a link where it names something of this site."""

    def process_link(
        self, env: BuildEnvironment, refnode: nodes.Element, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        refnode.attributes.update(
            {key: env.ref_context.get(key) for key in ("py:module", "py:class")},
            refdomain="py",
            reftype="obj",
            may_be_missing=True,
        )
        return title, target


def code_without_link(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.Node
) -> nodes.Node | None:
    """Of what names nothing of this site, the code alone."""
    return shown if node.get("may_be_missing") else None


def read_docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """From Google style and Markdown to reStructuredText.

    Not by napoleon's own hook, which takes what an attribute's docstring says up to its first colon for a type.
    """
    kind = "object" if what in ("attribute", "data", "property") else what
    lines[:] = _Docstring(list(_fences_as_blocks(lines)), _NAPOLEON, app, kind, name, thing, options).lines()
    if name in _DEFAULTS:
        lines += ["", f"Default: ``{_DEFAULTS[name]!r}``", ""]


def _fences_as_blocks(lines: list[str]) -> Iterator[str]:
    """Fences become blocks of code."""
    inside = False
    for line in lines:
        indentation, mark, language = line.partition(_FENCE)
        if not mark or indentation.strip():
            yield f"   {line}" if inside else line
            continue
        inside = not inside
        if inside:
            yield f"{indentation}.. code-block:: {language or 'text'}"
        yield ""


def shorten_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, None] | None:
    """None of a protocol, which is not called, nor of a dataclass, whose fields are all described below it."""
    if what != "class" or not (is_protocol(thing) or dataclasses.is_dataclass(thing)):
        return None
    return "(**knobs)" if thing is SLSAMConfig else "", None


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_role("code-or-link", CodeRole())
    app.config.default_role = "code-or-link"
    app.connect("missing-reference", code_without_link)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-process-signature", shorten_signature)
    return {"parallel_read_safe": True}
