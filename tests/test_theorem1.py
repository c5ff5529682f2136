"""The counterexample to Theorem 1 recomputed by other means; and neither it nor the corrected bound passes mutated."""

import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest

from disam_theory.claims import Verdict
from disam_theory.convergence import corrected_floor, corrected_left, thm1_bound
from disam_theory.errors import ComputationError
from proofs_checks import theorem1
from proofs_checks.theorem1 import (
    Problem,
    ball_path,
    check_conv_corrected,
    check_thm1,
    first_violation,
    interval_path,
    thm1_bound_harmonic,
)


def by_decimals(T, digits=60):
    """Both sides in decimal arithmetic: no interval, but another program and another arithmetic."""
    with localcontext() as context:
        context.prec = digits
        w, total = Decimal(1) / 100, Decimal(0)
        gap = (w + 1) ** 2 / 2
        for t in range(1, T + 1):
            gradient = w + (1 if w > 0 else -1)
            total += gradient**2
            w -= Decimal("0.5") / Decimal(t).sqrt() * gradient
        root = Decimal(T).sqrt()
        return total / T, gap / Decimal("0.5") / root + (Decimal("2.25") + 1) * Decimal("0.5") * Decimal(T).ln() / root


@pytest.mark.parametrize("T", [1, 2, 3, 64, 256])
@pytest.mark.parametrize("path", [ball_path, interval_path])
def test_both_paths_enclose_what_decimal_arithmetic_finds(path, T):
    left, right = by_decimals(T)
    sides = path(Problem(), T, thm1_bound)
    for (low, high), value in ((sides.left, left), (sides.right, right)):
        tiny = Fraction(1, 10**50)
        assert low - tiny <= Fraction(value) <= high + tiny
        assert high - low < Fraction(1, 10**40)


def test_disams_ascent_is_sams_on_this_problem_until_lambda_is_a_half():
    sam = interval_path(Problem(), 20, thm1_bound)
    assert interval_path(Problem(), 20, thm1_bound, lam=Fraction(2, 5)) == sam
    beyond = interval_path(Problem(), 20, thm1_bound, lam=Fraction(3, 5))  # the ascent turns round
    assert beyond.left[1] < sam.left[0]
    with pytest.raises(ComputationError, match="disagree"):
        check_thm1(None, lam=Fraction(3, 5))


def test_every_certified_number_is_rounded_to_the_safe_side():
    for row in check_thm1(None).data["sides"]:
        left, right = by_decimals(row["T"])
        assert Decimal(row["left_at_least"]) <= left < Decimal(row["left_at_least"]) + Decimal("1e-5")
        assert Decimal(row["right_at_most"]) >= right > Decimal(row["right_at_most"]) - Decimal("1e-5")


def test_the_bound_with_one_plus_log_T_fails_too():
    assert check_thm1(None, bound=thm1_bound_harmonic, steps=(256,)).verdict is Verdict.REFUTED


@pytest.mark.parametrize(
    ("bound", "first"),
    [(thm1_bound, 59), (thm1_bound_harmonic, 104)],
)
def test_the_bound_is_below_one_from_there_on(bound, first):
    assert first_violation(Problem(), bound) == first
    added = 1.0 if bound is thm1_bound_harmonic else 0.0
    values = [(1.01**2 + 1.625 * (added + math.log(T))) / math.sqrt(T) for T in range(8, 3000)]
    assert [T for T, value in enumerate(values, 8) if value >= 1][-1] == first - 1
    assert values == sorted(values, reverse=True)


def with_floor(gap, rate, L, G, rho, turning, T):
    return thm1_bound(gap, rate, L, G, rho, turning, T) + 2 * L**2 * rho**2


def test_a_true_bound_is_not_refuted():
    assert check_thm1(None, bound=with_floor).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"gradient_bound": Fraction(1)}, "every gradient met is at most G"),
        ({"rate": Fraction(4)}, "every gradient met is at most G"),
        ({"smoothness": Fraction(1, 2)}, "L-smooth"),
        ({"turning": Fraction(3, 2)}, "Gamma <= L"),
    ],
)
def test_a_problem_outside_the_assumptions_refutes_nothing(change, failed):
    evidence = check_thm1(None, problem=replace(Problem(), **change))
    assert evidence.verdict is Verdict.UNDECIDED
    assert failed in evidence.reason


def test_a_sign_that_is_not_certain_is_an_error():
    with pytest.raises(ComputationError, match="step 1 is not certain"):
        ball_path(replace(Problem(), start=Fraction(0)), 3, thm1_bound)
    with pytest.raises(ComputationError, match="step 1 is not certain"):
        interval_path(replace(Problem(), start=Fraction(0)), 3, thm1_bound)


def test_too_few_bits_are_an_error_and_no_wrong_verdict(monkeypatch):
    monkeypatch.setattr(theorem1, "BITS", 4)
    with pytest.raises(ComputationError, match="not certain"):
        check_thm1(None)


MUTATIONS = {
    "thm1": {
        "with a floor that grows with rho": lambda: check_thm1(None, bound=with_floor),
        "for a loss less smooth than the bound's L": lambda: check_thm1(
            None, problem=replace(Problem(), smoothness=Fraction(1, 2))
        ),
    },
    "conv-corrected": {
        "half the floor": lambda: check_conv_corrected(
            None, floor=lambda eta, L, rho: corrected_floor(eta, L, rho) / 2
        ),
        "no floor": lambda: check_conv_corrected(None, floor=lambda eta, L, rho: 0),
        "the whole of the ascent gradient": lambda: check_conv_corrected(None, left=lambda eta, L, a, b: eta * (a + b)),
        "twice the gradient at w": lambda: check_conv_corrected(
            None, left=lambda eta, L, a, b: corrected_left(eta, L, 2 * a, b)
        ),
    },
}


@pytest.mark.parametrize("name", MUTATIONS["conv-corrected"])
def test_a_stronger_corrected_bound_is_refuted_by_an_exact_run(name):
    evidence = MUTATIONS["conv-corrected"][name]()
    assert evidence.verdict is Verdict.REFUTED
    assert Fraction(evidence.data["least_slack"]["slack"]) < 0


def test_a_weaker_corrected_bound_is_not_called_proved_without_its_own_certificate():
    weaker = check_conv_corrected(None, floor=lambda eta, L, rho: 2 * corrected_floor(eta, L, rho))
    assert weaker.verdict is Verdict.UNDECIDED


def test_the_corrected_floor_is_attained():
    assert check_conv_corrected(None).data["least_slack"]["slack"] == "0"
