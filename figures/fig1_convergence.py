"""Fig. 1: (a) accuracy on the unseen domain of ERM and SAM over rho; (b) convergence of each source domain, and how
far the domains are apart in it.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disam_theory.disparity import normalised_losses, raw_losses, spread
from disam_theory.radii import final_accuracy
from disam_theory.study import Study
from figures.style import ALGORITHM, LINES, PALETTE, SUITES, FigureSpec, Row, band, panels, summary

HELD_OUT = {"digits-corrupted": "noise"}  # panel (b): sources that differ most in difficulty
RHO, LAM = 0.5, 0.1


def compute_accuracy(study: Study) -> list[Row]:
    """Mean unseen accuracy (per cent) of ERM (rho = 0) and of SAM at each rho, and the paired difference from ERM."""
    rows = []
    for suite in SUITES:
        erm = study.measure(study.records(suite, algorithm="erm", sampling="pooled"), final_accuracy)
        rows.append(_accuracy_row(suite, "erm", 0.0, erm, erm))
        sam = study.records(suite, algorithm="sam", sampling="pooled")
        for rho in sorted({record.settings.rho for record in sam}):
            values = study.measure([r for r in sam if r.settings.rho == rho], final_accuracy)
            rows.append(_accuracy_row(suite, "sam", rho, values, erm))
    return rows


def _accuracy_row(suite: str, algorithm: str, rho: float, values: np.ndarray, erm: np.ndarray) -> Row:
    place = {"suite": suite, "algorithm": algorithm, "rho": rho}
    return {**place, **summary(values), **summary(values - erm, "difference_")}


def draw_accuracy(rows: list[Row]) -> Figure:
    """A column a suite: above SAM over rho with ERM as a level, below the paired difference."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = panels(len(suites), rows=2, height=1.6, sharex=True)
    for column, suite in enumerate(suites):
        above, below = axes[:, column]
        erm = next(r for r in rows if r["suite"] == suite and r["algorithm"] == "erm")
        sam = [r for r in rows if r["suite"] == suite and r["algorithm"] == "sam"]
        band(above, [{**erm, "rho": r["rho"]} for r in sam], "rho", {**ALGORITHM["erm"], "marker": ""})
        band(above, sam, "rho", ALGORITHM["sam"])
        band(below, sam, "rho", ALGORITHM["sam"], prefix="difference_")
        below.axhline(0, color="#555555", lw=0.6)
        above.set(xscale="log", title=suite)
        below.set_xlabel(r"$\rho$")
    axes[0, 0].set_ylabel("unseen accuracy (%)")
    axes[1, 0].set_ylabel("difference from\nERM (points)")
    axes[0, 0].legend()
    return figure


def compute_domains(study: Study, names: tuple[str, ...] = ("erm", "sam")) -> list[Row]:
    r"""Each source domain's training loss over training, normalised as the paper does, $(L_i-\min)/\max$, and raw.

    ``spread_``: the standard deviation over the domains of the normalised losses, in each row of its step.
    """
    rows = []
    for suite, held_out in HELD_OUT.items():
        for name in names:
            traces = [r.trace for r in study.records(suite, **_arm(name)) if r.held_out == held_out]
            normal, raw = (np.stack([curves(t) for t in traces]) for curves in (normalised_losses, raw_losses))
            apart = spread(normal)  # (S, E)
            steps = traces[0].evaluations["step"].astype(int).tolist()
            for (i, domain), (e, step) in product(enumerate(traces[0].domains), enumerate(steps)):
                place = {"suite": suite, "held_out": held_out, "algorithm": name, "domain": domain, "step": step}
                curves = summary(normal[:, e, i]) | summary(raw[:, e, i], "raw_")
                rows.append(place | curves | summary(apart[:, e], "spread_"))
    return rows


def _arm(name: str) -> Row:
    radius = {} if name == "erm" else {"rho": RHO}
    strength = {"lam": LAM} if name == "disam" else {}
    return {"algorithm": name, "sampling": "pooled", **radius, **strength}


def draw_domains(rows: list[Row]) -> Figure:
    """Left ERM, then SAM: one line a source domain; right how far the domains are apart, a line an algorithm."""
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    figure, axes = panels(len(names) + 1)
    for ax, name in zip(axes[0], names, strict=False):
        draw_lines(ax, [row for row in rows if row["algorithm"] == name])
        ax.set(xlabel="step", title=title(name), ylim=(0, 1))
    domain = rows[0]["domain"]
    for name in names:
        apart = [row for row in rows if row["algorithm"] == name and row["domain"] == domain]
        band(axes[0, -1], apart, "step", ALGORITHM[name], prefix="spread_")
    axes[0, -1].set(xlabel="step", title="standard deviation", ylim=(0, None))
    axes[0, 0].set_ylabel(r"$(L_i-\min L_i)/\max L_i$")
    axes[0, 0].legend()
    axes[0, -1].legend()
    return figure


def draw_lines(ax: Axes, rows: list[Row], prefix: str = "") -> None:
    """One line a source domain, of one algorithm's rows."""
    for i, domain in enumerate(dict.fromkeys(row["domain"] for row in rows)):
        look = {"color": PALETTE[i], "linestyle": LINES[i], "marker": "os^D"[i % 4], "label": domain}
        band(ax, [row for row in rows if row["domain"] == domain], "step", look, prefix=prefix)


def title(name: str) -> str:
    """The algorithm with its radius."""
    radius = "" if name == "erm" else rf", $\rho={RHO:g}$"
    return f"{ALGORITHM[name]['label']}{radius}"


FIG1A = FigureSpec(
    id="fig1a",
    title="Accuracy on the unseen domain, ERM against SAM",
    caption="Accuracy on the unseen domain after training, averaged over held-out domains, of SAM at each radius and "
    "of ERM; below, the difference paired by seed. Shaded: 95 % intervals over seeds, which redraw the data.",
    where="Fig. 1(a)",
    compute=compute_accuracy,
    draw=draw_accuracy,
)
FIG1B = FigureSpec(
    id="fig1b",
    title="Convergence of each source domain",
    caption="Training loss of each source domain of digits-corrupted (noise held out), normalised to its own curve as "
    "the paper does; right, the standard deviation of these losses over the domains. Mean and 95 % interval over "
    "seeds.",
    where="Fig. 1(b)",
    compute=compute_domains,
    draw=draw_domains,
)
