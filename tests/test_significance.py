"""Welch tests from printed means and spreads: against SciPy on samples, by hand, and against the figure's intervals."""

from fractions import Fraction

import flint
import numpy as np
import pytest
from scipy import stats

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError
from figures.forest import FOREST
from proofs_checks import significance
from proofs_checks.arithmetic import DETAILS, OUT, find_row, read_table
from proofs_checks.significance import (
    AVERAGE,
    EACH,
    METHODS,
    READINGS,
    SIGNIFICANCE_CLAIMS,
    STANDARD_DEVIATION,
    STANDARD_ERROR,
    Arm,
    arm,
    check_significance,
    comparisons,
    holm,
    p_at_least,
    p_ball,
    p_value,
    welch,
)


def with_gains(points):
    """Table 1 with every method's gain ``points`` larger."""

    def read(name):
        rows = read_table(name)
        for method in METHODS:
            row = find_row(rows, OUT, f"{method}+DI")
            row.update({d: str(float(Fraction(row[d]) + points)) for d in DETAILS})
        return rows

    return read


MUTATIONS = {
    "table1-significance": {
        "on average over the data sets": lambda: check_significance(None, targets=AVERAGE),
        "gains 20 points larger": lambda: check_significance(None, read=with_gains(20)),
        "the same means and spreads from 30 seeds": lambda: check_significance(None, seeds=30),
    },
}


def test_the_averages_are_significant_in_both_readings_and_the_data_sets_in_neither():
    evidence = check_significance(None)
    assert evidence.verdict is Verdict.REFUTED
    assert all(len(rows) == 15 for rows in evidence.data["comparisons"].values())
    assert all(row["significant"] for rows in evidence.data["averages_over_data_sets"].values() for row in rows)
    assert MUTATIONS["table1-significance"]["on average over the data sets"]().verdict is Verdict.SUPPORTED


def test_supported_in_one_reading_is_conditional():
    """With 30 seeds a standard deviation of 0.2 is a small error of the mean, a standard error of 0.2 is what it is."""
    evidence = check_significance(None, seeds=30)
    assert evidence.verdict is Verdict.CONDITIONAL
    assert all(row["significant"] for row in evidence.data["comparisons"][STANDARD_DEVIATION])


def test_what_rounding_could_still_make_significant_is_undecided():
    """DomainNet misses 5 % after Holm's correction; rounded otherwise, it need not."""
    assert check_significance(None, targets=(("VLCS",), ("DomainNet",))).verdict is Verdict.UNDECIDED


def test_p_values_against_samples_with_the_printed_mean_and_deviation():
    """Three numbers with mean m and standard deviation s: m-s, m, m+s."""
    rows = [find_row(read_table("Table 1"), OUT, name) for name in ("SAGM", "SAGM+DI")]
    samples = [float(r["TerraInc"]) + float(r["TerraInc_pm"]) * np.array([-1.0, 0.0, 1.0]) for r in rows]
    expected = stats.ttest_ind(*samples, equal_var=False).pvalue
    arms = [arm(row, ("TerraInc",), reading=STANDARD_DEVIATION, seeds=3) for row in rows]
    assert p_value(*arms) == pytest.approx(expected, rel=1e-10)


def test_welch_by_hand():
    """GSAM on DomainNet: 44.6 and 45.6, spreads 0.2 and 0.1: t^2 = 3/0.05 = 60, nu = 2 * 0.05^2 / 0.0017 = 50/17."""
    rows = [find_row(read_table("Table 1"), OUT, name) for name in ("GSAM", "GSAM+DI")]
    arms = [arm(row, ("DomainNet",), reading=STANDARD_DEVIATION, seeds=3) for row in rows]
    assert welch(*arms) == (60, Fraction(50, 17))
    arms = [arm(row, ("DomainNet",), reading=STANDARD_ERROR, seeds=3) for row in rows]
    assert welch(*arms) == (20, Fraction(50, 17))


def test_the_average_has_the_data_sets_variances_over_25():
    row = find_row(read_table("Table 1"), OUT, "SAGM")
    found = arm(row, AVERAGE[0], reading=STANDARD_ERROR, seeds=3)
    squares = [Fraction(s) ** 2 for s in ("0.2", "0.3", "0.2", "0.9", "0.2")]
    assert found.mean == Fraction("66.1")
    assert found.variance == sum(squares) / 25
    assert found.freedom == 2 * sum(squares) ** 2 / sum(s**2 for s in squares)


def test_the_ball_holds_known_tails():
    """Cauchy: P(|T| >= 1) = 1/2. Two degrees of freedom: P(|T| >= t) = 1 - t/sqrt(t^2+2), 1 - sqrt(2/3) at t = 2."""
    assert p_ball(Fraction(1), Fraction(1)).contains(flint.arb(1) / 2)
    assert p_ball(Fraction(4), Fraction(2)).overlaps(1 - (flint.arb(2) / 3).sqrt())


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("columns", [*EACH, *AVERAGE])
def test_the_bound_is_below_the_p_value_of_every_rounding(reading, columns):
    rng = np.random.default_rng(0)
    rows = [find_row(read_table("Table 1"), OUT, name) for name in ("SAGM", "SAGM+DI")]
    bound = p_at_least(*rows, columns, reading=reading, seeds=3)
    for _ in range(40):
        shifted = []
        for row in rows:
            moves = {c: Fraction(int(rng.integers(-50, 51)), 1000) for d in columns for c in (d, f"{d}_pm")}
            shifted.append({**row, **{c: str(max(Fraction(row[c]) + move, Fraction(0))) for c, move in moves.items()}})
        arms = [arm(row, columns, reading=reading, seeds=3) for row in shifted]
        one_sided = p_value(*arms) / 2 if arms[1].mean > arms[0].mean else 1 - p_value(*arms) / 2
        assert bound <= one_sided


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_two_spreads_of_zero_and_two_paths_that_disagree_are_errors(monkeypatch):
    certain = Arm(Fraction(1), Fraction(0), Fraction(2))
    with pytest.raises(ComputationError, match="not defined"):
        welch(certain, certain)
    monkeypatch.setattr(significance, "p_scipy", lambda first, second: 0.5)
    with pytest.raises(ComputationError, match=r"0\.5 by SciPy"):
        p_value(certain, Arm(Fraction(2), Fraction(1), Fraction(2)))


def test_the_figures_intervals_contain_zero_where_the_uncorrected_test_is_not_significant():
    rows = FOREST.compute(None)
    ends = {STANDARD_DEVIATION: ("low", "high"), STANDARD_ERROR: ("low_if_standard_error", "high_if_standard_error")}
    for reading, (low, high) in ends.items():
        tests = [*comparisons(EACH, reading=reading), *comparisons(AVERAGE, reading=reading)]
        p_of = {(row["method"], row["on"]): row["p"] for row in tests}
        gain_of = {(row["method"], row["on"]): float(Fraction(row["gain"])) for row in tests}
        assert len(rows) == len(p_of) == 18
        for row in rows:
            pair = (row["algorithm"], row["data_set"])
            assert row["mean"] == pytest.approx(gain_of[pair])
            assert (row[low] < 0 < row[high]) == (p_of[pair] > 0.05)


def test_the_claim_names_both_readings():
    (claim,) = SIGNIFICANCE_CLAIMS
    assert all(reading in claim.check(None).reason for reading in READINGS)
