"""The paper's equations: each identity holds, and each wrong one is refuted by an instance."""

from fractions import Fraction
from functools import partial

import pytest
import sympy as sp

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError
from proofs_checks.exact import decide_identity, derivative, double_total, instances, moment, total
from proofs_checks.method import (
    METHOD_CLAIMS,
    check_eq3,
    check_eq5,
    check_eq6,
    check_eq8,
    check_eq8_sum,
    eq5_left,
    eq5_repaired_right,
    eq5_right,
    eq8_weight,
)

A, X, Y = sp.symbols("a x y")


@pytest.mark.parametrize("claim", METHOD_CLAIMS, ids=lambda claim: claim.id)
def test_rational_instances_are_the_second_path(claim):
    assert claim.check(None).data["rational_instances"] >= 50


def plain_weight(alpha, loss, mean, lam, number):
    """Eq. 8 without the factor 1/M."""
    return alpha - 2 * lam * (loss - mean)


MUTATIONS = {
    "eq3": {
        "plain mean of the domain losses": partial(
            check_eq3, None, summand=lambda size, loss, everything: loss / everything
        ),
        "shares squared": partial(
            check_eq3, None, summand=lambda size, loss, everything: (size / everything) ** 2 * loss
        ),
    },
    "eq5": {
        "with the term that is missing": partial(check_eq5, None, right=eq5_repaired_right),
        "left side on both": partial(check_eq5, None, right=eq5_left),
    },
    "eq5-repaired": {
        "alpha added twice": partial(check_eq5, None, right=lambda a, c, b, s: a + eq5_repaired_right(a, c, b, s)),
        "sign of beta": partial(check_eq5, None, right=lambda a, c, b, s: a + eq5_right(a, c, -b, s)),
    },
    "eq6": {
        "without the half": partial(check_eq6, None, summand=lambda x, y: (x - y) ** 2),
        "squares of sums": partial(check_eq6, None, summand=lambda x, y: (x + y) ** 2 / 2),
    },
    "eq8": {
        "sign": partial(check_eq8, None, weight=lambda a, x, m, lam, n: eq8_weight(a, x, m, -lam, n)),
        "without 1/M": partial(check_eq8, None, weight=plain_weight),
        "pooled mean forgotten": partial(check_eq8, None, weight=lambda a, x, m, lam, n: a - 2 * lam / n * x),
    },
    "eq8-sum": {
        "pooled mean forgotten": partial(check_eq8_sum, None, weight=lambda a, x, m, lam, n: a - 2 * lam / n * x),
        "two": partial(check_eq8_sum, None, weight=lambda a, x, m, lam, n: 2 * a),
    },
}
WRONG = [(claim, name) for claim, wrong in MUTATIONS.items() for name in wrong if claim != "eq5"]


@pytest.mark.parametrize(("claim", "name"), WRONG)
def test_a_wrong_statement_is_refuted_with_a_witness(claim, name):
    evidence = MUTATIONS[claim][name]()
    assert evidence.verdict is Verdict.REFUTED
    assert Fraction(evidence.data["witness"]["difference"]) != 0


def test_the_weights_sum_to_one_without_the_factor_too():
    """A true statement that differs from the printed one stays proved: the check does not just compare with it."""
    assert check_eq8_sum(None, weight=plain_weight).verdict is Verdict.PROVED


def test_the_witness_against_eq5_recomputed_by_hand():
    witness = check_eq5(None).data["witness"]
    alpha, c, g = ([Fraction(x) for x in witness[key]] for key in ("alpha", "C", "gradients"))
    beta = Fraction(witness["beta"])
    weights = [a + beta * x for a, x in zip(alpha, c, strict=True)]
    left = sum(w * d for w, d in zip(weights, g, strict=True)) / sum(weights)
    right = sum(beta * (x - a * sum(c)) * d for a, x, d in zip(alpha, c, g, strict=True)) / (1 + beta * sum(c))
    assert left - right == Fraction(witness["difference"]) == sum(a * d for a, d in zip(alpha, g, strict=True))


def test_sums_over_symbolic_domains_agree_with_plain_sums():
    summand = 3 * A * X**2 - X + 5 * A + 2
    pair = X**2 * Y - 4 * Y + 1
    for case in instances(12):
        values = {"M": len(case.losses)}

        def value(expression, case=case, values=values):
            """The expression with its moments filled in."""
            for p in expression.atoms(sp.Indexed):
                a, b = p.indices
                number = sum(s**a * x**b for s, x in zip(case.shares, case.losses, strict=True))
                expression = expression.subs(p, sp.Rational(number.numerator, number.denominator))
            return Fraction(str(expression.subs(moment(0, 0), values["M"])))

        plain = sum(3 * a * x**2 - x + 5 * a + 2 for a, x in zip(case.shares, case.losses, strict=True))
        assert value(total(summand, A, X)) == plain
        assert value(double_total(pair, X, Y)) == sum(x**2 * y - 4 * y + 1 for x in case.losses for y in case.losses)


def test_derivative_of_moments():
    assert derivative(moment(0, 3) * moment(1, 1), A, X) == 3 * X**2 * moment(1, 1) + A * moment(0, 3)


def test_two_paths_that_disagree_are_an_error_and_a_silent_difference_undecided():
    with pytest.raises(ComputationError, match="symbolic difference is 0"):
        decide_identity(sp.Integer(0), [({"L": (1,)}, Fraction(1))])
    assert decide_identity(X, [({"L": (1,)}, Fraction(0))]).verdict is Verdict.UNDECIDED
