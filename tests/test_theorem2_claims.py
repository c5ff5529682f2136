"""Theorem 2: the counterexample, the table and the comparisons recomputed by other means; nothing wrong passes."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import mpmath
import pytest
import sympy as sp

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError
from proofs_checks.theorem2 import (
    IMAGES,
    NETWORKS,
    PROMPT,
    RADII,
    WITNESSES,
    XI,
    Setting,
    TwoDomains,
    W,
    Witness,
    algorithm1,
    ball_maximum,
    certified_root,
    check_disam,
    check_rho_monotone,
    check_thm2,
    check_vacuous,
    enclosed_loss,
    flat,
    for_every_setting,
    hoeffding_margin,
    slope_sign,
    steep,
    thm2_root,
)

LIKELY = replace(WITNESSES["l = xi, whatever w"], chance=Fraction(1, 100))
CONCAVE = Witness(XI * (1 - W**2), Fraction(0))


def times_the_largest_loss(f, k, n, delta, ratio, constant, largest):
    return largest * thm2_root(f, k, n, delta, ratio, constant, largest)


def without_the_radius(f, k, n, delta, ratio, constant, largest):
    return thm2_root(f, k, n, delta, 1, constant, largest)


def growing_with_the_radius(f, k, n, delta, ratio, constant, largest):
    return thm2_root(f, k, n, delta, 1 / (1 + ratio), constant, largest)


def with_one_parameter(f, k, n, delta, ratio, constant, largest):
    return thm2_root(f, k / k, n, delta, ratio, constant, largest)


MUTATIONS = {
    "thm2": {
        "for a loss of at most 1": partial(check_thm2, None, allowed=Fraction(1)),
        "the root times the largest loss": partial(check_thm2, None, root=times_the_largest_loss),
        "costly samples that a training set hardly misses": partial(check_thm2, None, witnesses={"likely": LIKELY}),
        "a loss below its average around w": partial(check_thm2, None, witnesses={"concave": CONCAVE}),
    },
    "thm2-rho-monotone": {
        "the loss at w in place of the maximum": partial(check_rho_monotone, None, worst=lambda loss, w, rho: loss(w)),
        "a root that does not know the radius": partial(check_rho_monotone, None, root=without_the_radius),
        "a root that grows with the radius": partial(check_rho_monotone, None, root=growing_with_the_radius),
    },
    "thm2-vacuous": {
        "for CoOp's prompt": partial(check_vacuous, None, models=PROMPT),
        "for networks of norm 1/1000": partial(check_vacuous, None, norm=Fraction(1, 1000)),
        "a root that does not grow with the number of parameters": partial(
            check_vacuous, None, root=with_one_parameter
        ),
    },
    "thm2-disam": {
        "without the variance (SAM against SAM)": partial(check_disam, None, lam=Fraction(0)),
        "with the origin where DISAM ends": partial(check_disam, None, problems=(TwoDomains(Fraction(1, 20)),)),
        "for domains with the same least loss": partial(
            check_disam, None, problems=(TwoDomains(Fraction(0), offset=Fraction(0)),)
        ),
    },
}


def by_floats(k, n, delta, ratio, constant=0.0):
    inside = k * math.log(1 + ratio**2 * (1 + math.sqrt(math.log(n) / k)) ** 2) + 4 * math.log(n / delta) + constant
    return math.sqrt(inside / (n - 1))


@pytest.mark.parametrize(
    "at",
    [Setting(), Setting(norm=Fraction(3)), Setting(10, 50, Fraction(1, 20), Fraction(2), Fraction(7)), Setting(8192)],
)
def test_the_root_by_floats(at):
    low, high = certified_root(thm2_root, at, Fraction(5))
    assert float(low) == pytest.approx(by_floats(at.k, at.n, float(at.delta), float(at.norm / at.rho), 5.0))
    assert 0 <= high - low < Fraction(1, 10**40)


def test_paths_that_disagree_are_an_error():
    with pytest.raises(ComputationError, match="disagree"):
        certified_root(lambda f, *rest: rest[0] + (1 if f is mpmath.iv else 0), Setting())


def test_the_counterexample_by_hand():
    """p = 9/20000: no costly sample among 1,000 with probability 0.6376, and the mean loss is p X."""
    probability = Fraction(19991, 20000) ** 1000
    assert float(probability) == pytest.approx(math.exp(1000 * math.log1p(-9 / 20000)))
    for row in check_thm2(None).data["rows"]:
        expected, constant = Fraction(9, 20000) * Fraction(row["X"]), float(row["constant"])
        zero, ratio = (0.0, 0.0) if row["loss"].startswith("l = xi") else (math.log(2), 20.0)
        bound = zero + by_floats(1, 1000, 0.1, ratio, constant)
        assert bound == pytest.approx(float(row["bound_at_most"]), abs=2e-5)
        assert bound + 1 < float(expected)
        assert float(row["expected_loss_at_least"]) >= float(expected) - 1e-5
        assert float(row["probability_at_least"]) == pytest.approx(float(probability), abs=2e-5)


def test_a_training_set_with_one_costly_sample_satisfies_the_bound():
    """So the failure probability is that of the sets of zeros alone."""
    for row in check_thm2(None).data["rows"]:
        one_hit = Fraction(row["X"]) / 1000 + Fraction(row["bound_at_most"])
        assert one_hit > Fraction(row["expected_loss_at_least"]) + Fraction(1, 10)


@pytest.mark.parametrize(
    ("mutation", "failed"),
    [
        ("for a loss of at most 1", "the loss is at most 1"),
        ("costly samples that a training set hardly misses", "P(all samples are 0) > delta"),
        ("a loss below its average around w", "second derivative in w at least 0"),
    ],
)
def test_a_witness_outside_the_assumptions_refutes_nothing(mutation, failed):
    evidence = MUTATIONS["thm2"][mutation]()
    assert evidence.verdict is Verdict.UNDECIDED
    assert failed in evidence.reason


def test_every_setting_falls_unless_the_root_knows_the_largest_loss():
    assert for_every_setting(thm2_root)["holds"]
    assert not for_every_setting(times_the_largest_loss)["holds"]


def test_hoeffding_lies_below_the_root_at_every_n_and_delta():
    margin = hoeffding_margin(thm2_root)
    assert margin.is_nonnegative
    a, b = (next(s for s in margin.free_symbols if s.name == name) for name in "ab")
    n, delta = 50, 0.2
    value = float(margin.subs({a: math.log(n), b: -math.log(delta)}))
    squares = by_floats(1, n, delta, 0.0) ** 2 - math.log(1 / delta) / (2 * n)
    assert value == pytest.approx(squares * n * (n - 1))
    weak = hoeffding_margin(lambda f, k, n, delta, ratio, constant, largest: f.sqrt(f.log(1 / delta) / (4 * n)))
    assert not weak.is_nonnegative


def test_losses_by_floats():
    low, high = enclosed_loss(sp.log(1 + sp.exp(W * XI)), Fraction(1, 2), Fraction(3))
    assert float(low) == pytest.approx(math.log1p(math.exp(1.5)))
    assert 0 < high - low < Fraction(1, 10**40)


def test_the_bound_falls_and_then_rises_along_the_radii_at_the_steep_minimum():
    data = check_rho_monotone(None).data
    by_hand = [float(rho**2 / (1 + rho**2)) + by_floats(1, 1000, 0.1, float(1 / rho)) for rho in RADII]
    assert [float(x) for x in data["bounds"]["steep"]] == pytest.approx(by_hand, abs=2e-5)
    lowest = by_hand.index(min(by_hand))
    assert RADII[lowest] == Fraction(1, 20)
    assert by_hand[: lowest + 1] == sorted(by_hand[: lowest + 1], reverse=True)
    assert by_hand[lowest:] == sorted(by_hand[lowest:])
    assert min(map(float, data["bounds"]["flat"])) > float(data["floor_of_the_root"])


def test_the_maximum_over_a_ball():
    assert ball_maximum(steep, Fraction(1), Fraction(1, 2)) == Fraction(1, 5)
    assert ball_maximum(steep, Fraction(0), Fraction(1)) == Fraction(4, 5)
    assert ball_maximum(flat, Fraction(1), Fraction(1)) == 0
    assert ball_maximum(flat, Fraction(1), Fraction(2)) == Fraction(1, 2)
    with pytest.raises(ComputationError, match="not greatest at an end"):
        ball_maximum(lambda w: -steep(w), Fraction(1), Fraction(1))


def test_signs_of_the_derivative():
    assert slope_sign(thm2_root, "rho") == -1
    assert slope_sign(thm2_root, "norm") == 1
    assert slope_sign(without_the_radius, "rho") is None
    assert slope_sign(growing_with_the_radius, "rho") == 1


def test_vacuous_by_rationals_for_every_smaller_training_set_too():
    """With norm/rho at least 2 the logarithm is at least log 5 > 1, so the squared root exceeds k/(n - 1) > 1."""
    assert math.e < 5
    for k in NETWORKS.values():
        for n in IMAGES.values():
            assert Fraction(k, n - 1) > 1


def test_the_table_by_floats():
    rows = check_vacuous(None).data["rows"]
    assert len(rows) == 15
    for row in rows:
        k, n = row["k"], row["n"]
        for rho, value in row["root_at"].items():
            assert float(value) == pytest.approx(by_floats(k, n, 1.0, float(1 / Fraction(rho))), rel=1e-4)
        ratio = float(row["below_1_only_if_norm_over_rho_is_at_most"])
        assert by_floats(k, n, 1.0, ratio) == pytest.approx(1, rel=1e-3)
    on_domainnet = {row["model"]: row["vacuous"] for row in rows if row["data"] == "DomainNet"}
    assert on_domainnet == {**dict.fromkeys(NETWORKS, True), **dict.fromkeys(PROMPT, False)}


def test_twice_the_root_is_vacuous_and_undecided_as_its_threshold_is_not_known():
    twice = check_vacuous(None, root=lambda f, *rest: 2 * thm2_root(f, *rest))
    assert twice.verdict is Verdict.UNDECIDED


def test_algorithm_1_by_its_closed_form_and_by_floats():
    """DISAM: v + rho shrinks by 19/20 a step, as v stays above -1/18, where its direction of ascent turns."""
    rho = Fraction(1, 20)
    assert algorithm1(TwoDomains(Fraction(0)), Fraction(1, 10), rho) == Fraction(19, 20) ** 200 * Fraction(3, 50) - rho
    moved = algorithm1(TwoDomains(Fraction(1, 7)), Fraction(1, 10), rho)
    assert moved - Fraction(1, 7) == algorithm1(TwoDomains(Fraction(0)), Fraction(1, 10), rho)
    w = 0.01
    for _ in range(200):
        w -= 0.05 * (w + math.copysign(0.05, w))
    assert float(algorithm1(TwoDomains(Fraction(0)), Fraction(0), rho)) == pytest.approx(w, abs=1e-12)


def test_no_direction_of_ascent_is_an_error():
    """At v = 1/100 the direction is 0 for the offset that solves a v (1 - 2 lam a) + lam a o = 0."""
    stuck = TwoDomains(Fraction(0), offset=-Fraction(1, 100) * Fraction(9, 10) * 10)
    with pytest.raises(ComputationError, match="no certain direction"):
        algorithm1(stuck, Fraction(1, 10), Fraction(1, 20))


def test_the_bounds_at_both_iterates_by_floats():
    first, second = check_disam(None).data["rows"]
    for row, place in ((first, 0.0), (second, 0.05)):
        for name in ("SAM", "DISAM"):
            v = float(row[name]["distance_from_the_minimum"])
            top = 0.25 * (abs(v) + 0.05) ** 2 + 0.5
            bound = top + by_floats(1, 1000, 0.1, abs(v + place) / 0.05)
            assert float(row[name]["bound"]) == pytest.approx(bound, abs=1e-4)
    assert first["disam_above_in_both_terms"]
    assert not first["disam_below"]
    assert second["disam_below"]
    assert not second["disam_above_in_both_terms"]


def test_losses_outside_the_unit_interval_refute_nothing():
    evidence = check_disam(None, problems=(TwoDomains(Fraction(0), offset=Fraction(3)),))
    assert evidence.verdict is Verdict.UNDECIDED
    assert "in [0, 1]" in evidence.reason
