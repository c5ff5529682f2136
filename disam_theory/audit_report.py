r"""Audits of one or several checkpoints -> a table for the terminal, JSON, CSV, LaTeX, one self-contained HTML page.

The JSON, schema ``disam-audit/1``, is one object. Every list but ``differences`` has a field ``checkpoint`` first, the
label of the file; a number that is not finite, or has no meaning, is null. Unless said otherwise a field is the
attribute of that name in :mod:`disam_theory.audit`.

| key | what it holds |
|---|---|
| ``schema``, ``provenance``, ``reading`` | this schema; what made it, with file names and SHA-256; the paragraph |
| ``rows`` | one loss each: :class:`~disam_theory.audit.Row` |
| ``about`` | one checkpoint each: settings, parameters, norm of the weights, radii, bins of the ECE, batch size |
| ``shares`` | what a domain feels of SAM's and of DISAM's step |
| ``overlaps`` | of the top eigenspaces of two losses, with that of random spaces |
| ``warnings`` | fake flat minimum, hallucinated minimum, negative weight: value and threshold |
| ``bounds`` | generalisation bounds with each term; ``known`` is exact, at least, or unknown |
| ``sampling`` | with ``--max-samples``: standard errors as estimates of the whole domain |
| ``spread`` | of each quantity over the sources: :class:`~disam_theory.audit_differences.Spread` |
| ``densities``, ``slices`` | the figures' data |
| ``differences`` | against the first: :class:`~disam_theory.audit_differences.Difference` |
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from disam_theory.audit import ROW_LISTS, Audit, Row, aligned
from disam_theory.audit_differences import Difference, Spread, differences, head_of, spreads, unit_of
from disam_theory.audit_figures import Picture, pictures
from disam_theory.audit_reading import reading
from disam_theory.files import csv_text
from disam_theory.page import document, escaped, finite, tree
from disam_theory.provenance import one_line

SCHEMA = "disam-audit/1"
TABLES = ("shares", "overlaps", "warnings", "bounds", "sampling", "densities", "slices")
Audits = Mapping[str, Audit]
Line = list[str]


def as_json(audits: Audits, record: Mapping[str, Any]) -> str:
    """The document of the module's head."""
    found = differences(audits)
    content: dict[str, Any] = {"schema": SCHEMA, "provenance": dict(record), "reading": reading(audits, found)}
    content["rows"] = _labelled(audits, lambda audit: [asdict(row) for row in audit.rows])
    content["about"] = _labelled(audits, lambda audit: [audit.about])
    for name in TABLES:
        content[name] = _labelled(audits, lambda audit, name=name: getattr(audit, name))
    content["spread"] = _labelled(audits, lambda audit: [asdict(each) for each in spreads(audit)])
    content["differences"] = [asdict(each) for each in found]
    return json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _labelled(audits: Audits, rows_of: Any) -> list[dict[str, Any]]:
    return [{"checkpoint": label, **row} for label, audit in audits.items() for row in rows_of(audit)]


def as_csv(audits: Audits) -> str:
    """The rows as CSV; the j-th eigenvalue is in the columns ``lambda_j``, ``residual_j``, ``lower_j``, ``upper_j``."""
    return csv_text(_labelled(audits, lambda audit: [_flat(row) for row in audit.rows]))


def differences_csv(audits: Audits) -> str:
    """The differences as CSV, a line each."""
    return csv_text([asdict(each) for each in differences(audits)])


def _flat(row: Row) -> dict[str, Any]:
    flat = {name: value for name, value in asdict(row).items() if name not in ROW_LISTS}
    for j, found in enumerate(zip(*(getattr(row, name) for name in ROW_LISTS), strict=True), 1):
        names = (f"{name}_{j}" for name in ("lambda", "residual", "lower", "upper"))
        flat |= dict(zip(names, found, strict=True))
    return flat


# --- tables of text, for the terminal, LaTeX and the page ---


def as_table(audits: Audits) -> str:
    """For each checkpoint its tables, then the differences, then the paragraph."""
    parts = []
    for label, audit in audits.items():
        parts += [label + "\n" + "=" * len(label)] if len(audits) > 1 else []
        parts += [aligned(lines, head) for head, lines in tables_of(audit).values()]
        parts += [f"! {row['name']}: {row['message']}" for row in audit.warnings]
    found = differences(audits)
    for title, (head, lines) in difference_tables(found).items():
        parts += [title + "\n" + "=" * len(title), aligned(lines, head)]
    return "\n\n".join([*parts, textwrap.fill(reading(audits, found), 100, break_on_hyphens=False)]) + "\n"


