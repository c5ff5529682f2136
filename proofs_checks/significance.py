r"""Means and spreads of three seeds, as printed -> which gains they can tell from chance.

Welch's test of a method with the domain-inspired term against the method without it. The paper does not say whether
its $\pm$ is a standard deviation or a standard error: both readings are tested. Every p-value is computed twice, by
SciPy from the arms' means and deviations, and as $I_x(\nu/2,1/2)$ with $x=\nu/(\nu+t^2)$ from exact rational $t^2$ and
$\nu$ in ball arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import flint
from scipy import stats

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.errors import ComputationError
from proofs_checks.arithmetic import DETAILS, DOMAINBED, HALF_DIGIT, OUT, Reader, Row, find_row, read_table
from proofs_checks.enclosures import to_ball

METHODS = ("SAM", "GSAM", "SAGM")
EACH: tuple[tuple[str, ...], ...] = tuple((data_set,) for data_set in DETAILS)  # one comparison a data set
AVERAGE: tuple[tuple[str, ...], ...] = (tuple(DETAILS),)  # one comparison, of the average over the data sets
SEEDS, LEVEL = 3, 0.05
STANDARD_DEVIATION, STANDARD_ERROR = READINGS = ("standard deviation", "standard error")
BITS = 128


@dataclass(frozen=True)
class Arm:
    """A mean accuracy over ``columns``, the variance of that mean, and its degrees of freedom (Satterthwaite)."""

    mean: Fraction
    variance: Fraction
    freedom: Fraction


def arm(row: Row, columns: Sequence[str], *, reading: str, seeds: int, shift: Fraction = Fraction(0)) -> Arm:
    """The arm of a row, seeds and data sets independent; ``shift`` is added to every spread, which stays >= 0."""
    spreads = [max(Fraction(row[f"{column}_pm"]) + shift, Fraction(0)) for column in columns]
    variances = [s**2 / (seeds if reading == STANDARD_DEVIATION else 1) for s in spreads]
    total = sum(variances, Fraction(0))
    squares = sum((v**2 for v in variances), Fraction(0)) / (seeds - 1)
    mean = sum((Fraction(row[column]) for column in columns), Fraction(0)) / len(columns)
    return Arm(mean, total / len(columns) ** 2, total**2 / squares if squares else Fraction(seeds - 1))


def welch(first: Arm, second: Arm) -> tuple[Fraction, Fraction]:
    r"""$t^2$ and $\nu$ of Welch's test: $\nu=(a+b)^2/(a^2/\nu_a+b^2/\nu_b)$ for variances $a,b$ of the means."""
    variance = first.variance + second.variance
    if not variance:
        raise ComputationError("both spreads are 0, so Welch's test is not defined")
    parts = first.variance**2 / first.freedom + second.variance**2 / second.freedom
    return (second.mean - first.mean) ** 2 / variance, variance**2 / parts


def p_ball(square: Fraction, freedom: Fraction) -> flint.arb:
    r"""$P(|T|\ge t)$ of Student's $T$ with $\nu$ degrees of freedom: $I_{\nu/(\nu+t^2)}(\nu/2,1/2)$, as a ball."""
    with flint.ctx.workprec(BITS):
        at, half = (to_ball(x) for x in (freedom / (freedom + square), freedom / 2))
        return at.beta_lower(half, flint.arb(1) / 2, regularized=True)


def p_scipy(first: Arm, second: Arm) -> float:
    """Welch's p-value by SciPy; an arm with ``freedom`` degrees of freedom stands for ``freedom + 1`` observations."""
    numbers = [float(a.freedom) + 1 for a in (first, second)]
    deviations = [math.sqrt(a.variance * (a.freedom + 1)) for a in (first, second)]
    means = [float(a.mean) for a in (first, second)]
    ordered = itertools.chain.from_iterable(zip(means, deviations, numbers, strict=True))
    return float(stats.ttest_ind_from_stats(*ordered, equal_var=False).pvalue)


def p_value(first: Arm, second: Arm) -> float:
    """Two-sided p-value, by both paths.

    Raises:
        ComputationError: they differ by more than a relative 1e-8.
    """
    ball, by_scipy = float(p_ball(*welch(first, second))), p_scipy(first, second)
    if not math.isclose(ball, by_scipy, rel_tol=1e-8):
        raise ComputationError(f"Welch's p-value is {ball} in ball arithmetic and {by_scipy} by SciPy")
    return ball


