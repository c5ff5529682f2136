"""Both sides of Theorem 1 and of the corrected theorem along one full-batch run of SAM and of DISAM."""

from __future__ import annotations

from matplotlib.figure import Figure

from disam_theory import convergence
from disam_theory.errors import ComputationError
from disam_theory.study import Study
from figures.fig3_training_loss import arms
from figures.style import ALGORITHM, WIDTH, FigureSpec, Row

RHO = 0.05  # of the full-batch runs


def compute(study: Study, names: tuple[str, ...] = ("sam", "disam")) -> list[Row]:
    """A row a step of the first full-batch run of each algorithm, with all series of its trace."""
    full = [block for block in study.blocks if block.arms[0].sampling == "full"]
    if not full:
        raise ComputationError("the study has no full-batch runs; the inequalities speak of these alone")
    rows: list[Row] = []
    for name in names:
        record = study.records(full[0].suite, sampling="full", **arms(RHO)[name])[0]
        found = convergence.analyse(record.trace)
        place = {"suite": record.suite, "held_out": record.held_out, "algorithm": name, "seed": record.seed}
        rows += [{**place, "smoothness": found.smoothness, **point} for point in convergence.points(found)]
    return rows


def draw(rows: list[Row]) -> Figure:
    """A column an algorithm, see :func:`disam_theory.convergence.draw`."""
    columns: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{ALGORITHM[row['algorithm']]['label']}, $L\\geq{row['smoothness']:.3g}$"
        columns.setdefault(title, []).append(row)
    figure = Figure(figsize=(WIDTH, 4.6))
    convergence.draw(figure, columns)
    return figure


RATE = FigureSpec(
    id="rate",
    title="The convergence bounds along one run",
    caption=r"Above, averages over the first $T$ steps and their bounds: Theorem 1 as printed, with the largest "
    r"gradient norm of the run as $G$ and with $\Gamma=L$, and the corrected theorem. Below, the turning rate of the "
    r"perturbation and a lower bound of the local smoothness. One full-batch run an algorithm (first seed, first "
    r"domain held out), $L$ as estimated along it, $L_{\min}=0$.",
    where="Theorem 1",
    compute=compute,
    draw=draw,
)