def tables_of(audit: Audit) -> dict[str, tuple[Line, list[Line]]]:
    """Title -> head and lines, of one checkpoint."""
    found = {
        "Losses and eigenvalues": (_losses_head(audit), [_losses_line(row) for row in audit.rows]),
        "Sharpness": (SHARPNESS_HEAD, [_sharpness_line(row) for row in audit.rows]),
        "Perturbation": (SHARES_HEAD, _share_lines(audit)),
        "Spread over the sources": (SPREAD_HEAD, _spread_lines(audit)),
        "Generalisation bounds on the error": (BOUNDS_HEAD, _bound_lines(audit)),
    }
    if len(audit.overlaps) > 0:
        found["Overlap of the top eigenspaces"] = _overlap_table(audit)
    if audit.sampling:
        head = ["sampled", "n", "of", "± loss", "± acc %", "± lambda_1"]
        found["Sampling error"] = (head, [_sampling_line(row) for row in audit.sampling])
    return found


def _losses_head(audit: Audit) -> Line:
    k = len(audit.rows[0].eigenvalues)
    lambdas = [f"lambda_{j}" for j in range(1, k + 1)]
    return ["loss of", "n", "loss", "acc %", "ECE %", "chance %", "|grad|", "beta", *lambdas, ""]


def _losses_line(row: Row) -> Line:
    return [
        _name(row),
        str(row.n),
        _with_error(row.loss, row.loss_error),
        "" if row.accuracy is None else f"{100 * row.accuracy:.1f}",
        *("" if share is None else f"{100 * share:.1f}" for share in (row.ece, row.ece_by_chance)),
        f"{row.grad_norm:.3g}",
        "" if row.beta is None else f"{row.beta:.3g}",
        *(f"{v:.4g} ± {r:.1g}" for v, r in zip(row.eigenvalues, row.residuals, strict=True)),
        "" if row.converged else "! not converged",
    ]


SHARPNESS_HEAD = ["loss of", "trace", "SAM step", "worst case", "average case", "ASAM step", "grad variance"]


def _sharpness_line(row: Row) -> Line:
    worst = "" if row.worst_lower is None else f">= {row.worst_lower:.3g} (~ {row.worst_upper:.3g})"
    return [
        _name(row),
        _with_error(row.trace, row.trace_error),
        _number(row.sam),
        worst,
        _with_error(row.average, row.average_error),
        _number(row.asam),
        _with_error(row.gradient_variance, row.gradient_variance_error),
    ]


SHARES_HEAD = ["domain", "alpha", "beta", "SAM share %", "DISAM share %", "SAM rise", "DISAM rise"]


def _share_lines(audit: Audit) -> list[Line]:
    by = {(row["domain"], row["method"]): row for row in audit.shares}
    lines = []
    for name in dict.fromkeys(row["domain"] for row in audit.shares):
        sam, disam = by[name, "SAM"], by[name, "DISAM"]
        percent = ["" if each["share"] is None else f"{100 * each['share']:.1f}" for each in (sam, disam)]
        weights = [_number(each["weight"]) for each in (sam, disam)]
        lines.append([_name(audit.row(name)), *weights, *percent, *(f"{each['rise']:+.3g}" for each in (sam, disam))])
    return lines


SPREAD_HEAD = ["quantity", "mean", "deviation", "least", "of", "largest", "of", "unseen less mean"]


def _spread_lines(audit: Audit) -> list[Line]:
    return [_spread_line(each, unit_of(each.quantity)) for each in spreads(audit)]


def _spread_line(each: Spread, unit: float) -> Line:
    return [
        head_of(each.quantity),
        f"{unit * each.mean:.3g}",
        f"{unit * each.deviation:.2g}",
        f"{unit * each.least:.3g}",
        each.least_of,
        f"{unit * each.largest:.3g}",
        each.largest_of,
        "" if each.gap is None else f"{unit * each.gap:+.3g}",
    ]


BOUNDS_HEAD = ["bound", "on", "right side", "", "terms"]


def _bound_lines(audit: Audit) -> list[Line]:
    """The terms are text: as wide as each other, so that they begin in one column."""
    lines = [_bound_line(row) for row in audit.bounds]
    width = max(len(line[-1]) for line in lines)
    return [[*line[:-1], line[-1].ljust(width)] for line in lines]


def _bound_line(row: Mapping[str, Any]) -> Line:
    says = "vacuous" if row["vacuous"] else "" if row["complete"] else "not known in full"
    sign = "" if row["complete"] else ">= "
    return [row["name"], row["of"], f"{sign}{row['right_side']:.3f}", says, " + ".join(map(_term, row["terms"]))]


def _term(term: Mapping[str, Any]) -> str:
    value = "?" if term["value"] is None else f"{'>= ' if term['known'] == 'at least' else ''}{term['value']:.3g}"
    return f"{term['name']} {value}"


