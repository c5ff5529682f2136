r"""(domain losses, params) -> the published sharpness measures, of every domain and of the pooled loss.

Wherever a value belongs to a loss, it is an entry of a float64 tensor (M+1,) on the CPU: the M domains in order, then
the pooled loss $L=\sum_i\alpha_iL_i$. A rise $L_i(w+\epsilon)-L_i(w)$ is a difference of two losses, each computed
in the dtype of ``params``: in float32 a rise below about $10^{-7}L_i$ is round-off.

| letter | meaning |
|---|---|
| ``rho`` | radius $\rho>0$ of a perturbation $\epsilon$, in the units of the weights |
| ``sigma`` | standard deviation $\sigma>0$ of each entry of a random $\epsilon$, in the units of the weights |
| ``lam`` | $\lambda\ge0$ of $L_{DI}=L-\lambda\,\mathrm{Var}\{L_i\}$ |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from disam_theory.domains import Domain
from disam_theory.errors import ComputationError, UsageError, unknown_name
from disam_theory.losses import Criterion, DomainLosses, ModelPart, Params, cross_entropy, model_losses
from disam_theory.operators import Curvature, domain_gradients, flatten, unflatten, weights_at
from disam_theory.perturbations import ascent_step
from disam_theory.progress import Through, silently
from disam_theory.spectrum import Eigenpairs, domain_spectra

NORMALISATIONS = ("element", "filter")


@dataclass(frozen=True)
class WorstCase:
    r"""$\max_{\lVert\epsilon\rVert\le\rho}L_i(w+\epsilon)-L_i(w)$ from below and, by an estimate, from above."""

    lower: Tensor  # (M+1,) the largest rise found
    upper: Tensor  # (M+1,) the second-order estimate; a bound for a quadratic loss only
    converged: tuple[bool, ...]  # (M+1,) whether the eigenvalue in ``upper`` reached its tolerance


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws, and its standard error."""

    mean: Tensor  # (M+1,)
    standard_error: Tensor  # (M+1,)


@dataclass(frozen=True)
class PerturbationShares:
    r"""How much of one common ascent step $\epsilon$ each domain feels."""

    beta: Tensor  # (M,) the weights of the domain gradients in the step's direction
    first_order: Tensor  # (M+1,) <grad L_i, eps>
    rise: Tensor  # (M+1,) L_i(w + eps) - L_i(w)
    cosine: Tensor  # (M+1,) cos(grad L_i, eps); 0 where either is zero
    step: Tensor  # (n,) eps, flat


@dataclass(frozen=True)
class MinimumWarning:
    """Something that the pooled loss alone does not show: a measured ``value`` on the wrong side of ``threshold``."""

    name: str
    message: str  # one sentence with the numbers
    value: float
    threshold: float


def sam_sharpness(losses: DomainLosses, params: Params, *, rho: float) -> Tensor:
    r"""$L_i(w+\rho\,g_i/\lVert g_i\rVert)-L_i(w)$ with $g_i=\nabla L_i(w)$ (Foret et al. 2021, one step), (M+1,).

    Each loss takes its own gradient. Where $g_i=0$ the step and the value are 0. For a quadratic loss with Hessian
    $A_i$ it is $\rho\lVert g_i\rVert+\frac{\rho^2}2g_i^\top A_ig_i/\lVert g_i\rVert^2$.

    Raises:
        UsageError: ``rho`` is not positive and finite.
        ComputationError: a loss or a gradient is not finite.
    """
    _require_positive("rho", rho)
    gradients = _gradients(losses, params)
    return _own_rises(losses, params, (_ascent(g, rho) for g in gradients))


