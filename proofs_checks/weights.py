r"""Sharpness, the weights of Eq. 5 and 8, Algorithm 1 and Table 4 -> what holds of them, and where each one ends.

The identities of Eq. 3, 5, 6 and 8 are in :mod:`proofs_checks.method`; here is what the paper says *about* them. Most
instances are losses of one parameter that are quadratic with rational coefficients, $au^2+bu+c$: maxima over an
interval, gradients and whole steps of Algorithm 1 are then exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import combinations, permutations, product
from typing import Any

import flint
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.errors import ComputationError
from proofs_checks.enclosures import to_ball
from proofs_checks.exact import (
    M,
    decide_identity,
    derivative,
    dot,
    double_total,
    exact_strings,
    instances,
    moment,
    total,
)
from proofs_checks.method import (
    ALL_M,
    ALPHA,
    LAM,
    LOSS,
    OTHER,
    check_eq3,
    eq3_summand,
    eq5_left,
    eq6_summand,
    eq8_weight,
)
from proofs_checks.quadratics import Quadratic, quadratic, slope_at, spread, value_at

Number = Any  # a sympy expression or a Fraction
Checks = Iterator[tuple[dict[str, Any], Fraction]]
Vector = tuple[Fraction, ...]

MEAN = moment(0, 1) / M


def _mean(losses: Sequence[Quadratic]) -> Quadratic:
    a, b, c = (sum(column, Fraction(0)) / len(losses) for column in zip(*losses, strict=True))
    return a, b, c


@dataclass(frozen=True)
class Pool:
    r"""Domains of samples with quadratic losses, the point $w$ and the radius $\rho$."""

    domains: tuple[tuple[Quadratic, ...], ...]
    w: Fraction
    rho: Fraction

    @property
    def samples(self) -> list[Quadratic]:
        return [loss for domain in self.domains for loss in domain]

    @property
    def shares(self) -> list[Fraction]:
        return [Fraction(len(domain), len(self.samples)) for domain in self.domains]

    def extremes(self, loss: Quadratic) -> list[Fraction]:
        """Where ``loss`` can have its maximum over the ball, and the centre."""
        ends = [self.w - self.rho, self.w, self.w + self.rho]
        vertex = -loss[1] / (2 * loss[0]) if loss[0] else self.w
        return [*ends, vertex] if abs(vertex - self.w) <= self.rho else ends

    def maximum(self, loss: Quadratic) -> Fraction:
        return max(value_at(loss, u) for u in self.extremes(loss))

    def to_data(self) -> dict[str, Any]:
        losses = [[[str(x) for x in loss] for loss in domain] for domain in self.domains]
        return {"w": str(self.w), "rho": str(self.rho), "losses_a_b_c": str(losses)}


def _pools(count: int = 60) -> Iterator[Pool]:
    """Pools drawn with a fixed seed: two to four domains of one to three samples each, convex and concave losses."""
    rng = random.Random(1)
    for index in range(count):
        domains = tuple(
            tuple(quadratic(*(Fraction(rng.randint(-9, 9), rng.randint(1, 5)) for _ in range(3))) for _ in range(size))
            for size in (rng.randint(1, 3) for _ in range(2 + index % 3))
        )
        yield Pool(domains, Fraction(rng.randint(-9, 9), 4), Fraction(rng.randint(1, 9), 5))


def eq1_difference(perturbed: Number, plain: Number) -> Number:
    r"""$L(w+\epsilon;\xi)-L(w;\xi)$, whose mean over the data is maximised."""
    return perturbed - plain


def check_eq1(study: object, *, difference: Callable[..., Number] = eq1_difference) -> Evidence:
    r"""What the maximisation of ``difference`` leaves out of $L(w+\epsilon)$: is it $L(w)$, free of $\epsilon$?

    Then both maxima are attained at the same $\epsilon$ and differ by $L(w)$; at $\epsilon=0$ the difference is 0.
    """
    perturbed, plain = sp.symbols("L_eps L_w", real=True)
    sharpness = []

    def checks() -> Checks:
        for pool in _pools():
            loss = _mean(pool.samples)
            here = value_at(loss, pool.w)
            sharpness.append(max(difference(value_at(loss, u), here) for u in pool.extremes(loss)))
            yield pool.to_data(), pool.maximum(loss) - here - sharpness[-1]

    evidence = decide_identity(perturbed - difference(perturbed, plain) - plain, checks())
    if evidence.verdict is Verdict.PROVED and min(sharpness) < 0:
        raise ComputationError(f"the identity is proved, and an instance has the sharpness {min(sharpness)}")
    evidence.data["least_sharpness"] = str(min(sharpness))
    return evidence


def eq2_bound(share: Number, sharpness: Number, number: Number) -> Number:
    r"""$\alpha_is(w,D_i)$, the term of domain $i$ in the bound of $s(w,\mathcal S)$."""
    return share * sharpness


def check_eq2(study: object, *, bound: Callable[..., Number] = eq2_bound) -> Evidence:
    r"""Is the pooled sharpness at most the sum of ``bound`` over the domains?

    At a maximiser $\epsilon^*$ of the pooled loss domain $i$ gains $d_i=s(w,D_i)-x_i$ with $x_i\geq0$, and
    $s(w,\mathcal S)=\sum_i\alpha_id_i$: it suffices that every term of the bound exceeds $\alpha_id_i$.
    """
    share = sp.Symbol("alpha_i", positive=True)
    gain, shortfall = sp.Symbol("d_i", real=True), sp.Symbol("x_i", nonnegative=True)
    slack = sp.expand(bound(share, gain + shortfall, M) - share * gain)
    slacks = []
    for pool in _pools():
        means = [_mean(domain) for domain in pool.domains]
        domains = [pool.maximum(loss) - value_at(loss, pool.w) for loss in means]
        pooled = _mean(pool.samples)
        terms = [bound(share, s, len(means)) for share, s in zip(pool.shares, domains, strict=True)]
        slacks.append((sum(terms) - (pool.maximum(pooled) - value_at(pooled, pool.w)), pool))
    least, worst = min(slacks, key=lambda row: row[0])
    opposed = Pool(((quadratic(0, 1, 1),), (quadratic(0, -1, 1),)), Fraction(0), Fraction(1))
    data = {
        "slack_of_domain_i": f"${sp.latex(slack)}$",
        "rational_instances": len(slacks),
        "least_slack": str(least),
        "a_flat_pool_of_sharp_domains": {
            "losses": "1+w and 1-w at w=0, rho=1",
            "pooled_sharpness": str(opposed.maximum(_mean(opposed.samples)) - 1),
            "domain_sharpness": [str(opposed.maximum(loss) - 1) for loss in opposed.samples],
        },
    }
    if slack.is_nonnegative and least < 0:
        raise ComputationError(f"the slack is proved non-negative, and an instance has {least}")
    if slack.is_nonnegative:
        reason = "each domain gains at most its own sharpness at the pooled maximiser, so the weighted sum bounds it"
        return Evidence(Verdict.PROVED, f"{reason}; {len(slacks)} exact instances agree", data)
    if least < 0:
        return Evidence(Verdict.REFUTED, f"an exact instance exceeds the bound by {-least}", data | worst.to_data())
    return Evidence(Verdict.UNDECIDED, "the slack is not certain to be non-negative; no instance violates it", data)


def check_eq4(study: object, *, summand: Callable[..., Number] = eq3_summand) -> Evidence:
    r"""Can $\max_\epsilon E_{\xi\in\mathcal S}[L(w+\epsilon;\xi)]$ differ from the maximum of the sum of ``summand``?

    By Eq. 3 at the point $w+\epsilon$ the two functions of $\epsilon$ are one; the instances compare their maxima.
    """
    identity = check_eq3(study, summand=summand)
    gaps = []
    for pool in _pools():
        number = len(pool.samples)
        weights = [summand(Fraction(len(domain)), Fraction(1), number) for domain in pool.domains]
        means = [_mean(domain) for domain in pool.domains]
        a, b, c = (dot(weights, column) for column in zip(*means, strict=True))
        gaps.append(pool.maximum(_mean(pool.samples)) - pool.maximum((a, b, c)))
    data = {"equation_3": identity.verdict.value, "rational_instances": len(gaps)}
    data["largest_difference_of_the_maxima"] = str(max(map(abs, gaps)))
    same = identity.verdict is Verdict.PROVED
    if same and any(gaps):
        raise ComputationError("the two functions are one by Eq. 3, and their maxima differ on an instance")
    if same:
        reason = "by Eq. 3 at $w+\\epsilon$ both are the same function of $\\epsilon$, however the domains shift"
        return Evidence(Verdict.REFUTED, f"{reason}; {len(gaps)} exact pairs of maxima agree", data)
    if any(gaps):
        return Evidence(Verdict.PROVED, f"the maxima differ by up to {max(map(abs, gaps))} on an exact instance", data)
    return Evidence(Verdict.UNDECIDED, "Eq. 3 is not proved, and no instance shows a difference", data)


def by_gradient_norm(share: Number, norm: Number, projection: Number) -> Number:
    r"""$\lVert\nabla L_i\rVert$: the ascent is said to go to the domain where this is largest."""
    return norm


def check_eq4_bias(study: object, *, ranking: Callable[..., Number] = by_gradient_norm) -> Evidence:
    r"""Is the angle between $\sum_i\alpha_i\nabla L_i$ and $\nabla L_i$ smallest where ``ranking`` is largest?

    For two domains of equal share, with $x=1-\cos\angle(\nabla L_1,\nabla L_2)>0$: the difference of the projections
    $\langle\nabla L,\nabla L_i\rangle/\lVert\nabla L_i\rVert$ over the difference of the ranks must be positive.
    """
    n1, n2, a1, a2, x = sp.symbols("n_1 n_2 alpha_1 alpha_2 x", positive=True)
    projections = (a1 * n1 + a2 * n2 * (1 - x), a2 * n2 + a1 * n1 * (1 - x))
    change = projections[0] - projections[1]
    ranks = [ranking(a, n, p) for a, n, p in zip((a1, a2), (n1, n2), projections, strict=True)]
    quotient = sp.simplify((change / (ranks[0] - ranks[1])).subs(a2, a1))
    two_equal = [_follows(case, ranking) for case in _pythagorean_pairs()]
    others = {
        "shares 1/4 and 3/4": (((3, 0), (0, 2)), (Fraction(1, 4), Fraction(3, 4))),
        "three equal shares": (((0, -6), (3, 4), (4, 3)), (Fraction(1, 3),) * 3),
    }
    outside = {name: _follows(case, ranking) for name, case in others.items()}
    data = {
        "quotient_for_two_equal_shares": f"${sp.latex(quotient)}$",
        "quotient_for_two_shares_by_share_times_length": f"${sp.latex(sp.simplify(change / (a1 * n1 - a2 * n2)))}$",
        "rational_instances": len(two_equal),
        "follows_outside_the_condition": outside,
        "witnesses": {name: str(case[0]) for name, case in others.items()},
    }
    if quotient.is_positive and not all(two_equal):
        raise ComputationError("the symbols give the order for two equal shares, and an instance contradicts them")
    if quotient.is_positive and all(outside.values()):
        return Evidence(Verdict.PROVED, "the order is right with any shares and numbers of domains tried", data)
    if quotient.is_positive:
        where = " and with ".join(name for name, right in outside.items() if not right)
        reason = f"it holds for two domains of equal share, and fails with {where}: the sum follows shares and company"
        return Evidence(Verdict.CONDITIONAL, reason, data)
    if not all(two_equal):
        return Evidence(Verdict.REFUTED, "the order is wrong even for two domains of equal share", data)
    return Evidence(Verdict.UNDECIDED, "the order for two equal shares is not certain", data)


Gradients = tuple[tuple[tuple[int, int], ...], tuple[Fraction, ...]]  # plane vectors of integer length, and shares


def _follows(case: Gradients, ranking: Callable[..., Number]) -> bool:
    """Does the domain with the largest rank have the largest projection of the pooled gradient?"""
    vectors, shares = case
    pooled = [dot(shares, column) for column in zip(*vectors, strict=True)]
    norms = [sp.sqrt(dot(v, v)) for v in vectors]
    projections = [Fraction(dot(pooled, v), int(n)) for v, n in zip(vectors, norms, strict=True)]
    ranks = [ranking(a, Fraction(int(n)), p) for a, n, p in zip(shares, norms, projections, strict=True)]
    return projections[ranks.index(max(ranks))] == max(projections)


def _pythagorean_pairs() -> Iterator[Gradients]:
    """Pairs of vectors that are no multiples of one another and have different whole lengths."""
    legs = [(3, 4), (5, 12), (8, 15), (1, 0), (0, 2), (-3, 4), (-4, -3), (12, -5), (0, -7), (-20, 21)]
    for first, second in permutations(legs, 2):
        parallel = first[0] * second[1] == first[1] * second[0]
        if not parallel and dot(first, first) != dot(second, second):
            yield (first, second), (Fraction(1, 2), Fraction(1, 2))


def check_eq5_denominator(study: object, *, weight: Callable[..., Number] = eq5_left) -> Evidence:
    r"""Of two domains with equal share, has the one with the larger $C_i$ the larger weight of Eq. 5?

    With $x=1+\beta\sum_jC_j$ as a symbol the difference of two weights over $C_i-C_k$ must be positive for $x>0$.
    """
    c, other, x = sp.symbols("C_i C_k x", real=True)
    beta = sp.Symbol("beta", positive=True)
    sum_c = (x - 1) / beta
    rates = sp.simplify((weight(ALPHA, c, beta, sum_c) - weight(ALPHA, other, beta, sum_c)) / (c - other))
    inside = bool(rates.subs(x, sp.Symbol("x", positive=True)).is_positive)
    outside = bool(rates.subs(x, sp.Symbol("x", negative=True)).is_positive)
    kept: dict[str, list[bool]] = {"below": [], "above": []}
    for case in instances():
        degrees = [-loss for loss in case.losses]
        if len(set(degrees)) > 1:
            pole = -1 / sum(degrees, Fraction(0))
            kept["below"].append(_keeps_order(degrees, pole / 2, weight))
            kept["above"].append(_keeps_order(degrees, pole * 2, weight))
    witness = [weight(Fraction(1, 2), Fraction(d), Fraction(1, 2), Fraction(-3)) for d in (-1, -2)]
    try:
        at_pole = str(weight(Fraction(1, 2), Fraction(-1), Fraction(1, 3), Fraction(-3)))
    except ZeroDivisionError:
        at_pole = "undefined"
    data = {
        "rate": f"${sp.latex(rates)}$ with $x=1+\\beta\\sum_jC_j$",
        "instances_below_and_above_the_pole": [len(kept["below"]), len(kept["above"])],
        "order_kept_below_and_above": [sum(kept["below"]), sum(kept["above"])],
        "witness": {"alpha": "1/2, 1/2", "L": "1, 2", "L_star": "0, 0", "beta": "1/2"}
        | exact_strings({"weights": witness, "first_weight_at_beta_1/3": at_pole}),
    }
    if (inside, outside) != (all(kept["below"]), all(kept["above"])):
        raise ComputationError("the sign of the rate and the exact instances disagree")
    if not inside:
        return Evidence(Verdict.REFUTED, "the order is wrong below the pole too", data)
    if outside:
        return Evidence(Verdict.PROVED, "the order is kept whatever $\\beta>0$ is", data)
    reason = (
        "it holds for $\\beta<1/\\sum_j(L_j-L_j^*)$; there the denominator vanishes, and beyond the order is reversed: "
        f"for $C=(-1,-2)$, $\\beta=1/2$ the weights are {witness[0]} and {witness[1]}"
    )
    return Evidence(Verdict.CONDITIONAL, reason, data)


def _keeps_order(degrees: list[Fraction], beta: Fraction, weight: Callable[..., Number]) -> bool:
    share = Fraction(1, len(degrees))
    weights = [weight(share, c, beta, sum(degrees)) for c in degrees]
    pairs = list(zip(degrees, weights, strict=True))
    return all(u > v for c, u in pairs for d, v in pairs if c > d)


def arrow_printed(loss: Number, minimum: Number, mean_loss: Number, mean_minimum: Number) -> Number:
    r"""$L_i-\frac1M\sum_jL_j$."""
    return loss - mean_loss


def arrow_repaired(loss: Number, minimum: Number, mean_loss: Number, mean_minimum: Number) -> Number:
    r"""$-\big(L_i-\frac1M\sum_jL_j\big)+\big(L_i^*-\frac1M\sum_jL_j^*\big)$."""
    return mean_loss - loss + minimum - mean_minimum


def check_eq5_arrow(
    study: object, *, replaced: Callable[..., Number] = arrow_printed, equal_minima: bool = False
) -> Evidence:
    r"""$C_i-\frac1M\sum_jC_j$ against what replaces it, whose sign may be turned: Eq. 8 subtracts it."""
    loss, mean_loss, minimum, mean_minimum = sp.symbols("L_i Lbar L_i^* Lbar^*", real=True)
    if equal_minima:
        mean_minimum = minimum
    degree = (minimum - loss) - (mean_minimum - mean_loss)

    def checks(sign: int) -> Checks:
        for case in instances():
            shrink = 0 if equal_minima else 1
            minima = [shrink * x * Fraction(1 + i, 9) for i, x in enumerate(case.losses)]
            means = [sum(v, Fraction(0)) / len(minima) for v in (case.losses, minima)]
            for x, star in zip(case.losses, minima, strict=True):
                difference = star - x - (means[1] - means[0]) - sign * replaced(x, star, means[0], means[1])
                yield {"L": case.losses, "L_star": minima, "L_i": x}, difference

    tried = {
        sign: decide_identity(degree - sign * replaced(loss, minimum, mean_loss, mean_minimum), checks(sign))
        for sign in (1, -1)
    }
    for evidence in tried.values():
        if evidence.verdict is Verdict.PROVED:
            return evidence
    losses, minima = (Fraction(1), Fraction(1, 2)), (Fraction(1), Fraction(0))
    weights = [eq8_weight(Fraction(1, 2), x, sum(losses) / 2, Fraction(1, 10), 2) for x in losses]
    data = tried[-1].data | {
        "converged_and_weighted_down": {"lambda": "1/10", "alpha": "1/2, 1/2"}
        | exact_strings({"L": losses, "L_star": minima, "beta": weights}),
    }
    if any(evidence.verdict is not Verdict.REFUTED for evidence in tried.values()):
        return Evidence(Verdict.UNDECIDED, "neither sign is proved, and no instance refutes both", data)
    reason = (
        "the sign turns, which Eq. 8 makes good, and $L_i^*$ is lost: with $L=(1,1/2)$, $L^*=(1,0)$ the first domain "
        f"is at its minimum, and Eq. 8 lowers its weight to {weights[0]} and raises the other's to {weights[1]}"
    )
    return Evidence(Verdict.REFUTED, reason, data)


def eq7_objective(pooled: Number, held: Number, live: Number, lam: Number) -> Number:
    r"""$L(w+\epsilon)-\lambda\mathrm{Var}\{L_i(\hat w+\epsilon)\}$; ``live`` is the variance at $w+\epsilon$."""
    return pooled - lam * held


def check_eq7(
    study: object, *, objective: Callable[..., Number] = eq7_objective, weight: Callable[..., Number] = eq8_weight
) -> Evidence:
    r"""Coefficients of $\nabla L_i$: $\alpha_i$ in $\partial_w$, those of Eq. 8 in $\partial_\epsilon$ at 0.

    The chain rule takes $\partial/\partial L_i$ of each part; $\partial_w$ sees no ``held`` part.
    The instances differentiate polynomials in $w$, $\hat w$ and $\epsilon$ apart.
    """
    evidence = [
        decide_identity(difference, _eq7_instances(objective, weight, side))
        for side, difference in zip(("w", "epsilon"), eq7_differences(objective, weight), strict=True)
    ]
    data = {"gradient_in_w": evidence[0].data, "gradient_in_epsilon": evidence[1].data}
    if all(e.verdict is Verdict.PROVED for e in evidence):
        reason = "the held variance adds nothing to the gradient in $w$, and in $\\epsilon$ at 0 the gradient is Eq. 8"
        return Evidence(Verdict.PROVED, f"{reason}, for symbolic $M$ and on exact polynomials", data)
    weakest = next(e for e in evidence if e.verdict is not Verdict.PROVED)
    return Evidence(weakest.verdict, weakest.reason, data)


def eq7_differences(objective: Callable[..., Number], weight: Callable[..., Number]) -> tuple[sp.Expr, sp.Expr]:
    parts = sp.symbols("P V_held V_live")
    outer = [sp.diff(objective(*parts, LAM), part) for part in parts]
    spread = double_total(eq6_summand(LOSS, OTHER), LOSS, OTHER) / M**2
    inner = [derivative(part, ALPHA, LOSS) for part in (total(ALPHA * LOSS, ALPHA, LOSS), spread, spread)]
    in_w = outer[0] * inner[0] + outer[2] * inner[2] - ALPHA
    return sp.simplify(in_w), sp.simplify(dot(outer, inner) - weight(ALPHA, LOSS, MEAN, LAM, M))


def _eq7_instances(objective: Callable[..., Number], weight: Callable[..., Number], side: str) -> Checks:
    w, held_w, epsilon = sp.symbols("w what epsilon")
    for pool in _pools(8):
        losses = [_mean(domain) for domain in pool.domains]
        alpha = [sp.Rational(a.numerator, a.denominator) for a in pool.shares]
        lam, point = sp.Rational(1, 7), sp.Rational(pool.w.numerator, pool.w.denominator)

        def at(u: sp.Expr, losses: list[Quadratic] = losses) -> list[sp.Expr]:
            return [
                sp.sympify(sum(sp.Rational(str(x)) * u**p for x, p in zip(q, (2, 1, 0), strict=True))) for q in losses
            ]

        live, held = at(w + epsilon), at(held_w + epsilon)
        value = objective(dot(alpha, live), spread(held), spread(live), lam)
        shift = sp.Rational(str(pool.rho)) if side == "w" else 0
        gradient = sp.diff(value, w if side == "w" else epsilon).subs({w: point, held_w: point, epsilon: shift})
        here = [x.subs({w: point, epsilon: shift}) for x in live]
        slopes = [sp.diff(x, w).subs({w: point, epsilon: shift}) for x in live]
        mean = sum(here) / len(here)
        rule = alpha if side == "w" else [weight(a, x, mean, lam, len(here)) for a, x in zip(alpha, here, strict=True)]
        yield pool.to_data(), Fraction(str(sp.nsimplify(gradient - dot(rule, slopes))))


def sign_threshold(alpha: Number, lam: Number, number: Number) -> Number:
    r"""$\frac{\alpha_iM}{2\lambda}$: the weight is negative where $L_i-\bar L$ exceeds it."""
    return alpha * number / (2 * lam)


def sign_bound(alpha: Number, ceiling: Number, number: Number) -> Number:
    r"""$\frac{\alpha_{\min}M^2}{2(M-1)B}$: up to this $\lambda$ no weight is negative on $[0,B]^M$."""
    return alpha * number**2 / (2 * (number - 1) * ceiling)


@dataclass(frozen=True)
class DataSet:
    """Classes, domains and images as the paper gives them; images per domain where those known sum to the total."""

    classes: int
    domains: int
    images: int
    per_domain: tuple[int, ...] = ()


DATA_SETS = {
    "PACS": DataSet(7, 4, 9991, (2048, 2344, 1670, 3929)),
    "VLCS": DataSet(5, 4, 10729, (1415, 2656, 3376, 3282)),
    "OfficeHome": DataSet(65, 4, 15588, (2427, 4365, 4439, 4357)),
    "TerraIncognita": DataSet(10, 4, 24788),
    "DomainNet": DataSet(345, 6, 586575, (48129, 51605, 72266, 172500, 172947, 69128)),
}
LAMBDAS = (Fraction(1, 10), Fraction(1, 5), Fraction(1, 2), Fraction(7, 10))


def check_eq8_sign(
    study: object,
    *,
    weight: Callable[..., Number] = eq8_weight,
    threshold: Callable[..., Number] = sign_threshold,
    bound: Callable[..., Number] = sign_bound,
) -> Evidence:
    r"""Are all weights non-negative on $[0,B]^M$ for $\lambda$ at the bound, and is one negative just above it?

    Symbols: $\beta_i$ is a positive multiple of the threshold less $L_i-\bar L$, and on $[0,B]^M$ that gap is at most
    $(M-1)B/M$, attained at $L_i=B$ and 0 elsewhere. Instances: the weights are affine in the losses, so
    their least value over the cube is at one of its corners.
    """
    certain = _sign_certificates(weight, threshold, bound)
    at, above = [], []
    for case in instances(24):
        ceiling = max(case.losses) + 1
        largest = bound(min(case.shares), ceiling, len(case.shares))
        at.append(_least_weight(case.shares, ceiling, largest, weight))
        above.append(_least_weight(case.shares, ceiling, largest * Fraction(101, 100), weight))
    early = _early_weights(weight)
    data = {
        "certificates": certain,
        "least_weight_at_the_bound": str(min(at)),
        "cubes_with_a_negative_weight_1_percent_above": f"{sum(w < 0 for w in above)} of {len(above)}",
        "examples": early,
        "data_sets": {name: _sign_table(data_set, threshold, bound) for name, data_set in DATA_SETS.items()},
    }
    if min(at) < 0:
        return Evidence(Verdict.REFUTED, f"at the bound a weight is {min(at)}: the condition does not suffice", data)
    if not all(w < 0 for w in above):
        return Evidence(Verdict.UNDECIDED, "no weight turns negative just above the bound: it is not necessary", data)
    if not all(certain.values()):
        raise ComputationError(f"the corners of every cube agree with the bound, and the symbols do not: {certain}")
    reason = (
        r"$\beta_i<0$ iff $L_i-\bar L>\alpha_iM/2\lambda$, so for losses in $[0,B]$ no weight is negative iff "
        r"$\lambda\leq\alpha_{\min}M^2/(2(M-1)B)$; with losses $5/2,1,1$ and $\lambda=0.7$ the first weight is "
        f"{early[1]['beta'][0]}"
    )
    return Evidence(Verdict.CONDITIONAL, reason, data)


def _sign_certificates(
    weight: Callable[..., Number], threshold: Callable[..., Number], bound: Callable[..., Number]
) -> dict[str, bool]:
    mean, gap = sp.symbols("Lbar x", real=True)
    lam, alpha, ceiling, others = sp.symbols("lambda alpha B m", positive=True)
    below, rest = sp.symbols("u r", nonnegative=True)
    number = others + 1  # M - 1 = m domains besides i
    sign = weight(ALPHA, mean + gap, mean, LAM, M) - 2 * LAM / M * (threshold(ALPHA, LAM, M) - gap)
    own = ceiling - below  # L_i in [0, B], and the other losses sum to r >= 0
    shortfall = others * ceiling / number - (own - (own + rest) / number)
    corner = weight(alpha, ceiling, ceiling / number, lam, number)
    return {
        "negative iff the gap exceeds the threshold": sp.simplify(sign) == 0,
        "no gap above (M-1)B/M": bool(sp.factor(sp.simplify(shortfall)).is_nonnegative),
        "zero at the bound in the corner": sp.simplify(corner.subs(lam, bound(alpha, ceiling, number))) == 0,
        "falls with lambda there": bool(sp.simplify(sp.diff(corner, lam)).is_negative),
    }


def _least_weight(
    shares: Sequence[Fraction], ceiling: Fraction, lam: Fraction, weight: Callable[..., Number]
) -> Fraction:
    number = len(shares)
    return min(
        weight(alpha, loss, sum(corner) / Fraction(number), lam, number)
        for corner in product((Fraction(0), ceiling), repeat=number)
        for alpha, loss in zip(shares, corner, strict=True)
    )


def _early_weights(weight: Callable[..., Number]) -> list[dict[str, Any]]:
    rows = []
    for first, lam in ((Fraction(10), Fraction(1, 10)), (Fraction(5, 2), Fraction(7, 10))):
        losses = (first, Fraction(1), Fraction(1))
        weights = [weight(Fraction(1, 3), x, sum(losses, Fraction(0)) / 3, lam, 3) for x in losses]
        rows.append(exact_strings({"losses": losses, "lambda": lam, "beta": weights}))
    return rows


def _sign_table(data_set: DataSet, threshold: Callable[..., Number], bound: Callable[..., Number]) -> dict[str, Any]:
    """One data set with each domain left out in turn, at losses up to that of a uniform guess, the log of the
    number of classes; the comparison of each lambda with the bound is certified in ball arithmetic."""
    if data_set.per_domain and sum(data_set.per_domain) != data_set.images:
        raise ComputationError(f"the images per domain {data_set.per_domain} do not sum to {data_set.images}")
    number = data_set.domains - 1
    smallest = {"balanced": Fraction(1, number)}
    if data_set.per_domain:
        smallest["pooled"] = min(Fraction(min(rest), sum(rest)) for rest in combinations(data_set.per_domain, number))
    table: dict[str, Any] = {"M": number, "B": f"log({data_set.classes})"}
    for shares, alpha in smallest.items():
        ceiling = flint.arb(data_set.classes).log()
        largest = bound(to_ball(alpha), ceiling, number)
        rows = []
        for lam in LAMBDAS:
            ball = to_ball(lam)
            if ball.overlaps(largest):
                raise ComputationError(f"lambda={lam} and the bound {largest} cannot be told apart")
            gap = threshold(alpha, lam, number)
            rows.append({"lambda": str(lam), "non_negative": bool(ball < largest), "gap_in_nats": str(gap)})
        table[shares] = {"alpha_min": str(alpha), "largest_lambda": largest.str(5, radius=False), "by_lambda": rows}
    return table


@dataclass(frozen=True)
class AscentCase:
    r"""Two domains of equal share with quadratic losses, at $w=0$."""

    losses: tuple[Quadratic, Quadratic] = (quadratic(1, 3, 4), quadratic(1, -2, 1))
    lam: Fraction = Fraction(1, 10)
    rho: Fraction = Fraction(1, 20)


def check_eq8_ascent(study: object, *, case: AscentCase = AscentCase()) -> Evidence:
    r"""Is $\langle\nabla L,\sum_i\beta_i\nabla L_i\rangle<0$ with all $\beta_i>0$? The second path differentiates
    $L-\lambda\mathrm{Var}\{L_i\}$ as a polynomial."""
    zero, half = Fraction(0), Fraction(1, 2)
    values = [value_at(loss, zero) for loss in case.losses]
    slopes = [slope_at(loss, zero) for loss in case.losses]
    weights = [eq8_weight(half, x, sum(values) / 2, case.lam, 2) for x in values]
    p, g = sum(slopes) / 2, dot(weights, slopes)
    u = sp.Symbol("u")
    polynomials = [a * u**2 + b * u + c for a, b, c in case.losses]
    inspired = sum(polynomials) / 2 - case.lam * spread(polynomials)
    if sp.diff(inspired, u).subs(u, 0) != sp.Rational(g.numerator, g.denominator):
        raise ComputationError("the weights' sum and the derivative of the polynomial disagree")
    pooled = _mean(case.losses)
    step = case.rho * (1 if g > 0 else -1)
    assumptions = {
        "losses non-negative everywhere": all(a > 0 and b**2 <= 4 * a * c for a, b, c in case.losses),
        "all weights positive": min(weights) > 0,
        "lambda and rho positive": case.lam > 0 and case.rho > 0,
        "the gradients are not zero": p != 0 and g != 0,
    }
    data = exact_strings({"losses": values, "gradients": slopes, "beta": weights, "grad_L": p, "grad_L_DI": g}) | {
        "loss_at_w_and_at_the_ascent_point": [str(value_at(pooled, zero)), str(value_at(pooled, step))],
        "assumptions_checked": assumptions,
    }
    failed = [name for name, holds in assumptions.items() if not holds]
    if failed:
        return Evidence(Verdict.UNDECIDED, f"not a counterexample, as this fails on it: {'; '.join(failed)}", data)
    if p * g >= 0:
        return Evidence(Verdict.UNDECIDED, "the direction ascends on this instance", data)
    reason = (
        f"with the positive weights {weights[0]} and {weights[1]} the slope of $L$ is {p} and that of $L_{{DI}}$ {g}: "
        f"the step of length {case.rho} takes the loss from {data['loss_at_w_and_at_the_ascent_point'][0]} "
        f"down to {data['loss_at_w_and_at_the_ascent_point'][1]}"
    )
    return Evidence(Verdict.REFUTED, reason, data)


def ascent_excess(squared: Number, inner: Number, lam: Number) -> Number:
    r"""$\lVert\nabla L\rVert^2-\lambda\langle\nabla L,\nabla\mathrm{Var}\rangle$."""
    return squared - lam * inner


def check_eq8_ascent_condition(study: object, *, excess: Callable[..., Number] = ascent_excess) -> Evidence:
    r"""$\langle\nabla L,\sum_i\beta_i\nabla L_i\rangle$ against ``excess``, term by term in the domains.

    With $t_i=\langle\nabla L,\nabla L_i\rangle$: $\lVert\nabla L\rVert^2=\sum_i\alpha_it_i$, and
    $\langle\nabla L,\nabla\mathrm{Var}\rangle=\sum_i\frac2M(L_i-\bar L)t_i$ by the chain rule. The instances take
    $\nabla\mathrm{Var}$ along one direction by central differences, exact for a quadratic.
    """
    t = sp.Symbol("t_i", real=True)
    slope = derivative(double_total(eq6_summand(LOSS, OTHER), LOSS, OTHER) / M**2, ALPHA, LOSS)
    difference = eq8_weight(ALPHA, LOSS, MEAN, LAM, M) * t - excess(ALPHA * t, slope * t, LAM)
    signs = set()

    def checks() -> Checks:
        for case in instances():
            number, lam = len(case.losses), 20 * case.coefficient
            mean = sum(case.losses, Fraction(0)) / number
            p = dot(case.shares, case.gradients)
            ends = [[x + h * g for x, g in zip(case.losses, case.gradients, strict=True)] for h in (1, -1)]
            q = (spread(ends[0]) - spread(ends[1])) / 2
            weights = [eq8_weight(a, x, mean, lam, number) for a, x in zip(case.shares, case.losses, strict=True)]
            product_ = p * dot(weights, case.gradients)
            signs.add(product_ > 0)
            values = {"alpha": case.shares, "L": case.losses, "gradients": case.gradients, "lambda": lam}
            yield values, product_ - excess(p * p, p * q, lam)

    evidence = decide_identity(difference, checks())
    evidence.data["instances_on_both_sides"] = signs == {True, False}
    return evidence


def unbiased(number: Number, sum_of_variances: Number) -> Number:
    """No bias."""
    return 0 * sum_of_variances


def minibatch_bias(number: Number, sum_of_variances: Number) -> Number:
    r"""$\frac{M-1}{M^2}\sum_iv_i$, with $v_i$ the variance of the mean loss of domain $i$'s batch."""
    return (number - 1) / number**2 * sum_of_variances


