r"""A log that other code wrote -> the columns that the convergence theory can use, and what the log does not hold.

Which of the three a file is shows in its first bytes:

* A TensorBoard event file of the official DISAM trainer. The scalar ``merged_train_loss`` of each epoch is read; it is
  the mean over the epoch's batches, at $w_t^{asc}$ for SAM and DISAM and at $w_t$ for ERM, and the file does not say by
  which of them it was written. ``val_lodo_*`` and ``unseen_test_*`` are named, as no theorem here speaks of them.
* DomainBed's ``results.jsonl``. ``nll``, else ``loss``, is the mean over the steps since the row before.
* CSV, comma-separated in UTF-8, lines that start with ``#`` before the names left out. One column is ``step`` or
  ``epoch``, a rising whole number; others are those of :data:`COLUMNS`, in any order, any of them missing. An empty
  cell is no number. A row is read as the average since the row before.

A log cut off, or damaged from some byte on, gives what comes before. Nothing in a file is run or unpickled.
"""

from __future__ import annotations

import csv
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from disam_theory.errors import UsageError
from disam_theory.traces import EVALUATION_FIELDS, SCHEMA, STEP_FIELDS, Trace

COLUMNS = {
    "loss": "mean training loss at w_t",
    "loss_ascent": "mean training loss at w_t^asc",
    "grad_norm": "norm of grad L(w_t); of several steps, the root of the mean square",
    "grad_norm_ascent": "norm of grad L(w_t^asc), likewise",
    "lr": "step size eta_t",
    "phi": "angle between the perturbations of this step and the one before, in radians; used if each row is one step",
}
_MEASURED = ("loss", "loss_ascent", "grad_norm", "grad_norm_ascent")  # one of them at least has to be there
_IN_A_TRACE = {"loss": "losses", "loss_ascent": "losses_ascent"}  # what a trace calls the others is their name here

LATEST = 10**9  # step or epoch: beyond it a logarithm's average over one step is lost to rounding
LARGEST = 1e150  # of a number that can be squared

TENSORBOARD, DOMAINBED, CSV = "TensorBoard events", "DomainBed results", "CSV columns"
OFFICIAL_LOSS = "merged_train_loss"
OFFICIAL_OTHERS = ("val_lodo_", "unseen_test_")


@dataclass(frozen=True)
class Imported:
    """A log's rows, in order. ``at`` is what ``unit`` counts; ``columns`` has every name of :data:`COLUMNS`."""

    source: str  # TENSORBOARD, DOMAINBED or CSV
    unit: str  # "epoch" or "step"
    at: np.ndarray  # (T,), whole numbers that rise
    columns: dict[str, np.ndarray]  # each (T,); NaN where the log has no number
    notes: tuple[str, ...]  # what was left out, and how to read what was not
    algorithm: str = "unknown"

    def trace(self) -> Trace:
        """The rows as those of a trace with one domain, which is all of them; NaN in what the log does not hold."""
        T = len(self.at)
        steps = {name: np.full(T, math.nan) for name in STEP_FIELDS} | {"step": np.arange(T, dtype=float)}
        steps |= {_IN_A_TRACE.get(name, name): values for name, values in self.columns.items()}
        steps |= {name: steps[name].reshape(T, 1) for name in ("losses", "losses_ascent", "beta")}
        none = {name: np.empty((0, 1) if name == "losses" else 0) for name in ("step", *EVALUATION_FIELDS)}
        header = {"domains": ["all"], "sizes": [1], "settings": {"algorithm": self.algorithm}}
        return Trace(header, steps, none, "not said")


