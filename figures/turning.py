"""What the proof of Theorem 1 takes as small, and both sides of the bounds, along all full-batch runs."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from disam_theory import convergence
from disam_theory.errors import ComputationError
from disam_theory.study import Study
from figures.fig3_training_loss import arms
from figures.style import ALGORITHM, FigureSpec, Row, band, panels

NAMES, RHO = ("sam", "disam"), 0.05
SECANT = {"color": "#009E73", "linestyle": ":", "marker": ""}  # as figures of one run have it
LABELS = {
    "phi": "angle $\\phi_t$\n(degrees)",
    "gamma": r"$\Gamma_t=\phi_t/\eta_t$",
    "cross": "|cross term|\nover main term",
    "theorem1": "Theorem 1,\nleft over right",
    "corrected": "corrected,\nleft over right",
}


def compute(study: Study, names: tuple[str, ...] = NAMES) -> list[Row]:
    """A row for each suite, algorithm, quantity and step: the median over full-batch runs, and their quartiles."""
    suites = [block.suite for block in study.blocks if block.arms[0].sampling == "full"]
    if not suites:
        raise ComputationError("the study has no full-batch runs; Theorem 1 speaks of these alone")
    rows = []
    for suite in suites:
        for name in names:
            records = study.records(suite, sampling="full", **arms(RHO)[name])
            runs = [quantities(convergence.analyse(record.trace)) for record in records]
            for quantity in runs[0]:
                place = {"suite": suite, "algorithm": name, "quantity": quantity, "runs": len(runs)}
                rows += [{**place, **row} for row in _by_step(np.stack([run[quantity] for run in runs]))]
    return rows


def quantities(found: convergence.Convergence) -> dict[str, np.ndarray]:
    r"""What is drawn of one run, each (T,): the angle, its rate beside a lower bound of $L$, and the bounds' sides.

    The main term is $\eta_t\lVert\nabla L(w_t^{asc})\rVert^2$. A bound is exceeded where left over right is above one.
    """
    series = found.series
    return {
        "phi": np.degrees(series["turning_left"]),
        "gamma": series["gamma"],
        "local_smoothness": series["local_smoothness"],
        "cross": series["cross_over_main"],
        "theorem1": series["theorem1_left"] / series["theorem1_right"],
        "corrected": series["corrected_average_left"] / series["corrected_average_right"],
    }


def _by_step(curves: np.ndarray) -> list[Row]:
    """Median and quartiles of the sizes of curves (runs, T) at the steps T = 1, 2, ... at which every run has a number.

    ``negative`` is the share of runs in which it is below zero: the cross term alone has a sign.
    """
    there = np.isfinite(curves).all(0)
    low, middle, high = np.quantile(np.abs(curves[:, there]), [0.25, 0.5, 0.75], axis=0)
    columns = {
        "T": np.flatnonzero(there) + 1,
        "median": middle,
        "low": low,
        "high": high,
        "negative": (curves[:, there] < 0).mean(0),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]


def draw(rows: list[Row]) -> Figure:
    """A column a suite, a row a quantity, a line an algorithm."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = panels(len(suites), rows=len(LABELS), height=1.3, sharex=True, sharey="row")
    for column, suite in enumerate(suites):
        for line, quantity in enumerate(LABELS):
            for name in NAMES:
                band(axes[line, column], _of(rows, suite, name, quantity), "T", ALGORITHM[name])
        secant = {**SECANT, "label": r"secant of gradient norms ($\leq L$)"}
        band(axes[1, column], _of(rows, suite, "sam", "local_smoothness"), "T", secant)
        shares = [row["negative"] for name in NAMES for row in _of(rows, suite, name, "cross")]
        words = f"negative on {100 * np.mean(shares):.1f} % of steps"
        axes[2, column].text(0.97, 0.9, words, ha="right", va="top", fontsize=7, transform=axes[2, column].transAxes)
        axes[0, column].set(title=suite, xscale="log")
        for line in (1, 2, 3, 4):
            axes[line, column].set_yscale("log")
        for line in (3, 4):
            axes[line, column].axhline(1, color="#555555", lw=0.6)
        axes[-1, column].set_xlabel("steps $T$")
    for line, label in enumerate(LABELS.values()):
        axes[line, 0].set_ylabel(label)
    axes[0, 0].set_ylim(bottom=0)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _of(rows: list[Row], suite: str, name: str, quantity: str) -> list[Row]:
    """One curve's rows, whose medians are the line that ``band`` draws."""
    mine = [r for r in rows if (r["suite"], r["algorithm"], r["quantity"]) == (suite, name, quantity)]
    return [{**row, "mean": row["median"]} for row in mine]


TURNING = FigureSpec(
    id="turning",
    title="What the proof of Theorem 1 takes as small",
    caption=r"Along full-batch runs with $\eta_t=\eta_0/\sqrt t$ and $\rho=0.05$: the angle between consecutive "
    r"perturbations; its rate, beside a lower bound of the local smoothness along SAM's runs; the cross term that the "
    r"proof drops over $\eta_t\lVert\nabla L(w_t^{asc})\rVert^2$; and the left side "
    r"of Theorem 1 as printed and of the corrected theorem over the right one, with $L$ and $G$ as estimated along "
    r"each run and $L_{\min}=0$. Median and quartiles over all seeds and held-out domains.",
    where="Theorem 1",
    compute=compute,
    draw=draw,
)
