r"""(features, outputs, labels, domains) -> a statistic $s_i$ of each domain -> a penalty on how the domains' differ.

| objective | $s_i$, (K,) | penalty |
|---|---|---|
| ``coral`` | the features' mean and covariance, $(\mu_i/\sqrt d,\Sigma_i/d)$ | mean of $\lVert s_i-s_j\rVert^2$ |
| ``fishr`` | variance of the head's gradient over the samples, $v_i/\sqrt K$ | $\mathrm{Var}\{s_i\}$ |

CORAL is Sun and Saenko (2016) and Fishr Rame et al. (2022), both with DomainBed's formulas (Gulrajani and Lopez-Paz
2021) and without its schedule of the coefficient, which starts Fishr's late. $\mathrm{Var}\{s_i\}=
\frac1m\sum_i\lVert s_i-\bar s\rVert^2$ over the m domains that count, as V-REx's is of the losses; CORAL's mean is
over their pairs. Features are what enters the model's last linear layer, its head; ``d`` is their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

MATCHED = ("coral", "fishr")
FISHR_EMA = 0.95  # weight of the past in Fishr's moving average: DomainBed's default


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The last linear layer in the order of the modules: the head, where the model has one."""
    return next((layer for layer in reversed(list(model.modules())) if isinstance(layer, nn.Linear)), None)


@dataclass(frozen=True)
class Statistics:
    """The domains' statistics on one batch, with their graph."""

    values: Tensor  # (..., M, K)
    present: Tensor  # (..., M), one where the batch has samples enough of the domain, else zero


def coral_statistics(features: Tensor, domains: Tensor, M: int) -> Statistics:
    r"""$s_i=(\mu_i/\sqrt d,\Sigma_i/d)$ of ``features`` (..., B, d), ``domains`` (..., B) in 0..M-1.

    $\Sigma_i$ has $n_i-1$ below; a domain with fewer than two samples has none and does not count.
    """
    member, counts = _members(features, domains, M)
    d, own, all_features = features.shape[-1], member.mT.unsqueeze(-1), features.unsqueeze(-3)
    mean = (own * all_features).sum(-2) / counts.clamp(min=1).unsqueeze(-1)  # (..., M, d)
    centred = _aligned(own * (all_features - mean.unsqueeze(-2)))  # (..., M, B, d)
    covariance = (centred.mT @ centred)[..., :d, :d] / (counts - 1).clamp(min=1)[..., None, None]
    return Statistics(torch.cat([mean / math.sqrt(d), covariance.flatten(-2) / d], -1), (counts > 1).to(features.dtype))


def fishr_statistics(
    features: Tensor, outputs: Tensor, labels: Tensor, domains: Tensor, M: int, *, bias: bool = True
) -> Statistics:
    r"""$s_i=v_i/\sqrt K$, $v_i$ the variance over domain i's samples of the gradient in the head's K parameters.

    Of the cross-entropy of a linear head the gradient is $(p-e_y)(z,1)^\top$ for features $z$ (..., B, d) and
    probabilities $p$ of the ``outputs`` (..., B, C), without the 1 where ``bias`` is false; the variance has $n_i$
    below, so that it is zero for one sample.
    """
    member, counts = _members(features, domains, M)
    share = (member / counts.clamp(min=1).unsqueeze(-2)).unsqueeze(-1)  # (..., B, M, 1)
    error = outputs.softmax(-1) - one_hot(labels, outputs.shape[-1]).to(outputs.dtype)
    inputs = torch.cat([features, torch.ones_like(features[..., :1])], -1) if bias else features

    def moment(power: int) -> Tensor:
        own = (share * error.unsqueeze(-2) ** power).flatten(-2)  # (..., B, M C): one product for all domains
        product = _aligned(own).mT @ _aligned(inputs**power)
        return product[..., : own.shape[-1], : inputs.shape[-1]].unflatten(-2, (M, -1))

    variance = (moment(2) - moment(1) ** 2).flatten(-2)
    return Statistics(variance / math.sqrt(variance.shape[-1]), (counts > 0).to(features.dtype))


def _aligned(matrices: Tensor) -> Tensor:
    """With columns of zeros up to a multiple of 16: products of matrices off 64-byte boundaries round otherwise, and a
    run alone has to give the numbers that it gives in a stack."""
    return pad(matrices, (0, -matrices.shape[-1] % 16))


def _members(features: Tensor, domains: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Which sample is of which domain (..., B, M), and how many of each there are (..., M)."""
    member = one_hot(domains.long(), M).to(features.dtype)
    return member, member.sum(-2)


@dataclass(frozen=True)
class Matching:
    """CORAL or Fishr as what one run descends besides its loss, or R runs at once (a leading axis of runs)."""

    objective: str  # one of MATCHED
    strength: Tensor  # b, () or (R,)
    moving: Tensor | None = None  # Fishr's state (..., M, K): the moving average, without graph

    def statistics(
        self, features: Tensor, outputs: Tensor, labels: Tensor, domains: Tensor, M: int, *, bias: bool
    ) -> Statistics:
        """Those of this objective; ``bias``: whether the head has one."""
        if self.objective == "coral":
            return coral_statistics(features, domains, M)
        return fishr_statistics(features, outputs, labels, domains, M, bias=bias)

    def penalty(self, statistics: Statistics) -> Tensor:
        r"""$b$ times the penalty; zero where fewer than two domains count.

        Fishr's is of the moving average: see :meth:`observed`.
        """
        count = statistics.present.sum(-1)
        weights = (statistics.present / count.clamp(min=1).unsqueeze(-1)).unsqueeze(-1)  # (..., M, 1)
        values = self._smoothed(statistics)
        mean = (weights * values).sum(-2, keepdim=True)
        spread = (weights * (values - mean) ** 2).sum((-2, -1))
        if self.objective == "coral":  # the mean over pairs is 2m/(m-1) times the variance
            spread = spread * 2 * count / (count - 1).clamp(min=1)
        return self.strength * spread

    def observed(self, statistics: Statistics) -> Matching:
        r"""After a step's second pass: $\bar v_i\leftarrow v_i+0.95\,\bar v_i$ from zero on, as DomainBed corrects it.

        DomainBed's average $0.95a+0.05v$ over 0.05. A domain that does not count on the batch keeps its own.
        """
        if self.objective != "fishr":
            return self
        values = self._smoothed(statistics).detach()
        before = torch.zeros_like(values) if self.moving is None else self.moving
        return replace(self, moving=torch.where(statistics.present.unsqueeze(-1) > 0, values, before))

    def _smoothed(self, statistics: Statistics) -> Tensor:
        return statistics.values if self.moving is None else statistics.values + FISHR_EMA * self.moving


def matching(objective: str, strengths: Sequence[float], like: Tensor) -> Matching:
    """CORAL or Fishr of R runs at its start, in the dtype and on the device of ``like``."""
    return Matching(objective, torch.tensor(strengths, dtype=like.dtype, device=like.device))
