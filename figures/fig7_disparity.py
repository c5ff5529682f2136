"""Fig. 7: loss of each source domain through training, normalised and raw; of ERM and SAM as there, and of DISAM."""

from __future__ import annotations

from matplotlib.figure import Figure

from disam_theory.study import Study
from figures.fig1_convergence import RHO, compute_domains, draw_lines, title
from figures.style import FigureSpec, Row, panels

READINGS = {"": r"$(L_i-\min L_i)/\max L_i$", "raw_": "$L_i$"}  # prefix of the columns -> what they hold


def compute(study: Study) -> list[Row]:
    """Each source domain's normalised and raw loss at each evaluated step, for ERM, SAM and DISAM."""
    return compute_domains(study, ("erm", "sam", "disam"))


def draw(rows: list[Row]) -> Figure:
    """A column an algorithm; above the normalised losses, below the raw ones."""
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    figure, axes = panels(len(names), rows=2, height=1.7, sharex=True, sharey="row")
    for column, name in enumerate(names):
        mine = [row for row in rows if row["algorithm"] == name]
        for row, prefix in enumerate(READINGS):
            draw_lines(axes[row, column], mine, prefix)
        axes[0, column].set_title(title(name))
        axes[1, column].set_xlabel("step")
    for row, words in enumerate(READINGS.values()):
        axes[row, 0].set(ylabel=words, ylim=(0, None))
    axes[0, 0].legend()
    return figure


FIG7 = FigureSpec(
    id="fig7",
    title="Convergence of each source domain, normalised and raw",
    caption="Training loss of each source domain of digits-corrupted (noise held out): above, normalised to its own "
    rf"curve as the paper does; below, as it is. $\rho={RHO:g}$, $\lambda=0.1$. Mean and 95 % interval over seeds.",
    where="Fig. 7",
    compute=compute,
    draw=draw,
)
