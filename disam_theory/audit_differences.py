"""Audits of several checkpoints on the same samples -> each against the first, with intervals; the spread over domains.

Losses, accuracies and traces are paired over what both checkpoints saw: the same samples, the same random vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from disam_theory.audit import Audit, Row
from disam_theory.audit_measures import SOURCE, UNSEEN, Z95
from disam_theory.errors import UsageError
from disam_theory.statistics import paired_interval

PAIRED, PROBES = "95 %, paired over samples", "95 %, paired over random vectors, on these samples"
CERTIFIED, NONE = "certified, on these samples", "none: a fact about these samples"
SAMPLED = "95 %, for the whole domains: the sampling errors of both added"
QUANTITIES = ("loss", "accuracy", "lambda_1", "trace", "sam", "worst_lower", "asam", "grad_norm", "ece")
HEADS = {  # of the quantities in tables, where they have other names or units there
    "accuracy": "acc %",
    "sam": "SAM step",
    "worst_lower": "worst case",
    "asam": "ASAM step",
    "grad_norm": "|grad|",
    "ece": "ECE %",
}


def head_of(quantity: str) -> str:
    """What the tables call one of :data:`QUANTITIES`."""
    return HEADS.get(quantity, quantity)


def unit_of(quantity: str) -> float:
    """What a quantity is multiplied by where it is shown: shares are shown in per cent."""
    return 100.0 if head_of(quantity).endswith("%") else 1.0


@dataclass(frozen=True)
class Difference:
    """``quantity`` of the loss ``name`` at ``checkpoint`` less that at ``baseline``; each interval stands alone."""

    checkpoint: str
    baseline: str
    name: str
    quantity: str
    difference: float
    low: float | None
    high: float | None
    interval: str  # what the interval is

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and it has one sign."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def shown(self) -> str:
        """The difference and its interval, in as many digits as tell the interval's ends apart, three at least.

        In the unit of the tables, that of :func:`unit_of`.
        """
        unit = unit_of(self.quantity)
        if self.low is None or self.high is None:
            return f"{unit * self.difference:+.3g}"
        for digits in range(3, 9):
            value, low, high = (f"{unit * number:+.{digits}g}" for number in (self.difference, self.low, self.high))
            if low != high and "e+" not in f"{value}{low}{high}":
                break
        return f"{value} [{low}, {high}]"


def differences(audits: Mapping[str, Audit]) -> list[Difference]:
    """Each later checkpoint against the first: every domain and the pooled loss.

    Raises:
        UsageError: the audits are not of the same domains and numbers of samples.
    """
    (base, first), *others = audits.items()
    for label, other in others:
        if [(row.name, row.n) for row in other.rows] != [(row.name, row.n) for row in first.rows]:
            raise UsageError(f"{label} was audited on other domains or samples than {base}; audit both on the same")
    return [
        Difference(label, base, row.name, quantity, *found)
        for label, other in others
        for row in first.rows
        if row.role in (SOURCE, UNSEEN) or row.name == "pooled"
        for quantity, found in _of_row(first, other, row.name)
    ]


Found = tuple[float, float | None, float | None, str]


def _of_row(first: Audit, second: Audit, name: str) -> Iterator[tuple[str, Found]]:
    a, b = first.row(name), second.row(name)
    sources = {row.name: row.share for row in first.rows if row.role == SOURCE}
    shares = sources if name == "pooled" else {name: 1.0}
    yield "loss", (*_paired_means(first.draws, second.draws, shares), PAIRED)
    yield "accuracy", (*_paired_proportions(first.draws, second.draws, shares), PAIRED)
    yield "lambda_1", _eigenvalues(first, second, name)
    probes = [audit.draws[f"trace/{name}"] for audit in (first, second)]
    drawn = min(map(len, probes))  # a full audit draws more of them
    interval = paired_interval((probes[1][:drawn] - probes[0][:drawn]).numpy())
    yield "trace", (interval.estimate, interval.low, interval.high, PROBES)
    for quantity in QUANTITIES[4:]:
        one, other = getattr(a, quantity), getattr(b, quantity)
        if one is not None and other is not None:
            yield quantity, (other - one, None, None, NONE)


def _eigenvalues(first: Audit, second: Audit, name: str) -> Found:
    """The certified interval; of samples, widened by both sampling errors, whatever their correlation."""
    a, b = first.row(name), second.row(name)
    difference = b.eigenvalues[0] - a.eigenvalues[0]
    if not (a.converged and b.converged):
        return difference, None, None, "none: not converged"
    low, high = b.lower[0] - a.upper[0], b.upper[0] - a.lower[0]
    errors = [row["lambda_1_error"] for audit in (first, second) for row in audit.sampling if row["name"] == name]
    if not errors:
        return difference, low, high, CERTIFIED
    reach = Z95 * sum(errors)
    return difference, low - reach, high + reach, SAMPLED


def _paired_means(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], shares: Mapping[str, float]
) -> tuple[float, float, float]:
    """The mean difference of the samples' losses; domains are strata, each of a fixed share."""
    own = [(second[f"loss/{name}"] - first[f"loss/{name}"]).numpy() for name in shares]
    variances = [each.var(ddof=1) / len(each) for each in own]
    return _stratified([each.mean() for each in own], variances, list(shares.values()))


