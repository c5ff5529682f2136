"""DISAM against SAM: wrong statements do not pass, and the witnesses are recomputed by other means."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import flint
import numpy as np
import pytest
import torch

from disam_theory.errors import ComputationError
from proofs_checks import dynamics
from proofs_checks.dynamics import (
    FINITE,
    NARROWED,
    SAM,
    WIDENED,
    Domains,
    P,
    ascent_point,
    check_ascent_finite,
    check_ascent_slope,
    check_ascent_variance,
    check_equals_sam,
    check_fixed_point,
    check_fixed_point_general,
    check_iterate_rate,
    check_iterate_variance,
    check_not_gradient,
    disam_jacobian,
    iterate_rate,
    loss_slope_rate,
    sam_objective,
    step,
    two_domains,
    variance,
    variance_slope_rate,
)


def at_least(disam, sam):
    return disam >= sam


def added(p, q, lam):
    """The ascent direction of the mean loss plus the variance."""
    return p + lam * q


def with_hessians(case, first, second):
    p, q = dynamics._p_and_q(case.domains, case.start)
    return replace(case, domains=two_domains(p, q, *([Fraction(x) for x in d] for d in (first, second))))


MUTATIONS = {
    "disam-ascent-variance": {
        "half the rate": lambda: check_ascent_variance(
            None, rate=lambda pp, pq, qq, lam: variance_slope_rate(pp, pq, qq, lam) / 2
        ),
        "the variance added, not subtracted": lambda: check_ascent_variance(None, direction=added),
        "twice the radius": lambda: check_ascent_variance(None, radius=lambda gain, lipschitz: 2 * gain / lipschitz),
    },
    "disam-ascent-finite": {
        "the reverse order": lambda: check_ascent_finite(None, ordered=at_least),
        "at a small radius only": lambda: check_ascent_finite(None, case=replace(FINITE, rho=Fraction(1, 1000))),
        "domains of one curvature": lambda: check_ascent_finite(None, case=WIDENED),
        "a witness with a saddle": lambda: check_ascent_finite(None, case=with_hessians(FINITE, (33, 1), (1, -1))),
    },
    "disam-ascent-loss": {
        "as fast as the variance": lambda: check_ascent_slope(None, of=P, rate=variance_slope_rate),
        "the reverse sign": lambda: check_ascent_slope(
            None, of=P, rate=lambda pp, pq, qq, lam: -loss_slope_rate(pp, pq, qq, lam)
        ),
    },
    "disam-iterate-variance": {
        "the reverse order": lambda: check_iterate_variance(None, ordered=at_least),
        "curved against the shift": lambda: check_iterate_variance(None, case=NARROWED),
        "with lambda 0": lambda: check_iterate_variance(None, case=replace(WIDENED, lam=SAM)),
        "a step beyond 1/L": lambda: check_iterate_variance(None, case=replace(WIDENED, eta=Fraction(3))),
    },
    "disam-iterate-rate": {
        "the reverse sign": lambda: check_iterate_rate(None, rate=lambda q, H, u, v: -iterate_rate(q, H, u, v)),
        "without the Hessian": lambda: check_iterate_rate(
            None, rate=lambda q, H, u, v: sum(a * (b - c) for a, b, c in zip(q, u, v, strict=True))
        ),
        "half of it": lambda: check_iterate_rate(None, rate=lambda q, H, u, v: iterate_rate(q, H, u, v) / 2),
        "one sign only": lambda: check_iterate_rate(None, cases=(WIDENED, with_hessians(WIDENED, (2, 2), (2, 2)))),
    },
    "disam-fixed-point": {
        "at the minimum": lambda: check_fixed_point(None, fixed=lambda rho: Fraction(0)),
        "on the other side": lambda: check_fixed_point(None, fixed=lambda rho: rho),
        "for rho 1/2": lambda: check_fixed_point(None, rho=Fraction(1, 2)),
        "for SAM": lambda: check_fixed_point(None, lam=SAM),
        "below another limit": lambda: check_fixed_point(None, largest_rho=lambda lam: 2 * lam),
    },
    "disam-fixed-point-general": {
        "up to the whole pull": lambda: check_fixed_point_general(None, limit=Fraction(9, 10)),
        "with the pull at the minimum": lambda: check_fixed_point_general(None, contraction=lambda t: t),
        "on the other side": lambda: check_fixed_point_general(None, side=1),
        "twice the step": lambda: check_fixed_point_general(
            None, largest_step=lambda kappa: 4 * (1 - kappa) / (1 + kappa) ** 2
        ),
    },
    "disam-not-a-gradient": {
        "without the projector": lambda: check_not_gradient(
            None, jacobian=lambda H, P, Hd, rho, norm: disam_jacobian(H, P**0, Hd, rho, norm)
        ),
        "for lambda 0 as well": lambda: check_not_gradient(None, case=replace(NARROWED, lam=SAM)),
        "half of SAM's objective": lambda: check_not_gradient(
            None, objective=lambda loss, norm, rho: sam_objective(loss, norm, rho / 2)
        ),
    },
    "disam-equals-sam": {
        "wherever they are parallel": lambda: check_equals_sam(None, same_side=lambda pp, pq, lam: True),
        "linear in lambda": lambda: check_equals_sam(None, turning=lambda pp, pq, qq, lam: lam * (pp * qq - pq**2)),
        "where the gradients are orthogonal": lambda: check_equals_sam(None, turning=lambda pp, pq, qq, lam: pq),
    },
}


def autograd_step(case, lam):
    """The variance at the ascent point and after the step, and the step, by automatic differentiation."""
    domains = case.domains.mapped(float)
    shares, heights, slopes, hessians = (
        torch.tensor([*x], dtype=torch.float64) if not isinstance(x, tuple) else torch.tensor(np.array(x, dtype=float))
        for x in (domains.shares, domains.heights, domains.slopes, domains.curvatures)
    )

    def losses(w):
        return heights + slopes @ w + torch.einsum("i,kij,j->k", w, hessians, w) / 2

    def spread(w):
        return losses(w).var(unbiased=False)

    w = torch.tensor([float(x) for x in case.start], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(shares @ losses(w) - float(lam) * spread(w), w)
    ascent = (w + float(case.rho) * g / g.norm()).detach().requires_grad_()
    (down,) = torch.autograd.grad(shares @ losses(ascent), ascent)
    after = w.detach() - float(case.eta) * down
    return float(spread(ascent)), float(spread(after)), after.tolist()


@pytest.mark.parametrize("case", [FINITE, WIDENED, NARROWED])
@pytest.mark.parametrize("lam", [SAM, Fraction(1, 10)])
def test_one_step_by_automatic_differentiation(case, lam):
    at_ascent, after, w = autograd_step(case, lam)
    exact = step(case.domains, case.start, lam, case.rho, case.eta)
    assert w == pytest.approx([float(x) for x in exact], abs=1e-14)
    assert after == pytest.approx(float(variance(case.domains, exact)), abs=1e-13)
    ascent = ascent_point(case.domains, case.start, lam, case.rho)
    assert at_ascent == pytest.approx(float(variance(case.domains, ascent)), abs=1e-13)


def test_the_witness_at_a_finite_radius_by_hand():
    """L_1 - L_2 = 4 + (w_2 - w_1)/2 + 16 w_1^2, at (3,4)/100 for SAM and at (4,3)/100 for DISAM."""
    by_hand = {
        name: (4 + (b - a) / 2 + 16 * a**2) ** 2 / 4
        for name, (a, b) in {
            "sam": (Fraction(3, 100), Fraction(4, 100)),
            "disam": (Fraction(4, 100), Fraction(3, 100)),
        }.items()
    }
    found = check_ascent_finite(None).data["variance_at_the_ascent_point"]
    assert {name: Fraction(value) for name, value in found.items()} == by_hand
    assert by_hand["disam"] > by_hand["sam"]


def test_the_order_at_the_ascent_point_holds_at_small_radii_and_fails_more_often_at_larger_ones():
    rows = check_ascent_finite(None).data["at_the_ascent_points_of_random_domains"]
    larger = [row["larger"] for row in rows]
    assert larger[0] == 0 < larger[1] < larger[2]
    assert all(row["not_decided"] == 0 and row["smaller"] > 100 for row in rows)


def test_the_domains_have_the_gradients_they_were_made_for():
    p, q = [Fraction(2, 7), Fraction(-1)], [Fraction(3), Fraction(1, 5)]
    domains = two_domains(p, q, (Fraction(2), Fraction(1)), (Fraction(1), Fraction(5)))
    assert dynamics._p_and_q(domains, [Fraction(0)] * 2) == (p, q)
    assert variance(domains, [Fraction(0)] * 2) == 4


def test_both_slopes_fall_and_the_variance_gains_an_order_of_lambda_more():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = rng.normal(size=(2, 5))
        D = p @ p * (q @ q) - (p @ q) ** 2

        def slopes(lam, p=p, q=q):
            g = p - lam * q
            return np.array([q @ g, p @ g]) / np.linalg.norm(g)

        lams = np.linspace(0, 3, 200)
        assert (np.diff([slopes(lam) for lam in lams], axis=0) <= 1e-12).all()
        small = 1e-4
        gain, cost = slopes(0) - slopes(small)
        assert gain == pytest.approx(small * D / np.linalg.norm(p) ** 3, rel=1e-2)
        assert cost == pytest.approx(small**2 * D / np.linalg.norm(p) ** 3 / 2, rel=1e-2)


def test_the_rate_after_a_step_in_the_limit():
    """The exact difference over eta rho tends to q^T H (u_0 - u_lambda), by hand on both witnesses."""
    for case, by_hand in ((WIDENED, Fraction(2, 5)), (NARROWED, Fraction(-3, 5))):
        tiny = replace(case, rho=Fraction(1, 10**6), eta=Fraction(1, 10**6))
        ends = [
            variance(case.domains, step(case.domains, case.start, lam, tiny.rho, tiny.eta)) for lam in (tiny.lam, SAM)
        ]
        assert float((ends[0] - ends[1]) / (tiny.rho * tiny.eta)) == pytest.approx(float(by_hand), abs=1e-4)


@pytest.mark.parametrize("start", [-20.0, -0.26, -0.2, 0.0, 0.4, 30.0])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_plain_floats_reach_the_fixed_point_at_constant_and_decreasing_steps(start, power):
    """L_DI'(w) = (1 - 2 lambda) w + 2 lambda, and the pooled loss has the slope w."""
    w = start
    for t in range(1, 3000):
        g = 0.8 * w + 0.2
        w -= 0.5 / t**power * (w + math.copysign(0.05, g))
    assert w == pytest.approx(-0.05, abs=1e-9)


