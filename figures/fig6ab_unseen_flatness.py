"""Fig. 6(a, b): gradient variance and sharpness on the unseen domain along training, and how DISAM differs from SAM."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from disam_theory.algorithms import Settings
from disam_theory.flatness import BATCH, RADIUS, Kept, kept_flatness
from disam_theory.study import Study
from figures.style import ALGORITHM, FigureSpec, Row, band, panels, summary

RHOS = (0.05, 0.5)
LAM = 0.1
MEASURES = {"gradient_variance": "gradient\nvariance", "sharpness": "sharpness"}
RADII: dict[float, Row] = {
    0.05: {"color": "#009E73", "linestyle": "-", "marker": "o"},
    0.5: {"color": "#CC79A7", "linestyle": "--", "marker": "s"},
}


def compute(study: Study) -> list[Row]:
    """Both measures of ERM, SAM and DISAM at each kept step, and the relative difference from SAM in per cent."""
    rows = []
    compared = [b for b in study.blocks if b.snapshot_seeds and any(arm.algorithm == "erm" for arm in b.arms)]
    for suite in dict.fromkeys(block.suite for block in compared):
        kept = kept_flatness(study, suite)
        for rho in RHOS:
            arms = {name: kept[Settings(name, rho=rho, lam=LAM).name] for name in ("erm", "sam", "disam")}
            for name, arm in arms.items():
                rows += _rows(arm, arms["sam"], {"suite": suite, "algorithm": name, "rho": rho})
    return rows


def _rows(arm: Kept, sam: Kept, place: Row) -> list[Row]:
    rows = []
    for measure in MEASURES:
        values, reference = getattr(arm, measure), getattr(sam, measure)
        relative: np.ndarray = 100 * (values / reference - 1)
        for k, step in enumerate(arm.steps):
            difference = summary(relative[..., k], "difference_")
            rows.append({**place, "measure": measure, "step": step, **summary(values[..., k]), **difference})
    return rows


def draw(rows: list[Row]) -> Figure:
    """A column a suite: both measures at the larger radius, and below DISAM's difference from SAM at both radii."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = panels(len(suites), rows=3, height=1.5, sharex=True)
    for column, suite in enumerate(suites):
        here = [row for row in rows if row["suite"] == suite]
        for ax, measure in zip(axes[:2, column], MEASURES, strict=True):
            for name, look in ALGORITHM.items():
                mine = [row for row in here if row["measure"] == measure and row["algorithm"] == name]
                band(ax, [row for row in mine if row["rho"] == RHOS[-1]], "step", look)
        below = axes[2, column]
        for rho, radius in RADII.items():
            mine = [r for r in here if r["measure"] == "gradient_variance" and r["algorithm"] == "disam"]
            look = {**radius, "label": rf"$\rho={rho:g}$"}
            band(below, [r for r in mine if r["rho"] == rho], "step", look, prefix="difference_")
        below.axhline(0, color="#555555", lw=0.6)
        below.set_xlabel("step")
        axes[0, column].set_title(suite)
    for ax, label in zip(axes[:, 0], (*MEASURES.values(), "gradient variance,\nDISAM from SAM (%)"), strict=True):
        ax.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.legend(*axes[2, -1].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="lowest row")
    figure.align_ylabels(axes[:, 0])
    return figure


FIG6AB = FigureSpec(
    id="fig6ab",
    title="Flatness on the unseen domain along training",
    caption=rf"Variance of the gradient over batches of {BATCH} of the unseen domain, and rise of its loss by one "
    rf"ascent step of length {RADIUS:g}, at the weights that the study keeps; averaged over held-out domains, "
    r"$\rho=0.5$, $\lambda=0.1$. Below, how far DISAM's gradient variance lies from SAM's, paired by seed, at both "
    "radii. Mean and 95 % interval over seeds.",
    where="Fig. 6(a, b)",
    compute=compute,
    draw=draw,
)