def check_eq8_minibatch(
    study: object, *, bias: Callable[..., Number] = unbiased, whole_domains: bool = False
) -> Evidence:
    r"""$E[\mathrm{Var}\{\hat L_i\}]-\mathrm{Var}\{L_i\}$ against ``bias``, for symbolic $M$ and by enumeration.

    For independent $\hat L_i$ with mean $L_i$ and variance $v_i$: $E\hat L_i^2=L_i^2+v_i$ and
    $E(\sum_i\hat L_i)^2=(\sum_iL_i)^2+\sum_iv_i$. The instances list every batch of small populations, and take
    $v_i=\sigma_i^2/b_i$, with replacement, or $\frac{\sigma_i^2}{b_i}\frac{n_i-b_i}{n_i-1}$, without. With
    ``whole_domains`` every batch is its domain, and $v_i=0$.
    """
    sum_v = sp.Integer(0) if whole_domains else sp.Symbol("S_v", nonnegative=True)
    squares, square = moment(0, 2), moment(0, 1) ** 2
    expected = (squares + sum_v) / M - (square + sum_v) / M**2
    difference = expected - (squares / M - square / M**2) - bias(M, sum_v)
    return decide_identity(difference, _enumerated_batches(bias, whole_domains))


def _enumerated_batches(bias: Callable[..., Number], whole_domains: bool, count: int = 12) -> Checks:
    rng = random.Random(2)
    for index in range(count):
        replaced = index % 2 == 0 and not whole_domains
        domains = [[Fraction(rng.randint(0, 9), 2) for _ in range(rng.randint(2, 3))] for _ in range(2 + index % 2)]
        sizes = [len(losses) if whole_domains else rng.randint(1, 2) for losses in domains]
        draws = [
            list(product(losses, repeat=b) if replaced else combinations(losses, b))
            for losses, b in zip(domains, sizes, strict=True)
        ]
        means = [[sum(draw, Fraction(0)) / len(draw) for draw in domain] for domain in draws]
        estimates = [spread(batch) for batch in product(*means)]
        variances = [
            spread(losses) / b * (1 if replaced else Fraction(len(losses) - b, len(losses) - 1))
            for losses, b in zip(domains, sizes, strict=True)
        ]
        true = spread([sum(losses) / Fraction(len(losses)) for losses in domains])
        mean_estimate = sum(estimates) / len(estimates)
        values = {
            "populations": [str([str(x) for x in losses]) for losses in domains],
            "b": sizes,
            "with_replacement": replaced,
            "Var": true,
            "mean_of_the_estimate": mean_estimate,
        }
        yield values, mean_estimate - true - bias(Fraction(len(domains)), sum(variances))


