"""Findings and figures -> ``claims.json``, one self-contained HTML page, a table for the terminal.

The page needs no script and no network: mathematics is MathML, figures are embedded SVG, the style is inline.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from disam_theory.claims import Finding, Verdict
from disam_theory.files import write_atomically

SYMBOL = {
    Verdict.PROVED: "✓",
    Verdict.SUPPORTED: "+",
    Verdict.REFUTED: "✗",
    Verdict.CONDITIONAL: "~",
    Verdict.UNDECIDED: "?",
    Verdict.SKIPPED: "–",
}
MEANING = {
    Verdict.PROVED: "a symbolic, exact or ball-arithmetic argument, within the scope printed beside it",
    Verdict.SUPPORTED: "a proof with a step left to the reader, named in the scope, or the declared statistic",
    Verdict.REFUTED: "a certified counterexample, or an interval that excludes a difference that matters",
    Verdict.CONDITIONAL: "holds in some of the declared cases, or under an assumption the claim does not make",
    Verdict.UNDECIDED: "the evidence does not settle it",
    Verdict.SKIPPED: "not run",
}


LEDGER_HEAD = (
    "Written by `paper_repro.py`. Each entry says first how the statement was read and what was assumed, then the "
    "statement, the verdict with the reason, and within what scope it holds. The evidence (certificates, witnesses, "
    "intervals) is in `claims.json` and in the report."
)


@dataclass(frozen=True)
class FigureEntry:
    """A drawn figure: its SVG text, the place in the paper it belongs to, and its files relative to the report."""

    id: str
    title: str
    caption: str
    svg: str
    where: str
    files: tuple[str, ...]


def write_json(path: Path, environment: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """Write ``{"environment": ..., "claims": [...]}``, whole or not at all; a number that is not finite is null."""
    content = {"environment": dict(environment), "claims": [finding.to_json() for finding in findings]}
    write_atomically(path, json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def terminal_table(findings: Sequence[Finding], width: int) -> str:
    """One line a claim: id, verdict, whether it is as expected, where; the reason under a verdict that changed."""
    name = max([len(finding.claim.id) for finding in findings], default=0)
    lines = []
    for finding in findings:
        verdict = finding.evidence.verdict
        line = f"{SYMBOL[verdict]} {finding.claim.id:<{name}}  {verdict.value:<11}  {finding.claim.where}"
        if finding.as_expected:
            lines.append(line)
        else:
            lines.append(f"{line}  <- expected {finding.claim.expected.value}")
            lines.append(textwrap.indent(textwrap.fill(finding.evidence.reason, max(width - 4, 40)), "    "))
    expected = sum(finding.as_expected for finding in findings)
    return "\n".join([*lines, f"{expected} of {len(findings)} verdicts are as expected"])


def write_html(
    path: Path, environment: Mapping[str, Any], findings: Sequence[Finding], figures: Sequence[FigureEntry]
) -> None:
    """Write the report page, whole or not at all."""
    counts = ", ".join(
        f"{sum(f.evidence.verdict is verdict for f in findings)} {verdict.value}"
        for verdict in Verdict
        if any(f.evidence.verdict is verdict for f in findings)
    )
    title = "DISAM, checked: verdicts on Domain-Inspired Sharpness-Aware Minimization"
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><main><h1>DISAM, checked</h1>",
        "<p>What the paper <em>Domain-Inspired Sharpness-Aware Minimization Under Domain Shifts</em> (ICLR 2024, ",
        "arXiv 2405.18861) states, and what machine checks find. An empirical verdict holds in the scope printed ",
        f"beside it, and says nothing of larger models. <strong>{counts}</strong>.</p>",
        _verdict_table(findings),
        '<section><h2 id="evidence">Claims and evidence</h2>',
        *(_article(finding) for finding in findings),
        "</section>",
    ]
    if figures:
        parts += ['<section><h2 id="figures">Figures</h2>', *(_figure(figure) for figure in figures), "</section>"]
    parts += ['<section><h2 id="environment">Environment</h2>', _tree(dict(environment)), "</section>"]
    write_atomically(path, "\n".join([*parts, "</main></body></html>\n"]))


def write_markdown(path: Path, findings: Sequence[Finding]) -> None:
    """Write the ledger as a page of Markdown; it holds no time and no machine, so that it changes with the verdicts."""
    counts = ", ".join(
        f"{number} {verdict.value}"
        for verdict in Verdict
        if (number := sum(f.evidence.verdict is verdict for f in findings))
    )
    legend = "\n".join(f"- {SYMBOL[verdict]} *{verdict.value}*: {meaning}" for verdict, meaning in MEANING.items())
    table = "\n".join(_row(finding) for finding in findings)
    sections = "\n\n".join(_section(finding) for finding in findings)
    write_atomically(
        path,
        f"# The claims and what was found\n\n{LEDGER_HEAD}\n\n{len(findings)} claims: {counts}.\n\n{legend}\n\n"
        f"| claim | where | verdict |\n|---|---|---|\n{table}\n\n{sections}\n",
    )


def _row(finding: Finding) -> str:
    claim, verdict = finding.claim, finding.evidence.verdict
    return f"| [`{claim.id}`](#{claim.id}) | {claim.where} | {SYMBOL[verdict]} {verdict.value} |"


def _section(finding: Finding) -> str:
    claim, evidence = finding.claim, finding.evidence
    lines = [f"## {claim.id}", f"*{claim.where}.*"]
    if claim.assumptions:
        lines.append("Read and assumed:\n\n" + "\n".join(f"- {assumption}" for assumption in claim.assumptions))
    lines += [f"> {claim.statement}", f"{SYMBOL[evidence.verdict]} **{evidence.verdict.value}**: {evidence.reason}."]
    lines.append(f"Scope: {claim.scope}.")
    if claim.repaired_by:
        lines.append(f"Repaired by [`{claim.repaired_by}`](#{claim.repaired_by}).")
    if claim.references:
        lines.append(f"Rests on {'; '.join(claim.references)}.")
    return "\n\n".join(lines)


def _verdict_table(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f'<tr><td><a href="#{_text(f.claim.id)}">{_text(f.claim.id)}</a></td><td>{_badge(f.evidence.verdict)}'
        f"{_unexpected(f)}</td><td>{_math(f.claim.where)}</td><td>{_math(f.claim.statement)}</td></tr>"
        for f in findings
    )
    shown = sorted({f.evidence.verdict for f in findings}, key=list(Verdict).index)
    legend = "".join(f"<li>{_badge(verdict)} {MEANING[verdict]}</li>" for verdict in shown)
    return (
        '<h2 id="verdicts">Verdicts</h2><div class="wide verdicts"><table><thead><tr><th>claim</th><th>verdict</th>'
        f"<th>where</th><th>statement</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f'<ul class="legend">{legend}</ul>'
    )


def _article(finding: Finding) -> str:
    claim, evidence = finding.claim, finding.evidence
    assumptions = "".join(f"<li>{_math(text)}</li>" for text in claim.assumptions)
    repaired = (
        f'<p>Repaired by <a href="#{claim.repaired_by}">{claim.repaired_by}</a>.</p>' if claim.repaired_by else ""
    )
    sources = f'<p class="quiet">Rests on {_text("; ".join(claim.references))}.</p>' if claim.references else ""
    details = f"<details><summary>Evidence</summary>{_tree(evidence.data)}</details>" if evidence.data else ""
    return (
        f'<article id="{_text(claim.id)}"><h3>{_text(claim.id)} {_badge(evidence.verdict)}{_unexpected(finding)}</h3>'
        f'<p class="quiet">{_math(claim.where)} · {finding.seconds:.1f} s</p>'
        + (f"<p>Read and assumed</p><ul>{assumptions}</ul>" if assumptions else "")
        + f"<blockquote>{_math(claim.statement)}</blockquote>"
        f"<p><strong>Scope.</strong> {_math(claim.scope)}</p><p><strong>Found.</strong> {_math(evidence.reason)}</p>"
        f"{repaired}{sources}{details}</article>"
    )


def _figure(figure: FigureEntry) -> str:
    data = base64.b64encode(figure.svg.encode()).decode()
    links = ", ".join(f'<a href="{_text(file)}">{_text(Path(file).suffix[1:].upper())}</a>' for file in figure.files)
    alternative = _text(f"{figure.title}. {figure.caption}")
    return (
        f'<figure id="figure-{_text(figure.id)}"><h3>{_math(figure.title)}</h3>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{alternative}">'
        f"<figcaption>{_math(figure.caption)} ({_text(figure.where)}; {links})</figcaption></figure>"
    )


def _badge(verdict: Verdict) -> str:
    return f'<span class="badge {verdict.value}">{SYMBOL[verdict]} {verdict.value}</span>'


def _unexpected(finding: Finding) -> str:
    return "" if finding.as_expected else f' <em class="changed">expected {finding.claim.expected.value}</em>'


def _tree(value: Any) -> str:
    """JSON-ready data as definition lists and tables."""
    if isinstance(value, Mapping):
        items = "".join(f"<dt>{_text(str(key).replace('_', ' '))}</dt><dd>{_tree(v)}</dd>" for key, v in value.items())
        return f"<dl>{items}</dl>"
    if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) for row in value):
        deep = any(isinstance(cell, Mapping | list) for row in value for cell in row.values())
        return "".join(_tree(row) for row in value) if deep else _table(value)
    if isinstance(value, list | tuple):
        return ", ".join(_tree(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return _math(str(value))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_text(str(column).replace('_', ' '))}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_tree(row.get(c, ''))}</td>" for c in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(text)


@cache
def _math(text: str) -> str:
    """Text with LaTeX between dollar signs, as HTML with MathML."""
    pieces = re.split(r"\$([^$]+)\$", text)
    return "".join(convert(piece) if i % 2 else _text(piece) for i, piece in enumerate(pieces))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
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
@media print { body { font-size: 10pt } figure, tr { break-inside: avoid }
  details::details-content { content-visibility: visible } }
"""
