r"""Settings -> one step of ERM, SAM, DISAM or a relative as a pure function -> the row that its trace holds.

The three are one step (Algorithm 1) with their own radius $\rho$ (zero for ERM) and $\lambda$ (zero for ERM and SAM):

1. $g=\nabla L_{DI}(w_t;B_t)$,
2. $w_t^{asc}=w_t+\rho\,g/\lVert g\rVert$,
3. $w_{t+1}=w_t-\eta_t\nabla L(w_t^{asc};B_t)$.

ASAM and SAGM have another step 2, GSAM and SAGM another step 3 (:mod:`disam_theory.perturbations`), each with the
same $g$: $\lambda>0$ makes ASAM, GSAM and SAGM their domain-inspired forms (+DI). Where the objective is not the
average loss, its gradient replaces $\nabla L$ in step 3 (:mod:`disam_theory.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from disam_theory.errors import UsageError, unknown_name
from disam_theory.losses import Params, pooled
from disam_theory.objectives import OBJECTIVES, Objective
from disam_theory.perturbations import (
    VARIANCES,
    ascent_step,
    disam_weights,
    domain_inspired,
    dot,
    norm,
    of_runs,
    relative_direction,
    relative_step,
)

ALGORITHMS = ("erm", "sam", "disam", "asam", "gsam", "sagm")
CONSTANTS = {"asam": "asam_eta", "gsam": "gsam_alpha", "sagm": "sagm_alpha"}  # what each relative of SAM has besides
STRENGTHS = {"vrex": "vrex_penalty", "groupdro": "groupdro_eta"}  # what each objective has
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

    ``lam``: $\lambda$ of the ascent, 0.1 unless given, and 0 for ``asam``, ``gsam`` and ``sagm``: ``"gsam"`` is GSAM
    and ``"gsam", lam=0.1`` is GSAM+DI. ``erm`` and ``sam`` have none, whatever ``lam`` is. ``objective``: what is
    descended. ``asam_eta``, ``gsam_alpha``, ``sagm_alpha``, ``vrex_penalty`` and ``groupdro_eta`` belong to the
    algorithm and the objective of that name; the defaults are the authors' or DomainBed's.
    """

    algorithm: str = "disam"
    rho: float = 0.05
    lam: float | None = None
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    steps: int = 300
    sampling: str = "pooled"
    batch_size: int = 96
    variance: str = "domains"
    ascent_gradient: str = "autograd"
    objective: str = "average"
    asam_eta: float = 0.01
    gsam_alpha: float = 0.4
    sagm_alpha: float = 0.001
    vrex_penalty: float = 10.0
    groupdro_eta: float = 0.01

    def __post_init__(self) -> None:
        choices = {
            "algorithm": ALGORITHMS,
            "sampling": SAMPLINGS,
            "schedule": SCHEDULES,
            "variance": VARIANCES,
            "ascent_gradient": ("autograd", "weights"),
            "objective": OBJECTIVES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name.replace("_", " "), getattr(self, name), known)
        if self.algorithm != "erm" and not (self.rho > 0 and math.isfinite(self.rho)):
            raise UsageError(f"rho is {self.rho}; {self.algorithm} needs a finite radius above 0, such as 0.05")
        if self.lam is None:
            object.__setattr__(self, "lam", 0.0 if self.algorithm in CONSTANTS else 0.1)
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise UsageError(f"lambda is {self.lam}; it must be finite and at least 0, such as 0.1")
        for name in (*CONSTANTS.values(), *STRENGTHS.values()):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UsageError(f"{name} is {getattr(self, name)}; it must be finite and at least 0")
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
        return 0.0 if self.algorithm in ("erm", "sam") or self.lam is None else self.lam

    @property
    def constant(self) -> float:
        """What the algorithm has besides rho and lambda; NaN where it has nothing."""
        return getattr(self, CONSTANTS[self.algorithm]) if self.algorithm in CONSTANTS else math.nan

    def header(self) -> dict[str, Any]:
        """The settings as a trace's header has them: without the options of other algorithms and objectives."""
        own = {CONSTANTS.get(self.algorithm), STRENGTHS.get(self.objective)}
        foreign = {*CONSTANTS.values(), *STRENGTHS.values()} - own
        foreign |= {"objective"} if self.objective == "average" else set()
        return {name: value for name, value in asdict(self).items() if name not in foreign}

    @property
    def name(self) -> str:
        """A folder name for the settings, with what tells arms apart."""
        parts = [self.algorithm]
        parts += [f"rho{self.rho:g}"] if self.algorithm != "erm" else []
        parts += [f"lam{self.lam:g}"] if self.algorithm not in ("erm", "sam") else []
        parts += [f"{self.constant:g}"] if self.algorithm in CONSTANTS else []
        if self.objective != "average":
            parts.append(f"{self.objective}{getattr(self, STRENGTHS[self.objective]):g}")
        return "-".join([*parts, self.sampling])

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
    gradient: Params  # grad L(w_t), or of the objective
    gradient_di: Params  # grad L_DI(w_t)
    gradient_ascent: Params  # grad L(w_t^asc), or of the objective
    epsilon: Params  # w_t^asc - w_t
    update: Params  # what the base optimizer descends; ERM, SAM and DISAM: gradient_ascent
    objective: Objective | None = None  # with the state after the step; None for the average loss, L


