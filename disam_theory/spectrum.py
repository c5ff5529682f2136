"""Symmetric operator -> its largest algebraic eigenpairs, each with its residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from disam_theory.errors import ComputationError, UsageError
from disam_theory.operators import SymmetricOperator

ROUND_OFF = 100.0  # a residual below this many machine epsilons times the norm is the products' own error


@dataclass(frozen=True)
class Eigenpairs:
    """The ``k`` largest algebraic eigenvalues, and how far each pair is from solving the eigenvalue equation.

    The true matrix has an eigenvalue within ``residuals[j]`` of ``values[j]`` (for a symmetric matrix, up to the
    round-off of the products).
    """

    values: Tensor  # (k,) float64, largest first
    vectors: Tensor  # (n, k), orthonormal columns
    residuals: Tensor  # (k,) float64, |H v - theta v| recomputed from the returned vectors
    converged: bool  # every residual is at most tol * |theta|, or at the round-off of the products
    products: int  # matrix-vector products spent


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    tol: float = 1e-4,
    max_products: int = 300,
    rng: int = 0,
) -> Eigenpairs:
    r"""The ``k`` largest *algebraic* eigenvalues of $H$ with vectors, by Lanczos with full reorthogonalisation.

    Sharpness is the largest algebraic eigenvalue, not the largest in magnitude: at a saddle the two differ. The
    basis grows by one product a step (Lanczos 1950); the projections $\alpha_j$, $\beta_j$ and all norms are
    accumulated in float64. Stops once $\lVert Hv-\theta v\rVert\le$ ``tol`` $|\theta|$ for the k leading Ritz pairs
    (or at round-off, which an eigenvalue of zero needs), then recomputes the residuals from the vectors it returns.
    A Krylov space sees an eigenvalue of exact multiplicity once; where the space is exhausted early (an invariant
    subspace) a new random direction is added, so that rank-deficient operators and multiples of the identity are
    handled.

    Raises:
        UsageError: ``k`` is not in 1..n.
        ComputationError: a product is NaN or Inf.
    """
    n = operator.size
    if not 1 <= k <= n:
        raise UsageError(f"k is {k}; ask for 1 to {n} eigenpairs of a {n} x {n} operator")
    generator = torch.Generator().manual_seed(rng)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    coupling: list[float] = []  # coupling[j] joins basis vectors j and j + 1
    vector, beta = _fresh(operator, basis, generator), 0.0
    limit = min(n, max_products - k)
    if limit < k:
        raise UsageError(f"max_products is {max_products}; {k} eigenpairs need at least {2 * k}")
    while True:
        basis.append(vector)
        image = _product(operator, vector)
        diagonal.append(float(image.double() @ vector.double()))
        remainder = _orthogonalise(image, basis)
        beta = float(remainder.double().norm())
        ritz, mixing, scale = _ritz(diagonal, coupling, k)
        noise = ROUND_OFF * torch.finfo(operator.dtype).eps * scale
        if len(basis) >= k and bool((beta * mixing[-1].abs() <= (tol * ritz.abs()).clamp(min=noise)).all()):
            break
        if len(basis) == limit:
            break
        exhausted = beta <= noise
        coupling.append(0.0 if exhausted else beta)
        vector = _fresh(operator, basis, generator) if exhausted else (remainder / beta).to(operator.dtype)
    return _checked(operator, basis, mixing, tol, noise)


def _checked(operator: SymmetricOperator, basis: list[Tensor], mixing: Tensor, tol: float, noise: float) -> Eigenpairs:
    """Rayleigh quotients and explicit residuals of the vectors that are returned."""
    raw = torch.stack(basis, dim=1) @ mixing.to(basis[0])
    vectors, _ = torch.linalg.qr(raw)  # orthonormal to round-off already; the signs are fixed below
    images = torch.stack([_product(operator, v) for v in vectors.T], dim=1).double()
    wide = vectors.double()
    values = (wide * images).sum(0)
    residuals = (images - wide * values).norm(dim=0)
    converged = bool((residuals <= (tol * values.abs()).clamp(min=noise)).all())
    order = values.argsort(descending=True)
    sign = torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return Eigenpairs(values[order], (vectors * sign)[:, order], residuals[order], converged, len(basis) + len(values))


def _ritz(diagonal: list[float], coupling: list[float], k: int) -> tuple[Tensor, Tensor, float]:
    """The k largest eigenpairs of the tridiagonal matrix, values (k,) and vectors (m, k), and its norm; in float64."""
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if coupling:
        off = torch.tensor(coupling, dtype=torch.float64)
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values[-k:].flip(0), vectors[:, -k:].flip(1), float(values.abs().max())


def _product(operator: SymmetricOperator, vector: Tensor) -> Tensor:
    image = operator.matvec(vector)
    if not bool(torch.isfinite(image).all()):
        raise ComputationError("a Hessian-vector product is NaN or Inf; check the weights, or use --dtype float64")
    return image


def _orthogonalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """The part of ``vector`` orthogonal to ``basis``; twice is enough (Kahan, in Parlett 1980)."""
    matrix = torch.stack(basis, dim=1)
    for _ in range(2):
        vector = vector - matrix @ (matrix.T @ vector)
    return vector


def _fresh(operator: SymmetricOperator, basis: list[Tensor], generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to ``basis``, drawn on the CPU so that every device starts alike."""
    vector = torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
    if basis:
        vector = _orthogonalise(vector, basis)
    return (vector / vector.double().norm()).to(operator.dtype)