def adaptive_sharpness(losses: DomainLosses, params: Params, *, rho: float, normalisation: str = "element") -> Tensor:
    r"""$L_i(w+\epsilon)-L_i(w)$ with $\epsilon=\rho\,T_w^2g_i/\lVert T_wg_i\rVert$ (ASAM; Kwon et al. 2021), (M+1,).

    ``normalisation="element"``: $T_w=\mathrm{diag}|w|$. ``"filter"``: each row ``w[j]`` of a tensor with two axes or
    more is scaled by its $\lVert w_j\rVert_2$, the entries of other tensors by $|w|$. ASAM's small constant added to
    $T_w$ is left out, so weights of zero stay zero. Element-wise, the value does not change when weights are rescaled
    by positive factors that leave the network's function as it is (ReLU layers scaled by $c$ and $1/c$).
    ``rho`` is measured in $\lVert T_w^{-1}\epsilon\rVert$, so it is relative to the weights and has no units.

    Raises:
        UsageError: ``rho`` is not positive and finite, or an unknown normalisation.
        ComputationError: a loss or a gradient is not finite.
    """
    _require_positive("rho", rho)
    if normalisation not in NORMALISATIONS:
        raise unknown_name("normalisation", normalisation, NORMALISATIONS)
    size = {name: _row_norms(p) if normalisation == "filter" and p.ndim >= 2 else p.abs() for name, p in params.items()}
    scale = flatten(size).double()
    return _own_rises(losses, params, (scale * _ascent(scale * g, rho) for g in _gradients(losses, params)))


def worst_case_sharpness(
    losses: DomainLosses,
    params: Params,
    *,
    rho: float,
    steps: int,
    restarts: int,
    rng: int,
    sharpest: Sequence[Eigenpairs] | None = None,
    through: Through = silently,
) -> WorstCase:
    r"""Bounds on $\max_{\lVert\epsilon\rVert\le\rho}L_i(w+\epsilon)-L_i(w)$ (Keskar et al. 2017; Foret et al. 2021).

    ``lower`` is the best value of projected gradient ascent in the ball: ``steps`` trial steps from the one-step SAM
    point and from each of ``restarts`` uniformly random points of the sphere, the same for every loss. The stride is
    $\rho$ at first and is halved by each trial that does not rise. The value is attained, so it is a lower bound of
    the maximum; it is at least 0 ($\epsilon=0$) and at least :func:`sam_sharpness`.

    ``upper`` is $\rho\lVert g_i\rVert+\frac{\rho^2}2\max(\lambda_{\max}(\nabla^2L_i(w)),0)$, with the eigenvalue's
    residual added to it. It is an estimate, not a bound: terms of third order and above are left out, and for a large
    ``rho`` it can lie below ``lower``. For a quadratic loss they are zero and it is an upper bound, once converged.
    ``sharpest``: the top eigenpairs of the M domains and of the pooled loss, where they are known already. ``through``
    goes through the losses.

    Raises:
        UsageError: ``rho`` is not positive and finite, ``steps`` < 1 or ``restarts`` < 0.
        ComputationError: a loss, a gradient or a Hessian product is not finite.
    """
    _require_positive("rho", rho)
    _require_count("steps", steps, 1)
    _require_count("restarts", restarts, 0)
    gradients = _gradients(losses, params)
    generator = torch.Generator().manual_seed(rng)
    random = [_ascent(_gaussian(params, generator), rho) for _ in range(restarts)]
    costs = [sum(map(len, one.parts)) for one in _each(losses)]
    best = [
        max(0.0, *(_ascend(one, params, start, rho, steps) for start in (_ascent(g, rho), *random)))
        for one, g in through("worst case", list(zip(_each(losses), gradients, strict=True)), costs)
    ]
    sharpest = sharpest or _sharpest(losses, params)
    curvature = torch.stack([(pairs.values + pairs.residuals)[0] for pairs in sharpest]).cpu()
    upper = rho * gradients.norm(dim=1).cpu() + 0.5 * rho**2 * curvature.clamp(min=0.0)
    return WorstCase(torch.tensor(best, dtype=torch.float64), upper, tuple(pairs.converged for pairs in sharpest))


