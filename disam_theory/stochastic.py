r"""Symmetric operators -> estimates of a trace, of a spectral density, each with its standard error.

Also how an eigenvalue measured on a sample of the data may differ from that of all of it, and how the top subspaces of
two operators lie to each other.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from disam_theory.errors import UsageError
from disam_theory.losses import DomainLosses, ModelPart, Params
from disam_theory.operators import Curvature, SymmetricOperator, twice_differentiable, unflatten
from disam_theory.spectrum import Subspace, basis_bytes, inner, row_bytes, run_together

MATRICES = 8  # of n x samples in float64 that XTrace holds at once


@dataclass(frozen=True)
class Estimate:
    """A mean of independent or exchangeable samples and its standard error."""

    value: float
    standard_error: float
    products: int


@dataclass(frozen=True)
class Density:
    r"""A spectral density $\frac1n\sum_j\mathcal N(x;\lambda_j,s^2)$, smoothed with width ``width`` $=s$."""

    grid: Tensor  # (G,)
    density: Tensor  # (G,), integrates to one
    standard_error: Tensor  # (G,), over the random vectors
    nodes: Tensor  # (P, m) Ritz values of each random vector
    weights: Tensor  # (P, m), each row sums to one
    width: float
    products: int


def trace(operator: SymmetricOperator, *, samples: int = 20, power: int = 1, rng: int = 0) -> Estimate:
    r"""$\mathrm{tr}\,H^{p}$ by XTrace (Epperly, Tropp and Webber 2024), from ``2 samples power`` products.

    With $Q_{(i)}$ an orthonormal basis of $\{H^p\omega_j\}_{j\ne i}$, each random vector gives the estimate
    $\mathrm{tr}(Q_{(i)}^\top H^pQ_{(i)})$ plus a Hutchinson estimate of what is left from $\omega_i$ alone. They are
    exchangeable but share vectors, so that their mean errs by 1.0 to 1.4 times the standard error of as many
    independent ones (trials on six spectra); $\sqrt2$ times that is given. Unbiased; exact up to round-off where the
    rank of $H$ is below ``samples``, and where ``samples`` reaches n.

    Where its eight float64 matrices (n, samples) would take more than 3 GiB (20 samples of more than 2.5 million
    parameters), it is Hutch++ (Meyer et al. 2021) instead, by the same number of products, which holds up to two
    thirds of ``samples`` vectors.

    Raises:
        UsageError: fewer than two samples, or a power below one.
    """
    if samples < 2 or power < 1:
        raise UsageError(f"samples is {samples} and power {power}; use at least 2 samples and power 1")
    n = operator.size
    if samples >= n:
        exact = _apply(operator, torch.eye(n, dtype=torch.float64), power)
        return Estimate(float(exact.trace()), 0.0, n * power)
    generator = torch.Generator().manual_seed(rng)
    if MATRICES * n * samples * 8 > basis_bytes(torch.device("cpu")):
        return _hutch_plus_plus(operator, 2 * samples, power, generator)
    omega = torch.randn(n, samples, generator=generator, dtype=torch.float64)
    images = _apply(operator, omega, power)
    basis, singular, _ = torch.linalg.svd(images, full_matrices=False)
    floor = 100 * torch.finfo(operator.dtype).eps * float(singular.max())
    if bool((singular <= floor).any()):  # the images span the range of H: nothing is left out
        basis = basis[:, singular > floor]
        inner = basis.T @ _apply(operator, basis, power) if basis.shape[1] else torch.zeros(0, 0)
        return Estimate(float(inner.trace()), 0.0, (samples + basis.shape[1]) * power)
    basis, triangle = torch.linalg.qr(images)
    moved = _apply(operator, basis, power)
    inner = basis.T @ moved
    left_out = torch.linalg.inv(triangle).T
    left_out = left_out / left_out.norm(dim=0)  # column i: the direction of the basis that only image i spans
    coordinates = basis.T @ omega
    coordinates = coordinates - left_out * (left_out * coordinates).sum(0)
    rest, rest_image = omega - basis @ coordinates, images - moved @ coordinates
    captured = inner.trace() - (left_out * (inner @ left_out)).sum(0)
    estimates = captured + (n - samples + 1) * (rest * rest_image).sum(0) / (rest * rest).sum(0)
    return Estimate(float(estimates.mean()), float(estimates.std() * math.sqrt(2 / samples)), 2 * samples * power)


def _hutch_plus_plus(operator: SymmetricOperator, vectors: int, power: int, generator: torch.Generator) -> Estimate:
    r"""$\mathrm{tr}(Q^\top H^pQ)$ plus Hutchinson's mean over what $Q$ leaves out (Meyer et al. 2021, Hutch++).

    A third of the ``vectors``, as many as fit into 3 GiB, is for the range $Q$ of $H^p$, as many again for the first
    term, the others are signs projected on the rest. Unbiased given $Q$; the standard error is that of their mean.
    """
    n = operator.size
    rank = min(vectors // 3, max(1, basis_bytes(torch.device("cpu")) // row_bytes(operator)))
    basis = torch.zeros(rank, n, dtype=operator.dtype)
    signs = (torch.randint(0, 2, (n,), generator=generator).to(basis) * 2 - 1 for _ in range(vectors))
    largest = 0.0
    for row in basis:
        image = _apply(operator, next(signs)[:, None], power)[:, 0].to(basis)
        largest = max(largest, float(image.norm()))
        image = _left(_left(image, basis), basis)
        length = float(image.norm())
        if length > 100 * torch.finfo(basis.dtype).eps * largest:  # else the range is spanned: the row stays zero
            row.copy_(image / length)
    captured = sum(_form(operator, row, power) for row in basis)
    probes = [_form(operator, _left(next(signs), basis), power) for _ in range(vectors - 2 * len(basis))]
    rest = torch.tensor(probes, dtype=torch.float64)
    error = float(rest.std()) / math.sqrt(len(rest))
    return Estimate(captured + float(rest.mean()), error, vectors * power)


def _left(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector (n,) that is orthogonal to orthonormal rows (r, n)."""
    return vector - (basis @ vector) @ basis


