"""Theorem 3: the witnesses recomputed by other means; the bound that replaces it, and how near to it coins come."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError
from proofs_checks import theorem3
from proofs_checks.theorem3 import (
    BALLS,
    READINGS,
    SIZES,
    Ascent,
    Shift,
    centres_at,
    check_covering,
    check_discriminates,
    check_thm3,
    check_thm3_corrected,
    check_thm3_zero_one,
    check_uniform_rho,
    check_vc_term,
    complexity,
    covering_width2,
    cross_entropy,
    failing,
    finite_class_term,
    grid_index,
    grid_share,
    hoeffding,
    least_slack,
    level,
    size_table,
    triangle_bound,
    zero_one,
)

TENTH = Fraction(1, 10)


def without_covering(f, k, n, j, delta):
    return f.log((j + 1) * (j + 2) / f.number(delta)) / (2 * n)


def without_union(f, k, n, j, delta):
    return ((k * f.log(1 + 2 ** (j + 1)) if j >= 1 else 0) + f.log(1 / f.number(delta))) / (2 * n)


def half_root(f, k, n, j, delta):
    return covering_width2(f, k, n, j, delta) / 4


def without_dimension(f, k, n, j, delta):
    return covering_width2(f, 1, n, j, delta)


MUTATIONS = {
    "thm3": {
        "for the 0-1 loss": lambda: check_thm3(None, loss=zero_one),
        "with the divergence times the range of the loss": lambda: check_thm3(None, range_=lambda case: 1 - case.w[1]),
        "for a cross-entropy of at most log 2": lambda: check_thm3(
            None, loss=lambda f, margin: cross_entropy(f, max(margin, Fraction(0)))
        ),
        "for a class of VC dimension 1": lambda: check_thm3(None, case=Shift(d=1)),
    },
    "thm3-zero-one": {
        "without the combined risk": lambda: check_thm3_zero_one(None, bound=lambda r, d, c: r + d / 2),
        "without the divergence": lambda: check_thm3_zero_one(None, bound=lambda r, d, c: r + c),
        "a quarter of the divergence": lambda: check_thm3_zero_one(None, bound=lambda r, d, c: r + d / 4 + c),
        "half of the combined risk": lambda: check_thm3_zero_one(None, bound=lambda r, d, c: r + d / 2 + c / 2),
    },
    "thm3-vc-term": {
        "the logarithm of the class": lambda: check_vc_term(None, term=finite_class_term),
        "d in place of its logarithm": lambda: check_vc_term(
            None, term=lambda f, d, n, delta: f.sqrt((d + f.log(1 / f.number(delta))) / (2 * n))
        ),
        "a class smaller than the sample": lambda: check_vc_term(None, d=100),
    },
    "thm3-discriminates": {
        "worse by at most a tenth": lambda: check_discriminates(None, slack=lambda disam, sam: sam - disam + 0.1),
        "where the minimum lies rho from the origin": lambda: check_discriminates(None, centres=(Fraction(1, 20),)),
        "not smaller": lambda: check_discriminates(
            None, slack=lambda disam, sam: disam - sam, centres=(Fraction(0), Fraction(-1, 20))
        ),
    },
    "gen-covering": {
        "half the square root": lambda: check_covering(None, width2=half_root),
        "without the covering": lambda: check_covering(None, width2=without_covering),
        "without the weights of the levels": lambda: check_covering(None, width2=without_union),
        "without the dimension": lambda: check_covering(None, width2=without_dimension),
    },
    "gen-covering-uniform-rho": {
        "weights twice as large": lambda: check_uniform_rho(None, share=lambda i: 2 * grid_share(i)),
        "the radius for free": lambda: check_uniform_rho(None, share=lambda i: 1),
        "weights that fall like 1/i": lambda: check_uniform_rho(None, share=lambda i: 1 / (8 * (abs(i) + 1))),
        "the radius rounded up": lambda: check_uniform_rho(None, index=lambda ratio: grid_index(ratio) + 1),
    },
    "thm3-corrected": {
        "without the divergence": lambda: check_thm3_corrected(None, bound=lambda r, d, c: r + c),
        "without the combined risk": lambda: check_thm3_corrected(None, bound=lambda r, d, c: r + d / 2),
        "half the square root": lambda: check_thm3_corrected(None, width2=half_root),
        "domains weighted alike": lambda: check_thm3_corrected(None, pooled=lambda a, risks: sum(risks) / len(risks)),
        "Hoeffding with twice the samples": lambda: check_thm3_corrected(
            None, tail=lambda f, n, width2: hoeffding(f, 2 * n, width2)
        ),
    },
}


def by_floats(k, n, delta, ratio2, printed):
    """The last term of Eq. (23) with the parenthesis as printed or as in Theorem 2."""
    grown, rest = 1 + ratio2 * (1 + math.sqrt(math.log(n) / k)) ** 2, 4 * math.log(n / delta)
    return math.sqrt((k * math.log(grown + rest) if printed else k * math.log(grown) + rest) / (n - 1))


def test_the_sides_of_eq23_in_floating_point():
    rows = check_thm3(None).data["sides"][:2]
    small = math.log1p(math.exp(-9.95)) + 1 + math.sqrt((math.log(2) + math.log(100)) / 2000)
    small += 2 * math.log1p(math.exp(-10))
    for row, printed in zip(rows, (True, False), strict=True):
        right = small + by_floats(2, 1000, 0.01, 10100 / 0.05**2, printed)
        assert float(row["right_at_most"]) == pytest.approx(right, abs=2e-5)
        assert float(row["left_at_least"]) == pytest.approx(100, abs=2e-5)


@pytest.mark.parametrize("change", [{"d": 1}, {"k": 3}, {"rho": Fraction(0)}, {"delta": Fraction(2)}])
def test_an_assumption_that_fails_is_seen(change):
    assert [row["holds"] for row in replace(Shift(), **change).assumptions()].count(False) == 1


def test_both_readings_agree_where_the_logarithms_argument_is_all_there_is():
    values = [reading(BALLS, 2, 2, Fraction(2), Fraction(3), 4 * 0) for reading in READINGS.values()]
    assert float(values[0]) == pytest.approx(by_floats(2, 2, 2, 3, True))
    assert values[0].overlaps(values[1])  # n = delta, so that 4 log(n / delta) = 0


def test_the_triangle_inequality_is_tight_and_its_finite_cases_are_counted():
    cases, (slack, _) = least_slack(triangle_bound, 1, 2, 1)
    assert cases == 2 * 2 * (1 + 1 + 2)  # point masses S and T; classes {0}, {1} and both
    assert slack == 0
    _, (slack, witness) = least_slack(lambda risk, divergence, combined: risk, 1, 2, 1)
    assert slack == -1
    assert witness["S"] != witness["T"]


def test_the_case_against_a_bound_without_the_combined_risk_by_hand():
    witness = check_thm3_zero_one(None, bound=lambda r, d, c: r + d / 2).data["least_slack"]
    assert witness["slack"] == "-1"  # the same input, the other label on T, and a class of one


def test_the_missed_part_of_a_sample():
    data = check_vc_term(None).data
    assert data["deviation_in_every_sample_at_least"] == "4/5"
    assert Fraction(4, 5) <= Fraction(data["least_deviation_in_20_samples"]) <= Fraction(9, 10)
    assert float(data["term_at_most"]) == pytest.approx(math.sqrt(math.log(100_000) / 400), abs=2e-5)


def test_the_runs_by_hand():
    case = Ascent(steps=1)
    cycle = Fraction(1, 380)
    assert case.end(Fraction(0), Fraction(0)) == -cycle
    assert case.end(Fraction(3), Fraction(1, 10)) == 3 + cycle - (cycle + Fraction(1, 20)) / 10
    assert replace(case, steps=2).end(Fraction(0), Fraction(0)) == cycle


def test_where_the_origin_lies_decides_and_both_signs_occur():
    rows = check_discriminates(None).data["bounds"]
    assert {row["minimum_at"]: row["sign"] for row in rows} == {"0": "-", "1/20": "+"}
    same = check_discriminates(None, case=Ascent(lam=Fraction(0))).data["bounds"]
    assert all(float(row["slack_at_least"]) <= 0 <= float(row["slack_at_most"]) for row in same)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(Fraction(0), 0), (Fraction(1, 2), 0), (Fraction(51, 100), 1), (1, 1), (2, 2), (Fraction(21, 10), 3), (100, 8)],
)
def test_levels(ratio, expected):
    assert level(Fraction(ratio) ** 2) == expected


def test_centres_counted_one_by_one():
    levels = [level(Fraction(2 * z) ** 2) for z in range(-64, 65)]
    assert [levels.count(j) for j in range(9)] == [centres_at(j) for j in range(9)]


@pytest.mark.parametrize("width2", [covering_width2, half_root, without_union])
def test_the_probability_of_failure_by_whole_numbers(width2):
    n, survives = 40, 1.0
    for j in range(6):
        t = math.sqrt(float(width2(BALLS, 1, n, j, TENTH)))
        ways = sum(math.comb(n, ones) for ones in range(n + 1) if ones / n < 0.5 - t)
        survives *= (1 - Fraction(ways, 2**n)) ** centres_at(j)
    assert float(failing(width2, n, 5, TENTH)) == pytest.approx(1 - float(survives), rel=1e-9)


@pytest.mark.parametrize(("name", "width2"), [("half", half_root), ("covering", without_covering)])
def test_a_width_too_small_is_refuted_by_coins(name, width2):
    evidence = check_covering(None, width2=width2)
    assert evidence.verdict is Verdict.REFUTED
    last = evidence.data["exact_probability_of_failure"][-1]
    assert float(last["fails_at_most"]) > 0.1


def test_coins_refute_the_bound_without_the_weights_only_where_there_are_many_levels():
    evidence = check_covering(None, width2=without_union)
    assert evidence.verdict is Verdict.REFUTED
    few, _, many = (float(row["fails_at_most"]) for row in evidence.data["exact_probability_of_failure"])
    assert few < 0.1 < many


def test_a_smaller_covering_number_closes_nothing_and_is_not_refuted_either():
    assert check_covering(None, width2=without_dimension).verdict is Verdict.UNDECIDED


def test_a_simulation_that_contradicts_the_exact_probability_is_an_error(monkeypatch):
    monkeypatch.setattr(theorem3, "failing", lambda *args: theorem3.BALLS.number(TENTH / 2))
    with pytest.raises(ComputationError, match="disagree"):
        check_covering(None)


def test_the_grid_of_radii():
    assert [grid_index(Fraction(x)) for x in (1, Fraction(3, 2), 2, Fraction(1, 2), Fraction(1, 3))] == [
        0,
        0,
        1,
        -1,
        -2,
    ]
    assert sum(grid_share(Fraction(i)) for i in range(-2000, 2001)) == pytest.approx(0.75, abs=1e-3)
    assert check_uniform_rho(None, index=lambda ratio: grid_index(ratio) + 1).verdict is Verdict.REFUTED


def test_widths_in_floating_point():
    for (k, n, ratio), row in zip(SIZES, size_table(covering_width2), strict=True):
        j = max(0, math.ceil(math.log2(2 * ratio)))
        inside = (k * math.log(1 + 2 ** (j + 1)) if j else 0) + math.log((j + 1) * (j + 2) * 20)
        assert float(row["covering"]) == pytest.approx(math.sqrt(inside / (2 * n)), abs=2e-5)
        printed = by_floats(k, n, 0.05, float(ratio) ** 2, printed=False)
        assert float(row["theorem_2"]) == pytest.approx(printed, abs=2e-5)
        assert float(complexity(BALLS, k, n, Fraction(1, 20), ratio**2, 0)) == pytest.approx(printed)
    assert [row["covering_smaller"] for row in size_table(covering_width2)] == [True, True, True, False]


def test_stratified_tails_against_every_outcome():
    """Three coins of two kinds: the mean of the sum is 1/10 + 2/2, and 0 ones have probability (9/10)/4."""
    sums = dict.fromkeys(range(4), 0.0)
    for a, b, c in product((0, 1), repeat=3):
        sums[a + b + c] += (0.1 if a else 0.9) * 0.25
    assert sums[0] <= math.exp(-2 * 3 * (1.1 / 3) ** 2)
    assert check_thm3_corrected(None).data["exact_tails_of_stratified_samples"] > 20
