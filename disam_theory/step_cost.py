r"""(network, domains, batch) -> seconds of a training step of ERM, SAM and DISAM, in turns -> ratios with intervals.

Steps are those of :class:`~disam_theory.optim.SharpnessAware`. SAM's closure gives the mean loss of the batch and knows
no domains, as SAM is used; DISAM's sorts the losses by domain. So DISAM's overhead is all that the domain-inspired term
costs. ``plain-sam`` is SAM written down by hand, without any of this package.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from scipy import stats
from torch import Tensor, nn

from disam_theory.errors import UsageError
from disam_theory.optim import SharpnessAware, by_domain

RHO, LR = 0.05, 1e-3
BATCH, PIXELS, ROUNDS = 32, 8, 51
WIDTHS, DOMAINS = (8, 16, 32), (2, 16)
WIDTH, M_SOURCES = 8, 3  # what is held while the other changes
NAMES = ("erm", "plain-sam", "sam", "disam")
LEVEL = 0.95
Step = Callable[[], object]


@dataclass(frozen=True)
class Estimate:
    """A median with its interval, in the unit of the values."""

    median: float
    low: float
    high: float
    n: int


def median_interval(values: list[float], *, level: float = LEVEL) -> Estimate:
    r"""The median and the order statistics $x_{(j)},x_{(n+1-j)}$ that hold the true one with probability ``level``.

    $j$ is the largest with $P(X<j)\le(1-\text{level})/2$, $X\sim\mathrm{Bin}(n,\frac12)$: whatever the distribution
    (Conover 1999, Sec. 3.2), for independent values.

    Raises:
        UsageError: too few values for such an interval.
    """
    ordered, n = sorted(values), len(values)
    j = int(stats.binom.ppf((1 - level) / 2, n, 0.5))
    if j < 1:
        raise UsageError(f"{n} values give no interval of level {level:g} for a median; take more")
    return Estimate(statistics.median(ordered), ordered[j - 1], ordered[n - j], n)


def in_turns(steps: Mapping[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each step, one after the other in each of ``rounds``, whose order rotates; two rounds go before."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(-2, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            steps[name]()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def against(
    seconds: Mapping[str, list[float]], first: str, second: str, *, level: float = LEVEL
) -> dict[str, Estimate]:
    """Of the pairs of one round: the ratio of the first's seconds to the second's, and their difference."""
    pairs = list(zip(seconds[first], seconds[second], strict=True))
    return {
        "ratio": median_interval([one / other for one, other in pairs], level=level),
        "difference": median_interval([one - other for one, other in pairs], level=level),
    }


def training_steps(
    model: nn.Module, inputs: Tensor, labels: Tensor, domains: Tensor, M: int, names: tuple[str, ...]
) -> dict[str, Step]:
    """A step of each algorithm on its own copy of the model; ``domains`` (n,) in 0..M-1."""
    made: dict[str, Step] = {}
    for name in names:
        own = copy.deepcopy(model)

        def each(own: nn.Module = own) -> Tensor:
            return nn.functional.cross_entropy(own(inputs), labels, reduction="none")

        def by_domains(each: Callable[[], Tensor] = each) -> tuple[Tensor, Tensor]:
            return by_domain(each(), domains, M)

        def mean(each: Callable[[], Tensor] = each) -> Tensor:
            return each().mean().unsqueeze(0)

        if name == "erm":
            made[name] = _plain_erm(own, mean)
        elif name == "plain-sam":
            made[name] = _plain_sam(own, mean)
        else:
            algorithm, closure = ("disam", by_domains) if name == "disam" else (name, mean)
            optimizer = SharpnessAware(own.parameters(), torch.optim.SGD, algorithm=algorithm, rho=RHO, lr=LR)
            made[name] = partial(optimizer.step, closure)
    return made


def _plain_erm(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _plain_sam(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Foret et al. (2021), Algorithm 1, as it is commonly written."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    params = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        grads = [p.grad for p in params if p.grad is not None]
        scale = RHO / (torch.stack([g.norm() for g in grads]).norm() + 1e-12)
        away = [scale * g for g in grads]
        with torch.no_grad():
            for p, e in zip(params, away, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        loss().backward()
        with torch.no_grad():
            for p, e in zip(params, away, strict=True):
                p.sub_(e)
        optimizer.step()

    return step


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))), with group norm, halving the image and doubling the width at its entry."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(inside, out, 3, stride=2, padding=1)
        self.path = nn.Sequential(
            *(nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(4, out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, out, h/2, w/2)."""
        x = self.entry(x)
        return torch.relu(x + self.path(x))


def residual_network(width: int) -> nn.Module:
    """Three residual blocks of ``width``, 2 and 4 times as many channels, for colour images of 10 classes."""
    blocks = (Residual(3, width), Residual(width, 2 * width), Residual(2 * width, 4 * width))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def batch(size: int, M: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random images (size, 3, pixels, pixels), labels, and domains that take turns."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator), torch.arange(size) % M


@dataclass(frozen=True)
class Setting:
    """What a step was timed on, and its seconds."""

    width: int
    M: int
    parameters: int
    seconds: dict[str, list[float]]  # of each algorithm, (rounds,)

    @property
    def case(self) -> str:
        """In words."""
        return f"{self.M} domains, {self.parameters:,} parameters"


@cache  # a claim and a figure tell of the same measurement
def measured(rounds: int = ROUNDS) -> tuple[Setting, ...]:
    """Processor seconds of a step over widths, and of SAM's and DISAM's over numbers of domains.

    Processor time leaves out what else the machine does. It is that of all threads together.
    """
    places = [(width, M_SOURCES, NAMES) for width in WIDTHS] + [(WIDTH, M, ("sam", "disam")) for M in DOMAINS]
    found = []
    for width, M, names in places:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = residual_network(width)
        steps = training_steps(model, *batch(BATCH, M, PIXELS), M, names)
        size = sum(p.numel() for p in model.parameters())
        found.append(Setting(width, M, size, in_turns(steps, rounds, time.process_time)))
    return tuple(found)
