"""Forest plot of what the domain-inspired term gains in the embedded study, on Table 1's methods and Table 5's."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from disam_theory.algorithms import STRENGTHS
from disam_theory.errors import ComputationError
from disam_theory.radii import final_accuracy
from disam_theory.study import Study
from figures.style import SUITES, FigureSpec, Row, panels, summary

LAM, RHOS = 0.1, (0.05, 0.5)
MARGIN = 0.5  # points: the band in which a gain makes no practical difference
NAMES = {"sam": "SAM", "gsam": "GSAM", "sagm": "SAGM", "vrex": "V-REx", "fishr": "Fishr", "coral": "CORAL"}
PRINTED = {"sam": 1.9, "gsam": 1.7, "sagm": 1.9, "vrex": 2.7, "fishr": 1.5}  # Sec. 4.2; averages of Table 5
LOOK: dict[bool, dict[str, Any]] = {
    False: {"color": "#0072B2", "marker": "o"},
    True: {"color": "#000000", "marker": "D"},
}  # suite, average

Pair = tuple[dict[str, Any], dict[str, Any]]  # settings of the arm with the term, and of the one without


def compute(study: Study) -> list[Row]:
    """Gain in unseen accuracy after the last step, in points, of each comparison on each suite and on average."""
    rows = []
    for (method, rho), (first, second) in pairs(study).items():
        gains = {}
        for suite in SUITES:
            try:
                arms = [study.measure(study.records(suite, **arm), final_accuracy) for arm in (first, second)]
            except ComputationError:  # a run diverged: the claims say which
                continue
            gains[suite] = arms[0] - arms[1]
        if not gains:
            continue
        average = np.stack([gain.mean(1) for gain in gains.values()], 1)
        for suite, gain in {**gains, "average": average}.items():
            printed = PRINTED.get(method) if suite == "average" else None
            rows.append({"method": method, "rho": rho, "suite": suite, **summary(gain), "printed": printed})
    return rows


def pairs(study: Study) -> dict[tuple[str, float], Pair]:
    """(method, rho) -> the two arms, as the study has them."""
    found: dict[tuple[str, float], Pair] = {}
    arms = [arm for block in study.blocks for arm in block.arms if arm.sampling == "pooled"]
    for arm in arms:
        chosen = {"algorithm": arm.algorithm, "rho": arm.rho, "lam": arm.lam, "sampling": "pooled"}
        if arm.lam != LAM or arm.rho not in RHOS:
            continue
        if arm.objective in STRENGTHS and arm.algorithm == "disam":
            strength = STRENGTHS[arm.objective]
            own = {"objective": arm.objective, strength: getattr(arm, strength)}
            found[arm.objective, arm.rho] = ({**chosen, **own}, {"algorithm": "erm", **own})
        elif arm.algorithm == "disam" and any(a.algorithm == "sam" and a.rho == arm.rho for a in arms):
            found["sam", arm.rho] = (chosen, {"algorithm": "sam", "rho": arm.rho, "sampling": "pooled"})
        elif arm.algorithm in ("gsam", "sagm"):
            found[arm.algorithm, arm.rho] = (chosen, {**chosen, "lam": 0.0})
    return dict(sorted(found.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1])))


def draw(rows: list[Row]) -> Figure:
    """A block a comparison: a line a suite, the average below them, and what the paper prints as a cross."""
    comparisons = list(dict.fromkeys((row["method"], row["rho"]) for row in rows))
    figure, axes = panels(1, height=0.13 * (len(rows) + 1.3 * len(comparisons)) + 0.9)
    ax = axes[0, 0]
    labels, ticks, at = [], [], 0.0
    ax.axvspan(-MARGIN, MARGIN, color="#999999", alpha=0.15, lw=0)
    for method, rho in comparisons:
        what = "DISAM on it" if method in STRENGTHS else "the term"
        title = rf"{NAMES[method]}, $\rho={rho:g}$: with {what}, against without"
        ax.text(0.01, at, title, transform=ax.get_yaxis_transform(), fontweight="bold", va="center", fontsize=7)
        for row in (r for r in rows if (r["method"], r["rho"]) == (method, rho)):
            at += 1
            look = LOOK[row["suite"] == "average"]
            ax.plot([row["low"], row["high"]], [at, at], color=look["color"], lw=1.6)
            ax.plot(row["mean"], at, ls="none", ms=4, **look)
            if row["printed"] is not None:
                ax.plot(row["printed"], at, ls="none", marker="x", color="#D55E00", ms=5, mew=1.4)
            labels.append(row["suite"])
            ticks.append(at)
        at += 1.3
    ax.axvline(0, color="black", lw=0.8, zorder=1)
    ax.set(ylim=(at - 0.7, -0.8), yticks=ticks, yticklabels=labels, xlabel="gain in unseen accuracy (points)")
    ax.tick_params(axis="y", length=0, labelsize=7)
    ax.grid(visible=False, axis="y")
    handles = [
        Line2D([], [], lw=1.6, label="a suite", **LOOK[False]),
        Line2D([], [], lw=1.6, label="average of the suites", **LOOK[True]),
        Line2D([], [], ls="none", marker="x", color="#D55E00", mew=1.4, label="printed in the paper"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


GAINS = FigureSpec(
    id="gains",
    title="What the domain-inspired term gains in this study",
    caption=rf"Accuracy on the unseen domain after the last step, with the term ($\lambda={LAM:g}$) minus without it, "
    "paired by seed and averaged over held-out domains; 95 % intervals over seeds, not corrected for their number. "
    f"Grey: gains of less than {MARGIN:g} points. Crosses: what the paper has on DomainBed with ResNet-50, "
    "averaged over its data sets. DISAM on an objective is compared with the objective alone, as Table 5 does, so that "
    "SAM's own gain is part of it. A suite on which a run diverged is left out.",
    where="Tables 1 and 5",
    compute=compute,
    draw=draw,
)