ATTAINED = r"each loss is continuous, so that the maximum over the closed ball is attained"

WEIGHTS_CLAIMS = (
    Claim(
        id="eq1",
        where="Eq. (1)",
        statement=r"$s(w,D)=\max_{\lVert\epsilon\rVert\leq\rho}E_{\xi\in D}[L(w+\epsilon;\xi)-L(w;\xi)]\geq0$, and "
        r"$\max_{\lVert\epsilon\rVert\leq\rho}L(w+\epsilon)=L(w)+s(w,D)$: "
        "SAM's objective is the loss plus the sharpness.",
        assumptions=(
            ATTAINED,
            r"$D$ is a finite data set and $E_{\xi\in D}$ the mean over it; $\mathcal L$ stands for that mean and "
            "for one sample's loss, and the argument $\\xi$ tells them apart",
        ),
        scope=r"every dimension and loss: the two maxima are over functions of $\epsilon$ that differ by the constant "
        r"$L(w)$, and $\epsilon=0$ gives 0; $s$ depends on $\rho$, which Eq. (1) leaves out of its notation",
        expected=Verdict.PROVED,
        check=check_eq1,
    ),
    Claim(
        id="eq2",
        where="Eq. (2), (4)",
        statement=r"What SAM's objective on the pooled data adds to the loss is the pooled sharpness, and it is at "
        r"most the domains': $s(w,\mathcal S)\leq\sum_i\alpha_is(w,D_i)$.",
        assumptions=(ATTAINED, r"$\alpha_i=n_i/N>0$"),
        scope="every number of domains, dimension and loss; the inequality can be strict, so a flat pooled loss does "
        "not make the domains' losses flat (an exact instance is in the evidence)",
        expected=Verdict.PROVED,
        check=check_eq2,
    ),
    Claim(
        id="eq4",
        where="Eq. (4)",
        statement=r"Going from $\max_{\lVert\epsilon\rVert\leq\rho}E_{\xi\in\mathcal S}[L(w+\epsilon;\xi)]$ to "
        r"$\max_{\lVert\epsilon\rVert\leq\rho}\sum_i\alpha_iL_i(w+\epsilon)$ is an approximation, which domain shift "
        "can make a bad one.",
        assumptions=(r"$\mathcal S$ is the pooled training set, $\alpha_i=n_i/N$, as Eq. (3) has them",),
        scope=r"every number of domains, dimension and loss: Eq. (3) holds at each point $w+\epsilon$. That the pooled "
        "maximum serves domains unequally is another statement (eq2, eq4-bias)",
        expected=Verdict.REFUTED,
        check=check_eq4,
        repaired_by="eq4-bias",
    ),
    Claim(
        id="eq4-bias",
        where="Sec. 3.1, below Eq. (4)",
        statement=r"SAM's perturbation, to first order along $\sum_i\alpha_i\nabla L_i$, goes towards the domain with "
        "the largest gradient.",
        assumptions=(
            r"towards: the angle with $\nabla L_i$ is the smallest of all domains",
            "no gradient is zero, no two are parallel",
        ),
        scope=r"holds for two domains of equal share in every dimension (only lengths and the angle enter); for two "
        r"domains the order is that of $\alpha_i\lVert\nabla L_i\rVert$, for three or more not even that",
        expected=Verdict.CONDITIONAL,
        check=check_eq4_bias,
    ),
    Claim(
        id="eq5-denominator",
        where="Eq. (5)",
        statement=r"The weights $\frac{\alpha_i+\beta C_i}{\sum_j(\alpha_j+\beta C_j)}$ with $\beta>0$ give the domain "
        r"with the larger $C_i$ the larger weight.",
        assumptions=(r"$C_i=L_i^*-L_i\leq0$", "two domains of equal share are compared, of any number of domains"),
        scope=r"every $M$: the extra condition is $\beta\sum_j(L_j-L_j^*)<1$. It is necessary: at equality the weights "
        "are undefined, beyond it the order is reversed",
        expected=Verdict.CONDITIONAL,
        check=check_eq5_denominator,
    ),
    Claim(
        id="eq5-arrow",
        where="Sec. 3.2, below Eq. (5)",
        statement=r"$C_i-\alpha_i\sum_jC_j$ may be replaced by $L_i-\frac1M\sum_jL_j$: with $\alpha_i=1/M$ they are "
        "the same up to the sign that Eq. (8) restores.",
        assumptions=(r"$C_i=L_i^*-L_i$, $0\leq L_i^*\leq L_i$", r"$\alpha_i=1/M$"),
        scope="both signs are refuted by exact rational instances; harm is shown by one of two domains",
        expected=Verdict.REFUTED,
        check=check_eq5_arrow,
        repaired_by="eq5-arrow-repaired",
    ),
    Claim(
        id="eq5-arrow-repaired",
        where="Sec. 3.2, below Eq. (5), corrected",
        statement=r"$C_i-\frac1M\sum_jC_j=-\big(L_i-\frac1M\sum_jL_j\big)+\big(L_i^*-\frac1M\sum_jL_j^*\big)$: Eq. (8) "
        "weighs by convergence where all domains have the same minimum, and by the loss itself otherwise.",
        assumptions=(r"$C_i=L_i^*-L_i$",),
        scope=ALL_M,
        expected=Verdict.PROVED,
        check=partial(check_eq5_arrow, replaced=arrow_repaired),
    ),
    Claim(
        id="eq7",
        where="Eq. (7)",
        statement=r"With $\hat w=w$ held, $\sum_i\alpha_iL_i(w+\epsilon)-\lambda\mathrm{Var}\{L_i(\hat w+\epsilon)\}$ "
        r"has the gradient $\sum_i\alpha_i\nabla L_i(w+\epsilon)$ in $w$, free of the variance, and in $\epsilon$ at "
        r"$\epsilon=0$ the gradient of Eq. (8).",
        assumptions=("each $L_i$ is differentiable", r"$\hat w$ is a constant in derivatives and equals $w$ in value"),
        scope=ALL_M
        + r"; so $w$ descends $L$ at a point that $L_{DI}$ chooses, and Eq. (7) is not the minimum over $w$ "
        "of one function",
        expected=Verdict.PROVED,
        check=check_eq7,
    ),
    Claim(
        id="eq8-sign",
        where="Eq. (8)",
        statement=r"The weights of Eq. (8) make the perturbation mild for a domain of large loss and never turn it "
        r"against one: $\beta_i\geq0$.",
        assumptions=(
            r"losses in $[0,B]$",
            r"the table takes $B=\log(\mathrm{classes})$, the cross-entropy of a uniform guess; later losses are "
            "smaller and single bad ones larger",
            "leave one domain out; shares balanced, or those of the data sets' images. The images per domain are those "
            "published with the data sets (DomainNet: the cleaned version) and sum to the totals that the paper "
            "prints; for TerraIncognita no counts with the paper's total are known",
        ),
        scope=r"every $M\geq2$: the extra condition $\lambda\leq\alpha_{\min}M^2/(2(M-1)B)$ is sufficient and "
        "necessary on the whole cube; whether a training run comes near a corner is not said",
        expected=Verdict.CONDITIONAL,
        check=check_eq8_sign,
        references=(
            "Li et al. (2017), Deeper, broader and artier domain generalization, ICCV",
            "Fang, Xu, Rockmore (2013), Unbiased metric learning, ICCV",
            "Venkateswara et al. (2017), Deep hashing network for unsupervised domain adaptation, CVPR",
            "Peng et al. (2019), Moment matching for multi-source domain adaptation, ICCV",
        ),
    ),
    Claim(
        id="eq8-ascent",
        where="Eq. (8), Algorithm 1",
        statement=r"Where all $\beta_i>0$, DISAM's direction $\sum_i\beta_i\nabla L_i$ ascends $L$.",
        assumptions=(r"$L_i\geq0$, differentiable", r"$\nabla L\neq0$ and $\sum_i\beta_i\nabla L_i\neq0$"),
        scope="an exact counterexample with the defaults $\\lambda=0.1$, $\\rho=0.05$ and two quadratic domains",
        expected=Verdict.REFUTED,
        check=check_eq8_ascent,
        repaired_by="eq8-ascent-condition",
    ),
    Claim(
        id="eq8-ascent-condition",
        where="Eq. (8), with what it lacks",
        statement=r"$\langle\nabla L,\nabla L_{DI}\rangle=\lVert\nabla L\rVert^2-\lambda\langle\nabla L,"
        r"\nabla\mathrm{Var}\{L_i\}\rangle$: to first order the direction ascends $L$ iff "
        r"$\lambda\langle\nabla L,\nabla\mathrm{Var}\rangle<\lVert\nabla L\rVert^2$.",
        assumptions=("each $L_i$ is differentiable at $w$",),
        scope=ALL_M + "; to first order in the radius",
        expected=Verdict.PROVED,
        check=check_eq8_ascent_condition,
    ),
    Claim(
        id="eq8-minibatch",
        where="Algorithm 1, line 3",
        statement=r"The variance over domains of minibatch losses is unbiased: "
        r"$E\,\mathrm{Var}\{L_i(w;B_i)\}=\mathrm{Var}\{L_i(w)\}$.",
        assumptions=(
            r"batches of the domains drawn independently, each uniformly from its domain, $\lvert B_i\rvert\geq1$",
        ),
        scope="every batch of an exact rational population is enumerated. The paper uses the minibatch variance in "
        "place of Eq. (6) and does not say that it is unbiased",
        expected=Verdict.REFUTED,
        check=check_eq8_minibatch,
        repaired_by="eq8-minibatch-bias",
    ),
    Claim(
        id="eq8-minibatch-bias",
        where="Algorithm 1, line 3, corrected",
        statement=r"$E\,\mathrm{Var}\{L_i(w;B_i)\}=\mathrm{Var}\{L_i(w)\}+\frac{M-1}{M^2}\sum_iv_i$, where $v_i$ is "
        r"the variance of $L_i(w;B_i)$: $\sigma_i^2/b_i$ for $b_i$ samples drawn with replacement.",
        assumptions=(r"batches of the domains drawn independently, each uniformly from its domain, $b_i\geq1$ fixed",),
        scope=r"every $M$ (symbolic); batches with and without replacement are enumerated on small populations",
        expected=Verdict.PROVED,
        check=partial(check_eq8_minibatch, bias=minibatch_bias),
    ),
)
