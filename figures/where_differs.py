"""Where DISAM differs from SAM at all: a map over the domains' inequality and lambda, and what it does to accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disam_theory.directions import along, own_angle
from disam_theory.domains import UNEQUAL
from disam_theory.radii import final_accuracy
from disam_theory.study import Study
from figures.fig3_training_loss import LAM, RHO, arms
from figures.style import PALETTE, FigureSpec, Row, panels, summary

LAMBDAS = (0.05, 0.1, 0.2, 0.5, 1.0)
TRAINED = (LAM, 1.0)  # the lambdas of DISAM's runs
LOOKS: tuple[dict[str, Any], ...] = ({"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s"})
DEGREES = (0.3, 60.0)  # the map's colours


def compute(study: Study) -> list[Row]:
    """A row for each ratio of sizes and lambda: along SAM's runs the angle (degrees) and the weight change (%).

    Both on batches of the runs' size; ``all_data_``: the angle on all data. Where there are runs of DISAM too:
    ``own_``, the angle in their training, and ``gain_``, what they gain in unseen accuracy (points).
    """
    rows = []
    for ratio in UNEQUAL:
        suite = f"digits-unequal-{ratio}"
        sam = study.records(suite, sampling="pooled", **arms(RHO)["sam"])
        whole, batches = along(study, sam), along(study, sam, on_batches=True)
        accuracy = study.measure(sam, final_accuracy)
        for lam in LAMBDAS:
            on_all, angle = (
                np.array([[np.degrees(at.angle(lam)).mean() for at in held] for held in points])
                for points in (whole, batches)
            )
            change = np.array([[100 * np.nanmean(np.abs(at.weight_change(lam))) for at in held] for held in batches])
            row = {"ratio": ratio, "lam": lam, "rho": RHO, **summary(angle, "angle_"), **summary(change, "change_")}
            row |= summary(on_all, "all_data_")
            if lam in TRAINED:
                disam = study.records(suite, sampling="pooled", **{**arms(RHO)["disam"], "lam": lam})
                row |= summary(study.measure(disam, own_angle), "own_")
                row |= summary(study.measure(disam, final_accuracy) - accuracy, "gain_")
            rows.append(row)
    return rows


def draw(rows: list[Row]) -> Figure:
    """The map, the angle against the weight change, the angle that was foreseen, and the gain in accuracy."""
    figure, axes = panels(2, rows=2, height=2.4)
    _draw_map(axes[0, 0], rows)
    _draw_control(axes[0, 1], rows)
    _draw_foreseen(axes[1, 0], rows)
    _draw_gain(axes[1, 1], rows)
    return figure


def _draw_map(ax: Axes, rows: list[Row]) -> None:
    ratios, lams = (sorted({row[key] for row in rows}) for key in ("ratio", "lam"))
    found = {(row["lam"], row["ratio"]): row["angle_mean"] for row in rows}
    angle = np.array([[found[lam, ratio] for ratio in ratios] for lam in lams])
    logs, (low, high) = np.log(angle), np.log(DEGREES)
    ax.imshow(logs, cmap="Blues", vmin=low, vmax=high, aspect="auto", origin="lower")
    for (y, x), value in np.ndenumerate(angle):
        dark = logs[y, x] > (low + 2 * high) / 3
        ax.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    ax.set_xticks(range(len(ratios)), [f"{ratio}:1" for ratio in ratios])
    ax.set_yticks(range(len(lams)), [f"{lam:g}" for lam in lams])
    ax.set(xlabel="largest domain : rarest", ylabel=r"$\lambda$", title="angle (degrees), along SAM's runs")
    ax.grid(visible=False)


def _draw_control(ax: Axes, rows: list[Row]) -> None:
    for k, lam in enumerate(sorted({row["lam"] for row in rows})):
        mine = [row for row in rows if row["lam"] == lam]
        at = [row["change_mean"] for row in mine]
        _errorbar(
            ax, at, mine, "angle_", color=PALETTE[k], marker="os^Dv"[k], linestyle="", label=rf"$\lambda={lam:g}$"
        )
    ax.set(
        xscale="log", yscale="log", xlabel=r"mean $|2\lambda(L_i-\bar L)/(M\alpha_i)|$ (%)", ylabel="angle (degrees)"
    )
    ax.legend(loc="lower right", handletextpad=0.2)


def _draw_foreseen(ax: Axes, rows: list[Row]) -> None:
    for lam, look in zip(TRAINED, LOOKS, strict=True):
        mine = [row for row in rows if row["lam"] == lam]
        at, colour = [row["ratio"] for row in mine], look["color"]
        ax.plot(at, [row["all_data_mean"] for row in mine], color=colour, linestyle=":")
        ax.plot(at, [row["angle_mean"] for row in mine], color=colour, linestyle="--")
        _errorbar(ax, at, mine, "own_", **look, linestyle="-", label=rf"$\lambda={lam:g}$")
    for style, words in {":": "along SAM, all data", "--": "along SAM, batches", "-": "DISAM's training"}.items():
        ax.plot([], [], color="#555555", linestyle=style, label=words)
    ax.set(xscale="log", yscale="log", ylabel="angle (degrees)", ylim=(None, 2500))
    ax.set_yticks([1, 10, 100], ["1", "10", "100"])
    _ratio_axis(ax, rows)
    ax.legend(ncols=2, loc="upper center", fontsize=6.5)


def _draw_gain(ax: Axes, rows: list[Row]) -> None:
    for k, (lam, look) in enumerate(zip(TRAINED, LOOKS, strict=True)):
        mine = [row for row in rows if row["lam"] == lam]
        at = [row["ratio"] * (1.03, 0.97)[k] for row in mine]  # apart, so that no bar hides the other
        _errorbar(ax, at, mine, "gain_", **look, linestyle="-", label=rf"$\lambda={lam:g}$")
    ax.axhline(0, color="#555555", lw=0.6)
    ax.set(xscale="log", ylabel="DISAM minus SAM,\nunseen accuracy (points)")
    ax.margins(y=0.15)
    _ratio_axis(ax, rows)
    ax.legend(loc="upper center", ncols=2)


def _errorbar(ax: Axes, at: list[float], rows: list[Row], prefix: str, **look: Any) -> None:
    """The means with their intervals."""
    mean, low, high = (np.array([row[prefix + key] for row in rows]) for key in ("mean", "low", "high"))
    ax.errorbar(at, mean, np.maximum([mean - low, high - mean], 0.0), elinewidth=0.6, **look)


def _ratio_axis(ax: Axes, rows: list[Row]) -> None:
    ratios = sorted({row["ratio"] for row in rows})
    ax.set_xticks(ratios, [f"{ratio}:1" for ratio in ratios])
    ax.minorticks_off()
    ax.set_xlabel("largest domain : rarest")


WHERE_DIFFERS = FigureSpec(
    id="where_differs",
    title="Where DISAM differs from SAM",
    caption=r"Four domains of handwritten digits, the rarer the noisier. Above, the angle between SAM's and DISAM's "
    r"ascent directions, from the domains' gradients on batches of 96 at weights along SAM's runs, over the ratio of "
    r"the domains' sizes and $\lambda$, and against the mean relative change of the domains' weights. Below, that "
    r"angle, on batches and on all data, beside the one in DISAM's own training; and what DISAM gains on the unseen "
    r"domain, paired by seed. $\rho=0.5$; averaged over steps and held-out domains. Bars are 95 % "
    r"intervals over seeds, 20 at the largest ratio and 6 at the others; the map and the lines along SAM's runs are "
    r"means of as many.",
    where="not in the paper",
    compute=compute,
    draw=draw,
)
