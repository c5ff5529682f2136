r"""(domain losses, shares) -> weights of the domain gradients -> ascent step $\epsilon$ -> direction of descent.

Every ascent direction here is $g=\sum_i\beta_i\nabla L_i(w)$; ERM, SAM and DISAM differ in the weights $\beta$ alone,
SAM's relatives in the step along $g$ and in the direction of descent too.

| letter | meaning |
|---|---|
| ``alpha`` | shares $\alpha_i$ of the domains, (..., M) |
| ``beta`` | weights $\beta_i$ of the domain gradients in the ascent direction, (..., M) |
| ``rho`` | radius of the ascent step, () or one for each run (R,) |
| ``lam`` | $\lambda$, strength of the variance term, () or (R,) |
| ``constant`` | what a relative of SAM has besides: ASAM's $\eta$, GSAM's or SAGM's $\alpha$, () or (R,) |
"""

from __future__ import annotations

import torch
from torch import Tensor

from disam_theory.losses import Params, domain_variance, pooled, weighted_variance

VARIANCES = ("domains", "samples")
WEAKER = {"weaker-sam": "sam", "weaker-gsam": "gsam", "weaker-sagm": "sagm"}  # control -> whose step it shortens


def domain_inspired(
    losses: Tensor, alpha: Tensor, lam: Tensor, present: Tensor, *, variance: str = "domains"
) -> Tensor:
    r"""$L_{DI}=\sum_i\alpha_iL_i-\lambda\,\mathrm{Var}\{L_i\}$ (Sec. 2.1), over the domains present.

    ``variance="samples"`` is where the official code differs: it iterates over a Python set of tensors, which keeps
    one member a *sample*, so each domain's loss counts as often as the batch has samples of it.
    """
    spread = weighted_variance(losses, alpha) if variance == "samples" else domain_variance(losses, present)
    return pooled(losses, alpha) - lam * spread


def disam_weights(losses: Tensor, alpha: Tensor, lam: Tensor, present: Tensor, *, variance: str = "domains") -> Tensor:
    r"""$\beta_i=\alpha_i-\frac{2\lambda}M\big(L_i-\frac1M\sum_jL_j\big)$ (Eq. 8), zero for absent domains.

    The weights sum to one and are negative where $L_i-\bar L>\alpha_iM/2\lambda$. ``lam = 0`` gives SAM's weights.
    ``variance="samples"`` replaces $1/M$ by $\alpha_i$ in both places (see :func:`domain_inspired`).
    """
    p = alpha if variance == "samples" else present / present.sum(-1, keepdim=True)
    mean = (p * losses).sum(-1, keepdim=True)
    return alpha - 2.0 * lam.unsqueeze(-1) * p * (losses - mean)


def ascent_step(gradient: Params, rho: Tensor) -> Params:
    r"""$\epsilon=\rho\,g/\lVert g\rVert_2$ (Algorithm 1), the norm over all parameters together.

    ``rho`` of shape (R,) takes a leading axis of runs in every tensor. Where $g=0$ the paper's step is 0/0: here
    $\epsilon=0$, as the loss is then stationary to first order.
    """
    length = norm(gradient, rho.ndim)
    scale = torch.where(length > 0, rho / torch.where(length > 0, length, torch.ones_like(length)), 0.0)
    return {
        name: (scale.reshape(scale.shape + (1,) * (g.ndim - rho.ndim)) * g).to(g.dtype) for name, g in gradient.items()
    }


def adaptive_step(gradient: Params, params: Params, rho: Tensor, eta: Tensor) -> Params:
    r"""ASAM's $\epsilon=\rho\,T_w^2g/\lVert T_wg\rVert_2$, $T_w=\mathrm{diag}(|w|)+\eta I$ (Kwon et al. 2021, Eq. 9).

    Every parameter is scaled, as in the paper's formula; the authors' code leaves biases and norms at $T=1$.
    """
    scales = {name: p.abs() + _per_run(eta, p) for name, p in params.items()}
    step = ascent_step({name: scales[name] * g for name, g in gradient.items()}, rho)
    return {name: scales[name] * e for name, e in step.items()}


def matching_step(gradient: Params, rho: Tensor, alpha: Tensor) -> Params:
    r"""SAGM's $\epsilon=\big(\rho/\lVert g\rVert_2-\alpha\big)g$ (Wang et al. 2023): an ascent less a small descent."""
    step = ascent_step(gradient, rho)
    return {name: step[name] - _per_run(alpha, g) * g for name, g in gradient.items()}


def weaker_radius(plain: Params, inspired: Params, rho: Tensor) -> Tensor:
    r"""$\rho\cos(\nabla L,\nabla L_{DI})$, () or (R,): how far DISAM's step of length $\rho$ goes along SAM's.

    For controls, of no paper: where DISAM differs from SAM only by a weaker perturbation, SAM at this radius does as
    DISAM does. Negative where DISAM goes down along it, zero where either gradient is.
    """
    squares = dot(plain, plain, rho.ndim) * dot(inspired, inspired, rho.ndim)
    return rho * (dot(plain, inspired, rho.ndim) / squares.sqrt()).nan_to_num(0.0)