def _paired_proportions(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], shares: Mapping[str, float]
) -> tuple[float, float, float]:
    """The difference of accuracies with Agresti and Min's (2005) interval: half a pair is added to each of four cells.

    So an interval is never empty, not even where both checkpoints are right on the same samples.
    """
    own = [(second[f"right/{name}"] - first[f"right/{name}"]).numpy() for name in shares]
    means, variances = [], []
    for each in own:
        n, gained, lost = len(each) + 2, (each > 0).sum() + 0.5, (each < 0).sum() + 0.5
        means.append((gained - lost) / n)
        variances.append((gained + lost - (gained - lost) ** 2 / n) / n**2)
    _, low, high = _stratified(means, variances, list(shares.values()))
    return sum(share * float(each.mean()) for share, each in zip(shares.values(), own, strict=True)), low, high


def _stratified(
    means: Sequence[float], variances: Sequence[float], shares: Sequence[float]
) -> tuple[float, float, float]:
    centre = float(sum(share * mean for share, mean in zip(shares, means, strict=True)))
    reach = Z95 * math.sqrt(sum(share**2 * variance for share, variance in zip(shares, variances, strict=True)))
    return centre, centre - reach, centre + reach


@dataclass(frozen=True)
class Spread:
    """How a quantity differs over the source domains; ``gap`` is the unseen domains' mean less the sources'."""

    quantity: str
    mean: float  # unweighted, over the sources
    deviation: float  # sqrt(Var{.}) with the paper's 1/M
    least: float
    least_of: str
    largest: float
    largest_of: str
    gap: float | None


def spreads(audit: Audit) -> list[Spread]:
    """Of every quantity that each domain has."""
    sources = [row for row in audit.rows if row.role == SOURCE]
    unseen = [row for row in audit.rows if row.role == UNSEEN]
    return [_spread(quantity, sources, unseen) for quantity in QUANTITIES]


def _spread(quantity: str, sources: Sequence[Row], unseen: Sequence[Row]) -> Spread:
    values = [value_of(row, quantity) for row in sources]
    low, high = int(np.argmin(values)), int(np.argmax(values))
    mean = float(np.mean(values))
    gap = float(np.mean([value_of(row, quantity) for row in unseen])) - mean if unseen else None
    ends = (values[low], sources[low].name, values[high], sources[high].name)
    return Spread(quantity, mean, float(np.std(values)), *ends, gap)


def value_of(row: Row, quantity: str) -> float:
    """One of :data:`QUANTITIES` of a domain's row."""
    return row.eigenvalues[0] if quantity == "lambda_1" else float(getattr(row, quantity))
