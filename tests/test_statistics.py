"""Intervals and verdict rules of the empirical claims."""

import numpy as np
import pytest

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError
from disam_theory.statistics import Interval, claimed_below, over_cases, paired_interval


def interval(low, high):
    return Interval((low + high) / 2, low, high, 10, 0.95)


def test_interval_is_students_t_of_the_seed_means():
    # by hand: means 1, 2, 4 -> mean 7/3, s = 1.527525, t_{2, 0.975} = 4.302653
    result = paired_interval(np.array([[0.5, 1.5], [2.0, 2.0], [3.0, 5.0]]))
    assert result.estimate == pytest.approx(7 / 3)
    reach = 4.302652729911275 * 1.5275252316519468 / np.sqrt(3)
    assert result.high - result.estimate == pytest.approx(reach, rel=1e-9)
    assert result.n == 3


def test_interval_covers_the_truth_at_its_level():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        # held-out domains of a seed share their data: correlated within a row
        sample = generator.normal(0.3, 1.0, (6, 1)) + generator.normal(0, 0.5, (6, 4))
        found = paired_interval(sample)
        inside += found.low < 0.3 < found.high
    assert 0.935 < inside / 2000 < 0.965


def test_false_positive_rate_of_identical_arms_is_at_most_nominal():
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(2000):
        cases = {name: generator.normal(size=(5, 4)) for name in "abc"}
        found = over_cases(cases, margin=1e-9, unit="", what="null")
        wrong += any(case["verdict"] == "supported" for case in found.data["cases"])
    assert wrong / 2000 <= 0.025 + 0.01  # one of two tails of the joint 5 %


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-3.0, -1.0, Verdict.SUPPORTED),
        (-3.0, -0.1, Verdict.SUPPORTED),
        (-0.4, -0.1, Verdict.REFUTED),  # inside the margin: practically no difference
        (-0.4, 0.4, Verdict.REFUTED),
        (-3.0, 0.1, Verdict.UNDECIDED),
        (0.1, 3.0, Verdict.REFUTED),
    ],
)
def test_verdict_on_a_difference_claimed_below_zero(low, high, verdict):
    assert claimed_below(interval(low, high), margin=0.5) is verdict


def test_overall_verdict_needs_every_case():
    below, above = np.full((4, 2), -5.0), np.full((4, 2), 5.0)
    below[0], above[0] = -4.9, 4.9
    noise = np.array([[-30.0], [30.0], [-20.0], [22.0]])

    def verdict(**cases):
        return over_cases(cases, margin=0.5, unit="%", what="difference").verdict

    assert verdict(a=below, b=below) is Verdict.SUPPORTED
    assert verdict(a=below, b=above) is Verdict.CONDITIONAL
    assert verdict(a=above, b=noise) is Verdict.REFUTED
    assert verdict(a=below, b=noise) is Verdict.UNDECIDED


def test_the_reason_has_the_intervals_and_names_the_cases_of_the_opposite():
    near, far = np.array([[4.8], [5.0], [5.2], [5.0]]), np.array([[-5.2], [-5.0], [-4.8], [-5.0]])
    found = over_cases({"a": near, "b": far, "c": 0.001 * near}, margin=0.5, unit="%", what="difference")
    lowest, highest = (pick(row[end] for row in found.data["cases"]) for pick, end in ((min, "low"), (max, "high")))
    assert f"-5 to +5 % (intervals within {lowest:+.3g} to {highest:+.3g}) over 3 cases" in found.reason
    assert "(supported: b)" in found.reason
    assert "(the opposite: a)" in found.reason  # c differs by less than matters
    above = over_cases({"a": near, "b": far}, margin=0.5, unit="%", what="difference", above=True)
    assert "(supported: a)" in above.reason
    assert "(the opposite: b)" in above.reason


def test_cases_of_several_calls_are_corrected_together():
    values = {"a": np.array([[1.0], [2.0], [4.0]])}
    alone, among = (over_cases(values, margin=0.5, unit="", what="d", of=of).data for of in (None, 12))
    assert alone["cases"][0]["level"] == pytest.approx(0.95)
    assert among["cases"][0]["level"] == pytest.approx(1 - 0.05 / 12)
    assert among["multiplicity"].startswith("Bonferroni over 12 cases")


def test_too_few_seeds_and_diverged_runs_are_refused():
    with pytest.raises(ComputationError, match="1 seed"):
        paired_interval(np.ones((1, 3)))
    with pytest.raises(ComputationError, match="diverged"):
        paired_interval(np.array([[1.0], [np.nan]]))
