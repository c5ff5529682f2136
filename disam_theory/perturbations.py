r"""(domain losses, shares) -> weights of the domain gradients -> ascent step $\epsilon$.

Every ascent direction here is $g=\sum_i\beta_i\nabla L_i(w)$; the algorithms differ in the weights $\beta$ alone.

| letter | meaning |
|---|---|
| ``alpha`` | shares $\alpha_i$ of the domains, (..., M) |
| ``beta`` | weights $\beta_i$ of the domain gradients in the ascent direction, (..., M) |
| ``rho`` | radius of the ascent step, () or one for each run (R,) |
| ``lam`` | $\lambda$, strength of the variance term, () or (R,) |
"""

from __future__ import annotations

import torch
from torch import Tensor

from disam_theory.losses import Params, domain_variance, pooled, weighted_variance

VARIANCES = ("domains", "samples")


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


def norm(tree: Params, run_axes: int = 0) -> Tensor:
    r"""$\lVert v\rVert_2$ over all tensors of a params dict, in float64; the first ``run_axes`` axes are kept."""
    return dot(tree, tree, run_axes).sqrt()


def dot(a: Params, b: Params, run_axes: int = 0) -> Tensor:
    r"""$\langle a,b\rangle$ over all tensors of two params dicts, in float64; the first ``run_axes`` axes are kept."""
    products = [(a[name].double() * b[name].double()) for name in a]
    return torch.stack([p.reshape((*p.shape[:run_axes], -1)).sum(-1) for p in products]).sum(0)
