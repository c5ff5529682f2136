"""Fig. 5: accuracy on the unseen domain over the radius, of SAM and DISAM, and over DISAM's strength lambda."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disam_theory.radii import final_accuracy
from disam_theory.study import Study
from figures.style import ALGORITHM, SUITES, FigureSpec, Row, band, panels, summary

RHO, LAM = 0.5, 0.1  # the radius of the panel over lambda, the strength of the panel over rho


def arm(name: str, rho: float, lam: float = LAM) -> dict[str, Any]:
    """The settings that pick the runs of SAM or of DISAM at a radius."""
    strength = {"lam": lam} if name == "disam" else {}
    return {"algorithm": name, "rho": rho, "sampling": "pooled", **strength}


def radii(study: Study, suite: str) -> tuple[float, ...]:
    """The radii at which both SAM and DISAM were run, ascending."""
    sam = {r.settings.rho for r in study.records(suite, algorithm="sam", sampling="pooled")}
    disam = {r.settings.rho for r in study.records(suite, algorithm="disam", lam=LAM, sampling="pooled")}
    return tuple(sorted(sam & disam))


def strengths(study: Study, suite: str) -> tuple[float, ...]:
    r"""The $\lambda>0$ with which DISAM was run at :data:`RHO`, ascending."""
    runs = study.records(suite, algorithm="disam", rho=RHO, sampling="pooled")
    return tuple(sorted({r.settings.strength for r in runs if r.settings.strength > 0}))


def compute(study: Study) -> list[Row]:
    """Mean unseen accuracy (per cent), its difference from SAM's or from that at the default, and its spread."""
    rows = []
    for suite in SUITES:

        def accuracy(settings: dict[str, Any], suite: str = suite) -> np.ndarray:
            return study.measure(study.records(suite, **settings), final_accuracy)

        for rho in radii(study, suite):
            for name in ("sam", "disam"):
                place = {"panel": "rho", "suite": suite, "algorithm": name, "rho": rho, "lam": LAM * (name == "disam")}
                rows.append(place | _values(accuracy(arm(name, rho)), accuracy(arm("sam", rho))))
        for lam in strengths(study, suite):
            place = {"panel": "lambda", "suite": suite, "algorithm": "disam", "rho": RHO, "lam": lam}
            rows.append(place | _values(accuracy(arm("disam", RHO, lam)), accuracy(arm("disam", RHO))))
    return rows


def _values(values: np.ndarray, reference: np.ndarray) -> Row:
    """``spread``: the standard deviation over seeds of the accuracy averaged over held-out domains."""
    spread = {"spread": float(values.mean(1).std(ddof=1))}
    return summary(values) | spread | summary(values - reference, "difference_")


def draw(rows: list[Row]) -> Figure:
    """A column a suite: accuracy over rho, DISAM minus SAM, accuracy over lambda."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = panels(len(suites), rows=3, height=1.45)
    for column, suite in enumerate(suites):
        above, middle, below = axes[:, column]
        for name in ("sam", "disam"):
            mine = [r for r in rows if (r["panel"], r["suite"], r["algorithm"]) == ("rho", suite, name)]
            band(above, mine, "rho", ALGORITHM[name])
            if name == "disam":
                band(middle, mine, "rho", ALGORITHM[name], prefix="difference_")
        middle.axhline(0, color="#555555", lw=0.6)
        above.set(xscale="log", title=suite)
        middle.set(xscale="log", xlabel=r"$\rho$")
        above.tick_params(labelbottom=False)
        _draw_strengths(below, [r for r in rows if (r["panel"], r["suite"]) == ("lambda", suite)])
    for row, words in enumerate(("unseen\naccuracy (%)", "DISAM minus SAM\n(points)", "unseen\naccuracy (%)")):
        axes[row, 0].set_ylabel(words)
    axes[0, 0].legend()
    return figure


def _draw_strengths(ax: Axes, rows: list[Row]) -> None:
    """Shaded the spread over seeds; bars the interval of the mean."""
    look = ALGORITHM["disam"]
    band(ax, [r | {"low": r["mean"] - r["spread"], "high": r["mean"] + r["spread"]} for r in rows], "lam", look)
    reach = np.array([[r["mean"] - r["low"], r["high"] - r["mean"]] for r in rows]).T
    at, mean = ([r[name] for r in rows] for name in ("lam", "mean"))
    ax.errorbar(at, mean, yerr=reach, fmt="none", ecolor=look["color"], elinewidth=1.0, capsize=2)
    ax.set_xlabel(r"$\lambda$")


FIG5 = FigureSpec(
    id="fig5",
    title="Sensitivity to the radius and to the strength of the domain-inspired term",
    caption=r"Above, accuracy on the unseen domain over $\rho$ ($\lambda=0.1$) and, in the middle, DISAM's difference "
    r"from SAM paired by seed, shaded 95 % intervals over seeds. Below, DISAM's accuracy over $\lambda$ ($\rho=0.5$): "
    "shaded the standard deviation over seeds, bars the 95 % interval of the mean. Averaged over held-out domains.",
    where="Fig. 5",
    compute=compute,
    draw=draw,
)