def _overlap_table(audit: Audit) -> tuple[Line, list[Line]]:
    names = list(dict.fromkeys(name for row in audit.overlaps for name in (row["first"], row["second"])))
    by = {frozenset((row["first"], row["second"])): row["overlap"] for row in audit.overlaps}
    k, random = audit.overlaps[0]["k"], audit.overlaps[0]["at_random"]
    lines = [[a, *("1" if a == b else f"{by[frozenset((a, b))]:.2f}" for b in names)] for a in names]
    return [f"overlap, k={k} (random {random:.1g})", *names], lines


def _sampling_line(row: Mapping[str, Any]) -> Line:
    errors = [f"{row['loss_error']:.2g}", f"{100 * row['accuracy_error']:.1f}", f"{row['lambda_1_error']:.2g}"]
    return [row["name"], str(row["n"]), str(row["population"]), *errors]


DIFFERENCE_COLUMNS = ("loss", "accuracy", "lambda_1", "trace", "sam")


def difference_tables(found: Sequence[Difference]) -> dict[str, tuple[Line, list[Line]]]:
    """Which checkpoint less which -> head, and a line each loss; a star where the interval excludes zero."""
    by = {(each.checkpoint, each.name, each.quantity): each for each in found}
    tables: dict[str, tuple[Line, list[Line]]] = {}
    for checkpoint, baseline, name in dict.fromkeys((each.checkpoint, each.baseline, each.name) for each in found):
        head = ["loss of", *map(head_of, DIFFERENCE_COLUMNS)]
        _, lines = tables.setdefault(f"{checkpoint} - {baseline}", (head, []))
        lines.append([name, *(_difference(by[checkpoint, name, q]) for q in DIFFERENCE_COLUMNS)])
    return tables


def _difference(each: Difference) -> str:
    star = "*" if each.excludes_zero else " "
    return each.shown if each.low is None else each.shown + star


def _name(row: Row) -> str:
    return f"{row.name} (unseen)" if row.role == "unseen" else row.name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    if error is None:
        return f"{value:.4g}"
    rounded = float(f"{error:.1g}")
    return f"{value:.4g} ± {rounded:.0f}" if 10 <= rounded < 1e4 else f"{value:.4g} ± {error:.1g}"


# --- LaTeX ---

LATEX_OF = (*"\\&%$#_{}~^", "±", ">=")
LATEX_TO = (
    *(
        r"\textbackslash{}",
        r"\&",
        r"\%",
        r"\$",
        r"\#",
        r"\_",
        r"\{",
        r"\}",
        r"\textasciitilde{}",
        r"\textasciicircum{}",
    ),
    *(r"$\pm$", r"$\geq$"),
)
LATEX_HEADS = {"|grad|": r"$\lVert\nabla L\rVert$", "alpha": r"$\alpha$", "beta": r"$\beta$", "n": "$n$"}


def as_latex(audits: Audits, record: Mapping[str, Any]) -> str:
    r"""Tables in booktabs' style, to be read by ``\input``; the preamble needs ``\usepackage{booktabs}``."""
    parts = [f"% {one_line(record)}", r"% \usepackage{booktabs}"]
    for label, audit in audits.items():
        for title, (head, lines) in tables_of(audit).items():
            parts.append(_latex_table(f"{title} ({label})", head, lines))
    for title, (head, lines) in difference_tables(differences(audits)).items():
        parts.append(_latex_table(f"Differences, {title}; * where the interval excludes 0", head, lines))
    return "\n\n".join(parts) + "\n"


