"""Audits -> figures as SVG text for a page, or nothing where matplotlib is not installed.

Each figure is as wide as a phone, so that a page can put several side by side or one below the other. Ink is
``currentColor`` and the ground is transparent: a page in dark mode needs no second set. Domains differ in colour
(Okabe and Ito) and in line style or marker.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disam_theory.audit import Audit, Row
from disam_theory.audit_measures import SOURCE, UNSEEN

WIDTH, HEIGHT = 3.6, 2.7  # inches: 346 px
LEAST_DENSITY = 1e-6  # of what is drawn
INK = "#010203"  # stands for the page's own ink until the SVG is written
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # readable on white and on black
LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
RC: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.3,
    "grid.alpha": 0.4,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "disam_theory",
    "svg.fonttype": "path",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "grid.color": INK,
}
Axes = Any
Draw = Callable[[Axes, Audit], None]


@dataclass(frozen=True)
class Picture:
    """An SVG element with what it shows in words."""

    id: str
    title: str
    caption: str
    svg: str


def pictures(audits: Mapping[str, Audit]) -> list[Picture]:
    """Every figure that the audits have data for, of each checkpoint; none without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    found = []
    with matplotlib.rc_context(RC):
        for number, (label, audit) in enumerate(audits.items()):
            for name, (title, caption, draw) in FIGURES.items():
                figure = Figure(figsize=(WIDTH, HEIGHT))
                axes = figure.subplots()
                draw(axes, audit)
                if axes.has_data():
                    _legend(figure, axes)
                    id = f"{name}-{number}"
                    where = f", {label}" if len(audits) > 1 else ""
                    found.append(Picture(id, f"{title}{where}", caption, _svg(figure, id)))
    return found


def _svg(figure: Any, id: str) -> str:
    """The figure's SVG element alone: no date, ids of its own, and the page's ink."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # of names in letters that the font lacks, which the tables beside it show
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    element = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{id}-", element)
    return element.replace(INK, "currentColor")


# --- the figures, each from one audit ---


def eigenvalues(axes: Axes, audit: Audit) -> None:
    """A bar each eigenvalue with its certified interval, domain by domain."""
    rows = audit.rows
    k = len(rows[0].eigenvalues)
    for j in range(k):
        at = [i + (j - (k - 1) / 2) * 0.8 / k for i in range(len(rows))]
        heights = [row.eigenvalues[j] for row in rows]
        below = [row.eigenvalues[j] - row.lower[j] for row in rows]
        above = [row.upper[j] - row.eigenvalues[j] for row in rows]
        look = {"color": PALETTE[j % len(PALETTE)], "label": rf"$\lambda_{{{j + 1}}}$"}
        axes.bar(at, heights, 0.8 / k, yerr=(below, above), ecolor=INK, capsize=1.5, error_kw={"lw": 0.8}, **look)
    axes.set_xticks(range(len(rows)), [_name(row) for row in rows], rotation=40, ha="right")
    axes.set_ylabel("eigenvalue")
    axes.grid(visible=False, axis="x")


def against_loss(axes: Axes, audit: Audit) -> None:
    """SAM's sharpness against the loss, with the loss's 95 % interval."""
    for i, row in enumerate(_domains(audit)):
        reach = 1.96 * (row.loss_error or 0.0)
        look = {"color": _colour(audit, row.name), "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5}
        axes.errorbar(
            row.loss, row.sam, xerr=reach, capsize=2, linestyle="none", elinewidth=0.8, **look, label=_name(row)
        )
    axes.set(xlabel="loss", ylabel=r"SAM sharpness at $\rho$")
    axes.locator_params(nbins=5)
    if all(_spans_decades([getattr(row, name) for row in _domains(audit)]) for name in ("loss", "sam")):
        axes.set(xscale="log", yscale="log")


def _spans_decades(values: Sequence[float | None]) -> bool:
    """Whether a logarithmic axis would have room for its labels: below a factor of ten they run into each other."""
    numbers = [value or 0.0 for value in values]
    return min(numbers) > 0 and max(numbers) >= 10 * min(numbers)


def shares(axes: Axes, audit: Audit) -> None:
    """The first-order rise of each domain along SAM's and along DISAM's step."""
    names = list(dict.fromkeys(row["domain"] for row in audit.shares))
    for j, method in enumerate(("SAM", "DISAM")):
        own = {row["domain"]: row["first_order"] for row in audit.shares if row["method"] == method}
        look = {"color": PALETTE[1 - j], "hatch": "//" if j else "", "edgecolor": INK, "linewidth": 0.4}
        axes.barh(
            [i + (j - 0.5) * 0.38 for i in range(len(names))], [own[n] for n in names], 0.36, label=method, **look
        )
    axes.axvline(0.0, color=INK, lw=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(r"$\langle\nabla L_i,\epsilon\rangle$")
    axes.grid(visible=False, axis="y")


def densities(axes: Axes, audit: Audit) -> None:
    """The smoothed spectral density of each loss; it needs a full audit."""
    for name in dict.fromkeys(row["loss"] for row in audit.densities):
        own = [row for row in audit.densities if row["loss"] == name]
        y = [row["density"] if row["density"] > LEAST_DENSITY else math.nan for row in own]
        axes.plot([row["eigenvalue"] for row in own], y, label=name, **_line(audit, name))
    if audit.densities:
        axes.set(xlabel="eigenvalue", ylabel="density", yscale="log")


def landscape(axes: Axes, audit: Audit) -> None:
    """The losses along the pooled loss's sharpest direction."""
    for name in (name for name in audit.slices[0] if name != "a"):
        points = [(row["a"], row[name]) for row in audit.slices if row[name] is not None and math.isfinite(row[name])]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **_line(audit, name))
    axes.axvline(0.0, color=INK, lw=0.5)
    axes.set(xlabel=r"$a$: the weights are $w+a\,v_1$", ylabel="loss")


