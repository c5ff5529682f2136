"""Theorem 1's variants recomputed by other means; a true or a changed statement must not keep the verdict."""

import itertools
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial

import flint
import numpy as np
import pytest
import sympy as sp

from disam_theory.claims import Verdict
from disam_theory.convergence import thm1_bound
from disam_theory.errors import ComputationError
from proofs_checks.method import eq8_weight
from proofs_checks.theorem1_variants import (
    BALLS,
    INTERVALS,
    MIRRORED,
    NOISE,
    NOISY_PROBLEM,
    READINGS,
    TWISTED,
    TWISTED_PROBLEM,
    Domains,
    Planar,
    ascent_certificate,
    ascent_floor,
    at_ascent,
    ball_floor,
    both_paths,
    check_lambda_remark,
    check_rho_remark,
    check_strongly_convex,
    check_thm1_disam,
    check_thm1_readings,
    check_thm1_stochastic,
    expected_left,
    fails_from,
    polynomials,
    pooled_model,
    readings_in_the_plane,
    sams_turning,
    sides_of,
    turning,
)


def with_floor(gap, rate, L, G, rho, turning, T):
    """The printed bound with the floor that a true one has."""
    return thm1_bound(gap, rate, L, G, rho, turning, T) + 2 * L**2 * rho**2


def plain_gradient(model, w, ascent, rho):
    """Not a reading of the perturbed loss: L itself at w."""
    return model.loss(w), model.gradient(w)


def hessian_limit(planar):
    """The square of twice the norm of Hess L_DI: no direction turns faster where gradients are within a factor two."""
    return 4 * (planar.curvature + 4 * planar.lam) ** 2


def without_first_term(first, second, level):
    return fails_from(first / 100, second, level)


MUTATIONS = {
    "thm1-disam": {
        "the bound with a floor, which holds": partial(check_thm1_disam, None, bound=with_floor),
        "lambda 0, which is SAM": partial(check_thm1_disam, None, lam=Fraction(0)),
        "G below a gradient that is met": partial(
            check_thm1_disam, None, problem=replace(TWISTED_PROBLEM, gradient_bound=Fraction(3, 2))
        ),
        "Gamma above L": partial(check_thm1_disam, None, problem=replace(TWISTED_PROBLEM, turning=Fraction(2))),
    },
    "thm1-stochastic": {
        "the bound with a floor, which holds": partial(check_thm1_stochastic, None, bound=with_floor),
        "noise of mean 1/4": partial(check_thm1_stochastic, None, noise=(Fraction(0), Fraction(1, 2))),
        "G below a gradient that can be met": partial(
            check_thm1_stochastic, None, problem=replace(NOISY_PROBLEM, gradient_bound=Fraction(2))
        ),
        "too few steps for the bound to fall": partial(check_thm1_stochastic, None, steps=50),
    },
    "thm1-readings": {
        "the bound with a floor, which holds": partial(check_thm1_readings, None, bound=with_floor),
        "a fourth reading, the loss itself": partial(
            check_thm1_readings, None, readings={**READINGS, "the loss itself": plain_gradient}
        ),
    },
    "thm1-strongly-convex": {
        "twice mu rho at the ascent point": partial(
            check_strongly_convex, None, at_asc=lambda along, mu, rho: ascent_floor(along, 2 * mu, rho)
        ),
        "half of mu rho at the ascent point, without its certificate": partial(
            check_strongly_convex, None, at_asc=lambda along, mu, rho: ascent_floor(along, mu / 2, rho)
        ),
        "twice the distance at the maximum": partial(
            check_strongly_convex, None, at_top=lambda r, mu, rho: ball_floor(2 * r, mu, rho)
        ),
        "T_0 that forgets the first term": partial(check_strongly_convex, None, last_crossing=without_first_term),
        "the bound with a floor fails too": partial(check_strongly_convex, None, bound=with_floor),
    },
    "lambda-remark": {
        "the square of lambda": partial(
            check_lambda_remark, None, weight=lambda a, x, m, lam, n: eq8_weight(a, x, m, lam**2, n)
        ),
        "an adjustment that saturates": partial(
            check_lambda_remark, None, weight=lambda a, x, m, lam, n: eq8_weight(a, x, m, lam / (1 + lam), n)
        ),
        "the default lambda, not a large one": partial(check_lambda_remark, None, lam=Fraction(1, 10)),
    },
    "rho-remark": {
        "lambda 0, which is SAM": partial(check_rho_remark, None, planar=replace(Planar(), lam=Fraction(0))),
        "no faster than the Hessian of L_DI allows, which holds": partial(
            check_rho_remark, None, permitted=hessian_limit
        ),
        "losses that are negative somewhere": partial(
            check_rho_remark, None, planar=replace(Planar(), heights=(Fraction(2), Fraction(0)))
        ),
    },
}


