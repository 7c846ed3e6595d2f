"""The report as one HTML file that needs no other: pictures are inside, and there is no script."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from slsam_ds.report.facts import Fact
from slsam_ds.report.tables import Table


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture in every form that the page may choose from, as PNG.

    Attributes:
        title: What it shows.
        caption: How to read it.
        light: For a light background.
        dark: For a dark one.
        wide_light: The same across the whole page, where there is room for it; None: it takes half of it.
        wide_dark: And for a dark background.
    """

    title: str
    caption: str
    light: bytes
    dark: bytes
    wide_light: bytes | None = None
    wide_dark: bytes | None = None


def build_page(
    title: str,
    subtitle: str,
    facts: Iterable[Fact],
    pictures: Sequence[Picture],
    tables: Iterable[Table],
    notes: Iterable[str],
    *,
    introduction: str = "",
    tables_first: bool = False,
    refresh: float | None = None,
) -> str:
    """The whole page. Names that came from a model or a folder are escaped.

    Args:
        title: The heading.
        subtitle: The line below it.
        facts: Tiles at the top.
        pictures: Two in a row, or one that takes all of it.
        tables: Below the pictures.
        notes: Small print at the end.
        introduction: What one has to know to read the page.
        tables_first: The tables stand above the pictures.
        refresh: Seconds after which a browser loads the page again; None: it does not.
    """
    tiles = "".join(
        f"<div class=tile><dt>{escape(fact.label)}</dt><dd><b>{escape(fact.value)}</b> {escape(fact.note)}</dd></div>"
        for fact in facts
    )
    parts = [f"<div class=pictures>{''.join(map(_figure, pictures))}</div>", *map(_table, tables)]
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>",
        f"<p class=introduction>{escape(introduction)}</p>" if introduction else "",
        f"<dl class=tiles>{tiles}</dl>" if tiles else "",
        *([*parts[1:], parts[0]] if tables_first else parts),
        *(f"<p class=note>{escape(note)}</p>" for note in notes),
    ]
    reload = "" if refresh is None else f'<meta http-equiv="refresh" content="{max(round(refresh), 1)}">\n'
    return _PAGE.format(title=escape(title), reload=reload, style=_STYLE, body="\n".join(body))


def _figure(picture: Picture) -> str:
    sources = ""
    default = picture.light
    if picture.wide_light is not None and picture.wide_dark is not None:
        narrow = "(max-width: 760px)"
        sources += _source(f"{narrow} and (prefers-color-scheme: dark)", picture.dark)
        sources += _source(narrow, picture.light)
        sources += _source("(prefers-color-scheme: dark)", picture.wide_dark)
        default = picture.wide_light
    else:
        sources += _source("(prefers-color-scheme: dark)", picture.dark)
    kind = ' class="wide"' if picture.wide_light is not None else ""
    return (
        f"<figure{kind}><h2>{escape(picture.title)}</h2><picture>{sources}"
        f'<img src="{_inline(default)}" alt="{escape(picture.title)}"></picture>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _source(media: str, png: bytes) -> str:
    return f'<source media="{media}" srcset="{_inline(png)}">'


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _table(table: Table) -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in table.header)
    rows = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in table.rows
    )
    return (
        f"<section><h2>{escape(table.title)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


_STYLE = """
:root { color-scheme: light dark; --back: #f3f5f9; --card: #ffffff; --ink: #1f2733; --muted: #5d6778;
  --line: #dfe3eb; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f131a; --card: #171c25; --ink: #e8ecf3; --muted: #98a3b5; --line: #2a3240; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.05rem; }
header p { margin: .3rem 0 1.25rem; color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .75rem; margin: 0 0 1rem; }
.tile, figure, section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: .9rem; color: var(--muted); }
dd b { display: block; font-size: 1.5rem; line-height: 1.3; color: var(--ink); font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; margin-bottom: 1rem; }
figure { margin: 0; }
figure.wide { grid-column: 1 / -1; }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .4rem; color: var(--muted); font-size: .875rem; }
section { margin-bottom: 1rem; }
.scroll { overflow-x: auto; max-height: 40rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 500; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--card); color: var(--muted); font-weight: 500; }
th:first-child { position: sticky; left: 0; z-index: 1; background: var(--card); }
thead th:first-child { z-index: 2; }
.introduction { max-width: 60rem; margin: 0 0 1.25rem; }
.note { color: var(--muted); font-size: .875rem; max-width: 60rem; }
@media (max-width: 760px) { .pictures { grid-template-columns: minmax(0, 1fr); } body { padding: 1rem .6rem 2rem; }
  .tile, figure, section { padding: .7rem .7rem; } th, td { padding: .3rem .4rem; }
  tbody th { white-space: normal; min-width: 7.5rem; } thead th { white-space: normal; vertical-align: bottom; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
{reload}<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
