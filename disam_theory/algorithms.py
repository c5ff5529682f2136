r"""Settings -> one step of ERM, SAM, DISAM or a relative as a pure function -> the row that its trace holds.

The three are one step (Algorithm 1) with their own radius $\rho$ (zero for ERM) and $\lambda$ (zero for ERM and SAM):

1. $g=\nabla L_{DI}(w_t;B_t)$,
2. $w_t^{asc}=w_t+\rho\,g/\lVert g\rVert$,
3. $w_{t+1}=w_t-\eta_t\nabla L(w_t^{asc};B_t)$.

ASAM and SAGM have another step 2, GSAM and SAGM another step 3 (:mod:`disam_theory.perturbations`), each with the
same $g$: $\lambda>0$ makes ASAM, GSAM and SAGM their domain-inspired forms (+DI). Where the objective is not the
average loss, its gradient replaces $\nabla L$ in step 3 (:mod:`disam_theory.objectives`).

``dgsam`` is DGSAM (Song et al. 2025): from $w_t$ on it goes up one domain after the other, in random order and the
first again at the end, $\epsilon_j=\rho\,g_j/\lVert g_j\rVert$ with $g_j=\nabla L_{i(j)}(w_t+\epsilon_1+\dots
+\epsilon_{j-1})$, and descends $\frac M{M+1}\sum_{j=1}^{M+1}g_j$, without the last $\epsilon_j$. Its domains count
alike, so that here $\alpha_i=1/M$ over the domains present; DGSAM+DI gives $\epsilon_j$ the length
$\rho\,\beta_i/\alpha_i$ with the weights of Eq. (8) at $w_t$. As it descends a sum over domains, a plain SGD step is
about M times that of the others at the same learning rate; Adam, which its authors use, does not see that.

Two controls ask what makes DISAM differ from SAM. $\lambda<0$ turns its mechanism round. ``weaker-sam`` keeps SAM's
direction and shortens its radius to $\rho\cos(\nabla L,\nabla L_{DI})$ at each step; ``weaker-gsam`` and
``weaker-sagm`` do so to GSAM and SAGM.
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
from disam_theory.matching import MATCHED, Matching, Statistics, matching
from disam_theory.objectives import OBJECTIVES, Objective
from disam_theory.perturbations import (
    VARIANCES,
    WEAKER,
    ascent_step,
    cosine,
    disam_weights,
    domain_inspired,
    flat,
    gradual_passes,
    of_runs,
    relative_direction,
    relative_step,
    takes_gradient,
)

ALGORITHMS = ("erm", "sam", "disam", "asam", "gsam", "sagm", "dgsam", *WEAKER)
WITHOUT_DI = ("asam", "gsam", "sagm", "dgsam")  # whose own form has no lambda
RELATIVES = ("asam", "gsam", "sagm", *WEAKER)  # whose steps 2 and 3 are not Algorithm 1's
CONSTANTS = {  # what each relative of SAM has besides
    "asam": "asam_eta",
    **dict.fromkeys(("gsam", "weaker-gsam"), "gsam_alpha"),
    **dict.fromkeys(("sagm", "weaker-sagm"), "sagm_alpha"),
}
STRENGTHS = {  # what each objective has
    "vrex": "vrex_penalty",
    "groupdro": "groupdro_eta",
    "coral": "coral_penalty",
    "fishr": "fishr_penalty",
}
SAMPLINGS = ("pooled", "stratified", "full")
SCHEDULES = ("constant", "inverse-sqrt", "step", "cosine")


@dataclass(frozen=True)
class Settings:
    r"""How one run is trained.

    ``sampling``: ``pooled`` draws ``batch_size`` samples a step from the pooled sources, so that a domain may be
    absent, and the shares $\alpha_i$ are those of the batch; ``stratified`` draws ``batch_size`` from each domain and
    ``full`` takes all the data, both with $\alpha_i=n_i/N$. ``schedule``: $\eta_t$ constant, $\eta_0/\sqrt{t+1}$,
    divided by ten after 80 % of the steps (``step``), or $\frac{\eta_0}2(1+\cos\frac{\pi t}T)$.

    Two options name where the official code differs from the paper's text. ``variance="samples"``: its variance
    counts a domain as often as it has samples in the batch. ``ascent_gradient="weights"``: one backward pass of
    $\sum_i\beta_iL_i$ with the weights of Eq. (8) held fixed, in place of differentiating $L_{DI}$ itself; the two
    are equal up to round-off.

    ``lam``: $\lambda$ of the ascent, 0.1 unless given, and 0 for ``asam``, ``gsam``, ``sagm`` and ``dgsam``: ``"gsam"``
    is GSAM and ``"gsam", lam=0.1`` is GSAM+DI. ``erm`` and ``sam`` have none, whatever ``lam`` is. A negative
    one is a control. ``weaker-sam``, a control too, ascends along $\nabla L$ by $\rho$ times the cosine between
    $\nabla L$ and the $\nabla L_{DI}$ of its ``lam``; so do ``weaker-gsam`` and ``weaker-sagm``. ``objective``: what is
    descended.

    ``asam_eta`` to ``fishr_penalty`` belong to the algorithm and the objective of that name; the defaults are the
    authors' or DomainBed's, meant for deep networks and small learning rates. A perceptron of two layers does not train
    with V-REx at 10 or Fishr at 1,000 at a rate of 0.1; about 0.3 and 20, and 0.5 for CORAL, serve it.
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
    coral_penalty: float = 1.0
    fishr_penalty: float = 1000.0

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
            object.__setattr__(self, "lam", 0.0 if self.algorithm in WITHOUT_DI else 0.1)
        if not math.isfinite(self.strength):
            raise UsageError(f"lambda is {self.lam}; it must be finite, such as 0.1")
        for name in (*CONSTANTS.values(), *STRENGTHS.values()):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UsageError(f"{name} is {getattr(self, name)}; it must be finite and at least 0")
        if self.algorithm == "dgsam" and self.objective != "average":
            raise UsageError(f"dgsam descends the domains' own losses; it has no form for objective {self.objective!r}")
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
    def passes(self) -> tuple[str, ...]:
        """What a step of the run takes: runs that agree are advanced by one program."""
        if self.algorithm == "dgsam":
            return ("dgsam",)
        matched = self.objective if self.objective in MATCHED else "losses"
        if self.algorithm not in RELATIVES:
            return (matched,)
        return (matched, self.algorithm, *(["inspired"] if self.strength else []))

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
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.lr * (0.1 if self.schedule == "step" and step >= 0.8 * self.steps else 1.0)


