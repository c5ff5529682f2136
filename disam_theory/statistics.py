"""Paired differences over seeds -> interval -> verdict by a rule declared before the data are seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


def claimed_below(interval: Interval, *, margin: float) -> Verdict:
    """Verdict on "the difference is below zero" for an interval and an equivalence margin declared beforehand.

    ``REFUTED`` where the interval excludes negative values, or lies inside ``(-margin, margin)``: a difference so
    small that it makes no practical difference. Else ``SUPPORTED`` where it lies below zero, else ``UNDECIDED``.
    """
    inside = -margin < interval.low and interval.high < margin
    if inside or interval.low > 0:
        return Verdict.REFUTED
    return Verdict.SUPPORTED if interval.high < 0 else Verdict.UNDECIDED


def over_cases(differences: Mapping[str, np.ndarray], *, margin: float, unit: str, what: str) -> Evidence:
    """Evidence on "``what`` is below zero" from each case's paired differences (S, ...), Bonferroni over the cases.

    Overall: supported where every case supports it, refuted where a case refutes it and none supports it, conditional
    where some support it and others refute it (it holds in the cases named only), else undecided. The intervals
    hold together at 95 %.
    """
    level = 1 - 0.05 / len(differences)
    intervals = {case: paired_interval(d, level=level) for case, d in differences.items()}
    verdicts = {case: claimed_below(interval, margin=margin) for case, interval in intervals.items()}
    found = set(verdicts.values())
    if found == {Verdict.SUPPORTED}:
        overall = Verdict.SUPPORTED
    elif Verdict.REFUTED in found and Verdict.SUPPORTED not in found:
        overall = Verdict.REFUTED
    else:
        overall = Verdict.CONDITIONAL if Verdict.REFUTED in found else Verdict.UNDECIDED
    estimates = [interval.estimate for interval in intervals.values()]
    cases = {verdict: [case for case, v in verdicts.items() if v is verdict] for verdict in Verdict}
    words = ", ".join(f"{verdict.value} in {len(names)}" for verdict, names in cases.items() if names)
    if cases[Verdict.SUPPORTED] and overall is not Verdict.SUPPORTED:
        words += f" (supported: {'; '.join(cases[Verdict.SUPPORTED])})"
    spread = f"{min(estimates):+.3g} to {max(estimates):+.3g} {unit}"
    data: dict[str, Any] = {
        "estimand": what,
        "unit": unit,
        "equivalence_margin": margin,
        "multiplicity": f"Bonferroni over {len(differences)} cases, joint level 0.95",
        "cases": [{"case": s, **asdict(i), "verdict": verdicts[s].value} for s, i in intervals.items()],
    }
    return Evidence(overall, f"{what}: {spread} over {len(intervals)} cases, {words}", data)