def average_case_sharpness(
    losses: DomainLosses, params: Params, *, sigma: float, samples: int, rng: int, through: Through = silently
) -> Estimate:
    r"""$\mathbb E_{\epsilon\sim N(0,\sigma^2I)}[L_i(w+\epsilon)-L_i(w)]$ (Neyshabur et al. 2017), unbiased.

    The mean over ``samples`` antithetic pairs $\pm\epsilon$ ($2\cdot$ ``samples`` evaluations), in which the odd terms
    of the loss cancel; the standard error is that of the pair means. The same draws serve every loss, so the pooled
    value is the $\alpha$-weighted mean of the domains'. For a quadratic loss it estimates
    $\frac{\sigma^2}2\operatorname{tr}H_i$ from $S$ pairs with standard error $\sigma^2\lVert H_i\rVert_F/\sqrt{2S}$.
    ``through`` goes through the pairs.

    Raises:
        UsageError: ``sigma`` is not positive and finite, or ``samples`` < 2.
        ComputationError: a loss is not finite.
    """
    _require_positive("sigma", sigma)
    _require_count("samples", samples, 2)
    generator = torch.Generator().manual_seed(rng)
    at_rest = _values(losses, params)
    pairs = []
    for _ in through("average case", range(samples)):
        step = sigma * _gaussian(params, generator)
        pairs.append(0.5 * (_values(losses, params, step) + _values(losses, params, -step)) - at_rest)
    rises = torch.stack(pairs)  # (samples, M+1)
    return Estimate(rises.mean(0), rises.std(0) / math.sqrt(samples))


def gradient_variance(
    model: nn.Module,
    domains: Sequence[Domain],
    params: Params,
    *,
    batch_size: int,
    batches: int,
    rng: int,
    criterion: Criterion = cross_entropy,
    chunk: int = 1024,
    through: Through = silently,
) -> Estimate:
    r"""$\mathrm{Var}\{\nabla L_i(w;\mathcal B)\}=\mathbb E\lVert g_{\mathcal B}-\mathbb Eg_{\mathcal B}\rVert^2$.

    The sharpness of Fig. 6, after Jiang et al. (2023, AE-SAM). A batch is a uniformly random subset of ``batch_size``
    samples of the domain: drawn without replacement, independently of the other batches. The last entry draws from
    the union of the domains. With $B$ = ``batches`` gradients $g_b$ and their mean $\bar g$ the estimate is
    $\frac1{B-1}\sum_b\lVert g_b-\bar g\rVert^2$: summed over the parameters, and unbiased. Its standard error is the
    jackknife's (Efron and Stein 1981), $\frac{\sqrt B}{B-2}$ times the standard deviation of
    $\lVert g_b-\bar g\rVert^2$. Takes memory for $B$ gradients, and for ``chunk`` samples at once.
    ``through`` goes through the domains and their union.

    Raises:
        UsageError: ``batches`` < 3, or ``batch_size`` is not between 1 and the size of the smallest domain.
        ComputationError: a gradient is not finite.
    """
    _require_count("batches", batches, 3)
    _require_batch_size(batch_size, domains)
    union = Domain("pooled", torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains]))
    generator = torch.Generator().manual_seed(rng)
    means, errors = [], []
    for domain in through("gradient variance", (*domains, union)):
        chosen = torch.cat([torch.randperm(len(domain), generator=generator)[:batch_size] for _ in range(batches)])
        # cut into chunks of batch_size, the drawn samples' parts are 1/B of each batch's mean loss
        drawn = model_losses(model, [domain.take(chosen)], criterion=criterion, chunk=batch_size)
        squares = batches**2 * squared_distances(_each_part(drawn, chunk), params)
        means.append(squares.sum() / (batches - 1))
        errors.append(squares.std() * math.sqrt(batches) / (batches - 2))
    return Estimate(torch.stack(means), torch.stack(errors))


