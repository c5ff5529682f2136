"""Training steps -> one append-only JSON Lines file a run -> columns.

Schema ``disam-trace/1``. The file is text, one JSON object a line, each written whole; a line cut off by a kill is
ignored by the reader, and everything before it is good. ``null`` stands for a number that does not exist.

* line 1, the header: ``schema``, ``domains`` (M names, the order of every list below), ``settings`` and
  ``provenance`` (enough to repeat the run).
* then a line for each step t, in order, with the fields of :data:`STEP_FIELDS`; where the run was evaluated the line
  also has ``evaluation`` (fields of :data:`EVALUATION_FIELDS`), taken at ``w_t`` on all the data.
* last, ``{"end": "finished", ...}``, with the evaluation after the last step where there is one, or
  ``{"end": "diverged", "why": ...}``; a file without it was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from disam_theory.errors import ComputationError, UsageError
from disam_theory.files import make_folder

FLUSH_EVERY = 50  # steps between two writes of a trace to disk
SCHEMA = "disam-trace/1"

STEP_FIELDS = {
    "step": "t, counted from 0",
    "lr": "step size eta_t",
    "losses": "L_i(w_t) on the step's batch, (M,); null where the batch has no sample of the domain",
    "losses_ascent": "L_i(w_t^asc) on the same batch, (M,)",
    "beta": "weights beta_i of the ascent direction (Eq. 8), (M,)",
    "grad_norm": "norm of grad L(w_t), of the settings' objective where they name one",
    "grad_norm_di": "norm of grad L_DI(w_t)",
    "grad_norm_ascent": "norm of grad L(w_t^asc), likewise; in ERM, SAM and DISAM the gradient that updates w",
    "cos_sam": "cosine between grad L(w_t), SAM's direction, and grad L_DI(w_t); null where either is zero",
    "cos_phi": "cosine between eps_{t-1} and eps_t; null at the first step and where either is zero",
    "phi": "the angle phi between them, in radians",
    "cross_term": "<grad L(w_{t-1}^asc), eps_t - eps_{t-1}>, the term that the proof of Theorem 1 drops",
}
LATER_FIELDS = ("cos_sam",)  # older traces have them not; they read as NaN
EVALUATION_FIELDS = {
    "losses": "L_i(w_t) on all training data of source domain i, (M,)",
    "validation_accuracy": "share correct on the sources' validation parts together, or null",
    "unseen_loss": "mean loss on the unseen domain, or null",
    "unseen_accuracy": "share correct on the unseen domain, or null",
}


class TraceWriter:
    """Appends steps to a trace file. Lines reach the operating system whole at each :meth:`flush`."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path = path
        make_folder(path.parent)
        with self._refusing():
            self._file: TextIO = path.open("w", encoding="utf-8")
        self._write({"schema": SCHEMA, **header})
        self.flush()

    @classmethod
    def resumed(cls, path: Path, rows: int) -> TraceWriter:
        """Go on with the interrupted trace at ``path`` after its first ``rows`` steps; what follows is removed first.

        Raises:
            UsageError: the file is missing, is not a trace, or holds fewer steps.
        """
        held = len(read_trace(path).steps["step"])
        if held < rows:
            raise UsageError(f"{path}: holds {held} steps, not the {rows} that were recorded; remove the run")
        lines = path.read_bytes().splitlines(keepends=True)
        writer = cls.__new__(cls)
        writer._path = path
        with writer._refusing():
            os.truncate(path, sum(map(len, lines[: 1 + rows])))
            writer._file = path.open("a", encoding="utf-8")
        return writer

    def append(self, step: Mapping[str, Any]) -> None:
        """One step, with the fields of :data:`STEP_FIELDS` and perhaps ``evaluation``."""
        self._write(step)

    def flush(self) -> None:
        """Hand what was appended to the operating system; a closed trace is there already."""
        if not self._file.closed:
            with self._refusing():
                self._file.flush()

    def close(self, end: str = "finished", **why: Any) -> None:
        """Write the last line and close; after this the trace counts as complete."""
        if not self._file.closed:
            self._write({"end": end, **why})
            with self._refusing():
                self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._refusing():
            self._file.write(json.dumps(_jsonable(line), allow_nan=False, separators=(",", ":")) + "\n")

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"{self._path}: the trace cannot be written ({error.strerror}); what was written before is kept"
            raise ComputationError(message) from error


def _jsonable(value: Any) -> Any:
    """The value with floats at nine digits (exact for float32) and NaN or Inf as null."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


@dataclass(frozen=True)
class Trace:
    """A trace in columns: ``steps[field]`` is (T,) or (T, M); ``evaluations[field]`` likewise over evaluated steps."""

    header: dict[str, Any]
    steps: dict[str, np.ndarray]  # each (T,) or (T, M); NaN where the file says null
    evaluations: dict[str, np.ndarray]  # "step" and EVALUATION_FIELDS, each (E,) or (E, M)
    end: str | None  # "finished", "diverged", or None for an interrupted run

    @property
    def domains(self) -> list[str]:
        """The M source domains, in the order of every (., M) column."""
        return list(self.header["domains"])

    def check_every_step(self) -> None:
        """Refuse a trace that leaves out steps, for what compares one step with the next.

        Raises:
            UsageError: the trace holds every tenth step, say.
        """
        held = self.steps["step"]
        if (np.diff(held) > 1).any():
            first = ", ".join(f"{step:g}" for step in held[:3])
            raise UsageError(f"the trace holds steps {first}, ... only; record every step (record_every=1) for this")


def read_trace(path: Path) -> Trace:
    """Read a trace, also one whose writing was cut off.

    Raises:
        UsageError: the file is missing, or is not a trace of schema ``disam-trace/1``.
    """
    try:
        lines = list(_parsed(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot be read as a trace ({reason})") from error
    if not lines or lines[0].get("schema") != SCHEMA:
        raise UsageError(f"{path}: not a trace; its first line must hold the schema {SCHEMA!r}")
    steps = [line for line in lines[1:] if "losses" in line]
    evaluated = [{"step": line["step"], **line["evaluation"]} for line in lines[1:] if "evaluation" in line]
    end = lines[-1].get("end")
    return Trace(lines[0], _columns(steps, STEP_FIELDS), _columns(evaluated, ["step", *EVALUATION_FIELDS]), end)


def _parsed(lines: list[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # a line cut off by a kill: nothing whole can follow it


def _columns(rows: list[dict[str, Any]], fields: Iterable[str]) -> dict[str, np.ndarray]:
    def value(row: dict[str, Any], field: str) -> Any:
        return row.get(field) if field in LATER_FIELDS else row[field]

    return {field: np.array([value(row, field) for row in rows], dtype=float) for field in fields}


def finished(path: Path, header: Mapping[str, Any]) -> bool:
    """Whether ``path`` holds a complete trace of exactly these settings, so that the run need not be repeated."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
            file.seek(max(0, path.stat().st_size - 8192))
            last = json.loads(file.read().splitlines()[-1])
        return "end" in last and first["settings"] == json.loads(json.dumps(header["settings"]))
    except (OSError, ValueError, KeyError, IndexError):
        return False