def read_imported(path: Path) -> Imported | None:
    """The log at ``path``, or None for a file that looks like none of the three.

    Raises:
        UsageError: the file cannot be read, or is one of the three and holds nothing of use.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
        if _is_events(path, head):
            return _tensorboard(path)
        first = next((line for line in head.splitlines() if line.strip()), b"")
        if first.lstrip().startswith(b"{"):
            return _domainbed(path) if _is_domainbed(first) else None
        return _csv(path) if _is_csv(path, head) else None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; it is no log that can be read") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: cannot be read as a trace: a folder; name the file in it") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as a trace ({error.strerror})") from error


def _is_events(path: Path, head: bytes) -> bool:
    named = ".tfevents." in path.name
    return named or (len(head) >= 12 and struct.unpack("<I", head[8:12])[0] == _masked_crc(head[:8]))


def _is_domainbed(first: bytes) -> bool:
    own = b'"schema"' in first and SCHEMA.encode() in first
    return not own and any(key in first for key in (b'"args"', b'"hparams"', b'"env0_in_acc"'))


def _is_csv(path: Path, head: bytes) -> bool:
    names = next((line for line in head.splitlines() if line.strip() and not line.startswith(b"#")), b"")
    cells = [cell.strip(b' "\t\xef\xbb\xbf') for cell in names.split(b",")]
    return path.suffix.lower() == ".csv" or (len(cells) > 1 and (b"step" in cells or b"epoch" in cells))


# TensorBoard


def _tensorboard(path: Path) -> Imported:
    """The official trainer's ``merged_train_loss``; an epoch written twice counts as it was written last."""
    scalars: dict[str, dict[int, float]] = {}
    notes, twice = [], 0
    with path.open("rb") as file:
        frames = _Frames(file, path.stat().st_size)
        for frame in frames:
            try:
                found = list(_scalars(frame))
            except (ValueError, struct.error) as error:
                frames.stopped = f"record {frames.read} is not an event ({error})"
                break
            for step, tag, value in found:
                twice += tag == OFFICIAL_LOSS and step in scalars.get(tag, {})
                scalars.setdefault(tag, {})[step] = value
    if frames.stopped:
        notes.append(f"{frames.stopped}; what comes before it is used")
    losses = scalars.get(OFFICIAL_LOSS)
    if not losses:
        held = f"scalars are {', '.join(map(_bare, sorted(scalars)[:8]))}" if scalars else "there are no scalars in it"
        because = f" ({frames.stopped})" if frames.stopped else ""
        raise UsageError(f"{path}: no {OFFICIAL_LOSS}, the official trainer's training loss; {held}{because}")
    if twice:
        notes.append(f"{_counted(twice, 'epoch')} written more than once; the last counts")
    notes.append(
        f"{OFFICIAL_LOSS} is an epoch's mean, at w_asc for SAM and DISAM and at w for ERM; it is not said which"
    )
    notes += _unused([tag for tag in scalars if tag.startswith(OFFICIAL_OTHERS)])
    at = np.array(sorted(losses))
    if at[0] < 0 or at[-1] > LATEST:
        raise UsageError(f"{path}: {OFFICIAL_LOSS} has epochs from {at[0]} to {at[-1]}; they are from 0 to {LATEST}")
    return _imported(TENSORBOARD, "epoch", at, {"loss": np.array([losses[step] for step in at.tolist()])}, notes)


class _Frames:
    """The payloads of a TFRecord file: length, its checksum, payload, its checksum. ``stopped`` says why they end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size
        self.read, self.stopped = 0, ""

    def __iter__(self) -> Iterator[bytes]:
        while self._left:
            head = self._file.read(12)
            if len(head) < 12:
                self.stopped = f"cut off within record {self.read + 1}"
                return
            length, crc = struct.unpack("<QI", head)
            if crc != _masked_crc(head[:8]):
                self.stopped = f"damaged: the checksum of the length of record {self.read + 1} is wrong"
                return
            if length + 16 > self._left:  # before any of it is read: the length is the file's word
                self.stopped = f"cut off within record {self.read + 1}"
                return
            payload, crc = self._file.read(length), self._file.read(4)
            if crc != struct.pack("<I", _masked_crc(payload)):
                self.stopped = f"damaged: the checksum of record {self.read + 1} is wrong"
                return
            self._left -= length + 16
            self.read += 1
            yield payload


def _masked_crc(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated right by 15 bits and shifted by a constant, as TFRecord files have it."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_DOUBLES, _FLOATS = (2, "<d"), (1, "<f")  # DT_DOUBLE and DT_FLOAT of TensorFlow's types.proto


def _scalars(event: bytes) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of the scalars in an ``Event``: its fields 2, the step, and 5, a ``Summary``'s values."""
    fields = list(_fields(event))
    step = next((value for number, value in reversed(fields) if number == 2), 0)
    if not isinstance(step, int):
        raise ValueError("its step is no whole number")
    step -= (step >> 63) << 64  # two's complement
    for summary in _messages(fields, 5):
        for entry in _messages(list(_fields(summary)), 1):
            values = list(_fields(entry))
            tag, plain = _messages(values, 1), [v for number, v in values if number == 2]
            found = _float(plain[-1]) if plain else _tensor(_messages(values, 8))
            if tag and found is not None:
                yield step, tag[-1].decode(), found


