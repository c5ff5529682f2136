"""The verb ``rate``: traces, or logs that other code wrote -> what holds of the convergence theory along them."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from disam_theory import audit as audits
from disam_theory import convergence
from disam_theory.delivery import deliver, number, short_paths
from disam_theory.errors import UsageError
from disam_theory.files import csv_text, write_atomically
from disam_theory.imported import Imported, read_imported
from disam_theory.provenance import one_line, provenance, sha256
from disam_theory.traces import read_trace


def rate(arguments: argparse.Namespace) -> int:
    """``disam-theory rate``: how far the convergence theory holds along recorded traces, and how fast they converge."""
    logs = {str(path): read_imported(path) for path in arguments.traces}
    all_found = {path: _convergence(Path(path), log, arguments) for path, log in logs.items()}
    record = provenance(traces={path: sha256(Path(path)) for path in all_found}, **_constants(arguments))
    sources = {path: log.source if log else "trace" for path, log in logs.items()}
    rows = [{"trace": path, "source": sources[path], **convergence.row(found)} for path, found in all_found.items()]
    notes = {path: log.notes for path, log in logs.items() if log}
    needs = {name: inequality.columns for name, inequality in convergence.INEQUALITIES.items()} | convergence.MEASURES
    document = {"schema": "disam-rate/1", "provenance": record, "columns_needed": needs, "notes": notes, "rows": rows}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    deliver(arguments, {"json": text, "csv": csv_text(rows), "table": _table(all_found, logs)}, record)
    if arguments.out:
        series = {path: convergence.points(found) for path, found in all_found.items()}
        lines = [{"trace": path, **line} for path, rows in series.items() for line in rows]
        write_atomically(arguments.out / "series.csv", f"# {one_line(record)}\n{csv_text(lines)}")
        panels = _panels(series) if notes else convergence.PANELS
        units = [found.rows.unit for found in all_found.values()]
        _pictures(series, arguments.out, record, panels=panels, units=units)
    return 0


def _convergence(path: Path, log: Imported | None, arguments: argparse.Namespace) -> convergence.Convergence:
    """What the trace, or the log that other code wrote, says with the constants that are given."""
    rows = convergence.Rows.counted(log.unit, log.at) if log else None
    try:
        recorded = log.trace() if log else read_trace(path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: a line of it is not as a trace has it ({said}); record it anew") from error
    try:
        return convergence.analyse(recorded, rows=rows, **_constants(arguments))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _constants(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("smoothness", "gradient_bound", "minimum")}


def _panels(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Sequence[Sequence[str]]:
    """Those in which something can be drawn, of logs, most of which have the loss alone."""
    held = {name for rows in series.values() for row in rows for name, value in row.items() if value is not None}
    panels = (*convergence.PANELS, convergence.LOSS_PANEL)
    return [panel for panel in panels if held & set(panel)] or [convergence.LOSS_PANEL]


def _pictures(
    series: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, record: Mapping[str, Any], **layout: Any
) -> None:
    """``rate.pdf`` and ``rate.png``, a column a trace; matplotlib is no dependency of this package."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("disam-theory: no picture, as matplotlib is not installed; series.csv has its numbers", file=sys.stderr)
        return
    figure = Figure(figsize=(1.0 + 2.6 * len(series), 1.0 + 2.0 * len(layout["panels"])), layout="constrained")
    titles = (name.replace("/", "/\n") for name in short_paths(series))
    convergence.draw(figure, dict(zip(titles, series.values(), strict=True)), **layout)
    undated = {"pdf": {"Subject": one_line(record), "CreationDate": None}, "png": {"Description": one_line(record)}}
    for kind, metadata in undated.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=200)
        write_atomically(folder / f"rate.{kind}", buffer.getvalue())


LEGEND = """\
(17), (18) and Thm 1 are as the paper prints them, with Gamma = L; one step, sum and average are of the corrected
theorem. A number after the colon is the first step (from 0), or number T of steps, at which the left side exceeds the
right. L >= is an estimate, a lower bound: what holds with it holds with the true L. cross/main is the median of the
dropped cross term over eta |grad L(w_asc)|^2; a rate is a in |grad L|^2 ~ T^-a, or in L - L_min ~ T^-a, with its 95 %
interval. A dash is what cannot be had from the trace."""


