"""Fig. 6(c): time of a step with and without the domain-inspired term, over model sizes and numbers of domains."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from disam_theory.step_cost import BATCH, M_SOURCES, ROUNDS, WIDTH, Estimate, against, measured, median_interval
from disam_theory.study import Study
from figures.style import ALGORITHM, FigureSpec, Row, panels

PLAIN: dict[str, Any] = {"color": "#E69F00", "linestyle": ":", "marker": "D", "label": "SAM, by hand"}


def compute(study: Study) -> list[Row]:
    """Median processor milliseconds of each algorithm's step, and its ratio to SAM's; no run of the study is used."""
    rows = []
    for setting in measured():
        swept = ["parameters"] if setting.M == M_SOURCES else []
        swept += ["domains"] if setting.width == WIDTH else []
        for name in setting.seconds:
            time = median_interval([1e3 * s for s in setting.seconds[name]])
            ratio = against(setting.seconds, name, "sam")["ratio"]
            place = {"algorithm": name, "parameters": setting.parameters, "domains": setting.M}
            found = {**_named(time, ""), **_named(ratio, "ratio_"), "rounds": time.n}
            rows += [{"swept": what, **place, **found} for what in swept]
    return rows


def _named(estimate: Estimate, prefix: str) -> Row:
    return {prefix + "median": estimate.median, prefix + "low": estimate.low, prefix + "high": estimate.high}


def draw(rows: list[Row]) -> Figure:
    """Left over model size, right over domains; above the time, below the ratio to SAM's step."""
    figure, axes = panels(2, rows=2, height=1.7, sharex="col")
    for column, (swept, label) in enumerate((("parameters", "parameters"), ("domains", "domains"))):
        for name, look in {**ALGORITHM, "plain-sam": PLAIN}.items():
            mine = [row for row in rows if row["swept"] == swept and row["algorithm"] == name]
            mine.sort(key=lambda row: row[swept])
            if len(mine) < 2:
                continue  # not timed over this
            _line(axes[0, column], mine, swept, "", look)
            if name in ("disam", "plain-sam"):
                _line(axes[1, column], mine, swept, "ratio_", look)
        axes[1, column].axhline(1, color="#555555", lw=0.6)
        axes[1, column].set(xscale="log", xlabel=label)
    for ax, swept in zip(axes[1], ("parameters", "domains"), strict=True):
        ticks = sorted({row[swept] for row in rows if row["swept"] == swept})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("processor time\nof a step (ms)")
    axes[1, 0].set_ylabel("ratio to\nSAM's step")
    for ax in axes[0]:
        ax.set_ylim(0, None)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _line(ax: Any, rows: list[Row], x: str, prefix: str, look: dict[str, Any]) -> None:
    """Medians joined, with their intervals as bars."""
    middle, low, high = ([row[prefix + name] for row in rows] for name in ("median", "low", "high"))
    reach = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
    ax.errorbar([row[x] for row in rows], middle, yerr=reach, elinewidth=0.8, capsize=2, **look)


FIG6C = FigureSpec(
    id="fig6c",
    title="Time of a step with and without the term",
    caption=f"Processor time of a training step of small residual networks at batch {BATCH}, over model size with "
    f"{M_SOURCES} domains (left) and over the number of domains in the smallest network (right); below, the ratio to a "
    f"SAM step of the same round. Median of {ROUNDS} rounds and its 95 % interval. Times differ from run to run.",
    where="Fig. 6(c)",
    compute=compute,
    draw=draw,
)