@dataclass(frozen=True)
class Relatives:
    """Which of R runs follow a relative of SAM, and its constant."""

    members: dict[str, Tensor]  # algorithm -> bool (R,), of those that occur
    constant: Tensor  # (R,); NaN for the other runs

    def step(self, epsilon: Params, gradient: Params, params: Params, rho: Tensor) -> Params:
        """SAM's ``epsilon``, replaced for the members by their own."""
        for name, which in self.members.items():
            epsilon = of_runs(which, relative_step(name, gradient, params, rho, self.constant), epsilon)
        return epsilon

    def direction(self, gradient: Params, gradient_ascent: Params) -> Params:
        """The direction of descent, for the members their own."""
        update = gradient_ascent
        for name, which in self.members.items():
            update = of_runs(which, relative_direction(name, gradient, gradient_ascent, self.constant), update)
        return update


def relatives(runs: Sequence[Settings], *, device: torch.device | str = "cpu") -> Relatives | None:
    """The relatives of SAM among the runs; None where there is none."""
    names = [settings.algorithm for settings in runs]
    members = {name: torch.tensor([n == name for n in names], device=device) for name in CONSTANTS if name in names}
    constant = torch.tensor([settings.constant for settings in runs], dtype=torch.float64, device=device)
    return Relatives(members, constant) if members else None


def objectives(
    runs: Sequence[Settings], M: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Objective | None:
    """The runs' objectives at their start, with equal weights of the M domains; None where all are the average."""
    if all(settings.objective == "average" for settings in runs):
        return None

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Objective(
        vrex=column([s.objective == "vrex" for s in runs]).bool(),
        groupdro=column([s.objective == "groupdro" for s in runs]).bool(),
        penalty=column([s.vrex_penalty for s in runs]),
        eta=column([s.groupdro_eta for s in runs]),
        log_q=torch.full((len(runs), M), -math.log(M), dtype=dtype, device=device),
    )


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
    relatives: Relatives | None = None,
    objective: Objective | None = None,
) -> Ascent:
    r"""Steps 1 and 2 of Algorithm 1 and the gradient of step 3, for R runs with a leading axis in every tensor.

    ``objective`` is taken after it has seen the losses at $w_t$, at both points.

    Runs do not interact, so one gradient of the sum over runs is every run's own gradient.
    """
    at_w = {name: p.detach().requires_grad_(True) for name, p in params.items()}
    losses = losses_of(at_w)
    beta = disam_weights(losses.detach(), alpha, lam, present, variance=variance)
    if ascent_gradient == "weights":
        inspired = pooled(losses, beta)
    else:
        inspired = domain_inspired(losses, alpha, lam, present, variance=variance)
    objective = objective.observed(losses.detach(), present) if objective else None

    def descended(losses: Tensor) -> Tensor:
        return pooled(losses, objective.weights(losses.detach(), alpha, present) if objective else alpha)

    gradient = _gradient(descended(losses), at_w, keep=True)
    gradient_di = _gradient(inspired, at_w)
    epsilon = ascent_step(gradient_di, rho)
    if relatives:
        epsilon = relatives.step(epsilon, gradient_di, {name: p.detach() for name, p in params.items()}, rho)
    at_ascent = {name: (p.detach() + epsilon[name]).requires_grad_(True) for name, p in params.items()}
    losses_ascent = losses_of(at_ascent)
    gradient_ascent = _gradient(descended(losses_ascent), at_ascent)
    update = relatives.direction(gradient, gradient_ascent) if relatives else gradient_ascent
    return Ascent(
        losses.detach(),
        losses_ascent.detach(),
        beta,
        gradient,
        gradient_di,
        gradient_ascent,
        epsilon,
        update,
        objective,
    )


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