def disam_by_decimals(T, lam="0.1", start="-0.005", digits=60):
    """The left side on the twisted domains from the two losses and Eq. 8, in decimal arithmetic."""
    with localcontext() as context:
        context.prec = digits
        w, total, third, lam = Decimal(start), Decimal(0), Decimal(1) / 3, Decimal(lam)
        for t in range(1, T + 1):
            losses = [(w - 1) ** 2 / 4, 3 * (w + third) ** 2 / 4]
            slopes = [(w - 1) / 2, 3 * (w + third) / 2]
            weights = [Decimal("0.5") - lam * (x - sum(losses) / 2) for x in losses]
            ascent = w + (1 if sum(b * s for b, s in zip(weights, slopes, strict=True)) > 0 else -1)
            gradient = ((ascent - 1) / 2 + 3 * (ascent + third) / 2) / 2
            total += gradient**2
            w -= Decimal("0.5") / Decimal(t).sqrt() * gradient
        return total / T


@pytest.mark.parametrize("T", [1, 2, 100])
def test_disams_left_side_in_decimals(T):
    exact = disam_by_decimals(T)
    for side in both_paths(TWISTED, Fraction(1, 10), TWISTED_PROBLEM, thm1_bound, T, at_ascent):
        tiny = Fraction(1, 10**45)
        assert side.left[0] - tiny <= Fraction(exact) <= side.left[1] + tiny
        assert side.left[1] - side.left[0] < Fraction(1, 10**40)
    assert abs(exact - disam_by_decimals(T, lam="0")) > Decimal("0.00005")


def test_disams_right_side_by_hand():
    row = check_thm1_disam(None).data["sides"][0]
    gap = 0.995**2 / 2
    assert row["T"] == 100
    assert float(row["right_at_most"]) == pytest.approx(
        gap / 0.5 / 10 + (1.6**2 + 1) * 0.5 * math.log(100) / 10, abs=1e-5
    )


def test_the_twisted_domains():
    mean, inspired = polynomials(TWISTED, Fraction(1, 10))
    assert mean == flint.fmpq_poly([flint.fmpq(1, 6), 0, flint.fmpq(1, 2)])
    assert inspired.derivative()(flint.fmpq(0)) == flint.fmpq(1, 120)
    at_zero = replace(TWISTED_PROBLEM, start=Fraction(0))
    with pytest.raises(ComputationError, match="not certain"):
        sides_of(BALLS, MIRRORED, Fraction(1, 10), at_zero, thm1_bound, 2)


def test_a_domain_that_the_polynomials_do_not_know_is_an_error(monkeypatch):
    other = Domains(TWISTED.curvatures, (Fraction(1), Fraction(-1, 2)))
    wrong = replace(BALLS, model=lambda domains, lam: pooled_model(other, lam))
    monkeypatch.setattr("proofs_checks.theorem1_variants.BALLS", wrong)
    with pytest.raises(ComputationError, match="disagree"):
        check_thm1_disam(None)


