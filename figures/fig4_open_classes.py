"""Fig. 4: accuracy on base and on new classes while an adapter of a frozen pretrained network is tuned on the base."""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.figure import Figure

from disam_theory.pretrained import LAM, RHOS, arms, curves
from disam_theory.study import Study
from figures.style import ALGORITHM, FigureSpec, Row, band, panels, summary

NAMES = ("erm", "sam", "disam")
PLACES = ("in-domain", "unseen")
CLASSES = ("base", "new")


def compute(study: Study) -> list[Row]:
    """Mean accuracy (per cent) of each algorithm, and its difference from SAM in points, at each evaluated step."""
    found = curves(study.folder, max(block.seeds for block in study.blocks), progress=study.progress)
    rows = []
    for rho, place, classes, name in product(RHOS, PLACES, CLASSES, NAMES):
        accuracy, sam = (found.accuracy[arms(rho)[n].name, f"{place} {classes}"] for n in (name, "sam"))
        for e, step in enumerate(found.steps):
            what = {"rho": rho, "lam": LAM, "domain": place, "classes": classes, "algorithm": name, "step": step}
            difference = summary(accuracy[:, :, e] - sam[:, :, e], "difference_")
            rows.append({**what, **summary(accuracy[:, :, e]), **difference})
    return rows


def draw(rows: list[Row]) -> Figure:
    """A column a radius and half of the classes; above the sources, then the unseen domain, then there from SAM."""
    columns = list(product(dict.fromkeys(row["rho"] for row in rows), CLASSES))
    figure, axes = panels(len(columns), rows=3, height=1.4, sharex=True)
    _share_scales(axes)
    for column, (rho, classes) in enumerate(columns):
        for name in NAMES:
            mine = [r for r in rows if (r["rho"], r["classes"], r["algorithm"]) == (rho, classes, name)]
            for row, place in enumerate(PLACES):
                band(axes[row, column], [r for r in mine if r["domain"] == place], "step", ALGORITHM[name])
            if name != "sam":
                unseen = [r for r in mine if r["domain"] == "unseen"]
                band(axes[2, column], unseen, "step", ALGORITHM[name], prefix="difference_")
        axes[2, column].axhline(0, color="#555555", lw=0.6)
        axes[2, column].set_xlabel("step")
        axes[0, column].set_title(rf"{classes}, $\rho={rho:g}$")
    for row, words in enumerate(
        ("source domains,\naccuracy (%)", "unseen domain,\naccuracy (%)", "from SAM\n(points)")
    ):
        axes[row, 0].set_ylabel(words)
    axes[0, 1].legend()
    return figure


def _share_scales(axes: np.ndarray) -> None:
    """One scale a row of accuracies; one a radius for the differences, which are of other sizes."""
    for row, line in enumerate(axes):
        for column, ax in enumerate(line.tolist()):
            first = 0 if row < len(PLACES) else column - column % len(CLASSES)
            if column != first:
                ax.sharey(line[first])
                ax.tick_params(labelleft=False)


FIG4 = FigureSpec(
    id="fig4",
    title="Base and new classes, a frozen network's adapter tuned on the base ones",
    caption="Accuracy over tuning, all classes competing, on held-out images of the source domains (above) and of the "
    "unseen domain (middle); below, the difference from SAM on the unseen domain, paired by seed. Adapters on frozen "
    r"features of EfficientNet-Lite0, handwritten digits in four domains, averaged over held-out domains; "
    r"$\lambda=0.1$. Mean and 95 % interval over seeds, which redraw the data.",
    where="Fig. 4",
    compute=compute,
    draw=draw,
)
