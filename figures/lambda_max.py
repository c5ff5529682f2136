"""Top Hessian eigenvalue of each domain along training, for ERM, SAM and DISAM: the figure that the paper lacks."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from disam_theory.errors import ComputationError
from disam_theory.losses import model_losses
from disam_theory.operators import Curvature, domain_hessian
from disam_theory.spectrum import domain_spectra, top_eigenpairs
from disam_theory.study import Record, Study
from figures.fig3_training_loss import RHO, arms
from figures.style import ALGORITHM, FigureSpec, Row, band, panels, summary

SUITE, HELD_OUT = "digits-corrupted", "noise"


def compute(study: Study) -> list[Row]:
    """lambda_max of each source domain, of the pooled sources and of the unseen domain at the kept steps."""
    values: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    steps = next(block.snapshot_steps for block in study.blocks if block.suite == SUITE and block.snapshot_steps)
    for name, settings in arms(RHO).items():
        for record in study.records(SUITE, sampling="pooled", **settings):
            if record.held_out == HELD_OUT and record.weights_path(steps[0]).exists():
                for step in steps:
                    for loss, pair in _eigenvalues(study, record, step).items():
                        values.setdefault((name, loss, step), []).append(pair)
    return [_row(*key, pairs) for key, pairs in values.items()]


def _row(name: str, loss: str, step: int, pairs: list[tuple[float, float]]) -> Row:
    eigenvalues = torch.tensor([value for value, _ in pairs]).numpy()
    place = {"suite": SUITE, "held_out": HELD_OUT, "algorithm": name, "loss": loss, "step": step}
    return {**place, **summary(eigenvalues), "largest_residual": max(residual for _, residual in pairs)}


def _eigenvalues(study: Study, record: Record, step: int) -> dict[str, tuple[float, float]]:
    """lambda_max and its residual for each loss, in float64."""
    split, model = study.split(record), study.model().double()
    params = {name: p.double() for name, p in record.weights(step).items()}
    sources, unseen = (
        model_losses(model, [d.to(dtype=torch.float64) for d in domains], chunk=4096)
        for domains in (split.sources, [split.unseen])
    )
    found = domain_spectra(Curvature(sources, params), 1, tol=1e-3)
    found["pooled sources"] = found.pop("pooled")
    name = split.unseen.name
    found[f"{name} (unseen)"] = top_eigenpairs(domain_hessian(unseen, params, name), 1, tol=1e-3)
    for name, pairs in found.items():
        if not pairs.converged:
            raise ComputationError(f"lambda_max of {name} at step {step} of {record.path} did not converge")
    return {name: (float(pairs.values[0]), float(pairs.residuals[0])) for name, pairs in found.items()}


def draw(rows: list[Row]) -> Figure:
    """A panel a loss: lambda_max over training, one line an algorithm."""
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    columns = 3
    figure, axes = panels(columns, rows=-(-len(losses) // columns), height=1.75, sharex=True)
    for ax in axes.flat[len(losses) :]:
        ax.remove()
    for ax, loss in zip(axes.flat, losses, strict=False):
        for name, look in ALGORITHM.items():
            band(ax, [r for r in rows if r["loss"] == loss and r["algorithm"] == name], "step", look)
        ax.set(title=loss, xlabel="step", ylim=(0, None))
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\lambda_{\max}$")
    axes[0, 0].legend()
    return figure


LAMBDA_MAX = FigureSpec(
    id="lambda_max",
    title="Top Hessian eigenvalue of each domain along training",
    caption=r"Largest algebraic eigenvalue of the Hessian of each source domain's loss, of the pooled sources and of "
    r"the unseen domain (digits-corrupted, noise held out), $\rho=0.5$, $\lambda=0.1$. Mean and 95 % interval over "
    "seeds; every eigenvalue's relative residual is at most 0.001.",
    where="not in the paper",
    compute=compute,
    draw=draw,
)