@pytest.mark.parametrize("same_batch", [False, True])
def test_the_expectation_over_all_noise_by_floats(same_batch):
    values = expected_left(NOISY_PROBLEM, NOISE, Fraction(1, 10), 5, same_batch=same_batch)
    for T, (low, high) in enumerate(values, 1):
        squares = []
        for noise in itertools.product((-0.5, 0.5), repeat=T):
            w = 0.01
            for t, n in enumerate(noise, 1):
                ascent = w + np.sign(w - n if same_batch else w)
                squares.append(ascent**2)
                w -= 0.1 / math.sqrt(t) * (ascent - n)
        assert float(low) == pytest.approx(np.mean(squares), rel=1e-12)
        assert low >= 1
        assert high - low < Fraction(1, 10**40)


def test_simulated_noise_stays_above_the_certified_bound():
    """150 steps with the batch of the step: the mean over many runs exceeds rho^2, and with it the bound."""
    draws = np.random.default_rng(0).choice([-0.5, 0.5], size=(150, 4000))
    w, total = np.full(4000, 0.01), np.zeros(4000)
    for t, n in enumerate(draws, 1):
        ascent = w + np.sign(w - n)
        total += ascent**2
        assert np.abs(ascent - n).max() <= 3
        w = w - 0.1 / math.sqrt(t) * (ascent - n)
    assert (total / 150).mean() > 1 > float(check_thm1_stochastic(None).data["sides"][1]["right_at_most"])


def test_the_three_gradients_in_the_plane_by_finite_differences():
    exact = {
        name: np.array([float(Fraction(x)) for x in value])
        for name, value in readings_in_the_plane().items()
        if name != "all_differ"
    }
    hessian, w = np.array([1.0, 2.75]), np.array([2.4, 36 / 55])

    def unit(x):
        return hessian * x / np.linalg.norm(hessian * x)

    def at_asc(x):
        return hessian @ (x + unit(x)) ** 2 / 2

    def over_ball(x):
        angles = np.linspace(0, 2 * np.pi, 200001)
        return ((x[:, None] + np.stack([np.cos(angles), np.sin(angles)])) ** 2 * hessian[:, None]).sum(0).max() / 2

    for name, value, tolerance in (("R1", over_ball, 1e-4), ("R3", at_asc, 1e-7)):
        step = 1e-5
        slopes = [(value(w + step * e) - value(w - step * e)) / (2 * step) for e in np.eye(2)]
        assert slopes == pytest.approx(exact[name], abs=tolerance)
    assert exact["R2"] == pytest.approx(hessian * (w + unit(w)))
    assert readings_in_the_plane()["all_differ"]


def test_the_readings_agree_on_the_line():
    data = check_thm1_readings(None).data
    assert set(data["the_one_dimensional_formula_holds"].values()) == {True}
    assert len({row["left_at_least"] for row in data["sides"].values()}) == 1