def _float(value: int | bytes) -> float:
    if not isinstance(value, bytes):
        raise ValueError("a scalar is no float")
    return float(struct.unpack("<f", value)[0])


def _tensor(tensors: Sequence[bytes]) -> float | None:
    """The one number of a ``TensorProto`` (field 1 its type, 4 raw content, 5 floats, 6 doubles); None for others."""
    if not tensors:
        return None
    fields = list(_fields(tensors[-1]))
    for (kind, form), packed in ((_FLOATS, 5), (_DOUBLES, 6)):
        if (1, kind) in fields:
            content = b"".join(_messages(fields, 4) or _messages(fields, packed))
            return float(struct.unpack(form, content)[0]) if len(content) == struct.calcsize(form) else None
    return None


def _messages(fields: Sequence[tuple[int, int | bytes]], wanted: int) -> list[bytes]:
    return [value for number, value in fields if number == wanted and isinstance(value, bytes)]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message: a varint as a whole number, all else as its bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(message):
            raise ValueError("a field is longer than its message")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for k, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            return value & (1 << 64) - 1, at + k + 1
    raise ValueError("a number without its end")


# DomainBed


def _domainbed(path: Path) -> Imported:
    """The last run of the file: DomainBed appends, and a job that is launched again starts at step 0."""
    rows, notes = list[dict[str, Any]](), list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            notes.append(f"line {number} is cut off or damaged; the {len(rows)} before it are used")
            break
        if row is not None:
            rows.append(_domainbed_row(row, f"{path}: line {number}"))
    if not rows:
        raise UsageError(f"{path}: no line of it is whole")
    starts = [0, *(k for k in range(1, len(rows)) if rows[k]["step"] <= rows[k - 1]["step"])]
    if len(starts) > 1:
        notes.append(f"the file holds {len(starts)} runs, one after the other; the last is used")
        rows = rows[starts[-1] :]
    name = "nll" if all("nll" in row for row in rows) else "loss"
    values = np.array([_number(row.get(name), f"{path}: {name} at step {row['step']}") for row in rows])
    if np.isnan(values).all():
        raise UsageError(f"{path}: no line holds a number in {name}")
    settings = rows[-1].get("args")
    algorithm = str(settings.get("algorithm", "unknown")) if isinstance(settings, dict) else "unknown"
    exact = algorithm == "ERM" or name == "nll"
    which = "" if exact else f"; {_bare(algorithm)}'s may hold a penalty, or be at w_asc"
    notes.append(f"{name} is the mean over the steps since the row before{which}")
    notes.append("the lr among its hparams is not used: its optimiser need not be SGD")
    notes += _unused([key for key in rows[-1] if key.startswith("env") and key.endswith("_acc")])
    at = np.array([row["step"] for row in rows])
    return _imported(DOMAINBED, "step", at, {"loss": values}, notes, algorithm)


def _domainbed_row(row: Any, where: str) -> dict[str, Any]:
    step = row.get("step") if isinstance(row, dict) else None
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= LATEST:
        raise UsageError(f"{where}: step is {_shown(step)}; it must be a whole number from 0 to {LATEST}")
    return dict(row)


# CSV