FIGURES: Mapping[str, tuple[str, str, Draw]] = {
    "eigenvalues": (
        "Top eigenvalues of each loss",
        "Bars are Ritz values, whiskers the certified intervals on these samples; most are too short to be seen.",
        eigenvalues,
    ),
    "against-loss": (
        "Sharpness against loss",
        "Rise of each domain's loss after one step of length rho along its own gradient. The whisker is the 95 % "
        "interval of the loss.",
        against_loss,
    ),
    "shares": (
        "What each domain feels of the perturbation",
        "Rise to first order along one common step of length rho: SAM's, and DISAM's.",
        shares,
    ),
    "landscape": (
        "Losses along the sharpest direction",
        "Along the top eigenvector of the pooled loss. A slice shows this direction alone.",
        landscape,
    ),
    "densities": (
        "Spectral densities",
        "Smoothed by Gaussians; not drawn below one in a million. Nothing narrower than the smoothing is resolved.",
        densities,
    ),
}


def _domains(audit: Audit) -> Sequence[Row]:
    return [row for row in audit.rows if row.role in (SOURCE, UNSEEN)]


def _name(row: Row) -> str:
    return f"{row.name} (unseen)" if row.role == UNSEEN else row.name


def _number(audit: Audit, name: str) -> int:
    return [row.name for row in _domains(audit)].index(name)


def _colour(audit: Audit, name: str) -> str:
    """A domain has one colour in all figures, the pooled loss has the page's ink."""
    return INK if name == "pooled" else PALETTE[_number(audit, name) % len(PALETTE)]


def _line(audit: Audit, name: str) -> dict[str, Any]:
    style = "-" if name == "pooled" else LINES[_number(audit, name) % len(LINES)]
    return {"color": _colour(audit, name), "linestyle": style, "linewidth": 1.8 if name == "pooled" else 1.2}


def _legend(figure: Any, axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3))
