"""Paired differences over seeds -> interval -> verdict by a rule declared before the data are seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from disam_theory.claims import Evidence, Verdict
from disam_theory.errors import ComputationError


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; ``n`` is the number of independent replicates (seeds)."""

    estimate: float
    low: float
    high: float
    n: int
    level: float


def paired_interval(differences: np.ndarray, *, level: float = 0.95) -> Interval:
    r"""The mean of paired differences with Student's t interval, seeds as the independent replicates.

    ``differences`` (S, ...) has one row a seed. A seed redraws the data, the initial weights and the batches, and all
    held-out domains of one seed share them: they are averaged first, so the S row means are independent and the
    interval is $\bar d\pm t_{S-1}\,s/\sqrt S$ (the cluster mean's interval; Student 1908).

    Raises:
        ComputationError: fewer than two seeds, or a difference that is not finite (a diverged run).
    """
    means = np.asarray(differences, dtype=float).reshape(len(differences), -1).mean(axis=1)
    if len(means) < 2:
        raise ComputationError(f"{len(means)} seed(s) give no interval; run at least 2")
    if not np.isfinite(means).all():
        raise ComputationError("a run diverged, so its difference is not finite; lower the learning rate or rho")
    error = stats.sem(means)
    reach = stats.t.ppf(0.5 + level / 2, len(means) - 1) * error
    centre = float(means.mean())
    return Interval(centre, centre - float(reach), centre + float(reach), len(means), level)


def bootstrap_interval(differences: np.ndarray, *, level: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    r"""A percentile interval of the mean of ``differences`` (S, H) by a hierarchical bootstrap; fixed random numbers.

    Held-out domains (columns) are drawn with replacement, and seeds (rows) within each draw (Davison and Hinkley 1997,
    Sec. 3.8): what the mean might have been with other domains too. :func:`paired_interval` takes the domains as given.
    """
    values = np.asarray(differences, dtype=float).reshape(len(differences), -1)
    S, H = values.shape
    generator = np.random.default_rng(0)
    columns = generator.integers(0, H, (draws, H, 1))
    rows = generator.integers(0, S, (draws, H, S))
    low, high = np.quantile(values[rows, columns].mean((1, 2)), [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def false_positive_rate(differences: np.ndarray, *, level: float = 0.95, draws: int = 2000) -> float:
    """How often :func:`paired_interval` excludes zero when each seed's two arms change their labels at random.

    With the labels permuted there is no difference to find, so the rate is one of errors; nominal is ``1 - level``.
    """
    means = np.asarray(differences, dtype=float).reshape(len(differences), -1).mean(axis=1)
    flipped = means * np.random.default_rng(1).choice([-1.0, 1.0], (draws, len(means)))
    reach = stats.t.ppf(0.5 + level / 2, len(means) - 1) * stats.sem(flipped, axis=1)
    return float((np.abs(flipped.mean(1)) > reach).mean())


def claimed_below(interval: Interval, *, margin: float) -> Verdict:
    """Verdict on "the difference is below zero" for an interval and an equivalence margin declared beforehand.

    ``REFUTED`` where the interval excludes negative values, or lies inside ``(-margin, margin)``: a difference so
    small that it makes no practical difference. Else ``SUPPORTED`` where it lies below zero, else ``UNDECIDED``.
    """
    inside = -margin < interval.low and interval.high < margin
    if inside or interval.low > 0:
        return Verdict.REFUTED
    return Verdict.SUPPORTED if interval.high < 0 else Verdict.UNDECIDED


def claimed_above(interval: Interval, *, margin: float) -> Verdict:
    """Verdict on "the difference is above zero", by the rule of :func:`claimed_below`."""
    return claimed_below(replace(interval, low=-interval.high, high=-interval.low), margin=margin)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict from those of the cases.

    Supported where every case supports it, refuted where a case refutes it and none supports it, conditional where
    some support it and others refute it (it holds in the cases named only), else undecided.
    """
    found = set(verdicts)
    if found == {Verdict.SUPPORTED}:
        return Verdict.SUPPORTED
    if Verdict.REFUTED in found:
        return Verdict.CONDITIONAL if Verdict.SUPPORTED in found else Verdict.REFUTED
    return Verdict.UNDECIDED


def over_cases(
    differences: Mapping[str, np.ndarray],
    *,
    margin: float,
    unit: str,
    what: str,
    above: bool = False,
    of: int | None = None,
) -> Evidence:
    """Evidence on "``what`` is below zero" from each case's paired differences (S, ...), Bonferroni over the cases.

    With ``above`` the claim is that it is above zero. Overall by :func:`together`. The intervals hold together at 95 %;
    ``of``: with those of other calls, so many cases in all.
    """
    joint = of or len(differences)
    level = 1 - 0.05 / joint
    intervals = {case: paired_interval(d, level=level) for case, d in differences.items()}
    verdicts = {case: (claimed_above if above else claimed_below)(i, margin=margin) for case, i in intervals.items()}
    overall = together(verdicts.values())
    cases = {verdict: [case for case, v in verdicts.items() if v is verdict] for verdict in Verdict}
    opposite = [case for case in cases[Verdict.REFUTED] if _is_opposite(intervals[case], margin=margin, above=above)]
    words = ", ".join(f"{verdict.value} in {len(names)}" for verdict, names in cases.items() if names)
    if cases[Verdict.SUPPORTED] and overall is not Verdict.SUPPORTED:
        words += f" (supported: {'; '.join(cases[Verdict.SUPPORTED])})"
    if opposite:
        words += f" (the opposite: {'; '.join(opposite)})"
    spread = span_in_words([asdict(interval) for interval in intervals.values()], unit)
    data: dict[str, Any] = {
        "estimand": what,
        "unit": unit,
        "equivalence_margin": margin,
        "multiplicity": f"Bonferroni over {joint} cases, joint level 0.95",
        "claimed": "above zero" if above else "below zero",
        "cases": [
            {"case": s, **asdict(i), "verdict": verdicts[s].value, **_besides(differences[s], level)}
            for s, i in intervals.items()
        ],
    }
    return Evidence(overall, f"{what}: {spread} over {len(intervals)} cases, {words}", data)


def span_in_words(rows: Sequence[Mapping[str, Any]], unit: str, *, form: str = "+.3g") -> str:
    """The least and the largest ``estimate`` of some intervals' rows, and what holds every ``low`` and ``high``."""
    estimates, low, high = ([row[name] for row in rows] for name in ("estimate", "low", "high"))
    least, largest, lowest, highest = (f"{v:{form}}" for v in (min(estimates), max(estimates), min(low), max(high)))
    return f"{least} to {largest} {unit} (intervals within {lowest} to {highest})"


def _is_opposite(interval: Interval, *, margin: float, above: bool) -> bool:
    """Whether the interval has the sign that was not claimed, and reaches beyond what makes no practical difference."""
    return (interval.high < 0 and interval.low <= -margin) if above else (interval.low > 0 and interval.high >= margin)


def _besides(differences: np.ndarray, level: float) -> dict[str, float]:
    low, high = bootstrap_interval(differences, level=level)
    rate = false_positive_rate(differences, level=level)
    return {"bootstrap_low": low, "bootstrap_high": high, "false_positive_rate": rate}