def _csv(path: Path) -> Imported:
    text = path.read_text(encoding="utf-8-sig")
    lines = [(k, line) for k, line in enumerate(text.splitlines(), 1) if line.strip()]
    while lines and lines[0][1].startswith("#"):
        lines.pop(0)
    try:
        table = [[cell.strip() for cell in next(csv.reader([line], strict=True))] for _, line in lines]
    except csv.Error as error:
        raise UsageError(f"{path}: is not CSV as it is documented ({error})") from error
    if len(table) < 2:
        raise UsageError(f"{path}: holds no row under a line of column names")
    names, notes = table[0], list[str]()
    unit = _csv_names(names, path)
    if len(table[-1]) < len(names) and not text.endswith("\n"):
        notes.append(f"line {lines[-1][0]} is cut off; the rows before it are used")
        lines, table = lines[:-1], table[:-1]
    rows = [_csv_row(names, cells, f"{path}: line {k}") for (k, _), cells in zip(lines[1:], table[1:], strict=True)]
    for (k, _), before, row in zip(lines[2:], rows, rows[1:], strict=False):
        if row[unit] <= before[unit]:
            raise UsageError(f"{path}: line {k}: {unit} {row[unit]:g} follows {before[unit]:g}; it must rise")
    columns = {name: np.array([row[name] for row in rows]) for name in COLUMNS if name in names}
    if not rows or not any(np.isfinite(columns[name]).any() for name in _MEASURED if name in columns):
        raise UsageError(f"{path}: no number under any of {', '.join(_MEASURED)}")
    at = np.array([row[unit] for row in rows])
    if "phi" in columns and (unit == "epoch" or (np.diff(at) > 1).any()):
        del columns["phi"]  # Gamma_t is the angle to the next step over this step's eta_t
        notes.append("phi is not used, as a row is of several steps")
    notes += _unused([name for name in names if name not in COLUMNS and name != unit])
    return _imported(CSV, unit, at, columns, notes)


def _csv_names(names: Sequence[str], path: Path) -> str:
    """Which of ``step`` and ``epoch`` counts the rows; without a known name nothing can be read."""
    double = [name for k, name in enumerate(names) if name in names[:k]]
    if double:
        raise UsageError(f"{path}: column {_shown(double[0])} is there twice")
    units = [name for name in ("step", "epoch") if name in names]
    if not units:
        found = ", ".join(_shown(name) for name in names[:6])
        raise UsageError(f"{path}: no column step or epoch, separated by commas; its columns are {found}")
    if not set(_MEASURED) & set(names):
        raise UsageError(f"{path}: no column of {', '.join(_MEASURED)}; rename those that hold them")
    return units[0]


def _csv_row(names: Sequence[str], cells: Sequence[str], where: str) -> dict[str, float]:
    if len(cells) != len(names):
        raise UsageError(f"{where}: has {_counted(len(cells), 'cell')} under {_counted(len(names), 'column name')}")
    known = {name: cell for name, cell in zip(names, cells, strict=True) if name in (*COLUMNS, "step", "epoch")}
    row = {name: _number(cell or None, f"{where}: {name}") for name, cell in known.items()}
    for unit in [name for name in ("step", "epoch") if name in row][:1]:
        if not (0 <= row[unit] <= LATEST and row[unit].is_integer()):
            raise UsageError(f"{where}: {unit} is {_shown(known[unit])}; it must be a whole number from 0 to {LATEST}")
    for name in [name for name in ("grad_norm", "grad_norm_ascent", "lr", "phi") if name in row]:
        if row[name] < 0:
            raise UsageError(f"{where}: {name} is {row[name]:g}; it must be at least 0")
    return row


# all three


def _imported(
    source: str,
    unit: str,
    at: np.ndarray,
    columns: Mapping[str, np.ndarray],
    notes: Sequence[str],
    algorithm: str = "unknown",
) -> Imported:
    """All columns, with NaN for Inf: what diverged has no number."""
    given = {name: np.where(np.abs(values) <= LARGEST, values, math.nan) for name, values in columns.items()}
    lost = sum(int(np.isnan(values).sum()) for values in given.values())
    said = [*notes, *([f"{_counted(lost, 'cell')} without a finite number"] if lost else [])]
    absent = {name: np.full(len(at), math.nan) for name in COLUMNS}
    return Imported(source, unit, at.astype(float), absent | given, tuple(said), algorithm)


def _number(value: Any, where: str) -> float:
    """A number of a file, NaN for none."""
    if value is None:
        return math.nan
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value")
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{where} is {_shown(value)}, no number") from error


def _unused(names: Iterable[str]) -> list[str]:
    """The note on what a log holds beyond the theory's columns; long lists are counted."""
    found = sorted(names)
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return [f"not used, as no inequality has it: {', '.join(map(_bare, found[:4]))}{more}"] if found else []


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _bare(name: str) -> str:
    return _shown(name)[1:-1]


def _shown(value: Any) -> str:
    """A value of a file on one line, not longer than 40 characters."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"
