"""Findings and figures -> ``claims.json``, one self-contained HTML page, a table for the terminal.

The page needs no script and no network: mathematics is MathML, figures are embedded SVG, the style is inline.
"""

from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disam_theory.claims import Finding, Verdict
from disam_theory.files import write_atomically
from disam_theory.page import document, escaped, finite, mathematics, tree

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
    write_atomically(path, json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


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
        "<h1>DISAM, checked</h1>",
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
    parts += ['<section><h2 id="environment">Environment</h2>', tree(dict(environment)), "</section>"]
    write_atomically(path, document(title, parts))


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
        f'<tr><td><a href="#{escaped(f.claim.id)}">{escaped(f.claim.id)}</a></td><td>{_badge(f.evidence.verdict)}'
        f"{_unexpected(f)}</td><td>{mathematics(f.claim.where)}</td><td>{mathematics(f.claim.statement)}</td></tr>"
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
    assumptions = "".join(f"<li>{mathematics(text)}</li>" for text in claim.assumptions)
    repaired = (
        f'<p>Repaired by <a href="#{claim.repaired_by}">{claim.repaired_by}</a>.</p>' if claim.repaired_by else ""
    )
    sources = f'<p class="quiet">Rests on {escaped("; ".join(claim.references))}.</p>' if claim.references else ""
    details = f"<details><summary>Evidence</summary>{tree(evidence.data)}</details>" if evidence.data else ""
    return (
        f'<article id="{escaped(claim.id)}"><h3>{escaped(claim.id)} {_badge(evidence.verdict)}'
        f"{_unexpected(finding)}</h3>"
        f'<p class="quiet">{mathematics(claim.where)} · {finding.seconds:.1f} s</p>'
        + (f"<p>Read and assumed</p><ul>{assumptions}</ul>" if assumptions else "")
        + f"<blockquote>{mathematics(claim.statement)}</blockquote>"
        f"<p><strong>Scope.</strong> {mathematics(claim.scope)}</p>"
        f"<p><strong>Found.</strong> {mathematics(evidence.reason)}</p>"
        f"{repaired}{sources}{details}</article>"
    )


def _figure(figure: FigureEntry) -> str:
    data = base64.b64encode(figure.svg.encode()).decode()
    links = ", ".join(
        f'<a href="{escaped(file)}">{escaped(Path(file).suffix[1:].upper())}</a>' for file in figure.files
    )
    alternative = escaped(f"{figure.title}. {figure.caption}")
    return (
        f'<figure id="figure-{escaped(figure.id)}"><h3>{mathematics(figure.title)}</h3>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{alternative}">'
        f"<figcaption>{mathematics(figure.caption)} ({escaped(figure.where)}; {links})</figcaption></figure>"
    )


def _badge(verdict: Verdict) -> str:
    return f'<span class="badge {verdict.value}">{SYMBOL[verdict]} {verdict.value}</span>'


def _unexpected(finding: Finding) -> str:
    return "" if finding.as_expected else f' <em class="changed">expected {finding.claim.expected.value}</em>'