def gradual_passes(order: Tensor, present: Tensor) -> Tensor:
    r"""DGSAM's domain in each of its M + 1 passes (..., M + 1), from an ``order`` of all domains (..., M).

    Each domain present once and the first of them again (Song et al. 2025); -1 in passes that are not made as domains
    are absent from the batch.
    """
    M = order.shape[-1]
    order = order.gather(-1, torch.argsort(1 - present.gather(-1, order), dim=-1, stable=True))
    count, passes = present.sum(-1, keepdim=True), torch.arange(M + 1, device=order.device)
    first = order[..., :1].expand(*order.shape[:-1], M + 1)
    once = torch.where(passes < count, torch.cat([order, order[..., :1]], -1), first)
    return torch.where(passes <= count, once, -1)


def surrogate_gap_direction(gradient: Params, gradient_ascent: Params, alpha: Tensor) -> Params:
    r"""GSAM's $\nabla L(w^{asc})-\alpha\,\nabla L(w)_\perp$ (Zhuang et al. 2022, Algorithm 1).

    $\nabla L(w)_\perp$ is what $\nabla L(w)$ has orthogonal to $\nabla L(w^{asc})$: all of it where the latter is zero.
    """
    square = dot(gradient_ascent, gradient_ascent, alpha.ndim)
    along = dot(gradient, gradient_ascent, alpha.ndim) / torch.where(square > 0, square, torch.ones_like(square))
    direction = {}
    for name, up in gradient_ascent.items():
        orthogonal = gradient[name] - _per_run(along, up) * up
        direction[name] = up - _per_run(alpha, up) * orthogonal
    return direction


def relative_step(
    algorithm: str, gradient: Params, plain: Params, params: Params, rho: Tensor, constant: Tensor
) -> Params:
    r"""$\epsilon$ of ``algorithm`` at ``params``, from the ascent gradient $g$ and, for the controls, $\nabla L$."""
    if algorithm in WEAKER:
        shorter = weaker_radius(plain, gradient, rho)
        return relative_step(WEAKER[algorithm], plain, plain, params, shorter, constant)
    if algorithm == "asam":
        return adaptive_step(gradient, params, rho, constant)
    if algorithm == "sagm":
        return matching_step(gradient, rho, constant)
    return ascent_step(gradient, rho)


def takes_gradient(algorithm: str) -> bool:
    r"""Whether its direction of descent has $\nabla L(w)$, or the objective's gradient, in it."""
    return WEAKER.get(algorithm, algorithm) in ("gsam", "sagm")


def relative_direction(algorithm: str, gradient: Params, gradient_ascent: Params, constant: Tensor) -> Params:
    r"""The direction of descent of ``algorithm`` from $\nabla L(w)$ and $\nabla L(w^{asc})$.

    SAGM's is their sum, the gradient of its objective $L(w)+L(w^{asc})$; the authors' code takes half of it.
    """
    algorithm = WEAKER.get(algorithm, algorithm)
    if algorithm == "gsam":
        return surrogate_gap_direction(gradient, gradient_ascent, constant)
    if algorithm == "sagm":
        return {name: gradient[name] + up for name, up in gradient_ascent.items()}
    return gradient_ascent


def of_runs(which: Tensor, some: Params, others: Params) -> Params:
    """``some`` for the runs in the boolean ``which`` (R,), ``others`` for the rest."""
    return {name: torch.where(_per_run(which, s), s, others[name]) for name, s in some.items()}


def _per_run(values: Tensor, like: Tensor) -> Tensor:
    """``values``, () or (R,), with as many axes as ``like`` has, numbers in its dtype."""
    shaped = values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
    return shaped if shaped.dtype == torch.bool else shaped.to(like.dtype)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    r"""$\cos(a,b)$ over the last axis; NaN where either is zero. One exactly where they are equal."""
    return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()


def norm(tree: Params, run_axes: int = 0) -> Tensor:
    r"""$\lVert v\rVert_2$ over all tensors of a params dict, in float64; the first ``run_axes`` axes are kept."""
    lengths = [
        torch.linalg.vector_norm(p.reshape((*p.shape[:run_axes], -1)), dim=-1, dtype=torch.float64)  # makes no copy
        for p in tree.values()
    ]
    return torch.linalg.vector_norm(torch.stack(lengths), dim=0)


def dot(a: Params, b: Params, run_axes: int = 0) -> Tensor:
    r"""$\langle a,b\rangle$ over all tensors of two params dicts, summed in float64; ``run_axes`` axes are kept."""
    products = [(p * b[name]).reshape((*p.shape[:run_axes], -1)).sum(-1, dtype=torch.float64) for name, p in a.items()]
    return torch.stack(products).sum(0)


def flat(tree: Params, run_axes: int = 0) -> Tensor:
    """All tensors of a params dict as one vector, (P,) or (R, P), in float64."""
    return torch.cat([p.reshape((*p.shape[:run_axes], -1)) for p in tree.values()], -1).double()
