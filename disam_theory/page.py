"""What every page needs: text, mathematics and tables as HTML, and one style; no script and no network."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from latex2mathml.converter import convert


def document(title: str, body: Sequence[str], *, style: str = "") -> str:
    """A whole page; ``style`` is added to the style that all pages share."""
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return "\n".join(
        [head, viewport, f"<style>{STYLE}{style}</style></head><body><main>", *body, "</main></body></html>\n"]
    )


def tree(value: Any) -> str:
    """JSON-ready data as definition lists and tables."""
    if isinstance(value, Mapping):
        items = "".join(f"<dt>{escaped(str(key).replace('_', ' '))}</dt><dd>{tree(v)}</dd>" for key, v in value.items())
        return f"<dl>{items}</dl>"
    if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) for row in value):
        deep = any(isinstance(cell, Mapping | list) for row in value for cell in row.values())
        return "".join(tree(row) for row in value) if deep else table(value)
    if isinstance(value, list | tuple):
        return ", ".join(tree(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return mathematics(str(value))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table that scrolls by itself where it is too wide; what a row lacks is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escaped(str(column).replace('_', ' '))}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{tree(row.get(c, ''))}</td>" for c in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def escaped(text: str) -> str:
    """Text with what HTML gives a meaning to escaped."""
    return html.escape(text)


@cache
def mathematics(text: str) -> str:
    """Text with LaTeX between dollar signs, as HTML with MathML."""
    pieces = re.split(r"\$([^$]+)\$", text)
    return "".join(convert(piece) if i % 2 else escaped(piece) for i, piece in enumerate(pieces))


def finite(value: Any) -> Any:
    """Data for JSON: a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d5d5d5; --quiet: #5f5f5f; --soft: #f6f6f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --line: #3d3d3d; --quiet: #a5a5a5; --soft: #212121 }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 60rem; margin: auto; padding: 1rem }
a { color: light-dark(#0b57a8, #8ab8f0) }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2.5rem }
.wide { overflow-x: auto } .verdicts table { table-layout: fixed; width: 100%; min-width: 46rem }
.verdicts td { overflow-x: auto } .verdicts th:first-child { width: 12rem } .verdicts th:nth-child(2) { width: 7.5rem }
.verdicts th:nth-child(3) { width: 9rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top }
article, figure { margin: 1.2rem 0; padding: .2rem 1rem 1rem; border: 1px solid var(--line); border-radius: .5rem }
blockquote { margin: .6rem 0; padding: .5rem 1rem; background: var(--soft); border-left: .25rem solid var(--line) }
blockquote, dd { overflow-wrap: break-word } article > p, figcaption { overflow-x: auto }
.quiet, figcaption, .legend { color: var(--quiet); font-size: .9rem } .legend { list-style: none; padding: 0 }
.badge { font-size: .8rem; font-weight: 600; padding: .1rem .5rem; border-radius: .7rem; border: 1px solid;
  white-space: nowrap }
.proved, .supported { color: light-dark(#00603f, #6fd3a8) } .refuted { color: light-dark(#9c2d00, #ff9a76) }
.conditional { color: light-dark(#6d4c00, #e6be5a) } .undecided, .skipped { color: var(--quiet) }
.changed { color: light-dark(#9c2d00, #ff9a76) }
figure img { width: 100%; background: #fff; border-radius: .3rem }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: .15rem 1rem; font-size: .9rem;
  margin: .5rem 0 } dt { color: var(--quiet) } dd { margin: 0 }
dd:has(> dl, > .wide) { grid-column: 1 / -1; margin-left: 1rem }
details summary { cursor: pointer }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr) } dd { margin-left: 1rem } }
@media print { body { font-size: 10pt } figure, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  details::details-content { content-visibility: visible } }
"""
