"""The bounds' formulas against the ledger's own, against other libraries, and what each is said to be."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, kl_divergence

from disam_theory import generalization as g
from disam_theory.errors import UsageError
from proofs_checks import theorem2, theorem3

SETTINGS = [(1, 1000, 0.1, 0.0, 0.05), (2410, 1797, 0.05, 8.1, 0.05), (8192, 586575, 0.01, 0.5, 0.5)]
PLAIN = theorem3.Arithmetic(float, lambda x: math.log(float(x)), lambda x: math.exp(float(x)), math.sqrt)


@pytest.mark.parametrize(("k", "n", "delta", "norm", "rho"), SETTINGS)
def test_the_formulas_are_those_of_the_ledger(k, n, delta, norm, rho):
    f = SimpleNamespace(log=math.log, sqrt=math.sqrt)
    assert g.pac_bayes_root(k, n, delta, norm, rho, 3.0) == pytest.approx(
        theorem2.thm2_root(f, k, n, delta, norm / rho, 3.0, None), rel=1e-12
    )
    level = theorem3.level(Fraction(norm) ** 2 / Fraction(rho) ** 2)
    assert g.covering_level(norm, rho) == level
    width = math.sqrt(theorem3.covering_width2(PLAIN, k, n, level, delta))
    assert g.covering_width(k, n, delta, norm, rho) == pytest.approx(width, rel=1e-12)
    assert g.vc_term(7, n, delta) == pytest.approx(theorem3.vc_term(PLAIN, 7, n, delta), rel=1e-12)
    i = theorem3.grid_index(Fraction(rho))
    share = float(theorem3.grid_share(Fraction(i)))
    found = g.covering_width_any_radius(k, n, delta, norm, rho)
    assert found == pytest.approx(g.covering_width(k, n, delta * share, norm, 2.0**i), rel=1e-12)


def test_the_divergence_is_that_of_two_gaussians():
    k, sigma, prior = 5, 0.3, 0.7
    w = torch.linspace(-1, 2, k, dtype=torch.float64)
    eye = torch.eye(k, dtype=torch.float64)
    exact = kl_divergence(
        MultivariateNormal(w, sigma**2 * eye), MultivariateNormal(torch.zeros_like(w), prior**2 * eye)
    )
    assert g.gaussian_divergence(k, float(w.norm()), sigma, prior) == pytest.approx(float(exact), rel=1e-12)


def test_the_pac_bayes_width_pays_for_every_level_and_takes_the_best():
    k, n, delta, norm, sigma = 20, 5000, 0.05, 3.0, 0.1
    assert sum(Fraction(1, (j + 1) * (j + 2)) for j in range(g.LEVELS)) < 1
    widths = []
    for j in range(g.LEVELS):
        divergence = g.gaussian_divergence(k, norm, sigma, sigma * 2 ** (j / 2))
        price = math.log(2 * math.sqrt(n) / (delta / ((j + 1) * (j + 2))))
        widths.append(math.sqrt((divergence + price) / (2 * n)))
    assert g.pac_bayes_width(k, n, delta, norm, sigma) == pytest.approx(min(widths), rel=1e-12)
    assert 0 < widths.index(min(widths)) < g.LEVELS - 1


@pytest.mark.parametrize("n", [10, 100, 3000])
def test_hoeffdings_width_is_exceeded_with_at_most_delta(n):
    delta = 0.05
    width = g.hoeffding_width(n, delta)
    for p in (0.1, 0.5, 0.9):
        fails = stats.binom.cdf(math.ceil(n * (p - width)) - 1, n, p)
        assert fails <= delta
    half = g.hoeffding_width(n, delta) / 3  # a third of it would be too little
    assert stats.binom.cdf(math.ceil(n * (0.5 - half)) - 1, n, 0.5) > delta


AT = g.Measured(
    k=100,
    norm=1.0,
    rho=1.0,
    sigma=0.1,
    n=10**6,
    worst_error=0.02,
    random_error=0.03,
    draws=50,
    unseen={"s": (400, 0.2)},
)


def test_each_bound_is_the_sum_of_its_terms_and_says_what_is_not_known():
    found = {bound.name: bound for bound in g.bounds(AT)}
    assert [bound.of for bound in found.values()] == ["pooled"] * 4 + ["s"] * 3
    for bound in found.values():
        assert bound.right_side == pytest.approx(sum(term.value or 0 for term in bound.terms))
        assert all((term.value is None) == (term.known == g.UNKNOWN) for term in bound.terms)
        assert bound.assumes
    complete = {name for name, bound in found.items() if bound.complete}
    assert complete == {"PAC-Bayes", "test set"}
    assert found["test set"].right_side == pytest.approx(0.2 + math.sqrt(math.log(20) / 800))
    assert not any(bound.vacuous for bound in found.values())


def test_a_bound_is_called_vacuous_only_from_one_on():
    small = g.Bound("b", "pooled", (g.Term("a", 0.6), g.Term("b", 0.39, g.AT_LEAST), g.Term("c", None, g.UNKNOWN)), "")
    assert not small.vacuous
    assert not small.complete
    assert g.Bound("b", "pooled", (g.Term("a", 0.6), g.Term("b", 0.4)), "").vacuous
    many = g.Measured(**{**vars(AT), "k": 10**7, "sigma": 1e-6})
    assert {bound.name for bound in g.bounds(many) if bound.vacuous} == {
        *("Theorem 2, as printed", "covering", "covering, any radius", "PAC-Bayes"),
        *("Theorem 3, as printed", "Theorem 3, corrected"),
    }


def test_with_few_samples_the_pac_bayes_width_is_unknown():
    few = g.Measured(**{**vars(AT), "n": 6})
    width = g.pac_bayes(few, 0.05).terms[-1]
    assert (width.value, width.known) == (None, g.UNKNOWN)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: g.pac_bayes_root(0, 10, 0.1, 1.0, 0.1), "k is 0; it must be finite and at least 1"),
        (lambda: g.pac_bayes_root(1, 1, 0.1, 1.0, 0.1), "n is 1; it must be finite and at least 2"),
        (lambda: g.hoeffding_width(10, 1.0), "delta is 1.0; it must be finite and between 0 and 1"),
        (lambda: g.covering_width(1, 10, 0.1, math.inf, 0.1), "norm is inf"),
        (lambda: g.covering_level(1.0, 0.0), "rho is 0.0; it must be finite and above 0"),
        (lambda: g.pac_bayes_width(1, 7, 0.1, 1.0, 0.1), "at least 8 samples"),
    ],
)
def test_impossible_values_are_refused(call, message):
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        call()
