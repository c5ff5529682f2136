r"""(domain losses, params, directions) -> every domain's loss along a line or over a plane through a checkpoint.

| letter | meaning |
|---|---|
| ``w`` | the checkpoint, the origin of every slice |
| ``d1``, ``d2`` | directions $d_1,d_2$, params dicts with the names and shapes of ``w`` |
| ``a``, ``b`` | coordinates: the losses are those at $w+ad_1$ or $w+ad_1+bd_2$ |

A slice shows curvature along its directions alone: a flat picture in random directions does not exclude a sharp one
(see :func:`eigen_direction`). Losses that overflow far from the checkpoint stay Inf or NaN in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from disam_theory.errors import UsageError, unknown_name
from disam_theory.losses import DomainLosses, Params, domain_variance, mismatch, pooled
from disam_theory.operators import flatten, unflatten
from disam_theory.perturbations import dot, norm

NORMALISATIONS = ("filter", "none")
PARALLEL = 0.999  # two directions with a larger |cos| span no plane worth drawing
Coordinates = Sequence[float] | Tensor


@dataclass(frozen=True)
class DomainValues:
    """The domain losses at many points; the last axis of ``losses`` is the domain."""

    names: tuple[str, ...]  # (M,)
    shares: tuple[float, ...]  # (M,)
    losses: Tensor  # (..., M) float64, on the CPU

    @property
    def pooled(self) -> Tensor:
        r"""$L=\sum_i\alpha_iL_i$ (Eq. 3) at each point, (...)."""
        return pooled(self.losses, torch.tensor(self.shares, dtype=self.losses.dtype))

    def domain_inspired(self, lam: float) -> Tensor:
        r"""$L_{DI}=L-\lambda\,\mathrm{Var}\{L_i\}$ (Sec. 2.1) at each point, (...)."""
        return self.pooled - lam * domain_variance(self.losses)

    def column(self, name: str) -> Tensor:
        """The loss at each point (...) of the domain ``name``, or of all domains for ``"pooled"``."""
        if name in self.names:
            return self.losses[..., self.names.index(name)]
        if name != "pooled":
            raise unknown_name("domain", name, (*self.names, "pooled"))
        return self.pooled


@dataclass(frozen=True)
class Slice(DomainValues):
    """The domain losses (A, M) at $w+ad$ for each ``a`` of ``coordinates``."""

    coordinates: Tensor  # (A,) float64, increasing


@dataclass(frozen=True)
class Slice2D(DomainValues):
    """The domain losses (Y, X, M) at $w+ad_1+bd_2$ for each ``a`` of ``x`` and each ``b`` of ``y``."""

    x: Tensor  # (X,) float64, increasing
    y: Tensor  # (Y,) float64, increasing


# --- directions ---


def random_direction(params: Params, *, rng: int, normalisation: str = "filter") -> Params:
    r"""A Gaussian direction $d$, scaled to the filters of ``params`` or to length one.

    ``"filter"`` (Li et al. 2018): $d_j\leftarrow\lVert w_j\rVert\,d_j/\lVert d_j\rVert$ for each row $w_j$ of each
    tensor with two or more axes, zero in the others (biases and norms). The slice is then the same for networks that
    differ by a rescaling of their filters. ``"none"``: $\lVert d\rVert_2=1$ over all parameters.

    Raises:
        UsageError: an unknown normalisation, or ``"filter"`` where no tensor has a row that is not zero.
    """
    if normalisation not in NORMALISATIONS:
        raise unknown_name("normalisation", normalisation, NORMALISATIONS)
    generator = torch.Generator().manual_seed(rng)
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in params.items()}
    if normalisation == "filter":
        scaled = {name: _filter_scaled(d, params[name].detach().cpu().double()) for name, d in drawn.items()}
        if not any(bool(d.any()) for d in scaled.values()):
            raise UsageError("no parameter has filters other than zero; ask for normalisation 'none'")
    else:
        length = norm(drawn)
        scaled = {name: d / length for name, d in drawn.items()}
    return {name: d.to(params[name]) for name, d in scaled.items()}


def _filter_scaled(direction: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim <= 1:
        return torch.zeros_like(direction)
    ratio = weight.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
    return direction * ratio.reshape(-1, *[1] * (weight.ndim - 1))


def between(params_a: Params, params_b: Params) -> Params:
    """The direction $w_b-w_a$: 0 on the slice from $w_a$ is the one checkpoint, 1 the other (Goodfellow et al. 2015).

    Raises:
        UsageError: the checkpoints differ in their parameters' names or shapes, which it names.
    """
    if difference := mismatch(params_a, params_b):
        raise UsageError(f"the second checkpoint does not fit the first: {difference}; take both from one model")
    return {name: params_b[name].detach().to(a) - a.detach() for name, a in params_a.items()}


def eigen_direction(vector: Tensor, params: Params) -> Params:
    r"""An eigenvector (n,), such as a column of ``top_eigenpairs(...).vectors``, as a direction of its own length.

    Of unit length, the loss along it has the second derivative $\lambda_j$ at the checkpoint.
    """
    return {name: piece.to(params[name]) for name, piece in unflatten(vector.detach(), params).items()}


# --- slices ---


def slice_1d(
    losses: DomainLosses, params: Params, direction: Params, *, at: Coordinates, points_per_pass: int = 16
) -> Slice:
    """Every domain's loss at $w+ad$ for each $a$ of ``at``, ``points_per_pass`` points in one pass of the model.

    More points a pass are faster and take more memory; the values do not depend on it but by round-off. A model with
    an operation that ``torch.func.vmap`` does not take is evaluated at one point after the other.

    Raises:
        UsageError: coordinates that do not increase, a direction that does not fit ``params`` or has no length.
    """
    coordinates = _increasing("at", at)
    values = _evaluate(losses, params, [_fitted(params, direction, "direction")], coordinates[:, None], points_per_pass)
    return Slice(losses.names, losses.shares, values, coordinates)


def slice_2d(
    losses: DomainLosses,
    params: Params,
    directions: tuple[Params, Params],
    *,
    x: Coordinates,
    y: Coordinates,
    points_per_pass: int = 16,
) -> Slice2D:
    """Every domain's loss at $w+ad_1+bd_2$ for each $a$ of ``x`` and $b$ of ``y``; see :func:`slice_1d`.

    The directions are taken as they are, also where they are not orthogonal.

    Raises:
        UsageError: as :func:`slice_1d`, and where the directions are parallel.
    """
    first, second = (_fitted(params, d, f"direction {i + 1}") for i, d in enumerate(directions))
    cosine = float(dot(first, second) / (norm(first) * norm(second)))
    if abs(cosine) > PARALLEL:
        raise UsageError(f"the two directions are parallel (cosine {cosine:.6f}); draw the second with another rng")
    a, b = _increasing("x", x), _increasing("y", y)
    points = torch.cartesian_prod(b, a).flip(1)  # (Y X, 2): a runs fastest
    values = _evaluate(losses, params, [first, second], points, points_per_pass)
    return Slice2D(losses.names, losses.shares, values.reshape(len(b), len(a), losses.M), a, b)


def _evaluate(
    losses: DomainLosses, params: Params, directions: Sequence[Params], points: Tensor, points_per_pass: int
) -> Tensor:
    r"""The losses (P, M) at $w+\sum_kc_kd_k$ for the rows $c$ of ``points`` (P, D)."""
    if points_per_pass < 1:
        raise UsageError(f"points_per_pass is {points_per_pass}; it must be at least 1 point")
    origin = {name: p.detach() for name, p in params.items()}
    first = next(iter(origin.values()))

    def value(coefficients: Tensor) -> Tensor:
        point = origin
        for c, direction in zip(coefficients.unbind(), directions, strict=True):
            point = {name: p + c.to(p.dtype) * direction[name] for name, p in point.items()}
        return losses(point)

    blocks = points.to(first.device, first.dtype).split(points_per_pass)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # vmap takes fused attention one point at a time, and warns
        try:
            values = [vmap(value)(block) for block in blocks]
        except RuntimeError:  # an operation that vmap does not take; an error of the model's own comes again below
            values = [value(point)[None] for point in torch.cat(blocks)]
    return torch.cat(values).cpu().double()


def _fitted(params: Params, direction: Params, name: str) -> Params:
    """The direction in the dtype and on the device of ``params``; :class:`UsageError` where it cannot be one."""
    if difference := mismatch(params, direction):
        raise UsageError(f"the {name} does not fit the params: {difference}; make it from the same params")
    fitted = {key: direction[key].detach().to(p) for key, p in params.items()}
    length = float(flatten(fitted).norm())
    if not (length > 0 and math.isfinite(length)):
        raise UsageError(f"the {name} has length {length}; give one that is finite and not zero")
    return fitted


def _increasing(name: str, coordinates: Coordinates) -> Tensor:
    values = torch.as_tensor(coordinates, dtype=torch.float64, device="cpu")
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all() and (values.diff() > 0).all()):
        raise UsageError(f"{name} must be finite, increasing coordinates, such as torch.linspace(-1, 1, 21)")
    return values