def p_at_least(row: Row, with_term: Row, columns: Sequence[str], *, reading: str, seeds: int) -> float:
    r"""A lower bound of the one-sided p-value before any correction, however the printed numbers were rounded.

    The gain is taken 0.1 larger and every spread 0.05 smaller. Welch's $\nu$ never exceeds the sum of the arms'
    $n-1$, and for a given $t$ the tail of Student's distribution falls with $\nu$.
    """
    arms = [arm(r, columns, reading=reading, seeds=seeds, shift=-HALF_DIGIT) for r in (row, with_term)]
    variance = sum(a.variance for a in arms)
    gain = arms[1].mean - arms[0].mean + 2 * HALF_DIGIT
    if gain <= 0 or not variance:
        return 0.5 if gain <= 0 else 0.0
    return float(p_ball(gain**2 / variance, Fraction(2 * len(columns) * (seeds - 1))).lower()) / 2


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of m, times m-k+1, never below the one before, at most 1."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def comparisons(
    targets: Sequence[tuple[str, ...]], *, reading: str, seeds: int = SEEDS, read: Reader = read_table
) -> list[dict[str, Any]]:
    """Every method with the term against itself without it, on each target; Holm's correction over all of them."""
    table = read("Table 1")
    found: list[dict[str, Any]] = []
    for method, columns in itertools.product(METHODS, targets):
        without, with_term = (find_row(table, OUT, name) for name in (method, f"{method}+DI"))
        first, second = (arm(row, columns, reading=reading, seeds=seeds) for row in (without, with_term))
        place = {"method": method, "on": columns[0] if len(columns) == 1 else "average"}
        bound = p_at_least(without, with_term, columns, reading=reading, seeds=seeds)
        gain = str(second.mean - first.mean)
        found.append({**place, "gain": gain, "p": p_value(first, second), "one_sided_p_at_least": bound})
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = adjusted
        row["significant"] = adjusted <= LEVEL and Fraction(row["gain"]) > 0
    return found


def check_significance(
    study: object,
    *,
    targets: Sequence[tuple[str, ...]] = EACH,
    seeds: int = SEEDS,
    read: Reader = read_table,
) -> Evidence:
    """Is every gain significant at 5 %? Supported where it is in both readings of the spread, conditional in one.

    Refuted where in both readings some gain has a one-sided p-value above 5 % without any correction and with every
    rounding in its favour; else undecided.
    """
    by_reading = {r: comparisons(targets, reading=r, seeds=seeds, read=read) for r in READINGS}
    averages = {r: comparisons(AVERAGE, reading=r, seeds=seeds, read=read) for r in READINGS}
    holds = {reading: all(row["significant"] for row in rows) for reading, rows in by_reading.items()}
    weakest = {reading: max(rows, key=lambda row: row["one_sided_p_at_least"]) for reading, rows in by_reading.items()}
    counts = [f"{sum(row['significant'] for row in rows)} ({r})" for r, rows in by_reading.items()]
    total = len(by_reading[STANDARD_DEVIATION])
    reason = f"of {total} gains {' or '.join(counts)} are significant at 5 % by Welch's test with Holm's correction"
    data = {"seeds": seeds, "level": LEVEL, "comparisons": by_reading, "averages_over_data_sets": averages}
    if all(holds.values()):
        return Evidence(Verdict.SUPPORTED, reason, data)
    if any(holds.values()):
        return Evidence(Verdict.CONDITIONAL, reason, data)
    least = weakest[STANDARD_DEVIATION]
    if any(row["one_sided_p_at_least"] <= LEVEL for row in weakest.values()):
        return Evidence(Verdict.UNDECIDED, f"{reason}; with favourable rounding all of them may be", data)
    bound = math.floor(1000 * least["one_sided_p_at_least"]) / 1000
    reason += (
        f"; {least['method']}'s gain on {least['on']} has p at least {bound} one-sided, uncorrected and with every "
        "rounding in its favour"
    )
    return Evidence(Verdict.REFUTED, reason, data)


SIGNIFICANCE_CLAIMS = (
    Claim(
        id="table1-significance",
        where="Table 1, Sec. 4.2",
        statement="Adding the domain-inspired term improves out-of-domain accuracy significantly on each of the five "
        "data sets, for SAM, GSAM and SAGM.",
        assumptions=(
            "the paper says that it 'consistently improves generalization' and reports no test; significance at 5 % is "
            "this reading",
            "three seeds a mean, the seeds of two methods independent; means over seeds near normal",
            r"the printed $\pm$ is a standard deviation over seeds, or a standard error (as in DomainBed's tables): "
            "both are tested",
            "two-sided Welch tests, Holm's correction over the 15 comparisons; the three averages over the data sets, "
            "whose spread is not printed, are a family of their own, with the data sets independent",
        ),
        scope="Table 1 as printed, with its row SAM+DI, which Tables 6-10 contradict. Refuted says that three seeds do "
        "not show each gain, not that there is none: the averages over the data sets are significant in both readings. "
        "Runs paired by seed would have more power, and are not printed",
        expected=Verdict.REFUTED,
        check=check_significance,
        references=(
            "Welch, The generalization of 'Student's' problem, Biometrika 34, 1947",
            "Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979",
            DOMAINBED,
        ),
    ),
)