def perturbation_shares(losses: DomainLosses, params: Params, *, rho: float, lam: float) -> PerturbationShares:
    r"""What each domain feels of DISAM's ascent step $\epsilon=\rho\,g/\lVert g\rVert$ (Algorithm 1).

    Here $g=\nabla L_{DI}=\sum_i\beta_i\nabla L_i$; ``lam = 0`` gives SAM's step, with $g=\nabla L$ and $\beta=\alpha$.
    The first-order rises $\langle\nabla L_i,\epsilon\rangle$ share out the whole:
    $\sum_i\beta_i\langle\nabla L_i,\epsilon\rangle=\rho\lVert g\rVert$. Where $g=0$ the step is 0.

    Raises:
        UsageError: ``rho`` is not positive and finite, or ``lam`` is negative or not finite.
        ComputationError: a loss or a gradient is not finite.
    """
    _require_positive("rho", rho)
    _require_lambda(lam)
    gradients = _gradients(losses, params)
    step = _common_step(losses, params, gradients, rho, lam)
    first_order, lengths = (gradients @ step).cpu(), gradients.norm(dim=1).cpu()
    return PerturbationShares(
        beta=weights_at(losses, params, lam).double().cpu(),
        first_order=first_order,
        rise=_values(losses, params, step) - _values(losses, params),
        cosine=_quotient(first_order, lengths * step.norm().cpu()),
        step=step,
    )


def flat_minimum_warnings(
    losses: DomainLosses,
    params: Params,
    *,
    rho: float,
    lam: float = 0.0,
    factor: float = 5.0,
    fraction: float = 0.1,
) -> tuple[MinimumWarning, ...]:
    """Those of :func:`fake_flat_minimum` and :func:`hallucinated_minimum` that are present, in this order."""
    found = (
        fake_flat_minimum(losses, params, factor=factor),
        hallucinated_minimum(losses, params, rho=rho, lam=lam, fraction=fraction),
    )
    return tuple(warning for warning in found if warning is not None)


def fake_flat_minimum(
    losses: DomainLosses, params: Params, *, factor: float = 5.0, sharpest: Sequence[Eigenpairs] | None = None
) -> MinimumWarning | None:
    r"""The pooled loss is flat while a domain's is sharp (Song et al. 2025, arXiv 2503.23430); None where not.

    Present where $\max_i\lambda_{\max}(\nabla^2L_i)>f\max(\lambda_{\max}(\nabla^2L),0)$ with $f$ = ``factor``, and the
    domains disagree: two domain gradients have a negative cosine. A gradient of zero disagrees with none. Each
    eigenvalue is moved by its residual against the warning, so that round-off raises none. ``sharpest`` is
    :func:`worst_case_sharpness`'s.

    Raises:
        UsageError: ``factor`` is not positive and finite.
        ComputationError: a gradient or a Hessian product is not finite.
    """
    _require_positive("factor", factor)
    gradients = _gradients(losses, params)[:-1]
    lengths = gradients.norm(dim=1)
    cosine = float(_quotient(gradients @ gradients.T, lengths[:, None] * lengths).min())
    del gradients
    *alone, pooled = sharpest or _sharpest(losses, params)
    low = [float(pairs.values[0] - pairs.residuals[0]) for pairs in alone]
    sharp, name = max(zip(low, losses.names, strict=True))
    flat = float(pooled.values[0] + pooled.residuals[0])
    threshold = factor * max(flat, 0.0)
    if sharp <= threshold or cosine >= 0.0:
        return None
    beyond = f"more than {factor:g} times the pooled loss's" if flat > 0.0 else "and the pooled loss has"
    message = (
        f"domain {name!r} has lambda_max {sharp:.4g}, {beyond} {flat:.4g}, "
        f"and two domain gradients have cosine {cosine:.3g}"
    )
    return MinimumWarning("fake flat minimum", message, sharp, threshold)


def hallucinated_minimum(
    losses: DomainLosses, params: Params, *, rho: float, lam: float = 0.0, fraction: float = 0.1
) -> MinimumWarning | None:
    r"""Training stalls at a $w$ that is not stationary (Park et al. 2025, arXiv 2509.21818); None where not.

    Present where $\lVert\nabla L(w^{asc})\rVert<f\lVert\nabla L(w)\rVert$ with $f$ = ``fraction``, at the ascent point
    $w^{asc}=w+\epsilon$ of DISAM with ``lam``, or of SAM (``lam = 0``): the descent step is taken with that gradient.

    Raises:
        UsageError: ``rho`` or ``fraction`` is not positive and finite, or ``lam`` is negative or not finite.
        ComputationError: a loss or a gradient is not finite.
    """
    _require_positive("rho", rho)
    _require_positive("fraction", fraction)
    _require_lambda(lam)
    gradients = _gradients(losses, params)
    step, here = _common_step(losses, params, gradients, rho, lam), float(gradients[-1].norm())
    del gradients  # before there are others
    there = float(_pooled_gradient(losses, _moved(params, step)).norm())
    if there >= fraction * here:
        return None
    message = (
        f"the pooled gradient's length falls from {here:.4g} at the weights to {there:.4g} at the ascent point "
        f"(rho {rho:g}, lambda {lam:g}), below {fraction:g} times the first"
    )
    return MinimumWarning("hallucinated minimum", message, there, fraction * here)


