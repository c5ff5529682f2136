"""Fig. 8: order of convergence of ERM, DISAM and SAM."""

from __future__ import annotations

from disam_theory.study import Study
from figures.fig3_training_loss import compute as compute_losses
from figures.fig3_training_loss import draw
from figures.style import FigureSpec, Row


def compute(study: Study) -> list[Row]:
    """Mean loss of ERM, SAM and DISAM, and the difference from SAM, at each evaluated step."""
    return compute_losses(study, ("erm", "sam", "disam"))


FIG8 = FigureSpec(
    id="fig8",
    title="Convergence of ERM, SAM and DISAM",
    caption=r"Above, training loss on all source data; below, the relative difference from SAM, paired by seed. "
    r"$\rho=0.5$, $\lambda=0.1$. Averaged over held-out domains; mean and 95 % interval over seeds.",
    where="Fig. 8",
    compute=compute,
    draw=draw,
)