def _form(operator: SymmetricOperator, vector: Tensor, power: int) -> float:
    r"""$v^\top H^pv$."""
    return float(vector.double() @ _apply(operator, vector[:, None], power)[:, 0])


def _apply(operator: SymmetricOperator, block: Tensor, power: int) -> Tensor:
    """The power of the operator times the columns of ``block``; float64 on the CPU."""
    for _ in range(power):
        block = operator.matmat(block.to(operator.device, operator.dtype)).double().cpu()
    return block


def spectral_density(
    operator: SymmetricOperator | Curvature,
    *,
    vectors: int = 10,
    steps: int = 60,
    width: float | None = None,
    points: int = 400,
    rng: int = 0,
) -> Density:
    r"""The spectral density by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017; Ghorbani et al. 2019).

    ``vectors`` random directions, ``steps`` of Lanczos from each with full reorthogonalisation; the Gaussian's
    ``width`` is a hundredth of the range of the Ritz values unless given. Structure narrower than the width, and
    eigenvalues whose share of the spectrum is far below 1/n, are not resolved. Where the bases of all directions would
    take more than 3 GiB (on a GPU, a quarter of its memory), it is Lanczos' recurrence alone: then eigenvalues that
    have converged come again among the nodes, and share one weight (Greenbaum 1989), so that the density is the same.
    """
    if vectors < 2 or steps < 1 or points < 2:
        raise UsageError(f"vectors is {vectors}, steps {steps}, points {points}; use at least 2, 1 and 2")
    if isinstance(operator, Curvature):
        operator = operator.operator(operator.losses.shares)
    steps = min(steps, operator.size)
    fits = vectors * steps * row_bytes(operator) <= basis_bytes(operator.device)
    spaces = [
        Subspace(operator, torch.Generator().manual_seed(1000 * rng + p), steps if fits else 1, steps, False)
        for p in range(vectors)
    ]
    runs = {str(p): (_quadrature if fits else _recurrence)(space, steps) for p, space in enumerate(spaces)}
    matvec = operator.matvec
    found = run_together(runs, lambda wanted: {name: matvec(vector) for name, vector in wanted.items()})
    nodes = torch.stack([pair[0] for pair in found.values()])
    weights = torch.stack([pair[1] for pair in found.values()])
    low, high = float(nodes.min()), float(nodes.max())
    width = width or max((high - low) / 100, 1e-12 * max(abs(low), abs(high), 1e-300))
    grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((grid[:, None, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    each = (bumps * weights).sum(-1)  # (G, P)
    return Density(
        grid, each.mean(1), each.std(1) / math.sqrt(vectors), nodes, weights, width, products=vectors * steps
    )


def _quadrature(space: Subspace, steps: int) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Nodes (m,) and weights (m,) of the Gauss quadrature that belongs to the space's first vector."""
    for _ in range(steps):
        space.expand((yield space.choose(None)))
    values, coordinates = torch.linalg.eigh(space.projected)
    return values, coordinates[0] ** 2


def _recurrence(space: Subspace, steps: int) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The same by Lanczos' (1950) recurrence, with three vectors in memory; T is tridiagonal."""
    vector = space.choose(None)
    before, length = torch.zeros_like(vector), 0.0
    projected = torch.zeros(steps, steps, dtype=torch.float64)
    for j in range(steps):
        image = yield vector
        projected[j, j] = inner(vector[None], image[None])
        image = image - float(projected[j, j]) * vector - length * before
        length = math.sqrt(float(inner(image[None], image[None])))
        if j + 1 < steps:
            projected[j, j + 1] = projected[j + 1, j] = length
        before, vector = vector, image / length if length > 0 else image  # zero from there on, with no weight
    values, coordinates = torch.linalg.eigh(projected)
    return values, coordinates[0] ** 2


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """The angles in radians, smallest first, between the spans of orthonormal columns (n, k) and (n, l)."""
    cosines = torch.linalg.svdvals(first.double().T @ second.double())
    residual = first.double() - second.double() @ (second.double().T @ first.double())
    sines = torch.linalg.svdvals(residual).flip(0)[: len(cosines)]  # the sine is the sharper one for small angles
    return torch.where(cosines > 0.7, sines.clamp(max=1.0).asin(), cosines.clamp(max=1.0).acos())


def overlap(first: Tensor, second: Tensor) -> float:
    r"""$\lVert V_1^\top V_2\rVert_F^2/\min(k,l)$: 1 where one span holds the other, 0 where apart (Gur-Ari 2018)."""
    return float(inner(first.T, second.T).square().sum()) / min(first.shape[1], second.shape[1])


def sampling_error(losses: DomainLosses, params: Params, name: str, vector: Tensor, *, population: int) -> Estimate:
    r"""$v^\top\nabla^2L_i\,v$ of a sample of a domain, with the standard error as an estimate of the whole domain's.

    $v^\top\nabla^2\ell_j\,v$ of each sample j is $\frac{d^2}{dt^2}\ell_j(w+tv)$ at 0, forward over forward. To first
    order an eigenvalue moves with its matrix by $v^\top(\delta H)v$: it has the error $s/\sqrt n\,\sqrt{1-n/N}$, with
    ``population`` $=N$ samples in the whole domain. The top eigenvalue of a sample is also biased upward by a term
    of second order, which this does not cover.
    """
    parts = losses.parts[losses.index(name)]
    tangent = unflatten(vector, params)
    values = []
    for part in parts:
        if not isinstance(part, ModelPart):
            raise UsageError("the sampling error needs the losses of single samples; make the losses by model_losses")

        def slope(at: Params, part: ModelPart = part) -> Tensor:
            return jvp(part.samples, (at,), (tangent,))[1]

        with twice_differentiable():
            values.append(jvp(slope, (params,), (tangent,))[1])
    each = torch.cat(values).double()
    n = len(each)
    if population < n:
        raise UsageError(f"population is {population}, and the sample holds {n}; give the size of the whole domain")
    error = float(each.std()) / math.sqrt(n) * math.sqrt(1 - n / population)
    return Estimate(float(each.mean()), error, 0)