# --- one loss among them: a domain alone, or all pooled ---


def _each(losses: DomainLosses) -> tuple[DomainLosses, ...]:
    """Each domain alone, then all together (M+1): the pooled loss of the i-th is $L_i$, that of the last is $L$."""
    alone = zip(losses.names, losses.sizes, losses.parts, strict=True)
    return (*(replace(losses, names=(name,), sizes=(size,), parts=(parts,)) for name, size, parts in alone), losses)


def _each_part(losses: DomainLosses, chunk: int) -> DomainLosses:
    """The parts of the only domain as domains of their own, each in micro-batches of at most ``chunk`` samples."""
    (parts,) = losses.parts
    names = tuple(f"{losses.names[0]}, batch {b}" for b in range(len(parts)))
    return DomainLosses(
        names, (1,) * len(parts), tuple(part.cut(chunk) for part in parts if isinstance(part, ModelPart))
    )


def squared_distances(losses: DomainLosses, params: Params) -> Tensor:
    """Of each domain's gradient from the mean of all, (M,); one is widened to float64 at a time."""
    like = flatten(params)
    rows = list(_rows(losses, params))
    mean = torch.zeros_like(like, dtype=torch.float64)
    for row in rows:
        mean += row.double() / len(rows)
    return torch.stack([(row.double() - mean).square().sum().cpu() for row in rows])


def _own_rises(losses: DomainLosses, params: Params, steps: Iterable[Tensor]) -> Tensor:
    """The rise of every loss along its own step, (M+1,)."""
    rests = _values(losses, params)
    moved = [_values(one, params, step)[-1] for one, step in zip(_each(losses), steps, strict=True)]
    return torch.stack(moved) - rests


def _sharpest(losses: DomainLosses, params: Params) -> list[Eigenpairs]:
    """The top eigenpair of the Hessian of every loss at ``params``."""
    return list(domain_spectra(Curvature(losses, params)).values())


def _ascend(losses: DomainLosses, params: Params, start: Tensor, rho: float, steps: int) -> float:
    """The largest rise of the pooled loss that projected gradient ascent finds from ``start``."""
    rest = float(_values(losses, params)[-1])
    here, best, stride = start, float(_values(losses, params, start)[-1]), rho
    direction = _pooled_gradient(losses, _moved(params, here))
    for _ in range(steps):
        trial = here + _ascent(direction, stride)
        trial = trial * (rho / trial.norm()).clamp(max=1.0)
        value = float(_values(losses, params, trial)[-1])
        if value > best:
            here, best = trial, value
            direction = _pooled_gradient(losses, _moved(params, here))
        else:
            stride /= 2.0
    return best - rest


def _common_step(losses: DomainLosses, params: Params, gradients: Tensor, rho: float, lam: float) -> Tensor:
    r"""$\rho\,g/\lVert g\rVert$ with $g=\sum_i\beta_i\nabla L_i$, flat (n,)."""
    return _ascent(weights_at(losses, params, lam).double() @ gradients[:-1], rho)


# --- values, gradients and flat vectors, in float64 ---