def test_the_floors_on_a_loss_that_is_not_quadratic():
    """Both floors with room to spare on sum of x^2 + x^4: mu = 2, minimiser 0."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        w, rho = rng.normal(size=3), rng.uniform(0.01, 2)
        slope = 2 * w + 4 * w**3
        ascent = w + rho * slope / np.linalg.norm(slope)
        assert np.linalg.norm(2 * ascent + 4 * ascent**3) >= ascent_floor(np.linalg.norm(slope), 2, rho)
        top = w + rho * np.eye(3)[np.argmax(np.abs(w))] * np.sign(w[np.argmax(np.abs(w))])
        for _ in range(200):  # projected ascent to a maximiser over the ball
            pull = 2 * top + 4 * top**3
            top = w + rho * pull / np.linalg.norm(pull)
        assert np.linalg.norm(2 * top + 4 * top**3) >= ball_floor(np.linalg.norm(w), 2, rho) - 1e-9


def test_cauchy_schwarz_is_needed_and_the_certificate_says_what_is_left():
    remainders = ascent_certificate(lambda along, mu, rho: along + 3 * mu * rho)
    mu, rho = sp.symbols("mu rho", positive=True)
    assert remainders["gradient at the ascent point"] == -2 * mu * rho**2
    assert remainders["Cauchy-Schwarz"] == 0


def test_T0_solves_its_equation_and_agrees_with_the_first_counterexample():
    first, second, level = 0.51005 / 0.5, (2.25 + 1) * 0.5, 1.0
    T0 = float(fails_from(flint.arb(first), flint.arb(second), flint.arb(level)))
    assert (first + second * math.log(T0)) / math.sqrt(T0) == pytest.approx(level, rel=1e-12)
    assert 58 < T0 < 59  # first_violation finds 59


def test_a_mutated_floor_is_refuted_by_an_exact_quadratic():
    evidence = MUTATIONS["thm1-strongly-convex"]["twice mu rho at the ascent point"]()
    assert evidence.verdict is Verdict.REFUTED
    assert Fraction(evidence.data["least_slack"]["slack"]) < 0
    assert check_strongly_convex(None).data["least_slack"]["slack"] == "0"  # both floors are attained


def test_a_domain_turns_against_the_ascent_beyond_its_threshold():
    losses, share = [Fraction(10), Fraction(1), Fraction(1)], Fraction(1, 3)
    weights = [eq8_weight(share, x, sum(losses) / 3, Fraction(1, 10), 3) for x in losses]
    assert weights == [Fraction(-1, 15), Fraction(8, 15), Fraction(8, 15)]
    assert share * 3 / (2 * (losses[0] - 4)) == Fraction(1, 12) < Fraction(1, 10)


def test_the_weights_of_the_two_runs_by_hand():
    runs = check_lambda_remark(None).data["least_weight"]
    assert runs["apart at the start"]["first step"] == str(Fraction(1, 2) - Fraction(7, 10))  # L_1 - mean = 1
    assert runs["apart at the end"]["first step"] == "1/2"
    # towards w = -1/20, where L_1 - mean = 1 - w
    assert float(Fraction(runs["apart at the end"]["last step"])) == pytest.approx(0.5 - 0.7 * 1.05, abs=0.05)


def test_the_turning_rate_is_the_derivative_of_the_direction():
    """sin(phi)/eta tends to |P Hess L_DI v| / |grad L_DI|, which is worked out by hand for these domains."""
    planar = Planar()
    k, rho = planar.curvature, planar.rho
    limit = abs(Fraction(28, 100) * k - Fraction(56, 1000) * (1 - k * rho))
    small = turning(replace(planar, rate=Fraction(1, 10**6)), planar.lam)
    assert math.sqrt(small) == pytest.approx(float(limit), rel=1e-5)
    assert sams_turning(planar) == 0
    assert turning(planar, planar.lam) > k**2


def test_sam_keeps_its_direction_in_the_plane_for_a_hundred_steps():
    planar = Planar()
    w = np.zeros(2)
    first = np.array([0.6, 0.8])
    for t in range(1, 101):
        g = first + float(planar.curvature) * w
        assert g / np.linalg.norm(g) == pytest.approx(first, abs=1e-12)
        ascent = w + float(planar.rho) * g / np.linalg.norm(g)
        w = w - float(planar.rate) / math.sqrt(t) * (first + float(planar.curvature) * ascent)


def test_a_direction_without_a_rational_norm_is_an_error():
    with pytest.raises(ComputationError, match="not rational"):
        turning(replace(Planar(), slopes=((Fraction(2), Fraction(0)), (Fraction(0), Fraction(1)))), Fraction(0))


def test_both_arithmetics_enclose_the_same_numbers():
    for arithmetic in (BALLS, INTERVALS):
        with arithmetic.precision():
            low, high = arithmetic.ends(arithmetic.number(Fraction(1, 3)) + arithmetic.steps(2).sqrt())
        assert Decimal(low.numerator) / low.denominator == pytest.approx(Decimal(1) / 3 + Decimal(2).sqrt())
        assert 0 < high - low < Fraction(1, 10**70)
