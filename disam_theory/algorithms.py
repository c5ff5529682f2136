r"""Settings -> one step of ERM, SAM or DISAM as a pure function -> the row that its trace holds.

The three are one step (Algorithm 1) with their own radius $\rho$ (zero for ERM) and $\lambda$ (zero for ERM and SAM):

1. $g=\nabla L_{DI}(w_t;B_t)$,
2. $w_t^{asc}=w_t+\rho\,g/\lVert g\rVert$,
3. $w_{t+1}=w_t-\eta_t\nabla L(w_t^{asc};B_t)$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disam_theory.errors import UsageError, unknown_name
from disam_theory.losses import Params, pooled
from disam_theory.perturbations import VARIANCES, ascent_step, disam_weights, domain_inspired, dot, norm

ALGORITHMS = ("erm", "sam", "disam")
SAMPLINGS = ("pooled", "stratified", "full")
SCHEDULES = ("constant", "inverse-sqrt", "step")


@dataclass(frozen=True)
class Settings:
    r"""How one run is trained.

    ``sampling``: ``pooled`` draws ``batch_size`` samples a step from the pooled sources, so that a domain may be
    absent, and the shares $\alpha_i$ are those of the batch; ``stratified`` draws ``batch_size`` from each domain and
    ``full`` takes all the data, both with $\alpha_i=n_i/N$. ``schedule``: $\eta_t$ constant, $\eta_0/\sqrt{t+1}$, or
    divided by ten after 80 % of the steps.

    Two options name where the official code differs from the paper's text. ``variance="samples"``: its variance
    counts a domain as often as it has samples in the batch. ``ascent_gradient="weights"``: one backward pass of
    $\sum_i\beta_iL_i$ with the weights of Eq. (8) held fixed, in place of differentiating $L_{DI}$ itself; the two
    are equal up to round-off.
    """

    algorithm: str = "disam"
    rho: float = 0.05
    lam: float = 0.1
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    steps: int = 300
    sampling: str = "pooled"
    batch_size: int = 96
    variance: str = "domains"
    ascent_gradient: str = "autograd"

    def __post_init__(self) -> None:
        choices = {
            "algorithm": ALGORITHMS,
            "sampling": SAMPLINGS,
            "schedule": SCHEDULES,
            "variance": VARIANCES,
            "ascent_gradient": ("autograd", "weights"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name.replace("_", " "), getattr(self, name), known)
        if self.algorithm != "erm" and not (self.rho > 0 and math.isfinite(self.rho)):
            raise UsageError(f"rho is {self.rho}; {self.algorithm} needs a finite radius above 0, such as 0.05")
        if self.algorithm == "disam" and not (self.lam >= 0 and math.isfinite(self.lam)):
            raise UsageError(f"lambda is {self.lam}; it must be finite and at least 0, such as 0.1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UsageError(f"learning rate is {self.lr}; it must be finite and above 0")
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(f"steps is {self.steps} and batch size {self.batch_size}; both must be at least 1")

    @property
    def radius(self) -> float:
        """rho as the stacked program sees it: zero for ERM."""
        return 0.0 if self.algorithm == "erm" else self.rho

    @property
    def strength(self) -> float:
        """lambda as the stacked program sees it: zero for ERM and SAM."""
        return self.lam if self.algorithm == "disam" else 0.0

    def lr_at(self, step: int) -> float:
        r"""$\eta_t$ of step ``step``, counted from 0."""
        if self.schedule == "inverse-sqrt":
            return self.lr / math.sqrt(step + 1)
        return self.lr * (0.1 if self.schedule == "step" and step >= 0.8 * self.steps else 1.0)


@dataclass(frozen=True)
class Ascent:
    """What one step computes, for R runs at once."""

    losses: Tensor  # (R, M) at w_t
    losses_ascent: Tensor  # (R, M) at w_t^asc
    beta: Tensor  # (R, M)
    gradient: Params  # grad L(w_t)
    gradient_di: Params  # grad L_DI(w_t)
    gradient_ascent: Params  # grad L(w_t^asc)
    epsilon: Params  # w_t^asc - w_t


LossesOf = Callable[[Params], Tensor]  # stacked params -> (R, M) domain losses of one batch


def ascent_point(
    losses_of: LossesOf,
    params: Params,
    *,
    alpha: Tensor,
    present: Tensor,
    rho: Tensor,
    lam: Tensor,
    variance: str = "domains",
    ascent_gradient: str = "autograd",
) -> Ascent:
    r"""Steps 1 and 2 of Algorithm 1 and the gradient of step 3, for R runs with a leading axis in every tensor.

    Runs do not interact, so one gradient of the sum over runs is every run's own gradient.
    """
    at_w = {name: p.detach().requires_grad_(True) for name, p in params.items()}
    losses = losses_of(at_w)
    beta = disam_weights(losses.detach(), alpha, lam, present, variance=variance)
    if ascent_gradient == "weights":
        inspired = pooled(losses, beta)
    else:
        inspired = domain_inspired(losses, alpha, lam, present, variance=variance)
    gradient = _gradient(pooled(losses, alpha), at_w, keep=True)
    gradient_di = _gradient(inspired, at_w)
    epsilon = ascent_step(gradient_di, rho)
    at_ascent = {name: (p.detach() + epsilon[name]).requires_grad_(True) for name, p in params.items()}
    losses_ascent = losses_of(at_ascent)
    gradient_ascent = _gradient(pooled(losses_ascent, alpha), at_ascent)
    return Ascent(losses.detach(), losses_ascent.detach(), beta, gradient, gradient_di, gradient_ascent, epsilon)


def _gradient(values: Tensor, params: Params, *, keep: bool = False) -> Params:
    grads = torch.autograd.grad(values.sum(), list(params.values()), retain_graph=keep)
    return dict(zip(params, grads, strict=True))


class StepRecords:
    """Turns the steps of R runs into the rows of their traces; keeps the last step for the angle and the cross term."""

    def __init__(self) -> None:
        self._last: Ascent | None = None

    def rows(self, step: int, lrs: Sequence[float], now: Ascent, present: Tensor) -> list[dict[str, Any]]:
        """One row for each run (fields: :data:`disam_theory.traces.STEP_FIELDS`)."""
        cosine, cross = self._against_last(now)
        absent = present == 0
        columns = {
            "losses": now.losses.masked_fill(absent, math.nan).tolist(),
            "losses_ascent": now.losses_ascent.masked_fill(absent, math.nan).tolist(),
            "beta": now.beta.tolist(),
            "grad_norm": norm(now.gradient, 1).tolist(),
            "grad_norm_di": norm(now.gradient_di, 1).tolist(),
            "grad_norm_ascent": norm(now.gradient_ascent, 1).tolist(),
            "cos_phi": cosine.tolist(),
            "phi": cosine.clamp(-1.0, 1.0).acos().tolist(),
            "cross_term": cross.tolist(),
        }
        self._last = now
        return [
            {"step": step, "lr": lr, **{name: values[r] for name, values in columns.items()}}
            for r, lr in enumerate(lrs)
        ]

    def _against_last(self, now: Ascent) -> tuple[Tensor, Tensor]:
        if self._last is None:
            nothing = torch.full((len(now.losses),), math.nan, dtype=torch.float64)
            return nothing, nothing
        last = self._last
        lengths = norm(last.epsilon, 1) * norm(now.epsilon, 1)
        cosine = dot(last.epsilon, now.epsilon, 1) / lengths  # 0/0 = NaN where there is no ascent
        change = {name: now.epsilon[name] - last.epsilon[name] for name in now.epsilon}
        return cosine, dot(last.gradient_ascent, change, 1)
