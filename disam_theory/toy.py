r"""A seed -> a toy problem of two parameters: source domains and an unseen one, each $L_i(w)=s_if(w-\delta_i)$.

Domain shift in its plainest form: every domain has the same surface $f$, moved by $\delta_i$ and scaled by its
difficulty $s_i$, and the unseen domain is one more draw. The surface has wells of different widths $\sigma_k$, so
minima of different sharpness, in a bowl that keeps the weights near:
$f(w)=\frac b2\lVert w\rVert^2+\sum_ka_k\big(1-e^{-\lVert w-m_k\rVert^2/2\sigma_k^2}\big)\ge0$.

All that is drawn, and how each problem is solved, is fixed here for all seeds alike.

| letter | meaning |
|---|---|
| ``R`` | number of problems, solved at once |
| ``M`` | number of source domains; the unseen domain has index M |
| ``K`` | number of wells |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from disam_theory.algorithms import Ascent, Settings, ascent_point, relatives
from disam_theory.losses import Params

M, K = 3, 4
BOX = 2.0  # wells and starts are uniform in [-BOX, BOX]^2
WIDTHS = (0.4, 1.6)  # log-uniform: curvatures of equally deep wells differ by up to 16
DEPTHS = (0.5, 1.5)  # uniform
DIFFICULTIES = (0.5, 2.0)  # log-uniform
SHIFT = 0.4  # standard deviation of a domain's shift, along each axis; the narrowest well's width
BOWL = 0.1  # b
LAMS = (0.1, 0.7)  # the ends of the range on which the paper finds DISAM stable (Fig. 5)
FAMILY = range(200)  # the seeds; the first is the problem that is drawn
ANGLE_MARGIN = 1.0  # degrees; a smaller difference makes no practical difference
SHARPNESS_MARGIN = 0.01  # of the larger of the two sharpnesses in absolute value; likewise
ERM = Settings("erm", rho=0.5, lr=0.1, schedule="step", steps=300, sampling="full")
SAM = replace(ERM, algorithm="sam")
DISAM = tuple(replace(ERM, algorithm="disam", lam=lam) for lam in LAMS)
CONTROLS = {  # in words, for each of DISAM
    "-lambda": tuple(replace(disam, lam=-disam.strength) for disam in DISAM),
    "a weaker SAM": tuple(replace(disam, algorithm="weaker-sam") for disam in DISAM),
}


@dataclass(frozen=True)
class Toys:
    """R problems, with M + 1 domains each; equal shares."""

    centres: Tensor  # (R, K, 2)
    widths: Tensor  # (R, K)
    depths: Tensor  # (R, K)
    shifts: Tensor  # (R, M + 1, 2)
    difficulties: Tensor  # (R, M + 1)
    starts: Tensor  # (R, 2)

    def losses(self, w: Tensor) -> Tensor:
        """The losses (..., R, M + 1) of all domains at the points ``w`` (..., R, 2)."""
        moved = w.unsqueeze(-2) - self.shifts
        squares = (moved.unsqueeze(-2) - self.centres.unsqueeze(-3)).square().sum(-1)
        wells = self.depths.unsqueeze(-2) * -torch.expm1(-squares / (2 * self.widths.square().unsqueeze(-2)))
        return self.difficulties * (BOWL / 2 * moved.square().sum(-1) + wells.sum(-1))

    def ascent(self, w: Tensor, settings: Settings) -> Ascent:
        """The package's own step from the points ``w`` (R, 2), on the source domains."""
        runs = w.new_ones(len(w))
        present = w.new_ones(len(w), M)
        rho, lam = settings.radius * runs, settings.strength * runs
        return ascent_point(
            self._sources,
            {"w": w},
            alpha=present / M,
            present=present,
            rho=rho,
            lam=lam,
            relatives=relatives([settings]),  # one for all
            measured=False,
        )

    def path(self, settings: Settings) -> Tensor:
        """The weights (T + 1, R, 2) of each problem from its start on."""
        points = [self.starts]
        for step in range(settings.steps):
            gradient = self.ascent(points[-1], settings).gradient_ascent["w"]
            points.append(points[-1] - settings.lr_at(step) * gradient)
        return torch.stack(points)

    def angles(self, w: Tensor, settings: Settings) -> Tensor:
        """Degrees (R,) between the ascent at ``w`` (R, 2) and the largest gradient of a source domain there."""
        largest, ascent = self.largest_gradient(w), self.ascent(w, settings).epsilon["w"]
        return torch.rad2deg(torch.acos(torch.cosine_similarity(largest, ascent, dim=-1).clamp(-1, 1)))

    def largest_gradient(self, w: Tensor) -> Tensor:
        """The gradient (R, 2) of the source domain whose gradient at ``w`` (R, 2) is the longest."""
        point = w.detach().requires_grad_()
        losses = self.losses(point)
        each = [torch.autograd.grad(losses[:, i].sum(), point, retain_graph=True)[0] for i in range(M)]
        gradients = torch.stack(each, dim=1)
        return gradients[torch.arange(len(w)), gradients.norm(dim=-1).argmax(1)]

    def sharpness(self, w: Tensor) -> Tensor:
        """The largest eigenvalue (R,) of the unseen domain's Hessian at ``w`` (R, 2), all of which are made at once."""
        point = w.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(point)[:, M].sum(), point, create_graph=True)
        rows = [torch.autograd.grad(part.sum(), point, retain_graph=True)[0] for part in gradient.unbind(1)]
        return torch.linalg.eigvalsh(torch.stack(rows, 1))[:, -1]

    def _sources(self, params: Params) -> Tensor:
        return self.losses(params["w"])[:, :M]