@dataclass(frozen=True)
class Ascent:
    """What one step computes, for R runs at once; ``gradient`` and ``plain`` are empty where nothing needed them."""

    losses: Tensor  # (R, M) at w_t
    losses_ascent: Tensor  # (R, M) at w_t^asc
    beta: Tensor  # (R, M)
    gradient: Params  # grad L(w_t), or of the objective
    gradient_di: Params  # grad L_DI(w_t)
    plain: Params  # grad L(w_t), whatever the objective
    gradient_ascent: Params  # grad L(w_t^asc), or of the objective
    epsilon: Params  # w_t^asc - w_t
    update: Params  # what the base optimizer descends; ERM, SAM and DISAM: gradient_ascent
    objective: Objective | None = None  # with the state after the step; None for the average loss, L
    matching: Matching | None = None  # likewise, where the objective is CORAL or Fishr


@dataclass(frozen=True)
class Relatives:
    """Which of R runs follow one of :data:`RELATIVES`, and its constant."""

    members: dict[str, Tensor]  # algorithm -> bool (R,), of those that occur
    constant: Tensor  # (R,); NaN for the other runs

    @property
    def take_gradient(self) -> bool:
        r"""Whether a member's direction of descent has $\nabla L(w)$, or the objective's gradient, in it."""
        return any(map(takes_gradient, self.members))

    @property
    def take_plain(self) -> bool:
        r"""Whether a member's step takes $\nabla L(w)$ besides $\nabla L_{DI}(w)$."""
        return any(name in WEAKER for name in self.members)

    def step(self, epsilon: Params, gradient: Params, plain: Params, params: Params, rho: Tensor) -> Params:
        """SAM's ``epsilon``, replaced for the members by their own."""
        for name, which in self.members.items():
            epsilon = of_runs(which, relative_step(name, gradient, plain, params, rho, self.constant), epsilon)
        return epsilon

    def weights(self, beta: Tensor, alpha: Tensor) -> Tensor:
        """The weights of the domain gradients in the ascent direction."""
        for name in WEAKER.keys() & self.members.keys():
            beta = torch.where(self.members[name].unsqueeze(-1), alpha, beta)
        return beta

    def direction(self, gradient: Params, gradient_ascent: Params) -> Params:
        """The direction of descent, for the members their own."""
        update = gradient_ascent
        for name, which in self.members.items():
            update = of_runs(which, relative_direction(name, gradient, gradient_ascent, self.constant), update)
        return update


def relatives(runs: Sequence[Settings], *, device: torch.device | str = "cpu") -> Relatives | None:
    """The relatives of SAM among the runs; None where there is none."""
    names = [settings.algorithm for settings in runs]
    members = {name: torch.tensor([n == name for n in names], device=device) for name in RELATIVES if name in names}
    constant = torch.tensor([settings.constant for settings in runs], dtype=torch.float64, device=device)
    return Relatives(members, constant) if members else None


