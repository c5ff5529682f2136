"""How far DISAM's ascent is from SAM's over training, and the variance of the domains' losses before and after it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from disam_theory.study import Record, Study
from disam_theory.traces import Trace
from figures.fig3_training_loss import LAM, RHO, arms
from figures.style import ALGORITHM, LINES, PALETTE, SUITES, FigureSpec, Row, band, panels, summary

STRENGTHS = (LAM, 0.5, 1.0)
PLACES = {"losses": "$w$", "losses_ascent": "$w^{asc}$"}


def negative_share(trace: Trace) -> np.ndarray:
    r"""The share of the weights $\beta_i$ below zero at each recorded step (T,), of the domains in the batch."""
    here = np.isfinite(trace.steps["losses"])
    return ((trace.steps["beta"] < 0) & here).sum(1) / here.sum(1)


def variances(trace: Trace, at: str) -> np.ndarray:
    r"""$\mathrm{Var}\{L_i\}$ (Eq. 6) on each recorded step's batch (T,), at ``losses`` or at ``losses_ascent``."""
    return np.nanvar(trace.steps[at], axis=1)


def compute_directions(study: Study) -> list[Row]:
    r"""Mean cosine of the ascent directions, and mean share (%) of negative weights, along DISAM's runs."""
    rows = []
    for suite in SUITES:
        for lam in STRENGTHS:
            records = study.records(suite, sampling="pooled", **{**arms(RHO)["disam"], "lam": lam})
            steps = records[0].trace.steps["step"].astype(int).tolist()
            cosine = _curves(records, lambda trace: trace.steps["cos_sam"])
            negative = 100 * _curves(records, negative_share)
            for t, step in enumerate(steps):
                place = {"suite": suite, "rho": RHO, "lam": lam, "step": step}
                rows.append({**place, **summary(cosine[..., t], "cosine_"), **summary(negative[..., t], "negative_")})
    return rows


def compute_variances(study: Study) -> list[Row]:
    r"""Geometric means of the variance at $w$ and at $w^{asc}$, and DISAM's relative difference from SAM (%).

    Both algorithms see the same batches, so that what a batch's noise adds to a variance is shared.
    """
    rows = []
    for suite in SUITES:
        picked = {name: study.records(suite, sampling="pooled", **arms(RHO)[name]) for name in ("sam", "disam")}
        steps = picked["sam"][0].trace.steps["step"].astype(int).tolist()
        for at in PLACES:
            logs = {
                name: _curves(records, lambda t, at=at: np.log(variances(t, at))) for name, records in picked.items()
            }
            for name in picked:
                for t, step in enumerate(steps):
                    place = {"suite": suite, "rho": RHO, "lam": LAM, "algorithm": name, "at": at, "step": step}
                    difference = _exponential(summary(logs[name][..., t] - logs["sam"][..., t]))
                    relative = {f"difference_{k}": 100 * (difference[k] - 1) for k in ("mean", "low", "high")}
                    rows.append({**place, **_exponential(summary(logs[name][..., t])), **relative})
    return rows


def _exponential(logarithms: Row) -> Row:
    return {k: v if k == "seeds" else float(np.exp(v)) for k, v in logarithms.items()}


def _curves(records: list[Record], column: Any) -> np.ndarray:
    """A column of each run's trace, (S, H, T)."""
    seeds = len({record.seed for record in records})
    curves = np.stack([column(record.trace) for record in records])
    return curves.reshape(seeds, -1, curves.shape[-1])


def draw_directions(rows: list[Row]) -> Figure:
    """Above the cosine, below the share of negative weights; a column a suite, a line a lambda."""
    suites, lams = (list(dict.fromkeys(row[key] for row in rows)) for key in ("suite", "lam"))
    figure, axes = panels(len(suites), rows=2, height=1.7, sharex=True, sharey="row")
    for column, suite in enumerate(suites):
        for k, lam in enumerate(lams):
            look = {"color": PALETTE[k], "linestyle": LINES[k], "marker": "os^"[k], "label": rf"$\lambda={lam:g}$"}
            mine = [r for r in rows if r["suite"] == suite and r["lam"] == lam]
            band(axes[0, column], mine, "step", look, prefix="cosine_")
            band(axes[1, column], mine, "step", look, prefix="negative_")
        axes[0, column].set_title(suite)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("cosine of SAM's and\nDISAM's ascent")
    axes[1, 0].set_ylabel("negative weights (%)")
    axes[0, 0].legend(loc="lower left")
    return figure


def draw_variances(rows: list[Row]) -> Figure:
    """Above the variances of both algorithms at both points, below DISAM's difference from SAM; a column a suite."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = panels(len(suites), rows=2, height=1.8, sharex=True, sharey="row")
    for column, suite in enumerate(suites):
        for k, (at, point) in enumerate(PLACES.items()):
            for name in ("sam", "disam"):
                mine = [r for r in rows if (r["suite"], r["algorithm"], r["at"]) == (suite, name, at)]
                words = {"label": f"{ALGORITHM[name]['label']}, {point}", "marker": "os"[k], "alpha": (0.55, 1.0)[k]}
                look = {**ALGORITHM[name], **words}
                band(axes[0, column], mine, "step", look)
            below = {"color": PALETTE[k], "linestyle": LINES[k], "marker": "os"[k], "label": f"at {point}"}
            band(axes[1, column], mine, "step", below, prefix="difference_")
        axes[0, column].set(title=suite, yscale="log")
        axes[1, column].axhline(0, color="#555555", lw=0.6)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel(r"$\mathrm{Var}\{L_i\}$")
    axes[1, 0].set_ylabel("DISAM's difference\nfrom SAM (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    axes[1, 0].legend(loc="lower left")
    return figure


DIRECTIONS = FigureSpec(
    id="directions",
    title="How far DISAM's ascent is from SAM's over training",
    caption=r"Along DISAM's runs, $\rho=0.5$: the cosine between $\nabla L$, which SAM ascends, and $\nabla L_{DI}$, "
    r"and the share of the domains' weights $\beta_i$ that are negative, on the step's batch. $\lambda=0.1$ is the "
    "paper's default. Averaged over held-out domains; mean and 95 % interval over seeds.",
    where="not in the paper",
    compute=compute_directions,
    draw=draw_directions,
)
VARIANCES = FigureSpec(
    id="variances",
    title="Variance of the domains' losses, before and after the ascent",
    caption=r"Above, $\mathrm{Var}\{L_i\}$ on the step's batch at $w$ and at $w^{asc}$ (geometric mean); below, "
    r"DISAM's relative difference from SAM, whose runs see the same batches. DISAM's objective makes the "
    r"variance at the ascent point smaller. $\rho=0.5$, $\lambda=0.1$. Averaged over held-out domains; 95 % intervals "
    "over seeds.",
    where="not in the paper",
    compute=compute_variances,
    draw=draw_variances,
)