def toys(seeds: Sequence[int]) -> Toys:
    """The problems of these seeds; a seed's problem does not depend on the others."""
    drawn = [_draw(np.random.default_rng(seed)) for seed in seeds]
    return Toys(*(torch.from_numpy(np.stack(values)) for values in zip(*drawn, strict=True)))


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return (
        rng.uniform(-BOX, BOX, (K, 2)),
        _log_uniform(rng, *WIDTHS, K),
        rng.uniform(*DEPTHS, K),
        rng.normal(0, SHIFT, (M + 1, 2)),
        _log_uniform(rng, *DIFFICULTIES, M + 1),
        rng.uniform(-BOX, BOX, 2),
    )


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int) -> np.ndarray:
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


@dataclass(frozen=True)
class Outcome:
    """What one algorithm does on every problem of the family."""

    angles: Tensor  # (R,) at the start, see Toys.angles; NaN for ERM, which does not ascend
    ends: Tensor  # (R, 2) the last weights
    losses: Tensor  # (R,) of the unseen domain at the last weights
    sharpness: Tensor  # (R,) of the unseen domain at the last weights


@cache
def outcome(settings: Settings) -> Outcome:
    """Solve every problem of the family."""
    problems = toys(FAMILY)
    ends = problems.path(settings)[-1]
    angles = problems.angles(problems.starts, settings) if settings.radius else torch.full((len(ends),), math.nan)
    return Outcome(angles, ends, problems.losses(ends)[:, M], problems.sharpness(ends))


@dataclass(frozen=True)
class Count:
    """In how many problems a first number lies below a second by more than a margin, above it, or neither."""

    below: int
    tied: int
    above: int

    def interval(self, level: float) -> tuple[float, float]:
        """Clopper and Pearson's interval of the share of ``below`` among the problems that are not tied."""
        return _clopper_pearson(self.below, self.below + self.above, level)

    def tied_interval(self, level: float) -> tuple[float, float]:
        """The interval of the share of ties among all problems."""
        return _clopper_pearson(self.tied, self.below + self.tied + self.above, level)

    def p_value(self) -> float:
        """Two-sided sign test of "below as often as above"."""
        decided = self.below + self.above
        return float(stats.binomtest(self.below, decided).pvalue) if decided else 1.0


def count(first: Tensor, second: Tensor, margin: Tensor | float) -> Count:
    """Compare two (R,) within a margin, () or (R,)."""
    below, above = int((first < second - margin).sum()), int((first > second + margin).sum())
    return Count(below, len(first) - below - above, above)


def flatter(first: Tensor, second: Tensor) -> Count:
    """In how many problems the first sharpness (R,) is below the second."""
    return count(first, second, SHARPNESS_MARGIN * torch.maximum(first.abs(), second.abs()))


def nearer(first: Tensor, second: Tensor) -> Count:
    """In how many problems the first angle (R,) to the largest gradient is below the second."""
    return count(first, second, ANGLE_MARGIN)


def _clopper_pearson(k: int, n: int, level: float) -> tuple[float, float]:
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(k, n).proportion_ci(level, "exact")
    return float(interval.low), float(interval.high)