def objectives(
    runs: Sequence[Settings], M: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Objective | None:
    """The runs' objectives at their start, with equal weights of the M domains; None where all weights are alpha."""
    if all(settings.objective in ("average", *MATCHED) for settings in runs):
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


def matching_of(runs: Sequence[Settings], like: Tensor) -> Matching | None:
    """CORAL or Fishr of runs that share one objective, at its start, as ``like`` in dtype and device; else None."""
    objective = runs[0].objective
    return matching(objective, [getattr(s, STRENGTHS[objective]) for s in runs], like) if objective in MATCHED else None


# stacked params -> (R, M) domain losses of one batch, or them and what computes the Statistics if they are wanted
LossesOf = Callable[[Params], Any]


@dataclass(frozen=True)
class Descended:
    r"""$O(w)=\sum_i\gamma_iL_i$ and CORAL's or Fishr's penalty: what is descended, given what a pass computed."""

    alpha: Tensor  # (R, M)
    present: Tensor  # (R, M)
    objective: Objective | None = None
    matching: Matching | None = None

    def __call__(self, losses: Tensor, statistics: Statistics | None) -> Tensor:
        """(R,), with the graph of the losses and of the penalty."""
        gamma = self.objective.weights(losses.detach(), self.alpha, self.present) if self.objective else self.alpha
        value = pooled(losses, gamma)
        return value + self.matching.penalty(statistics) if self.matching and statistics else value


def ascent_point(
    losses_of: LossesOf,
    params: Params,
    *,
    alpha: Tensor,
    present: Tensor,
    rho: Tensor,
    lam: Tensor | None,
    variance: str = "domains",
    ascent_gradient: str = "autograd",
    relatives: Relatives | None = None,
    objective: Objective | None = None,
    matching: Matching | None = None,
    measured: bool = True,
) -> Ascent:
    r"""Steps 1 and 2 of Algorithm 1 and the gradient of step 3, for R runs with a leading axis in every tensor.

    ``lam`` is None where it is zero for all: then $L_{DI}=L$ and a backward pass is spared. So are those whose
    gradients no step takes, unless they are to be ``measured``. ``objective`` is taken after it has seen the losses at
    $w_t$, at both points; ``matching`` sees the statistics at $w_t^{asc}$ alone.

    Runs do not interact, so one gradient of the sum over runs is every run's own gradient.
    """
    at_w = _free(params)
    losses, statistics = _pair(losses_of(at_w))
    descended = Descended(alpha, present, objective and objective.observed(losses.detach(), present), matching)
    other = objective is not None or matching is not None
    wants_gradient = measured or (relatives is not None and relatives.take_gradient)
    wants_plain = measured or lam is None or (relatives is not None and relatives.take_plain)
    plain = _gradient(pooled(losses, alpha), at_w) if wants_plain or (wants_gradient and not other) else {}
    gradient = _gradient(descended(losses, statistics()), at_w) if wants_gradient and other else plain
    beta, gradient_di = alpha, plain
    if lam is not None:
        beta = disam_weights(losses.detach(), alpha, lam, present, variance=variance)
        inspired = domain_inspired(losses, alpha, lam, present, variance=variance)
        gradient_di = _gradient(pooled(losses, beta) if ascent_gradient == "weights" else inspired, at_w)
    epsilon = ascent_step(gradient_di, rho)
    if relatives:
        epsilon = relatives.step(epsilon, gradient_di, plain, {name: p.detach() for name, p in params.items()}, rho)
        beta = relatives.weights(beta, alpha)
    at_ascent = _free({name: p.detach() + epsilon[name] for name, p in params.items()})
    losses_ascent, statistics = _pair(losses_of(at_ascent))
    ascended = statistics()
    up = _gradient(descended(losses_ascent, ascended), at_ascent)
    return Ascent(
        losses.detach(),
        losses_ascent.detach(),
        beta,
        gradient,
        gradient_di,
        plain,
        up,
        epsilon,
        relatives.direction(gradient, up) if relatives else up,
        descended.objective,
        matching.observed(ascended) if matching and ascended else None,
    )


def gradual_point(
    losses_of: LossesOf, params: Params, *, order: Tensor, present: Tensor, rho: Tensor, lam: Tensor | None
) -> Ascent:
    r"""DGSAM's step for R runs; ``order`` (R, M) has the domains in the order in which they are gone up.

    $w_t^{asc}$ is the last point at which a gradient is taken. $L$ and $L_{DI}$ have equal shares.
    """
    alpha = present / present.sum(1, keepdim=True)
    passes = gradual_passes(order, present)  # (R, M + 1)
    epsilon = {name: torch.zeros_like(p) for name, p in params.items()}
    total, every = epsilon, torch.arange(order.shape[1], device=order.device)
    for j, domain in enumerate(passes.unbind(1)):
        at = _free({name: p.detach() + epsilon[name] for name, p in params.items()})
        losses, _ = _pair(losses_of(at))
        if j == 0:
            first, plain = losses.detach(), _gradient(pooled(losses, alpha), at)
            beta = alpha if lam is None else disam_weights(first, alpha, lam, present)
            gradient_di = plain if lam is None else _gradient(pooled(losses, beta), at)
        chosen = (domain.unsqueeze(1) == every).to(losses.dtype)  # nothing in a pass that is not made
        own = _gradient(pooled(losses, chosen), at)
        total = {name: t + own[name] for name, t in total.items()}
        if j < len(every):
            ratio = (chosen * beta).sum(1) / (chosen * alpha).sum(1).where(domain >= 0, 1)
            step = ascent_step(own, rho * ratio * (passes[:, j + 1] >= 0))
            epsilon = {name: e + step[name] for name, e in epsilon.items()}
    count = present.sum(1)
    update = {name: t * (count / (count + 1)).view(-1, *[1] * (t.ndim - 1)) for name, t in total.items()}
    up = _gradient(pooled(losses, alpha), at)
    return Ascent(first, losses.detach(), beta, plain, gradient_di, plain, up, epsilon, update)


def _pair(given: Tensor | tuple[Tensor, Callable[[], Statistics]]) -> tuple[Tensor, Callable[[], Statistics | None]]:
    return (given, lambda: None) if isinstance(given, Tensor) else given


def _free(params: Params) -> Params:
    return {name: p.detach().requires_grad_(True) for name, p in params.items()}


def _gradient(values: Tensor, params: Params) -> Params:
    """Of the sum over runs; the graph is kept for others, and goes with the tensors that hold it."""
    grads = torch.autograd.grad(values.sum(), list(params.values()), retain_graph=True)
    return dict(zip(params, grads, strict=True))


AT_ONCE = 16  # runs whose vectors are compared at once: the float64 copies of more leave the processor's cache


class StepRecords:
    """Turns the steps of R runs into the rows of their traces; keeps the last step for the angle and the cross term."""

    def __init__(self) -> None:
        self._last: Ascent | None = None

    def passed(self, now: Ascent) -> None:
        """A step of which no row is wanted; the next one's angle is to its perturbation."""
        self._last = now

    def rows(self, step: int, lrs: Sequence[float], now: Ascent, present: Tensor) -> list[dict[str, Any]]:
        """One row for each run (fields: :data:`disam_theory.traces.STEP_FIELDS`)."""
        runs = [slice(start, start + AT_ONCE) for start in range(0, len(lrs), AT_ONCE)]
        columns = {
            "losses": now.losses.masked_fill(present == 0, math.nan),
            "losses_ascent": now.losses_ascent.masked_fill(present == 0, math.nan),
            "beta": now.beta,
            **dict(zip(_MEASURED, torch.cat([_measured(now, self._last, some) for some in runs], 1), strict=True)),
        }
        columns["phi"] = columns["cos_phi"].clamp(-1.0, 1.0).acos()
        self._last = now
        lists = {name: values.tolist() for name, values in columns.items()}
        return [
            {"step": step, "lr": lr, **{name: values[r] for name, values in lists.items()}} for r, lr in enumerate(lrs)
        ]


_MEASURED = ("grad_norm", "grad_norm_di", "grad_norm_ascent", "cos_sam", "cos_phi", "cross_term")


def _measured(now: Ascent, last: Ascent | None, some: slice) -> Tensor:
    """The columns :data:`_MEASURED` (6, r) of some runs."""

    def vector(tree: Params) -> Tensor:
        return flat({name: p[some] for name, p in tree.items()}, 1)

    def length(v: Tensor) -> Tensor:
        return (v * v).sum(1).sqrt()

    plain, up, epsilon = vector(now.plain), vector(now.gradient_ascent), vector(now.epsilon)
    inspired = plain if now.gradient_di is now.plain else vector(now.gradient_di)
    descended = plain if now.gradient is now.plain else vector(now.gradient)
    cos_phi = cross = torch.full_like(plain[:, 0], math.nan)
    if last is not None:
        before = vector(last.epsilon)
        cos_phi, cross = cosine(before, epsilon), (vector(last.gradient_ascent) * (epsilon - before)).sum(1)
    return torch.stack([length(descended), length(inspired), length(up), cosine(plain, inspired), cos_phi, cross])
