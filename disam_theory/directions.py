r"""(losses, Gram matrix of the domain gradients) -> the angle between SAM's and DISAM's ascent, at any lambda.

SAM ascends along $g=\sum_i\alpha_i\nabla L_i$, DISAM along $g-\lambda v$ with
$v=\nabla\mathrm{Var}\{L_i\}=\frac2M\sum_i(L_i-\bar L)\nabla L_i$. Where $v_\perp$ is the part of $v$ orthogonal to $g$,
the angle $\theta$ between the two has

$$\sin\theta=\frac{\lambda\lVert v_\perp\rVert}{\lVert g-\lambda v\rVert},\qquad
\theta=\lambda\frac{\lVert v_\perp\rVert}{\lVert g\rVert}+O(\lambda^2).$$

All of it follows from the M losses and the M x M Gram matrix $\langle\nabla L_i,\nabla L_j\rangle$ at one point, for
every $\lambda$ at once and without a run of DISAM: on all data, or on a batch, whose domains have the batch's shares
$\alpha_i$ and the mean $\bar L$ is over the domains present.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from disam_theory.domains import Domain
from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import Params, cross_entropy, parameters_of

if TYPE_CHECKING:
    from disam_theory.study import Record, Study
    from disam_theory.traces import Trace


def variance_weights(losses: np.ndarray, present: np.ndarray) -> np.ndarray:
    r"""$\frac2M(L_i-\bar L)$ (K, M): the domain gradients' weights in $\nabla\mathrm{Var}\{L_i\}$; 0 where absent."""
    count = present.sum(-1, keepdims=True)
    mean = losses.sum(-1, keepdims=True, where=present) / count
    return np.where(present, 2 / count * (losses - mean), 0.0)


@dataclass(frozen=True)
class DomainGradients:
    """What the domains' losses and gradients are at K points of the weights, each on all data or on a batch."""

    losses: np.ndarray  # (K, M); 0 for a domain that is absent from the batch
    gram: np.ndarray  # (K, M, M): inner products of the domains' gradients
    alpha: np.ndarray  # (K, M): shares of the domains; 0 for an absent one

    def angle(self, lam: float) -> np.ndarray:
        r"""$\theta$ in radians at each point (K,), exactly: 0 where DISAM's direction is SAM's, $\pi$ where opposite.

        $\tan\theta=\lambda\lVert v_\perp\rVert/(\lVert g\rVert-\lambda\langle v,g\rangle/\lVert g\rVert)$, which loses
        no digits where the cosine is close to one.
        """
        length, along, across = self._parts()
        return np.arctan2(abs(lam) * across, length - lam * along)

    def first_order_angle(self, lam: float) -> np.ndarray:
        r"""$\lambda\lVert v_\perp\rVert/\lVert g\rVert$ in radians (K,)."""
        length, _, across = self._parts()
        return abs(lam) * across / length

    def weight_change(self, lam: float) -> np.ndarray:
        r"""$2\lambda(L_i-\bar L)/(M\alpha_i)=1-\beta_i/\alpha_i$ (K, M), of Eq. (8); NaN for an absent domain."""
        share = np.where(self.alpha > 0, self.alpha, np.nan)
        return lam * self.variance_weights() / share

    def variance_weights(self) -> np.ndarray:
        """:func:`variance_weights` (K, M)."""
        return variance_weights(self.losses, self.alpha > 0)

    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r"""$\lVert g\rVert$, and the length of $v$ along $g$ and across it, each (K,)."""
        weights = self.variance_weights()
        plain = np.einsum("kij,kj->ki", self.gram, self.alpha)
        length = np.sqrt((plain * self.alpha).sum(-1))
        along = (weights * plain).sum(-1) / length
        square = np.einsum("ki,kij,kj->k", weights, self.gram, weights)
        return length, along, np.sqrt(np.maximum(square - along**2, 0.0))


