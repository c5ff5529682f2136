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
    r"""The ``k`` largest *algebraic* eigenvalues of $H$ with vectors, by block Lanczos with full reorthogonalisation.

    Sharpness is the largest algebraic eigenvalue, not the largest in magnitude: at a saddle the two differ. The basis
    starts from k random vectors and grows by k products a step (Golub and Underwood 1977): as many as can be needed to
    see an eigenvalue as often as it occurs. The projections and norms are accumulated in float64. Stops once
    $\lVert Hv-\theta v\rVert\le$ ``tol`` $|\theta|$ for the k leading Ritz pairs (or at round-off, which an eigenvalue
    of zero needs), then recomputes the residuals from the vectors it returns. Directions in which the Krylov space is
    exhausted are replaced by random ones.

    Raises:
        UsageError: ``k`` is not in 1..n, or ``max_products`` is too few.
        ComputationError: a product is NaN or Inf.
    """
    n = operator.size
    if not 1 <= k <= n:
        raise UsageError(f"k is {k}; ask for 1 to {n} eigenpairs of a {n} x {n} operator")
    limit = min(n, max_products - k)
    if limit < k:
        raise UsageError(f"max_products is {max_products}; {k} eigenpairs need at least {2 * k}")
    generator = torch.Generator().manual_seed(rng)
    basis = torch.empty(n, 0, dtype=operator.dtype, device=operator.device)
    block = torch.linalg.qr(_random(operator, k, generator)).Q
    projected = torch.zeros(0, 0, dtype=torch.float64)
    coupling = torch.zeros(k, 0, dtype=torch.float64)  # block tridiagonal: (columns of the new block, of the last)
    while True:
        basis = torch.cat([basis, block], dim=1)
        images = _products(operator, block)
        inner = block.double().T @ images.double()
        projected = _bordered(projected, coupling, (inner + inner.T).cpu() / 2)
        remainder = _orthogonalise(images, basis)
        values, mixing = torch.linalg.eigh(projected)
        noise = ROUND_OFF * torch.finfo(operator.dtype).eps * float(values.abs().max())
        leading, mixing = values[-k:].flip(0), mixing[:, -k:].flip(1)
        last = mixing[-block.shape[1] :].to(remainder.device)
        estimates = (remainder.double() @ last).norm(dim=0).cpu()
        if bool((estimates <= (tol * leading.abs()).clamp(min=noise)).all()) or basis.shape[1] == limit:
            return _checked(operator, basis @ mixing.to(basis), tol, noise, basis.shape[1])
        block, coupling = _next_block(operator, remainder, basis, noise, generator)
        block, coupling = block[:, : limit - basis.shape[1]], coupling[: limit - basis.shape[1]]


def _next_block(
    operator: SymmetricOperator, remainder: Tensor, basis: Tensor, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (n, b) and coefficients (b, b) whose product is ``remainder``; random where it has none."""
    left, singular, right = torch.linalg.svd(remainder, full_matrices=False)
    exhausted = singular <= noise
    left = torch.where(exhausted, _random(operator, len(singular), generator), left)
    columns, triangle = torch.linalg.qr(_orthogonalise(left, basis))
    coefficients = (triangle * singular.where(~exhausted, 0.0)) @ right
    return columns, coefficients.double().cpu()


def _bordered(projected: Tensor, coupling: Tensor, inner: Tensor) -> Tensor:
    """The projected matrix with one more block: ``coupling`` joins it to the last, ``inner`` is its diagonal block."""
    size, new = len(projected), len(inner)
    grown = torch.zeros(size + new, size + new, dtype=torch.float64)
    grown[:size, :size] = projected
    grown[size:, size:] = inner
    if size:
        grown[size:, size - coupling.shape[1] : size] = coupling
        grown[size - coupling.shape[1] : size, size:] = coupling.T
    return grown


def _checked(operator: SymmetricOperator, raw: Tensor, tol: float, noise: float, spent: int) -> Eigenpairs:
    """Rayleigh quotients and explicit residuals of the vectors that are returned."""
    vectors = torch.linalg.qr(raw).Q  # orthonormal to round-off already; the signs are fixed below
    images, wide = _products(operator, vectors).double(), vectors.double()
    values = (wide * images).sum(0)
    residuals = (images - wide * values).norm(dim=0)
    converged = bool((residuals <= (tol * values.abs()).clamp(min=noise)).all())
    order = values.argsort(descending=True)
    sign = torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return Eigenpairs(values[order], (vectors * sign)[:, order], residuals[order], converged, spent + len(values))


def _products(operator: SymmetricOperator, block: Tensor) -> Tensor:
    images = operator.matmat(block)
    if not bool(torch.isfinite(images).all()):
        raise ComputationError("a Hessian-vector product is NaN or Inf; check the weights, or use --dtype float64")
    return images


def _orthogonalise(block: Tensor, basis: Tensor) -> Tensor:
    """The part of each column of ``block`` orthogonal to ``basis``; twice is enough (Kahan, in Parlett 1980)."""
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    return block


def _random(operator: SymmetricOperator, columns: int, generator: torch.Generator) -> Tensor:
    """Random columns (n, columns), drawn on the CPU so that every device starts alike."""
    drawn = torch.randn(columns, operator.size, generator=generator, dtype=torch.float64).T
    return drawn.to(operator.device, operator.dtype)
