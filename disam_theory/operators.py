r"""(domain losses, params) -> Hessians as linear operators: one domain, any weighting of them, $L_{DI}$.

Vectors are flat: the parameters in the dict's order, each flattened, in one vector of ``n`` numbers. A product is
``jvp(grad)``, forward over reverse. Nothing here uses ``jacrev``: in torch 2.13 a ``jvp`` through ``jacrev``, and so
``torch.func.hessian``, is silently wrong through LayerNorm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import grad, jvp

from disam_theory.errors import UsageError
from disam_theory.losses import DomainLosses, Params
from disam_theory.perturbations import disam_weights

if TYPE_CHECKING:
    import scipy.sparse.linalg


@dataclass(frozen=True)
class SymmetricOperator:
    """A symmetric matrix (n, n) known by its products."""

    size: int
    dtype: torch.dtype
    device: torch.device
    matvec: Callable[[Tensor], Tensor]  # (n,) -> (n,)

    def matmat(self, block: Tensor) -> Tensor:
        """The products with the columns of ``block`` (n, k), as (n, k)."""
        return torch.stack([self.matvec(column) for column in block.T], dim=1)

    def dense(self) -> Tensor:
        """The matrix itself (n, n), by n products; for small n."""
        return self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A SciPy ``LinearOperator`` view, for ``eigsh`` and the like; products run on this operator's device."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def product(v: np.ndarray) -> np.ndarray:
            vector = torch.as_tensor(v.reshape(-1), dtype=self.dtype, device=self.device)
            return self.matvec(vector).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator((self.size, self.size), matvec=product, rmatvec=product, dtype=numpy_dtype)


def hessian(losses: DomainLosses, params: Params, *, weights: Sequence[float] | Tensor) -> SymmetricOperator:
    r"""$\sum_iw_i\nabla^2L_i(w)$ for ``weights`` (M,): $\alpha$ gives the pooled Hessian, $\beta$ the weighted one.

    Each $L_i$ is the sum of its micro-batches' shares, so the chunk size does not change the product. Domains of weight
    zero are not evaluated.
    """
    values = [float(w) for w in weights]
    if len(values) != losses.M:
        raise UsageError(f"{len(values)} weights for {losses.M} domains; give one weight a domain")
    active = [(w, part) for w, parts in zip(values, losses.parts, strict=True) for part in parts if w != 0.0]
    params = {name: p.detach() for name, p in params.items()}
    first = next(iter(params.values()))

    def matvec(vector: Tensor) -> Tensor:
        tangent = unflatten(vector, params)
        total = torch.zeros_like(vector)
        with _twice_differentiable():
            for weight, part in active:
                product: Params = jvp(grad(part), (params,), (tangent,))[1]
                total += weight * flatten(product)
        return total

    return SymmetricOperator(_size(params), first.dtype, first.device, matvec)


def domain_hessian(losses: DomainLosses, params: Params, name: str) -> SymmetricOperator:
    r"""$\nabla^2L_i(w)$ of the domain called ``name``."""
    weights = [0.0] * losses.M
    weights[losses.index(name)] = 1.0
    return hessian(losses, params, weights=weights)


def domain_inspired_hessian(losses: DomainLosses, params: Params, lam: float) -> SymmetricOperator:
    r"""$\nabla^2L_{DI}=\sum_i\beta_i\nabla^2L_i-2\lambda\,\mathrm{Cov}_M(\nabla L_i)$, with $\beta$ at ``params``.

    $\mathrm{Cov}_M=\frac1M\sum_i(\nabla L_i-\overline{\nabla L})(\nabla L_i-\overline{\nabla L})^\top$, unweighted
    as the variance is: differentiate $\mathrm{Var}\{L_i\}=\frac1M\sum_i(L_i-\bar L)^2$ twice.
    """
    beta = weights_at(losses, params, lam)
    weighted = hessian(losses, params, weights=beta)
    gradients = domain_gradients(losses, params)
    centred = gradients - gradients.mean(0)

    def matvec(vector: Tensor) -> Tensor:
        return weighted.matvec(vector) - (2.0 * lam / losses.M) * centred.T @ (centred @ vector)

    return SymmetricOperator(weighted.size, weighted.dtype, weighted.device, matvec)


def weights_at(losses: DomainLosses, params: Params, lam: float) -> Tensor:
    r"""$\beta_i(w)$ of Eq. (8) at ``params``, (M,)."""
    values = losses.checked(params)
    alpha = torch.tensor(losses.shares, dtype=values.dtype, device=values.device)
    return disam_weights(
        values, alpha, torch.tensor(lam, dtype=values.dtype, device=values.device), torch.ones_like(values)
    )


def domain_gradients(losses: DomainLosses, params: Params) -> Tensor:
    r"""$\nabla L_i(w)$ of each domain, flat, (M, n)."""
    rows = []
    for parts in losses.parts:
        rows.append(torch.stack([flatten(grad(part)(params)) for part in parts]).sum(0))
    return torch.stack(rows)


def flatten(tree: Params) -> Tensor:
    """A params dict as one vector (n,)."""
    return torch.cat([value.reshape(-1) for value in tree.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """A vector (n,) as a params dict with the names and shapes of ``like``."""
    if vector.shape != (_size(like),):
        raise UsageError(f"the vector has shape {tuple(vector.shape)}; the parameters need ({_size(like)},)")
    pieces = vector.split([p.numel() for p in like.values()])
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def _size(params: Params) -> int:
    return sum(p.numel() for p in params.values())


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Fused attention has no second derivative: use the plain formula meanwhile, and restore what was set before."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