def domain_gradients(
    model: nn.Module,
    points: Sequence[Params],
    domains: Sequence[Domain],
    *,
    batch_size: int | None = None,
    rng: int = 0,
) -> DomainGradients:
    """The domains' mean losses and their gradients at the weights ``points``, in float64.

    On all the data of each domain; or, with ``batch_size``, at each point on a batch of its own, drawn without
    replacement from the pooled data by the seed ``rng``.

    Raises:
        UsageError: no points, or batches larger than the data.
    """
    if not points:
        raise UsageError("no weights to take gradients at; give at least one params dict")
    model = model.double().eval()
    stacked = {name: torch.stack([point[name].double() for point in points]) for name in parameters_of(model)}
    parts = list(_whole(domains, len(points)) if batch_size is None else _drawn(domains, len(points), batch_size, rng))
    losses, gradients = zip(*(_of_part(model, stacked, *part) for part in parts), strict=True)
    each = torch.stack(gradients, 1)  # (K, M, P)
    counts = torch.stack([(weights > 0).sum(1) for _, _, weights in parts], 1)
    alpha = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    return DomainGradients(torch.stack(losses, 1).numpy(), (each @ each.mT).numpy(), alpha.numpy())


Part = tuple[Tensor, Tensor, Tensor]  # a domain's inputs (K, n, ...), labels (K, n) and the samples' weights (K, n)


def _whole(domains: Sequence[Domain], K: int) -> Iterator[Part]:
    for domain in (domain.to(dtype=torch.float64) for domain in domains):
        n = len(domain)
        weights = torch.full((K, n), 1 / n, dtype=torch.float64)
        yield domain.inputs.expand(K, *domain.inputs.shape), domain.labels.expand(K, n), weights


def _drawn(domains: Sequence[Domain], K: int, batch_size: int, rng: int) -> Iterator[Part]:
    """Each domain's part of the same batches: all their samples, those of other domains with weight zero."""
    member = torch.cat([torch.full((len(domain),), i) for i, domain in enumerate(domains)])
    if not 1 <= batch_size <= len(member):
        raise UsageError(f"batch size is {batch_size}; it must lie between 1 and the {len(member)} samples")
    generator = torch.Generator().manual_seed(rng)
    index = torch.stack([torch.randperm(len(member), generator=generator)[:batch_size] for _ in range(K)])
    inputs = torch.cat([domain.inputs for domain in domains]).double()[index]
    labels = torch.cat([domain.labels for domain in domains])[index]
    for i in range(len(domains)):
        mine = (member[index] == i).double()
        yield inputs, labels, mine / mine.sum(1, keepdim=True).clamp(min=1)


def _of_part(
    model: nn.Module, stacked: Params, inputs: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """A domain's loss (K,) and gradient (K, P) at K points; the points do not interact, so one sum serves all."""
    free = {name: p.detach().requires_grad_(True) for name, p in stacked.items()}
    outputs = vmap(lambda params, x: functional_call(model, params, (x,)))(free, inputs)
    losses = (cross_entropy(outputs.transpose(1, 2), labels) * weights).sum(1)
    gradients = torch.autograd.grad(losses.sum(), list(free.values()))
    return losses.detach(), torch.cat([g.flatten(1) for g in gradients], 1)


def along(study: Study, records: Sequence[Record], *, on_batches: bool = False) -> list[list[DomainGradients]]:
    """By seed and held-out domain, the domains' gradients at the weights kept along runs.

    On all training data, or on batches of the runs' size. ``records`` are the runs of one arm on one suite; those
    without kept weights are left out.

    Raises:
        ComputationError: there are no kept weights.
    """
    suite = records[0].suite
    steps = sorted({step for block in study.blocks if block.suite == suite for step in block.snapshot_steps})
    found: dict[int, list[DomainGradients]] = {}
    for record in records:
        kept = [record.weights(step) for step in steps if record.weights_path(step).exists()]
        if kept:
            size = record.settings.batch_size if on_batches else None
            sources = study.split(record).sources
            measured = domain_gradients(study.model(), kept, sources, batch_size=size, rng=record.seed)
            found.setdefault(record.seed, []).append(measured)
    if not found:
        raise ComputationError(f"no weights were kept on {suite!r}; give its block snapshot_steps and snapshot_seeds")
    return list(found.values())


def own_angle(trace: Trace) -> float:
    """The angle (degrees) between the two directions, averaged over the recorded steps of a run of DISAM."""
    return float(np.nanmean(np.degrees(np.arccos(np.clip(trace.steps["cos_sam"], -1.0, 1.0)))))