def _values(losses: DomainLosses, params: Params, step: Tensor | None = None) -> Tensor:
    r"""$L_1,\dots,L_M,L$ at $w+\epsilon$, or at $w$ without a step, (M+1,)."""
    if step is None:
        return _with_pooled(losses.checked(params).double().cpu(), losses)
    with torch.no_grad():
        values = losses(_moved(params, step)).double().cpu()
    for name, value in zip(losses.names, values.tolist(), strict=True):
        if not math.isfinite(value):
            raise ComputationError(
                f"the loss on domain {name!r} is {value} at a distance of {float(step.norm()):.3g} from the weights; "
                "use a smaller rho or sigma"
            )
    return _with_pooled(values, losses)


def _gradients(losses: DomainLosses, params: Params) -> Tensor:
    r"""$\nabla L_1,\dots,\nabla L_M,\nabla L$, flat (M+1, n)."""
    flat = flatten(params)
    wide = torch.empty(losses.M + 1, len(flat), dtype=torch.float64, device=flat.device)
    for i, row in enumerate(_rows(losses, params)):  # one is in memory twice at a time, for large models
        wide[i] = row
    wide[-1] = torch.tensor(losses.shares, dtype=wide.dtype, device=wide.device) @ wide[:-1]
    return wide


def _pooled_gradient(losses: DomainLosses, params: Params) -> Tensor:
    r"""$\nabla L$ alone, flat (n,)."""
    total = torch.zeros_like(flatten(params), dtype=torch.float64)
    for share, row in zip(losses.shares, _rows(losses, params), strict=True):
        total += share * row.double()
    return total


def _rows(losses: DomainLosses, params: Params) -> Iterator[Tensor]:
    """The gradient of each domain, flat (n,), in the dtype of ``params``."""
    for alone in _each(losses)[:-1]:
        (row,) = domain_gradients(alone, params).detach()
        if not bool(torch.isfinite(row).all()):
            raise ComputationError(
                f"the gradient on domain {alone.names[0]!r} is NaN or Inf; check the weights, or use float64"
            )
        yield row


def _with_pooled(rows: Tensor, losses: DomainLosses) -> Tensor:
    r"""``rows`` (M, ...) and as a last row $\sum_i\alpha_i$ times them."""
    alpha = torch.tensor(losses.shares, dtype=rows.dtype, device=rows.device)
    return torch.cat([rows, torch.tensordot(alpha, rows, dims=1).unsqueeze(0)])


def _moved(params: Params, step: Tensor) -> Params:
    r"""$w+\epsilon$ for a flat step (n,)."""
    flat = flatten(params)
    return unflatten((flat + step).to(flat.dtype), params)


def _ascent(gradient: Tensor, rho: float) -> Tensor:
    """:func:`ascent_step` of a flat gradient (n,)."""
    radius = torch.tensor(rho, dtype=gradient.dtype, device=gradient.device)
    return ascent_step({"w": gradient}, radius)["w"]


def _gaussian(params: Params, generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers (n,), drawn on the CPU."""
    flat = flatten(params)
    return torch.randn(len(flat), generator=generator, dtype=torch.float64).to(flat.device)


def _quotient(products: Tensor, lengths: Tensor) -> Tensor:
    """``products / lengths``, and 0 where a length is."""
    return torch.where(lengths > 0, products / lengths, 0.0)


def _row_norms(tensor: Tensor) -> Tensor:
    r"""$\lVert w_j\rVert_2$ of each row ``w[j]``, at every entry of the row."""
    return tensor.flatten(1).norm(dim=1).reshape(-1, *(1,) * (tensor.ndim - 1)).expand_as(tensor)


# --- what may be asked for ---


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UsageError(f"{name} is {value}; it must be finite and above 0")


def _require_lambda(lam: float) -> None:
    if not (lam >= 0 and math.isfinite(lam)):
        raise UsageError(f"lambda is {lam}; it must be finite and at least 0, such as 0.1")


def _require_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name} is {value}; it must be at least {least}")


def _require_batch_size(batch_size: int, domains: Sequence[Domain]) -> None:
    _require_count("batch_size", batch_size, 1)
    smallest = min(domains, key=len)
    if batch_size > len(smallest):
        raise UsageError(
            f"batch_size is {batch_size} and domain {smallest.name!r} has {len(smallest)} samples; "
            f"use at most {len(smallest)}"
        )