QUANTITIES = {  # what the table calls those of convergence.QUANTITIES
    "training_loss": "L_p",
    "gradient_at_w": "|grad L(w)|",
    "gradient_at_ascent_and_G": "|grad L(w_asc)| and so G",
    "eta": "eta",
    "Gamma": "Gamma",
    "beta": "beta",
}


def _table(all_found: Mapping[str, convergence.Convergence], logs: Mapping[str, Imported | None]) -> str:
    """A line a trace; below it what the words mean, and for what cannot be had or does not hold, why."""
    lines, notes = [], dict[str, list[str]]()
    for name, (path, found) in zip(short_paths(all_found), all_found.items(), strict=True):
        values = convergence.row(found)
        sign = ">= " if found.smoothness_is == "estimated" and values["smoothness"] is not None else ""
        numbers = [number(values[key]) for key in ("smoothness", "gamma_max", "cross_over_main_median", "beta_min")]
        verdicts = [_verdict(finding) for finding in found.findings.values()]
        lines.append(
            [name, _length(found), sign + numbers[0], *verdicts, *numbers[1:], *map(_fitted, found.rates.values())]
        )
        for note in (*_log_notes(found, logs[path]), *_notes(found)):
            notes.setdefault(note, []).append(name)
    titles = [inequality.title for inequality in convergence.INEQUALITIES.values()]
    head = [
        "trace",
        "steps",
        "L",
        *titles,
        "max Gamma",
        "cross/main",
        "min beta",
        "rate at w",
        "rate at w_asc",
        "rate of L",
    ]
    below = [
        f"- {note}" + ("" if len(names) == len(all_found) else f" [{', '.join(names)}]")
        for note, names in notes.items()
    ]
    return "\n".join([audits.aligned(lines, head), "", LEGEND, *below]) + "\n"


def _length(found: convergence.Convergence) -> str:
    """The number of steps; of a log's rows also what they reach to."""
    unit, end = found.rows.unit, int(found.rows.ends[-1])
    return str(found.steps) if unit == "step" and end == found.steps else f"{found.steps} to {unit} {end}"


def _log_notes(found: convergence.Convergence, log: Imported | None) -> Iterator[str]:
    """What of the theorem's quantities a log that other code wrote holds, and how to read it."""
    if log:
        names = {held: [QUANTITIES[q] for q, has in found.held.items() if has == held] for held in (True, False)}
        yield f"{log.source} give of the theorem's quantities: {', '.join(names[True])}"
        yield f"{log.source} do not give: {', '.join(names[False])}; nor L, rho and L_min"
        yield f"{log.source}: no inequality can be evaluated, and the rate of L tests none; Theorem 1 bounds gradients"
        yield from log.notes


def _notes(found: convergence.Convergence) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for name, finding in found.findings.items():
        if finding.verdict != convergence.HOLDS:
            said = f"{finding.verdict}: {finding.why}"
            by_reason.setdefault(said, []).append(convergence.INEQUALITIES[name].title)
    yield from (f"{', '.join(titles)} {said}" for said, titles in by_reason.items())
    if found.step_sizes_above:
        yield f"eta > 1/L at {found.step_sizes_above} steps: there the corrected theorem bounds no gradient at w_asc"
    for where, rate in found.rates.items():
        if rate.why:
            named = {"at_w": "at w", "at_ascent": "at w_asc", "loss": "of L"}[where]
            yield f"rate {named} {convergence.ABSENT}: {rate.why}"


def _verdict(finding: convergence.Finding) -> str:
    if finding.verdict == convergence.ABSENT:
        return "-"
    return finding.verdict if finding.first is None else f"{finding.verdict}: {finding.first}"


def _fitted(rate: convergence.Rate) -> str:
    return "-" if rate.why else f"{rate.exponent:.2f} [{rate.low:.2f}, {rate.high:.2f}]"
