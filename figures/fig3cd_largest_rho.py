"""Fig. 3(c, d): the largest radius at which SAM and DISAM still work, by two criteria, and the ratio of the two."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disam_theory.radii import ALLOWED, CRITERIA, LargestRadii, largest_radii
from disam_theory.study import Study
from figures.fig5_sensitivity import arm, radii
from figures.style import ALGORITHM, SUITES, FigureSpec, Row, panels, summary

NAMES = ("sam", "disam")


def compute(study: Study) -> list[Row]:
    """Geometric mean over seeds of each algorithm's largest workable radius, and of its ratio to SAM's, by case."""
    rows = []
    for suite in SUITES:
        rhos = radii(study, suite)
        for criterion, field in CRITERIA.items():
            found = {n: largest_radii(study, suite, {rho: arm(n, rho) for rho in rhos}, field) for n in NAMES}
            rows += [_row(suite, criterion, name, found[name], found["sam"], rhos) for name in NAMES]
    return rows


def _row(suite: str, criterion: str, name: str, found: LargestRadii, sam: LargestRadii, rhos: tuple[float, ...]) -> Row:
    values = summary(np.log(found.rho)) | summary(np.log(found.rho / sam.rho), "ratio_")
    powers = {key: value if key.endswith("seeds") else float(np.exp(value)) for key, value in values.items()}
    place = {"suite": suite, "criterion": criterion, "algorithm": name, "grid_first": rhos[0], "grid_last": rhos[-1]}
    either = {"ratio_censored_seeds": int((found.censored | sam.censored).sum())}
    return place | powers | {"censored_seeds": int(found.censored.sum())} | either


def draw(rows: list[Row]) -> Figure:
    """A column a criterion: above the radii of both, below their ratio; hollow where seeds are censored."""
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = panels(len(criteria), rows=2, height=1.7, sharex=True, sharey="row")
    for column, criterion in enumerate(criteria):
        above, below = axes[:, column]
        for shift, name in zip((-0.12, 0.12), NAMES, strict=True):
            mine = [row for row in rows if (row["criterion"], row["algorithm"]) == (criterion, name)]
            _points(above, mine, np.arange(len(suites)) + shift, name, "")
            if name == "disam":
                _points(below, mine, np.arange(len(suites)), name, "ratio_")
        below.axhline(1, color="#555555", lw=0.6)
        above.set_title(f"accuracy on the {criterion}")
        below.set(xticks=range(len(suites)), xticklabels=[s.removeprefix("digits-") for s in suites])
        below.margins(x=0.25)
    axes[0, 0].set(yscale="log", ylabel=r"largest workable $\rho$")
    axes[0, 0].margins(y=0.15)
    axes[1, 0].set_ylabel("DISAM's over SAM's")
    axes[0, 0].legend()
    return figure


def _points(ax: Axes, rows: list[Row], at: np.ndarray, name: str, prefix: str) -> None:
    mean, low, high = (np.array([row[prefix + column] for row in rows]) for column in ("mean", "low", "high"))
    look: dict[str, Any] = {key: ALGORITHM[name][key] for key in ("color", "marker", "label")}
    ax.errorbar(at, mean, yerr=[mean - low, high - mean], linestyle="none", elinewidth=1.0, capsize=2, **look)
    for x, y, top, row in zip(at, mean, high, rows, strict=True):
        if count := row[prefix + "censored_seeds"]:
            ax.plot(x, y, color=look["color"], marker=look["marker"], markerfacecolor="white", zorder=4)
            ax.annotate(str(count), (x, top), (0, 4), textcoords="offset points", ha="center", fontsize=7)


FIG3CD = FigureSpec(
    id="fig3cd",
    title="Largest workable radius of SAM and DISAM",
    caption=f"Largest radius at which accuracy is at most {ALLOWED:g} point below ERM's, on the unseen domain or on "
    r"the sources' validation parts, interpolated in $\log\rho$ for each seed; below, DISAM's over SAM's, paired. "
    r"$\lambda=0.1$. Geometric mean and 95 % interval over seeds; hollow with a number: so many seeds reached an end "
    "of the grid, beyond which the radius is not known.",
    where="Fig. 3(c, d)",
    compute=compute,
    draw=draw,
)
