"""One style for all figures: Okabe-Ito colours with a line style and a marker each, 5.5 inches wide, vector output."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disam_theory.files import csv_text, write_atomically
from disam_theory.provenance import one_line
from disam_theory.statistics import paired_interval
from disam_theory.study import Study

WIDTH = 5.5  # inches, the text width of the paper
SUITES = ("digits-rotated", "digits-corrupted", "digits-sources")  # with every arm; the study's others are of one map
Row = dict[str, Any]

ALGORITHM = {
    "erm": {"color": "#000000", "linestyle": "-", "marker": "o", "label": "ERM"},
    "sam": {"color": "#D55E00", "linestyle": "--", "marker": "s", "label": "SAM"},
    "disam": {"color": "#0072B2", "linestyle": "-.", "marker": "^", "label": "DISAM"},
}
PALETTE = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # domains, after the algorithms' colours
LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)))

RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.3,
    "grid.alpha": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "disam_theory",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class FigureSpec:
    """A figure: ``compute`` makes its rows from the study, ``draw`` draws rows; the CSV of the rows is its data."""

    id: str
    title: str
    caption: str
    where: str
    compute: Callable[[Study], list[Row]]
    draw: Callable[[list[Row]], Figure]


@contextmanager
def styled() -> Iterator[None]:
    """The style, without pyplot's state."""
    with matplotlib.rc_context(RC):
        yield


def panels(columns: int, *, rows: int = 1, height: float = 2.1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of the text's width and its axes (rows, columns)."""
    figure = Figure(figsize=(WIDTH, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def band(axes: Axes, rows: Sequence[Row], x: str, look: Mapping[str, Any], *, prefix: str = "") -> None:
    """A line of ``mean`` over ``x`` with the interval ``low`` to ``high`` shaded; ``prefix`` names the columns."""
    at = [row[x] for row in rows]
    mean, low, high = ([row[prefix + name] for row in rows] for name in ("mean", "low", "high"))
    axes.plot(at, mean, markevery=max(1, len(rows) // 6), **look)
    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, lw=0)


def summary(values: np.ndarray, prefix: str = "") -> Row:
    """Mean over seeds with the 95 % t interval, of values (S, H): held-out domains averaged within each seed."""
    interval = paired_interval(values)
    named = {"mean": interval.estimate, "low": interval.low, "high": interval.high, "seeds": interval.n}
    return {prefix + name: value for name, value in named.items()}


def save(spec: FigureSpec, rows: list[Row], folder: Path, record: Mapping[str, Any]) -> str:
    """Write ``ID.csv``, ``.pdf``, ``.svg`` and ``.png``; returns the SVG's text. Same rows and record, same bytes.

    ``record`` is the provenance: the comment line that the CSV starts with, and the pictures' metadata.
    """
    made_by = one_line(record)
    write_atomically(folder / f"{spec.id}.csv", f"# {made_by}\n{csv_text(rows)}")
    svg = b""
    with styled():
        figure = spec.draw(rows)
        undated = {
            "svg": {"Description": made_by, "Date": None},
            "pdf": {"Subject": made_by, "CreationDate": None},
            "png": {"Description": made_by},
        }
        for kind, metadata in undated.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            write_atomically(folder / f"{spec.id}.{kind}", buffer.getvalue())
            svg = buffer.getvalue() if kind == "svg" else svg
    return svg.decode()