def _latex_table(title: str, head: Line, lines: Sequence[Line]) -> str:
    filled = _filled(lines)
    columns = "".join("r" if c and _numeric(line[c] for line in lines) else "l" for c in filled)
    first = _latex_head if head == SPREAD_HEAD else _latex  # its lines begin with the words of heads, others with names
    body = [" & ".join((_latex if c else first)(line[c]) for c in filled) + r" \\" for line in lines]
    names = " & ".join(_latex_head(head[c]) for c in filled) + r" \\"
    rules = [r"\toprule", names, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([f"% {title}", rf"\begin{{tabular}}{{{columns}}}", *rules, r"\end{tabular}"])


def _filled(lines: Sequence[Line]) -> list[int]:
    """The columns that say something: without an unseen domain, say, there is no gap to it."""
    return [c for c in range(len(lines[0])) if any(line[c].strip() for line in lines)]


def _numeric(cells: Iterable[str]) -> bool:
    return all(not cell or cell.lstrip(">=+- ")[:1].isdigit() for cell in cells)


def _latex_head(name: str) -> str:
    if name in LATEX_HEADS:
        return LATEX_HEADS[name]
    stem, _, number = name.partition("lambda_")
    return rf"{_latex(stem)}$\lambda_{{{number}}}$" if number else _latex(name)


def _latex(text: str) -> str:
    out = text.replace(">=", "\0")
    out = "".join(dict(zip(LATEX_OF, LATEX_TO, strict=True)).get(character, character) for character in out)
    out = re.sub(r"(\d(?:\.\d+)?)e([+-]\d+)", lambda m: rf"${m[1]}\cdot10^{{{int(m[2])}}}$", out)
    return re.sub(r"(?<![\w.$^{])-(?=\d)", "$-$", out).replace("\0", r"$\geq$")


# --- the page ---

STYLE = """
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
.pictures figure { margin: 0 } .pictures svg { width: 100%; height: auto; color: var(--ink) }
td, th { white-space: nowrap } .terms td:last-child { white-space: normal; min-width: 18rem }
.warning { font-weight: 600 }
.number td:not(:first-child), .number th:not(:first-child) { text-align: right }
.terms td { text-align: left }
@media print { .wide { overflow: visible } table { font-size: 7pt } th, td { padding: .15rem .3rem } }
"""
DIFFERENCES_NOTE = (
    "Losses and accuracies: 95 % intervals paired over samples. Eigenvalues: certified on these samples, or 95 % for "
    "the whole domains where only a part was audited. Traces: 95 %, paired over random vectors. A star: the interval "
    "excludes 0. No interval: a fact about these samples. Each interval stands at its level alone."
)
NOTES = {
    "Losses and eigenvalues": "The error of a loss is its standard error, of an eigenvalue the residual on these "
    "samples. ECE: expected calibration error, 15 equal bins of confidence; chance: a calibrated model stays below it "
    "in 95 of 100 cases. beta: weights of Eq. (8).",
    "Sharpness": "Rises of a loss within the radius rho: along its own gradient (SAM; ASAM relative to the weights), "
    "the largest found with a second-order estimate in brackets, the mean under Gaussian noise. The trace and the "
    "gradient variance with standard errors.",
    "Perturbation": "Shares of the first-order rise of the loss that is ascended, and each domain's rise, along one "
    "step of length rho.",
    "Generalisation bounds on the error": "Each holds with probability 1 - delta under what it assumes (in "
    "audit.json). What cannot be measured enters by its least value; 1 or more is vacuous.",
    "Overlap of the top eigenspaces": "1 where one space holds the other, 0 where they are at right angles.",
    "Spread over the sources": "Deviation with 1/M, as in Eq. (6).",
    "Sampling error": "Standard errors as estimates of the whole domain, which is finite.",
}


def as_html(audits: Audits, record: Mapping[str, Any]) -> str:
    """One page without a script or a request: the paragraph, figures, tables, provenance."""
    found = differences(audits)
    body = ["<h1>Sharpness, domain by domain</h1>", f"<p>{escaped(', '.join(audits))}</p>"]
    body += [f"<p>{escaped(reading(audits, found))}</p>"]
    body += [
        f'<p class="warning">{escaped(label)}: {escaped(row["message"])}</p>'
        for label, audit in audits.items()
        for row in audit.warnings
    ]
    if found:
        body += ["<h2>Differences</h2>", f'<p class="quiet">{DIFFERENCES_NOTE}</p>']
        for title, (head, lines) in difference_tables(found).items():
            body += [f"<h3>{escaped(title)}</h3>", _html_table(head, lines)]
    body += _html_pictures(pictures(audits))
    for label, audit in audits.items():
        body += [f"<h2>{escaped(label)}</h2>"]
        for title, (head, lines) in tables_of(audit).items():
            body += [f"<h3>{title}</h3>", _html_table(head, lines), f'<p class="quiet">{NOTES[title]}</p>']
        body += ["<h3>Settings and sizes</h3>", tree(audit.about)]
    body += ["<h2>Provenance</h2>", tree(dict(record))]
    return document("Sharpness, domain by domain", body, style=STYLE)


def _html_pictures(found: Sequence[Picture]) -> list[str]:
    if not found:
        return ['<p class="quiet">No figures: matplotlib is not installed.</p>']
    figures = [
        f'<figure id="{each.id}"><h3>{escaped(each.title)}</h3>'
        + each.svg.replace("<svg ", f'<svg role="img" aria-label="{escaped(each.title)}" ', 1)
        + f"<figcaption>{escaped(each.caption)}</figcaption></figure>"
        for each in found
    ]
    return ["<h2>Figures</h2>", '<div class="pictures">', *figures, "</div>"]


def _html_table(head: Line, lines: Sequence[Line]) -> str:
    filled = _filled(lines)
    names = "".join(f"<th>{escaped(head[c])}</th>" for c in filled)
    body = "".join("<tr>" + "".join(f"<td>{escaped(line[c])}</td>" for c in filled) + "</tr>" for line in lines)
    kind = "terms" if "terms" in head else "number"
    return f'<div class="wide {kind}"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
