"""Forest plot of Table 1's gains with their intervals: what the printed means and spreads of three seeds support."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from disam_theory.study import Study
from figures.style import FigureSpec, Row, panels

TABLE = Path(__file__).parents[1] / "proofs_checks" / "tables" / "table01_resnet50.csv"
METHODS = ("SAM", "GSAM", "SAGM")
DATA_SETS = ("PACS", "VLCS", "OfficeHome", "TerraInc", "DomainNet")
SEEDS = 3
INNER, OUTER = "#0072B2", "#56B4E9"  # intervals: spread read as standard deviation, as standard error


def compute(study: Study) -> list[Row]:
    """Gain of the domain-inspired term for each method and data set, from the printed table; no run is used."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        printed = {row["algorithm"]: row for row in csv.DictReader(file) if row["section"] == "out-of-domain"}
    return [
        _row(method, name, printed[method], printed[f"{method}+DI"], columns)
        for method in METHODS
        for name, columns in (*((d, (d,)) for d in DATA_SETS), ("average", DATA_SETS))
    ]


def _row(method: str, name: str, first: dict[str, str], second: dict[str, str], columns: Sequence[str]) -> Row:
    r"""The gain and its Welch intervals at 95 %: half-width $t_\nu s$ with $s^2=\sum_iv_i$, $\nu=s^4/\sum_iv_i^2/(n-1)$
    (Satterthwaite), over the variances $v_i$ of the arms' means on the data sets; $\nu$ is the same in both readings.
    """
    gain = np.mean([float(second[c]) - float(first[c]) for c in columns])
    spreads = np.array([float(row[f"{c}_pm"]) for row in (first, second) for c in columns])
    variances = (spreads / len(columns)) ** 2 / SEEDS
    freedom = variances.sum() ** 2 / (variances**2 / (SEEDS - 1)).sum()
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(variances.sum())
    wide = reach * np.sqrt(SEEDS)
    return {
        "algorithm": method,
        "data_set": name,
        "mean": float(gain),
        "low": float(gain - reach),
        "high": float(gain + reach),
        "low_if_standard_error": float(gain - wide),
        "high_if_standard_error": float(gain + wide),
        "seeds": SEEDS,
    }


def draw(rows: list[Row]) -> Figure:
    """A line a comparison, in a block a method; the thick interval inside the thin one, the gain at the right."""
    figure, axes = panels(1, height=4.6)
    ax = axes[0, 0]
    beside: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center_baseline", "fontsize": 9}
    ax.text(1.01, 0, "gain", **beside)
    labels, ticks, at = [], [], 0.0
    for method in dict.fromkeys(row["algorithm"] for row in rows):
        heading = f"{method} with the term, against {method}"
        ax.text(0.01, at, heading, fontweight="bold", backgroundcolor="white", zorder=2, **beside)
        for row in (row for row in rows if row["algorithm"] == method):
            at += 1
            ends = [row["low_if_standard_error"], row["high_if_standard_error"]]
            ax.plot(ends, [at, at], color=OUTER, lw=1.4, marker="|", ms=6, mew=1.4, zorder=2)
            ax.plot([row["low"], row["high"]], [at, at], color=INNER, lw=4.5, solid_capstyle="butt", zorder=3)
            shape = "D" if row["data_set"] == "average" else "o"
            ax.plot(row["mean"], at, color="white", mec="black", mew=1.0, marker=shape, ms=4.5, ls="none", zorder=4)
            ax.text(1.01, at, f"{row['mean']:+.1f}", **beside)
            labels.append(row["data_set"])
            ticks.append(at)
        at += 1.4
    ax.axvline(0, color="black", lw=0.8, zorder=1)
    ax.set(ylim=(at - 0.8, -0.7), yticks=ticks, yticklabels=labels)
    ax.tick_params(labelsize=9)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("gain in out-of-domain accuracy (percentage points)", fontsize=9)
    handles = [
        Line2D([], [], color=INNER, lw=4.5, label=r"if $\pm$ is a standard deviation"),
        Line2D([], [], color=OUTER, lw=1.4, marker="|", ms=6, mew=1.4, label=r"if $\pm$ is a standard error"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, fontsize=9, title="95 % interval", title_fontsize=9
    )
    return figure


FOREST = FigureSpec(
    id="forest",
    title="What three seeds say of Table 1's gains",
    caption=r"Gain of adding the domain-inspired term, from the means and spreads that Table 1 prints, with Welch "
    r"intervals at 95 % for three seeds an arm, not corrected for their number; the printed $\pm$ is read as the "
    "standard deviation over seeds or as the standard error. The average takes the data sets as independent. No run of "
    "the study is used.",
    where="Table 1, Sec. 4.2",
    compute=compute,
    draw=draw,
)