def test_what_the_fixed_point_costs():
    at = check_fixed_point(None).data["fixed_point"]
    rho = Fraction(1, 20)
    assert Fraction(at["loss_above_minimum"]) == rho**2 / 2
    assert Fraction(at["variance"]) == (1 + rho) ** 2
    assert Fraction(at["variance_at_minimum"]) == 1


def test_the_general_fixed_points_are_certified_and_wider_than_the_minimum():
    data = check_fixed_point_general(None).data
    number = data["problems_that_meet_the_condition"]
    assert number >= 10
    assert number == data["certified_in_a_box"] == data["algorithm_1_arrives"]
    assert data["variance_above_that_at_the_minimum"] == number
    assert check_fixed_point_general(None, side=1).data["algorithm_1_arrives"] == 0


def numeric_field(case, lam):
    domains = case.domains.mapped(float)

    def field(w):
        ascent = ascent_point(domains, [float(x) for x in w], float(lam), float(case.rho))
        return np.array(dynamics._pooled(domains, domains.gradients(ascent)))

    return field


def test_the_jacobian_by_finite_differences():
    field, h = numeric_field(NARROWED, NARROWED.lam), 1e-5
    columns = [(field(h * e) - field(-h * e)) / (2 * h) for e in np.eye(2)]
    exact = [[float(Fraction(x)) for x in row] for row in check_not_gradient(None).data["jacobian_of_disam"]]
    np.testing.assert_allclose(np.array(columns).T, exact, atol=1e-8)
    assert exact[0][1] - exact[1][0] == pytest.approx(0.0476)


