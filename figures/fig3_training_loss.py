"""Fig. 3(a, b): training loss of SAM and DISAM, and, as the curves hide it, their paired difference."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from disam_theory.study import Record, Study
from figures.style import ALGORITHM, SUITES, FigureSpec, Row, band, panels, summary

RHO, LAM = 0.5, 0.1


def arms(rho: float) -> dict[str, dict[str, Any]]:
    """The settings that pick each algorithm's runs."""
    return {
        "erm": {"algorithm": "erm"},
        "sam": {"algorithm": "sam", "rho": rho},
        "disam": {"algorithm": "disam", "rho": rho, "lam": LAM},
    }


def loss_curves(records: list[Record]) -> np.ndarray:
    r"""$L(w_t)=\sum_i\alpha_iL_i(w_t)$ on all training data at the evaluated steps, (S, H, E)."""
    curves = []
    for record in records:
        sizes = np.array(record.trace.header["sizes"], dtype=float)
        curves.append(record.trace.evaluations["losses"] @ (sizes / sizes.sum()))
    seeds = len({record.seed for record in records})
    return np.stack(curves).reshape(seeds, -1, len(curves[0]))


def compute(study: Study, names: tuple[str, ...] = ("sam", "disam")) -> list[Row]:
    """Mean loss of each algorithm, and its relative difference from SAM in per cent, at each evaluated step."""
    rows = []
    for suite in SUITES:
        picked = {name: study.records(suite, sampling="pooled", **arms(RHO)[name]) for name in {"sam", *names}}
        curves = {name: loss_curves(records) for name, records in picked.items()}
        steps = picked["sam"][0].trace.evaluations["step"].astype(int).tolist()
        for name in names:
            relative = 100 * (curves[name] / curves["sam"] - 1)
            for e, step in enumerate(steps):
                place = {"suite": suite, "algorithm": name, "rho": RHO, "lam": LAM, "step": step}
                difference = summary(relative[:, :, e], "difference_")
                rows.append({**place, **summary(curves[name][:, :, e]), **difference})
    return rows


def draw(rows: list[Row]) -> Figure:
    """Above the loss, below the difference from SAM; a column a suite."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = panels(len(suites), rows=2, height=1.7, sharex=True)
    for column, suite in enumerate(suites):
        for name in dict.fromkeys(row["algorithm"] for row in rows):
            mine = [r for r in rows if r["suite"] == suite and r["algorithm"] == name]
            band(axes[0, column], mine, "step", ALGORITHM[name])
            if name != "sam":
                band(axes[1, column], mine, "step", ALGORITHM[name], prefix="difference_")
        axes[0, column].set(title=suite, yscale="log")
        axes[1, column].axhline(0, color="#555555", lw=0.6)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("training loss $L(w_t)$")
    axes[1, 0].set_ylabel("difference\nfrom SAM (%)")
    axes[0, -1].legend()
    return figure


FIG3 = FigureSpec(
    id="fig3ab",
    title="Training loss of SAM and DISAM",
    caption=r"Above, training loss on all source data; below, DISAM's relative difference from SAM, paired by seed. "
    r"$\rho=0.5$, $\lambda=0.1$ (App. C.1). Averaged over held-out domains; mean and 95 % interval over seeds.",
    where="Fig. 3(a, b)",
    compute=compute,
    draw=draw,
)