@pytest.mark.parametrize("lam", [SAM, Fraction(1, 10)])
def test_the_circulation_by_quadrature(lam):
    field = numeric_field(NARROWED, lam)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    corners = 0.1 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)])
    around = sum(
        weight / 2 * field(a + (node + 1) / 2 * (b - a)) @ (b - a)
        for a, b in pairwise(corners)
        for node, weight in zip(nodes, weights, strict=True)
    )
    assert float(dynamics._circulation(NARROWED, lam).mid()) == pytest.approx(around, abs=1e-12)


def test_an_ascent_that_goes_down_although_every_weight_is_positive():
    row = check_equals_sam(None).data["reversed"]
    assert all(Fraction(x) > 0 for x in row["beta"])
    losses = [((w - 1) ** 2 / 2 + (w + 1) ** 2 / 2 + 2) / 2 for w in (Fraction(row["w"]), Fraction(row["w_asc"]))]
    assert losses == [Fraction(row["loss_at_w"]), Fraction(row["loss_at_w_asc"])]
    assert losses[1] < losses[0]


def test_a_length_that_is_not_rational_is_an_error():
    domains = Domains([Fraction(1)], [Fraction(0)], ([Fraction(1), Fraction(1)],), (([Fraction(0)] * 2,) * 2,))
    for slopes, shown in (([1, 1], "root of 2,"), ([0, 0], "root of 0,")):
        with pytest.raises(ComputationError, match=shown):
            ascent_point(replace(domains, slopes=([Fraction(x) for x in slopes],)), dynamics.ORIGIN, SAM, Fraction(1))


def test_paths_that_disagree_are_an_error(monkeypatch):
    monkeypatch.setattr(dynamics, "variance", lambda domains, w: Fraction(1))
    with pytest.raises(ComputationError, match="disagree about the step"):
        check_iterate_variance(None)


def test_a_derivative_that_only_symbols_accept_is_an_error(monkeypatch):
    monkeypatch.setattr(dynamics, "to_ball", lambda x: flint.arb(float(x) + 0.5))
    with pytest.raises(ComputationError, match="ball arithmetic does not"):
        check_ascent_slope(
            None, rate=lambda *args: variance_slope_rate(*args) * (2 if isinstance(args[0], flint.arb) else 1)
        )
