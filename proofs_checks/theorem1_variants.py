r"""Theorem 1 where its first counterexample leaves a way out -> DISAM on its own path, with noise, under every reading.

Domains here have the losses $L_i(w)=\frac{h_i}2(w-c_i)^2+o_i$ and equal shares, with $L(w)=w^2/2$ plus a constant. One
path knows the polynomials $L$ and $L_{DI}'$ and runs in ball arithmetic; the other knows the domains and the weights of
Eq. 8 alone and runs in mpmath's interval arithmetic. Their enclosures must overlap. Beside the counterexamples stand
the reason that they are no accident (every strongly convex loss is one), and the paper's remarks on $\lambda$ and
$\rho$.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any

import flint
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.convergence import corrected_floor, thm1_bound
from disam_theory.errors import ComputationError
from proofs_checks.enclosures import (
    BITS,
    Ends,
    IntervalSteps,
    Number,
    ball_ends,
    decimal,
    interval_ends,
    interval_precision,
    overlap,
    to_ball,
    to_interval,
)
from proofs_checks.exact import Instance, M, dot, exact_strings, instances
from proofs_checks.method import ALPHA, LAM, LOSS, eq8_weight
from proofs_checks.theorem1 import Problem, Sides, assumptions_on, first_violation, thm1_bound_harmonic

Plane = tuple[Fraction, Fraction]
X = flint.fmpq_poly([0, 1])


@dataclass(frozen=True)
class Domains:
    r"""$L_i(w)=\frac{h_i}2(w-c_i)^2+o_i$, of equal shares."""

    curvatures: tuple[Number, ...]
    centres: tuple[Number, ...]
    offsets: tuple[Number, ...] = (Fraction(0), Fraction(0))

    def losses(self, w: Number) -> list[Number]:
        """Every domain's loss at w."""
        return [h * (w - c) ** 2 / 2 + o for h, c, o in zip(self.curvatures, self.centres, self.offsets, strict=True)]

    def moved(self, shift: Fraction) -> Domains:
        r"""Every domain moved by the noise ``shift`` $=n$: $L_i(w;n)=L_i(w-n)$."""
        return replace(self, centres=tuple(centre + shift for centre in self.centres))


@dataclass(frozen=True)
class Model:
    r"""What a step evaluates: the direction $L_{DI}'(w)$, the gradient $L'(w)$, and $L(w)-L(0)$."""

    direction: Callable[[Number], Number]
    gradient: Callable[[Number], Number]
    loss: Callable[[Number], Number]


def polynomials(domains: Domains, lam: Fraction) -> tuple[flint.fmpq_poly, flint.fmpq_poly]:
    r"""$L$ and $L_{DI}=L-\lambda\big(\frac1M\sum_iL_i^2-L^2\big)$ as exact polynomials in $w$."""
    triples = zip(domains.curvatures, domains.centres, domains.offsets, strict=True)
    losses = [flint.fmpq_poly([_exact(h * c**2 / 2 + o), _exact(-h * c), _exact(h / 2)]) for h, c, o in triples]
    zero, number = flint.fmpq_poly([0]), len(losses)
    mean = sum(losses, zero) / number
    variance = sum((loss * loss for loss in losses), zero) / number - mean * mean
    return mean, mean - _exact(lam) * variance


def pooled_model(domains: Domains, lam: Fraction) -> Model:
    """The path that knows the polynomials, in ball arithmetic."""
    mean, inspired = polynomials(domains, lam)
    parts = (inspired.derivative(), mean.derivative(), mean - mean(flint.fmpq(0)))
    return Model(*(flint.arb_poly(part) for part in parts))


def domain_model(domains: Domains, lam: Fraction, number: Callable[[Fraction], Number]) -> Model:
    """The path that knows each domain and the weights of Eq. 8, in the arithmetic of ``number``."""
    kinds = (domains.curvatures, domains.centres, domains.offsets)
    here, count = Domains(*(tuple(map(number, kind)) for kind in kinds)), len(domains.centres)
    share = number(Fraction(1, count))

    def slopes(w: Number) -> list[Number]:
        return [h * (w - c) for h, c in zip(here.curvatures, here.centres, strict=True)]

    def direction(w: Number) -> Number:
        losses = here.losses(w)
        mean = sum(losses) * share
        weights = [eq8_weight(share, loss, mean, number(lam), count) for loss in losses]
        return sum(weight * slope for weight, slope in zip(weights, slopes(w), strict=True))

    def gradient(w: Number) -> Number:
        return sum(slopes(w)) * share

    return Model(direction, gradient, lambda w: (sum(here.losses(w)) - sum(here.losses(number(Fraction(0))))) * share)


@dataclass(frozen=True)
class Arithmetic:
    """Rationals -> numbers that carry their error, Arb's balls or mpmath's intervals; and the path they run."""

    number: Callable[[Fraction], Number]
    steps: Callable[[int], Number]  # has the methods sqrt and log
    ends: Callable[[Number], Ends]
    precision: Callable[[], AbstractContextManager[Any]]
    model: Callable[[Domains, Fraction], Model]  # rounds to the precision it is called in


BALLS = Arithmetic(to_ball, flint.arb, ball_ends, lambda: flint.ctx.workprec(BITS), pooled_model)
INTERVALS = Arithmetic(
    to_interval,
    IntervalSteps,
    interval_ends,
    lambda: interval_precision(BITS),
    partial(domain_model, number=to_interval),
)


# the value and the gradient of L_p at w, from the model, w, w^asc and rho
Reading = Callable[[Model, Number, Number, Number], tuple[Number, Number]]


def at_ascent(model: Model, w: Number, ascent: Number, rho: Number) -> tuple[Number, Number]:
    r"""R2, as the proof has it: $L_p(w)=L(w^{asc})$, and $\nabla L_p(w)$ stands for $\nabla L(w^{asc})$."""
    return model.loss(ascent), model.gradient(ascent)


def over_the_ball(model: Model, w: Number, ascent: Number, rho: Number) -> tuple[Number, Number]:
    r"""R1, Sec. 2.1: $L_p(w)=\max_{|\epsilon|\leq\rho}L(w+\epsilon)$, of a convex $L$ in one dimension; the gradient is
    that of $L$ at the maximiser (Danskin), which is the higher of the two ends."""
    top = w + rho * _sign(model.loss(w + rho) - model.loss(w - rho))
    return model.loss(top), model.gradient(top)


def total_derivative(model: Model, w: Number, ascent: Number, rho: Number) -> tuple[Number, Number]:
    r"""R3: the derivative of $w\mapsto L\big(w+\rho u(w)\big)$, that is $\big(1+\rho u'(w)\big)L'(w^{asc})$; on the
    line $u=\pm1$ does not change near $w$, so that $u'=0$."""
    return at_ascent(model, w, ascent, rho)


READINGS: dict[str, Reading] = {
    "R1 maximum over the ball": over_the_ball,
    "R2 gradient at the ascent point": at_ascent,
    "R3 total derivative": total_derivative,
}


def sides_of(
    arithmetic: Arithmetic,
    domains: Domains,
    lam: Fraction,
    problem: Problem,
    bound: Callable[..., Number],
    steps: int,
    reading: Reading = at_ascent,
) -> Sides:
    """Algorithm 1 on the domains, and the theorem's two sides after ``steps`` steps."""
    with arithmetic.precision():
        model = arithmetic.model(domains, lam)
        w, rho, rate = map(arithmetic.number, (problem.start, problem.rho, problem.rate))
        total, gap, met = arithmetic.number(Fraction(0)), None, []
        for t in range(1, steps + 1):
            ascent = w + rho * _sign(model.direction(w))
            value, slope = reading(model, w, ascent, rho)
            gap = value if gap is None else gap
            total += slope**2
            met += [slope, model.gradient(ascent), model.gradient(w)]
            w -= rate / arithmetic.steps(t).sqrt() * model.gradient(ascent)
        constants = (problem.smoothness, problem.gradient_bound, problem.rho, problem.turning)
        right = bound(gap, rate, *map(arithmetic.number, constants), arithmetic.steps(steps))
        largest = max(abs(end) for slope in met for end in arithmetic.ends(slope))
        return Sides(steps, arithmetic.ends(total / steps), arithmetic.ends(right), largest)


def both_paths(
    domains: Domains, lam: Fraction, problem: Problem, bound: Callable[..., Number], steps: int, reading: Reading
) -> tuple[Sides, Sides]:
    """The two sides by balls and by intervals; raises where the enclosures do not overlap."""
    ball, other = (sides_of(path, domains, lam, problem, bound, steps, reading) for path in (BALLS, INTERVALS))
    if not (overlap(ball.left, other.left) and overlap(ball.right, other.right)):
        raise ComputationError(f"ball and interval arithmetic disagree at T={steps}; one of the two paths is wrong")
    return ball, other


def _row(paths: Sequence[Sides], bound: Callable[..., Number] = thm1_bound) -> dict[str, Any]:
    left, right = min(side.left[0] for side in paths), max(side.right[1] for side in paths)
    shown = {"left_at_least": decimal(left), "right_at_most": decimal(right, up=True)}
    name = "1 + log T" if bound is thm1_bound_harmonic else "log T"
    return {"T": paths[0].steps, "with": name, **shown, "violated": left > right}


TWISTED = Domains((Fraction(1, 2), Fraction(3, 2)), (Fraction(1), Fraction(-1, 3)))
TWISTED_PROBLEM = Problem(start=Fraction(-1, 200), gradient_bound=Fraction(8, 5))
MIRRORED = Domains((Fraction(1), Fraction(1)), (Fraction(1), Fraction(-1)))


def check_thm1_disam(
    study: object,
    *,
    bound: Callable[..., Number] = thm1_bound,
    problem: Problem = TWISTED_PROBLEM,
    lam: Fraction = Fraction(1, 10),
    steps: tuple[int, ...] = (100, 400),
    window: Fraction = Fraction(1, 100),
) -> Evidence:
    r"""Does the left side exceed ``bound`` where DISAM ascends another way than SAM, and $\nabla\mathrm{Var}\neq0$ at
    the minimiser?

    $L_1=(w-1)^2/4$ and $L_2=\frac34(w+\frac13)^2$ give $L=w^2/2+\frac16$, and $L_{DI}'$ is 0 at some
    $w_0\in(-\delta,0)$ alone, $\delta$ = ``window``. DISAM starts between $w_0$ and 0, where SAM goes the other way.
    From any $w$ its ascent point has $|L'(w^{asc})|\geq\rho-\delta$.
    """

    def row(T: int, formula: Callable[..., Number], told: Problem = problem) -> dict[str, Any]:
        return _row(both_paths(TWISTED, lam, told, formula, T, at_ascent), formula)

    rows = [*(row(T, bound) for T in steps), row(steps[-1], thm1_bound_harmonic)]
    disam, sam = (sides_of(BALLS, TWISTED, x, problem, bound, steps[-1]) for x in (lam, Fraction(0)))
    assumptions = [
        *assumptions_on(problem, disam.largest),
        *_apart_from_sam(problem, lam, window, apart=not overlap(sam.left, disam.left)),
    ]
    at_all_T = (problem.rho - window) ** 2
    data = {
        "problem": {key: str(value) for key, value in vars(problem).items()},
        "lambda": str(lam),
        "sides": rows,
        "with_Gamma_0": row(steps[-1], bound, replace(problem, turning=Fraction(0))),
        "left_at_least_for_every_T": str(at_all_T),
        "violated_for_every_T_from": first_violation(problem, _scaled(bound, problem.rho**2 / at_all_T)),
        "assumptions_checked": assumptions,
    }
    return _refuted_where("DISAM on a path that is not SAM's", rows, assumptions, data)


def _apart_from_sam(problem: Problem, lam: Fraction, window: Fraction, *, apart: bool) -> list[dict[str, Any]]:
    r"""What makes the problem DISAM's own, and that $L_{DI}'$ has the sign of $w$ outside $[-\delta,0]$ on $[-G,G]$."""
    (mean, inspired), (_, variance) = polynomials(TWISTED, lam), polynomials(TWISTED, Fraction(1))
    variance, slope = mean - variance, inspired.derivative()
    x = sp.Symbol("x")
    as_sympy = sp.Poly([sp.Rational(int(c.p), int(c.q)) for c in reversed(slope.coeffs())], x)
    reach = problem.gradient_bound
    roots = as_sympy.count_roots(sp.Rational(*(-reach).as_integer_ratio()), sp.Rational(*reach.as_integer_ratio()))
    bracketed = slope(_exact(-window)) < 0 < slope(flint.fmpq(0))
    at_minimum = variance.derivative()(flint.fmpq(0))
    farthest = window + problem.rate * problem.rho  # |w'| <= max(|w|, eta rho), and from the window <= window + eta rho
    stays = problem.rate <= 1 and abs(problem.start) <= farthest and farthest + problem.rho <= reach
    return [
        {"assumption": "no later gradient exceeds G", "value": str(farthest + problem.rho), "holds": stays},
        {"assumption": "the pooled gradient is w", "value": str(mean.derivative()), "holds": mean.derivative() == X},
        {"assumption": "grad Var at the minimiser is not 0", "value": str(at_minimum), "holds": at_minimum != 0},
        {
            "assumption": "L_DI' changes sign once on [-G, G], between -window and 0",
            "value": f"{roots} root",
            "holds": roots == 1 and bracketed,
        },
        {"assumption": "DISAM's left side is not SAM's", "value": "disjoint enclosures", "holds": apart},
    ]


def _refuted_where(
    subject: str, rows: list[dict[str, Any]], assumptions: list[dict[str, Any]], data: dict[str, Any]
) -> Evidence:
    """Refuted where every assumption holds and every row is violated."""
    failed = [row["assumption"] for row in assumptions if not row["holds"]]
    if failed:
        return Evidence(Verdict.UNDECIDED, f"not a counterexample, as this fails on it: {'; '.join(failed)}", data)
    kept = [row for row in rows if not row["violated"]]
    if kept:
        T, left, right = (kept[0][key] for key in ("T", "left_at_least", "right_at_most"))
        return Evidence(Verdict.UNDECIDED, f"the bound is not exceeded at T={T}: {left} against {right}", data)
    shown = "; ".join(f"T={r['T']}, {r['with']}: {r['left_at_least']} > {r['right_at_most']}" for r in rows)
    return Evidence(Verdict.REFUTED, f"the left side exceeds the bound for {subject}: {shown}", data)


def _scaled(bound: Callable[..., Number], factor: Fraction) -> Callable[..., Number]:
    return lambda *constants: bound(*constants) * to_ball(factor)


def check_thm1_readings(
    study: object,
    *,
    bound: Callable[..., Number] = thm1_bound,
    readings: dict[str, Reading] = READINGS,
    steps: int = 256,
    lam: Fraction = Fraction(1, 10),
) -> Evidence:
    r"""Is there a reading of $L_p$ under which the theorem survives $L(w)=w^2/2+\frac12$, run by SAM and by DISAM?

    There the three readings have the same value and gradient, $(|w|+\rho)^2/2$ and
    $(|w|+\rho)\,\mathrm{sign}(w)$, for $w\neq0$.
    """
    problem = Problem()
    rows, largest = {}, Fraction(0)
    for name, reading in readings.items():
        paths = [
            *both_paths(MIRRORED, Fraction(0), problem, bound, steps, reading),
            *both_paths(MIRRORED, lam, problem, bound, steps, reading),
        ]
        rows[name] = _row(paths)
        largest = max(largest, *(side.largest for side in paths))
    assumptions = assumptions_on(problem, largest)
    same = {name: _same_on_both_sides_of_zero(reading) for name, reading in readings.items()}
    data = {
        "sides": rows,
        "the_one_dimensional_formula_holds": same,
        "apart_in_two_dimensions": readings_in_the_plane(),
        "assumptions_checked": assumptions,
    }
    surviving = [name for name, row in rows.items() if not row["violated"]]
    if surviving:
        return Evidence(Verdict.UNDECIDED, f"the witness does not violate the bound under {surviving[0]}", data)
    return _refuted_where("each reading of $L_p$", list(rows.values()), assumptions, data)


def _same_on_both_sides_of_zero(reading: Reading) -> bool:
    r"""On $w^2/2$ with $w=\pm s$ and symbols $s,\rho>0$: is the value $(s+\rho)^2/2$, the gradient its derivative?"""
    s, rho = sp.symbols("s rho", positive=True)
    model = Model(direction=lambda w: w, gradient=lambda w: w, loss=lambda w: sp.expand(w**2 / 2))
    for side in (1, -1):
        value, slope = reading(model, side * s, side * (s + rho), rho)
        if sp.expand(value - (s + rho) ** 2 / 2) or sp.expand(slope - side * sp.diff(value, s)):
            return False
    return True


def readings_in_the_plane() -> dict[str, Any]:
    r"""The three gradients of $L_p$ on $L(w)=\frac12(w_1^2+\frac{11}4w_2^2)$ at
    $w=(\frac{12}5,\frac{36}{55})$ with $\rho=1$.

    R1's maximiser $\epsilon$ satisfies $H(w+\epsilon)=\nu\epsilon$ with $\nu=5$. As $\nu I-H$ is positive definite and
    $L(w+\epsilon)-L(w+e)=\frac12(e-\epsilon)^\top(\nu I-H)(e-\epsilon)+\frac\nu2(1-\lVert e\rVert^2)$, it is the
    only one.
    """
    curvature, w = (Fraction(1), Fraction(11, 4)), (Fraction(12, 5), Fraction(36, 55))
    p = _times(curvature, w)
    u = _unit(p)
    top, nu = (Fraction(3, 5), Fraction(4, 5)), Fraction(5)
    at_top = _times(curvature, _plus(w, top))
    is_top = at_top == _scale(nu, top) and dot(top, top) == 1 and all(nu > h for h in curvature)
    v = _times(curvature, _plus(w, u))
    turn = _scale(1 / dot(p, u), _times(curvature, _plus(v, _scale(-dot(u, v), u))))  # (du/dw)^T v = H P v / |p|
    total = _plus(v, turn)
    if not is_top or _maximum_identity() != 0:
        raise ComputationError("the point named as the maximum over the ball is not the maximum")
    gradients = {"R1": at_top, "R2": v, "R3": total}
    return {
        **exact_strings(gradients),
        "all_differ": len(set(gradients.values())) == 3,
    }


def _maximum_identity() -> sp.Expr:
    r"""The identity above with symbols, where $p=(\nu I-H)\epsilon$ and $\lVert\epsilon\rVert=1$: 0 if right."""
    a, b, nu, x, y, c, s = sp.symbols("a b nu x y c s", real=True)
    slope = ((nu - a) * c, (nu - b) * s)

    def gain(d: Number, e: Number) -> Number:
        return slope[0] * d + slope[1] * e + (a * d**2 + b * e**2) / 2

    excess = ((nu - a) * (x - c) ** 2 + (nu - b) * (y - s) ** 2) / 2 + nu / 2 * (1 - x**2 - y**2)
    return sp.expand(sp.expand(gain(c, s) - gain(x, y) - excess).subs(s**2, 1 - c**2))


NOISY_PROBLEM = Problem(rate=Fraction(1, 10), gradient_bound=Fraction(3))
NOISE = (Fraction(-1, 2), Fraction(1, 2))


def check_thm1_stochastic(
    study: object,
    *,
    bound: Callable[..., Number] = thm1_bound,
    problem: Problem = NOISY_PROBLEM,
    noise: tuple[Fraction, ...] = NOISE,
    lam: Fraction = Fraction(1, 10),
    steps: int = 150,
) -> Evidence:
    r"""Does $\frac1T\sum_tE|L'(w_t^{asc})|^2$ exceed ``bound`` where every batch moves both domains by $n=\pm\frac12$?

    With $s=\pm1$ the sign of the ascent direction, $|L'(w^{asc})|^2=(w+\rho s)^2=w^2+\rho^2+2\rho ws$. The noise is
    symmetric and independent of $w_t$, so that $w_tE[s\mid w_t]\geq0$ whether $s$ is the sign of $w$ (ascent on all
    data) or of $w-n$ (Algorithm 1: the same batch): the left side is at least $\rho^2$ for every $T$.
    """
    reach = problem.rho + max(map(abs, noise))
    mean_loss = replace(problem, gradient_bound=reach + problem.rho)
    assumptions = [
        *assumptions_on(mean_loss, mean_loss.gradient_bound),
        *_assumptions_on_noise(problem, noise, lam, reach),
    ]
    rows = [_row_against(problem, formula, steps) for formula in (bound, thm1_bound_harmonic)]
    ascents = {"ascent on all data": False, "ascent on the same batch": True}
    data = {
        "problem": {key: str(value) for key, value in vars(problem).items()},
        "noise": [str(n) for n in noise],
        "sides": rows,
        "violated_for_every_T_from": first_violation(problem, bound),
        "with_1_plus_log_T_from": first_violation(problem, thm1_bound_harmonic),
        "expectation_over_all_noise": {
            name: [decimal(low) for low, _ in expected_left(problem, noise, lam, 6, same_batch=same)]
            for name, same in ascents.items()
        },
        "gap_of_step_12": {name: str(_gap_of_step_12(problem, noise, same)) for name, same in ascents.items()},
        "assumptions_checked": assumptions,
    }
    return _refuted_where("stochastic SAM and DISAM, the left side being at least $\\rho^2$", rows, assumptions, data)


def _row_against(problem: Problem, bound: Callable[..., Number], steps: int) -> dict[str, Any]:
    r"""$\rho^2$, which the left side is at least, against ``bound`` by both arithmetics."""
    constants = (problem.rate, problem.smoothness, problem.gradient_bound, problem.rho, problem.turning)
    gap, floor, sides = (abs(problem.start) + problem.rho) ** 2 / 2, problem.rho**2, []
    for arithmetic in (BALLS, INTERVALS):
        with arithmetic.precision():
            right = bound(*map(arithmetic.number, (gap, *constants)), arithmetic.steps(steps))
            sides.append(Sides(steps, (floor, floor), arithmetic.ends(right), problem.gradient_bound))
    if not overlap(sides[0].right, sides[1].right):
        raise ComputationError(f"ball and interval arithmetic disagree on the bound at T={steps}")
    return _row(sides, bound)


def _gap_of_step_12(problem: Problem, noise: tuple[Fraction, ...], same_batch: bool) -> Fraction:
    r"""$E\langle L'(w^{asc}),g_p\rangle-E|L'(w^{asc})|^2=-E[n(w+\rho s)]$ at $w_1$, which step (12) takes to be 0."""
    w = problem.start
    ascents = [w + problem.rho * _sign(w - n if same_batch else w) for n in noise]
    return -sum((n * ascent for n, ascent in zip(noise, ascents, strict=True)), Fraction(0)) / len(noise)


def _assumptions_on_noise(
    problem: Problem, noise: tuple[Fraction, ...], lam: Fraction, reach: Fraction
) -> list[dict[str, Any]]:
    r"""The noise is centred and symmetric, the ascent follows the sign of $w-n$, and a stochastic gradient stays below
    $G$: $|w_{t+1}|\leq(1-\eta_t)|w_t|+\eta_t(\rho+|n|)\leq$ ``reach``."""
    mean = sum(noise, Fraction(0)) / len(noise)
    slopes = [
        polynomials(MIRRORED.moved(n), lam)[1].derivative() - _exact(1 - 2 * lam) * (X - _exact(n)) for n in noise
    ]
    worst = min((1 if w > 0 else -1) * _mean_sign(noise, w) for w in _cells(noise))
    steepest = reach + problem.rho + max(map(abs, noise))
    stays = problem.rate <= 1 and abs(problem.start) <= reach
    return [
        {"assumption": "the noise has mean 0", "value": str(mean), "holds": mean == 0},
        {"assumption": "sign(w) E[s | w] >= 0 for every w", "value": str(worst), "holds": worst >= 0},
        {
            "assumption": "a batch ascends along (1 - 2 lambda)(w - n), lambda < 1/2",
            "value": str(1 - 2 * lam),
            "holds": lam < Fraction(1, 2) and not any(slopes),
        },
        {"assumption": "no w_t leaves [-reach, reach]", "value": str(reach), "holds": stays},
        {
            "assumption": "every stochastic gradient is at most G",
            "value": str(steepest),
            "holds": steepest <= problem.gradient_bound,
        },
    ]


def _cells(noise: tuple[Fraction, ...]) -> list[Fraction]:
    """A point of each open interval on which no sign of w or of w - n changes."""
    breaks = sorted({*noise, Fraction(0)})
    inner = [(a + b) / 2 for a, b in pairwise(breaks)]
    return [breaks[0] - 1, *inner, breaks[-1] + 1]


def _mean_sign(noise: tuple[Fraction, ...], w: Fraction) -> Fraction:
    return Fraction(sum(1 if w > n else -1 for n in noise), len(noise))


def expected_left(
    problem: Problem, noise: tuple[Fraction, ...], lam: Fraction, steps: int, *, same_batch: bool
) -> list[Ends]:
    r"""$\frac1T\sum_{t\leq T}E|L'(w_t^{asc})|^2$ for $T=1..$ ``steps``, over every sequence of noise, by both paths."""

    def by(arithmetic: Arithmetic) -> list[Ends]:
        with arithmetic.precision():
            batches = [arithmetic.model(MIRRORED.moved(n), lam) for n in noise]
            mean = arithmetic.model(MIRRORED, lam)
            rho, rate = arithmetic.number(problem.rho), arithmetic.number(problem.rate)
            level, total, results = [arithmetic.number(problem.start)], arithmetic.number(Fraction(0)), []
            for t in range(1, steps + 1):
                eta, following = rate / arithmetic.steps(t).sqrt(), []
                for w in level:
                    for batch in batches:
                        ascent = w + rho * _sign((batch if same_batch else mean).direction(w))
                        total += mean.gradient(ascent) ** 2 / (len(level) * len(batches))
                        following.append(w - eta * batch.gradient(ascent))
                level = following
                results.append(arithmetic.ends(total / t))
            return results

    ball, other = by(BALLS), by(INTERVALS)
    if not all(overlap(a, b) for a, b in zip(ball, other, strict=True)):
        raise ComputationError(
            "ball and interval arithmetic disagree on the expectation; one of the two paths is wrong"
        )
    return [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(ball, other, strict=True)]


def ascent_floor(along: Number, mu: Number, rho: Number) -> Number:
    r"""$\langle\nabla L(w),u\rangle+\mu\rho$, for $w^{asc}=w+\rho u$; for SAM $\lVert\nabla L(w)\rVert+\mu\rho$."""
    return along + mu * rho


def ball_floor(distance: Number, mu: Number, rho: Number) -> Number:
    r"""$\mu(\lVert w-w^*\rVert+\rho)$, $w^*$ the minimiser."""
    return mu * (distance + rho)


def fails_from(first: Number, second: Number, level: Number) -> Number:
    r"""$T_0=\exp\!\big(-\frac AB-2W_{-1}(-\frac m{2B}e^{-A/2B})\big)$, where $(A+B\log T)/\sqrt T=m$ the last time."""
    ratio = first / second
    return (-ratio - 2 * (-level / (2 * second) * (-ratio / 2).exp()).lambertw(-1)).exp()


def check_strongly_convex(
    study: object,
    *,
    at_asc: Callable[..., Number] = ascent_floor,
    at_top: Callable[..., Number] = ball_floor,
    last_crossing: Callable[..., Number] = fails_from,
    bound: Callable[..., Number] = thm1_bound,
) -> Evidence:
    r"""Do the two lower bounds and $T_0$ follow, step by step, from what defines strong convexity and a maximum?

    Each remainder is the claim less a sum of terms that are not negative, with every inner product a symbol; so it
    holds in every dimension. Exact quadratics in one to four dimensions look for a violation, and both arithmetics
    look at the bound on either side of $T_0$.
    """
    remainders = {**ascent_certificate(at_asc), **ball_certificate(at_top), **crossing_certificate()}
    slacks = list(_quadratic_slacks(at_asc, at_top))
    worst = min(slacks, key=lambda row: row["slack"])
    crossings = [_crossing_row(constants, last_crossing, bound) for constants in CROSSINGS]
    open_ones = [name for name, remainder in remainders.items() if remainder != 0]
    data = {
        "remainders": {name: str(remainder) for name, remainder in remainders.items()},
        "exact_quadratics": len(slacks),
        "least_slack": exact_strings(worst),
        "T_0": crossings,
    }
    if not open_ones and worst["slack"] < 0:
        raise ComputationError(
            f"the certificates close, and an exact quadratic violates a bound: {data['least_slack']}"
        )
    if worst["slack"] < 0:
        return Evidence(Verdict.REFUTED, f"an exact quadratic falls below the floor of {worst['floor']}", data)
    wrong = [row for row in crossings if not row["above_before_and_below_after"]]
    if wrong:
        return Evidence(Verdict.REFUTED, f"the bound does not cross the level at $T_0$ = {wrong[0]['T_0']}", data)
    if open_ones:
        return Evidence(Verdict.UNDECIDED, f"the certificate does not close: {', '.join(open_ones)}", data)
    reason = (
        "each bound is a sum of the inequalities that define strong convexity, a maximum and a norm; "
        f"{len(slacks)} exact quadratics agree, and the printed bound is below $\\mu^2\\rho^2$ after $T_0$"
    )
    return Evidence(Verdict.PROVED, reason, data)


def ascent_certificate(floor: Callable[..., Number]) -> dict[str, sp.Expr]:
    r"""With $a=\nabla L(w)$, $b=\nabla L(w+e)$, $e=\rho u$, $\lVert u\rVert=1$: steps to $\lVert b\rVert\geq$ floor.

    Strong convexity at $w$ and at $w+e$ gives $\langle b-a,e\rangle\geq\mu\rho^2$; Cauchy-Schwarz gives
    $\langle b,e\rangle\leq\rho\lVert b\rVert$, as $\big\lVert\lVert e\rVert^2b-\langle b,e\rangle e\big\rVert^2\geq0$.
    """
    here, there, ae, be, bb, ee, norm_b = sp.symbols("f_w f_asc ae be bb ee norm_b", real=True)
    mu, rho = sp.symbols("mu rho", positive=True)
    forward = there - here - ae - mu / 2 * rho**2
    backward = here - there + be - mu / 2 * rho**2
    cauchy = rho * norm_b - be
    cauchy_square = _norm2(ee, -be, bb, be, ee) - ee * (ee * bb - be**2)
    claim = rho * (norm_b - floor(ae / rho, mu, rho))
    along = sp.Symbol("norm_a", positive=True)
    return {
        "Cauchy-Schwarz": sp.expand(cauchy_square),
        "gradient at the ascent point": sp.expand(claim - forward - backward - cauchy),
        "SAM: the square is at least (mu rho)^2": sp.expand(
            floor(along, mu, rho) ** 2 - (mu * rho) ** 2 - along**2 - 2 * along * mu * rho
        ),
    }


def ball_certificate(floor: Callable[..., Number]) -> dict[str, sp.Expr]:
    r"""With $x=w+\epsilon^*$ a maximiser, $g=\nabla L(x)$, $d=w^*-x$, $r=\lVert w-w^*\rVert$ and the point $y$ of the
    ball at distance $r+\rho$ from $w^*$ (any of its sphere if $r=0$): the steps to $\lVert g\rVert\geq$ floor.

    $\lVert g+\mu d\rVert^2\geq0$ and strong convexity from $x$ to $w^*$ give $\lVert g\rVert^2\geq2\mu(L(x)-L^*)$;
    $L(x)\geq L(y)$; strong convexity from $w^*$, where the gradient is 0, gives $L(y)-L^*\geq\frac\mu2(r+\rho)^2$.
    """
    top, far, least, gg, gd, dd = sp.symbols("f_top f_far f_least gg gd dd", real=True)
    mu, rho, r = sp.symbols("mu rho r", positive=True)
    to_minimum = least - top - gd - mu / 2 * dd
    maximal = top - far
    growth = far - least - mu / 2 * (r + rho) ** 2
    claim = gg - floor(r, mu, rho) ** 2
    return {
        "gradient at the maximum": sp.expand(
            claim - _norm2(sp.Integer(1), mu, gg, gd, dd) - 2 * mu * (to_minimum + maximal + growth)
        ),
        "the far point: y - w* = (1 + rho/r)(w - w*)": sp.expand((1 + rho / r) ** 2 * r**2 - (r + rho) ** 2),
    }


def crossing_certificate() -> dict[str, sp.Expr]:
    r"""$T_0$ solves $(A+B\log T)T^{-1/2}=m$, and the left side falls where $\log T>2-A/B$, as it does from $T_0$ on:
    there $\log T_0=-\frac AB-2z$ with $z=W_{-1}\leq-1$, and $ze^z=-\frac m{2B}e^{-A/2B}$ defines $W$."""
    a, b, T = sp.symbols("A B T", positive=True)
    z = sp.Symbol("z", real=True)
    log_T0 = -a / b - 2 * z
    level = -2 * b * z * sp.exp(z) * sp.exp(a / (2 * b))  # what the definition of z says of m
    bound = (a + b * sp.log(T)) / sp.sqrt(T)
    falls = sp.simplify(sp.diff(bound, T) * 2 * T ** sp.Rational(3, 2) - b * (2 - a / b - sp.log(T)))
    return {
        "T_0 solves the equation": sp.simplify((a + b * log_T0) * sp.exp(-log_T0 / 2) - level),
        "derivative of the bound": falls,
        "T_0 is on the falling side": sp.expand(log_T0 - (2 - a / b) - 2 * (-1 - z)),
    }


def _norm2(x: Number, y: Number, pp: Number, pq: Number, qq: Number) -> Number:
    r"""$\lVert xp+yq\rVert^2$ from the inner products of $p$ and $q$."""
    return x**2 * pp + 2 * x * y * pq + y**2 * qq


CROSSINGS = (
    # mu, L, rho, G, eta_0, L_p(w_1) - L_min
    ("1", "1", "1", "3/2", "1/2", "10201/20000"),
    ("1/10", "1", "1/20", "1", "1/10", "1/2"),
    ("1/2", "2", "1/2", "4", "1/4", "3"),
)


def _crossing_row(
    constants: tuple[str, ...], last_crossing: Callable[..., Number], bound: Callable[..., Number]
) -> dict[str, Any]:
    r"""The bound at the integers before and after $T_0$, in both arithmetics, against $\mu^2\rho^2$."""
    mu, L, rho, G, rate, gap = map(Fraction, constants)
    level = mu**2 * rho**2
    with BALLS.precision():
        T0 = last_crossing(to_ball(gap / rate), to_ball((L * G**2 + rho**2 * L**3) * rate), to_ball(level))
        low, high = ball_ends(T0)
    crossed = True
    for arithmetic in (BALLS, INTERVALS):
        with arithmetic.precision():
            before, after = (
                arithmetic.ends(bound(*map(arithmetic.number, (gap, rate, L, G, rho, L)), arithmetic.steps(max(1, T))))
                for T in (low // 1 - 1, high // 1 + 1)
            )
        crossed = crossed and before[0] > level > after[1]
    names = ("mu", "L", "rho", "G", "eta_0", "gap")
    shown = dict(zip(names, constants, strict=True))
    return {**shown, "T_0": f"{float(high):.6g}", "above_before_and_below_after": crossed}


def _quadratic_slacks(at_asc: Callable[..., Number], at_top: Callable[..., Number]) -> Iterator[dict[str, Any]]:
    r"""Squared norms less squared floors on $\frac12w^\top Hw$, $H=\mu I+A^\top A$, in rationals; every fourth has
    $A=0$, where both floors are attained. Ascent along the gradient (SAM), and along any direction."""
    rng = random.Random(0)
    for index in range(160):
        size, mu, rho = 1 + index // 4 % 4, Fraction(rng.randint(1, 9), 4), Fraction(rng.randint(1, 9), 5)
        spread = 0 if index % 4 == 0 else 3
        factor = flint.fmpq_mat(size, size, [rng.randint(-spread, spread) for _ in range(size**2)])
        identity = flint.fmpq_mat(size, size, [int(i == j) for i in range(size) for j in range(size)])
        hessian = factor.transpose() * factor + _exact(mu) * identity
        u, length = _unit_column(rng, size), Fraction(rng.randint(1, 9), 3)
        any_slope = flint.fmpq_mat(size, 1, [rng.randint(-5, 5) for _ in range(size)])
        for rule, slope in (("SAM", _exact(length) * u), ("any direction", any_slope)):
            floor = at_asc(_inner(slope, u), mu, rho)
            gradient = slope + _exact(rho) * (hessian * u)
            slack = _inner(gradient, gradient) - max(floor, Fraction(0)) ** 2
            yield {"floor": rule, "dimension": size, "mu": mu, "rho": rho, "slack": slack}
        nu = mu + sum((_fraction(hessian[i, i]) for i in range(size)), Fraction(0))  # above the largest eigenvalue
        from_minimum = hessian.solve(
            (_exact(nu) * identity - hessian) * u * _exact(rho)
        )  # so that rho u is the maximum
        distance = _root_below(_inner(from_minimum, from_minimum))
        slack = (nu * rho) ** 2 - at_top(distance, mu, rho) ** 2
        yield {"floor": "maximum over the ball", "dimension": size, "mu": mu, "rho": rho, "slack": slack}


def _unit_column(rng: random.Random, size: int) -> flint.fmpq_mat:
    """A rational unit vector: the first axis, reflected."""
    q = [rng.randint(1, 6) for _ in range(size)]
    scale = Fraction(-2 * q[0], sum(x * x for x in q))
    return flint.fmpq_mat(size, 1, [_exact(scale * x + (i == 0)) for i, x in enumerate(q)])


def _inner(x: flint.fmpq_mat, y: flint.fmpq_mat) -> Fraction:
    return _fraction((x.transpose() * y)[0, 0])


def _root_below(x: Fraction) -> Fraction:
    """The square root, or a rational just below it."""
    scale = x.denominator * 10**12
    return Fraction(isqrt(x.numerator * x.denominator * 10**24), scale)


NEGATIVE_EARLY = (MIRRORED, Fraction(-1))
NEGATIVE_LATE = (replace(MIRRORED, offsets=(Fraction(2), Fraction(0))), Fraction(1))


def check_lambda_remark(
    study: object,
    *,
    weight: Callable[..., Number] = eq8_weight,
    lam: Fraction = Fraction(7, 10),
    early: tuple[Domains, Fraction] = NEGATIVE_EARLY,
    late: tuple[Domains, Fraction] = NEGATIVE_LATE,
) -> Evidence:
    r"""Is $\beta_i-\alpha_i$ proportional to $\lambda$, and is a large $\lambda$ aggressive early in the training?

    The first by symbols, and by instances on both sides of $\lambda=\frac{\alpha_iM}{2(L_i-\bar L)}$, where $\beta_i$
    is 0. The second by two exact runs: in one the losses are furthest apart at the start, in the other at the end.
    """
    adjustment = weight(ALPHA, LOSS, sp.Symbol("mean", real=True), LAM, M) - ALPHA
    proportional = [sp.simplify(sp.diff(adjustment, LAM, 2)), sp.simplify(adjustment.subs(LAM, 0))]
    cases = [row for case in instances() for row in _threshold_rows(case, weight)]
    runs = {
        "apart at the start": _weights_along(*early, lam, weight),
        "apart at the end": _weights_along(*late, lam, weight),
    }
    data = {
        "adjustment": f"${sp.latex(sp.factor(adjustment))}$",
        "second_derivative_and_value_at_0": [str(x) for x in proportional],
        "weights_around_the_threshold": len(cases),
        "lambda_of_the_runs": str(lam),
        "least_weight": {name: exact_strings(run) for name, run in runs.items()},
    }
    if any(proportional) or not all(cases):
        return Evidence(Verdict.REFUTED, "the adjustment is not proportional to $\\lambda$, or turns no weight", data)
    first, second = runs.values()
    if first["first step"] < 0 <= first["last step"] and second["last step"] < 0 <= second["first step"]:
        reason = (
            r"$\beta_i-\alpha_i$ is proportional to $\lambda$ and turns a weight negative beyond "
            r"$\alpha_iM/(2(L_i-\bar L))$; that this comes early needs domain losses that are furthest apart early: "
            "in one exact run it does, in another the adjustment is 0 at first and a weight is negative at the end"
        )
        return Evidence(Verdict.CONDITIONAL, reason, data)
    return Evidence(Verdict.UNDECIDED, "the runs do not show a weight that turns early and one that turns late", data)


def _threshold_rows(case: Instance, weight: Callable[..., Number]) -> Iterator[bool]:
    r"""For each domain whose loss is above the mean: is its weight positive, 0, negative at half, one, two times it?"""
    number = len(case.losses)
    mean = sum(case.losses) / number
    for alpha, loss in zip(case.shares, case.losses, strict=True):
        if loss > mean:
            threshold = alpha * number / (2 * (loss - mean))
            half, at, twice = (weight(alpha, loss, mean, k * threshold, number) for k in (Fraction(1, 2), 1, 2))
            yield half > 0 and at == 0 and twice < 0


def _weights_along(
    domains: Domains, start: Fraction, lam: Fraction, weight: Callable[..., Number], steps: int = 12
) -> dict[str, Fraction]:
    r"""The least weight at the first and at the last step of an exact run with $\eta=\frac14$, $\rho=\frac1{20}$."""
    model, w, seen = domain_model(domains, lam, Fraction), start, []
    for _ in range(steps):
        losses = domains.losses(w)
        share = Fraction(1, len(losses))
        seen.append(min(weight(share, loss, sum(losses) * share, lam, len(losses)) for loss in losses))
        w -= model.gradient(w + Fraction(_sign(model.direction(w)), 20)) / 4
    return {"first step": seen[0], "last step": seen[-1]}


@dataclass(frozen=True)
class Planar:
    r"""Two domains of equal share, $L_i(w)=a_i+\langle s_i,w\rangle+\frac\kappa2\lVert w\rVert^2$ in the plane, and a
    first step from $w_1=0$. $\kappa$ is the smoothness of their mean, and $\lVert\nabla L(0)\rVert=1$."""

    slopes: tuple[Plane, Plane] = ((Fraction(-2, 5), Fraction(9, 5)), (Fraction(8, 5), Fraction(-1, 5)))
    heights: tuple[Fraction, Fraction] = (Fraction(202), Fraction(200))
    curvature: Fraction = Fraction(1, 100)
    lam: Fraction = Fraction(1, 10)
    rho: Fraction = Fraction(1, 20)
    rate: Fraction = Fraction(1, 10)

    def inspired(self, w: Plane, lam: Fraction) -> Plane:
        r"""$\nabla L_{DI}(w)=p+\kappa w-\frac\lambda2Dc$ with $D=L_1-L_2$ and $c=s_1-s_2$."""
        (first, second), (high, low) = self.slopes, self.heights
        c = _plus(first, _scale(Fraction(-1), second))
        pull = -lam / 2 * (high - low + dot(c, w))
        return _plus(_plus(_scale(Fraction(1, 2), _plus(first, second)), _scale(self.curvature, w)), _scale(pull, c))

    def weighted(self, w: Plane, lam: Fraction) -> Plane:
        r"""The same as $\sum_i\beta_i\nabla L_i$ with the weights of Eq. 8."""
        heights = zip(self.heights, self.slopes, strict=True)
        losses = [a + dot(s, w) + self.curvature * dot(w, w) / 2 for a, s in heights]
        weights = [eq8_weight(Fraction(1, 2), loss, sum(losses) / 2, lam, 2) for loss in losses]
        gradients = [_plus(s, _scale(self.curvature, w)) for s in self.slopes]
        return _plus(*(_scale(b, g) for b, g in zip(weights, gradients, strict=True)))


def sams_turning(planar: Planar) -> Fraction:
    r"""$(\sin\phi_1/\eta_1)^2$ of SAM's ascent direction on the same problem."""
    return turning(planar, Fraction(0))


def turning(planar: Planar, lam: Fraction) -> Fraction:
    r"""$(\sin\phi_1/\eta_1)^2$, exactly, where $\phi_1\in[0,\frac\pi2)$ is the angle that the ascent direction turns by
    in the first step, so that $\phi_1/\eta_1$ is at least its root. Both formulas of the direction must agree."""
    w, directions = (Fraction(0), Fraction(0)), []
    for _ in range(2):
        g = planar.inspired(w, lam)
        if g != planar.weighted(w, lam):
            raise ComputationError("the gradient of L_DI and the sum with the weights of Eq. 8 differ")
        directions.append(g)
        if len(directions) == 1:
            ascent = _plus(w, _scale(planar.rho, _unit(g)))
            w = _plus(w, _scale(-planar.rate, planar.inspired(ascent, Fraction(0))))
    (a, b), (c, d) = directions
    if a * c + b * d <= 0:
        raise ComputationError("the ascent direction turns by a right angle or more")
    return (a * d - b * c) ** 2 / ((a * a + b * b) * (c * c + d * d)) / planar.rate**2


def check_rho_remark(
    study: object,
    *,
    planar: Planar = Planar(),
    permitted: Callable[[Planar], Fraction] = sams_turning,
    steps: int = 100,
) -> Evidence:
    r"""Does DISAM's ascent direction turn less than SAM's, so that $\rho^2L\Gamma^2$ leaves it a larger $\rho$?

    $\Gamma$ bounds $\phi_t/\eta_t$. SAM runs straight to the minimiser of $L$ and does not turn at all; DISAM's first
    step alone shows that its $\Gamma$ exceeds SAM's, and $L$ too. ``permitted`` gives the square it may not exceed.
    """
    square, limit = turning(planar, planar.lam), permitted(planar)
    assumptions = _assumptions_on_plane(planar, steps)
    failed = [row["assumption"] for row in assumptions if not row["holds"]]
    data = {
        "disam_turning_at_least": decimal(_root_below(square)),
        "disam_turning_squared": str(square),
        "may_not_exceed_squared": str(limit),
        "sam_turning": str(sams_turning(planar)),
        "smoothness_L": str(planar.curvature),
        "disam_exceeds_L": square > planar.curvature**2,
        "floor_of_the_corrected_bound": str(corrected_floor(*sp.symbols("eta L rho"))),
        "theorem_2_with_a_larger_rho": _larger_rho_in_theorem_2(),
        "assumptions_checked": assumptions,
    }
    if failed:
        return Evidence(Verdict.UNDECIDED, f"not a counterexample, as this fails on it: {'; '.join(failed)}", data)
    if square <= limit:
        return Evidence(Verdict.UNDECIDED, "on this problem DISAM's direction turns no more than it may", data)
    reason = (
        f"DISAM's $\\Gamma$ is not smaller in general: on an exact problem its direction turns by at least "
        f"{data['disam_turning_at_least']} $\\eta$ in a step where SAM's does not turn, so equal $\\rho^2L\\Gamma^2$ "
        "would leave DISAM the smaller $\\rho$"
    )
    return Evidence(Verdict.REFUTED, reason, data)


def _assumptions_on_plane(planar: Planar, steps: int) -> list[dict[str, Any]]:
    r"""The losses are not negative, so bounded below; and SAM stays on the ray from the minimiser through $w_1$.

    On that ray $w=m+\tau p$ with $\lVert p\rVert=1$, $\tau_1=1/\kappa$ and $\tau'=\tau-\eta\kappa(\tau+\rho)$, so that
    $\tau_T\geq\tau_1-T\eta_0\kappa(\tau_1+\rho)$, as long as that is positive.
    """
    origin = (Fraction(0), Fraction(0))
    p, k = planar.inspired(origin, Fraction(0)), planar.curvature
    least = [a - dot(s, s) / (2 * k) for a, s in zip(planar.heights, planar.slopes, strict=True)]
    remaining = 1 / k - steps * planar.rate * k * (1 / k + planar.rho)
    weights = [eq8_weight(Fraction(1, 2), a, sum(planar.heights) / 2, planar.lam, 2) for a in planar.heights]
    return [
        {"assumption": "every domain's loss is at least 0", "value": [str(x) for x in least], "holds": min(least) >= 0},
        {"assumption": "the first gradient has norm 1", "value": str(dot(p, p)), "holds": dot(p, p) == 1},
        {
            "assumption": f"SAM keeps its direction for {steps} steps",
            "value": str(remaining),
            "holds": remaining > 0 and sams_turning(planar) == 0,
        },
        {"assumption": "DISAM's weights are positive", "value": [str(b) for b in weights], "holds": min(weights) > 0},
    ]


def _larger_rho_in_theorem_2() -> dict[str, str]:
    r"""Theorem 2's right side on $L_S(w)=\min(w^2,1)$ at $w=0$: its root has $\lVert w\rVert/\rho=0$ whatever $\rho$
    is, and the maximum over the ball is $\min(\rho^2,1)$."""
    rows = {rho: min(rho**2, Fraction(1)) for rho in (Fraction(1, 2), Fraction(1))}
    return {f"maximum with rho = {rho}, the root being the same": str(value) for rho, value in rows.items()}


def _sign(x: Number) -> int:
    if not (bool(x > 0) or bool(x < 0)):
        raise ComputationError("the sign of an ascent direction is not certain; use more bits")
    return 1 if bool(x > 0) else -1


def _exact(x: Fraction) -> flint.fmpq:
    return flint.fmpq(x.numerator, x.denominator)


def _fraction(x: flint.fmpq) -> Fraction:
    return Fraction(int(x.p), int(x.q))


def _plus(x: Plane, y: Plane) -> Plane:
    return x[0] + y[0], x[1] + y[1]


def _scale(factor: Fraction, x: Plane) -> Plane:
    return factor * x[0], factor * x[1]


def _times(diagonal: Plane, x: Plane) -> Plane:
    return diagonal[0] * x[0], diagonal[1] * x[1]


def _unit(x: Plane) -> Plane:
    square = dot(x, x)
    norm = Fraction(isqrt(square.numerator), isqrt(square.denominator))
    if norm**2 != square:
        raise ComputationError(f"the norm of {x[0]}, {x[1]} is not rational")
    return _scale(1 / norm, x)


BOUND = (
    r"$\frac1T\sum_{t=1}^TE\lVert\nabla L_p(w_t)\rVert^2\leq\frac{L_p(w_0)-L_{\min}}{\eta_0\sqrt T}"
    r"+\frac{(LG^2+\rho^2L\Gamma^2)\,\eta_0\log T}{\sqrt T}$"
)
ASSUMED = (
    r"$L$ is $L$-smooth, not convex, bounded below by $L_{\min}$",
    r"$\eta_t=\eta_0/\sqrt t$, $\rho$ fixed, and $w_0$ is read as the first iterate $w_1$",
)
WITHOUT_NOISE = r"gradients bounded by $G$ (here without noise)"
THEOREM1_VARIANT_CLAIMS = (
    Claim(
        id="thm1-disam",
        where="Theorem 1, Eq. (9)",
        statement=BOUND + r" for DISAM with $\Gamma\leq L$.",
        assumptions=(
            *ASSUMED,
            WITHOUT_NOISE,
            r"$\Gamma$ enters through the right side alone, which rises with it: $\Gamma=L$ allows the most",
        ),
        scope=r"a counterexample on which $\nabla\mathrm{Var}\{L_i\}\neq0$ at the minimiser of $L$ and DISAM leaves "
        r"SAM's path at once; also with $1+\log T$ in place of $\log T$. For larger $T$ it is taken that no $w_t$ is "
        r"exactly a zero of $\nabla L_{DI}$",
        expected=Verdict.REFUTED,
        check=check_thm1_disam,
        repaired_by="conv-corrected",
    ),
    Claim(
        id="thm1-stochastic",
        where="Theorem 1, Eq. (9)",
        statement=BOUND + r", with the expectation over noisy gradients of norm at most $G$, for SAM and DISAM.",
        assumptions=(
            *ASSUMED,
            r"a batch moves both domains by the same $n=\pm\frac12$, with equal chances and independently of the past",
            "the ascent uses all data, or (Algorithm 1) the batch of the step: both are checked",
        ),
        scope=r"a counterexample, also with $1+\log T$ in place of $\log T$. The left side is bounded below for every "
        "$T$ by a symmetry that is checked on every interval where no sign changes, and enclosed over all noise "
        r"sequences for $T\leq6$; no $w_t$ is taken to be exactly where an ascent direction vanishes",
        expected=Verdict.REFUTED,
        check=check_thm1_stochastic,
        repaired_by="conv-corrected-stochastic",
    ),
    Claim(
        id="thm1-readings",
        where="Sec. 2.1, Theorem 1 and its proof",
        statement=r"Under at least one of three readings of $L_p$ and its gradient Theorem 1 holds: (R1) "
        r"$\max_{\lVert\epsilon\rVert\leq\rho}L(w+\epsilon)$; (R2) $L(w^{asc})$ with $\nabla L(w^{asc})$ for its "
        r"gradient; (R3) $L(w^{asc})$ with the derivative of $w\mapsto L(w^{asc}(w))$.",
        assumptions=(*ASSUMED, WITHOUT_NOISE),
        scope=r"one counterexample for all three, for SAM and DISAM: on $w^2/2$ they have the same value and gradient "
        r"for $w\neq0$. That they are not the same in general is shown by an exact quadratic in the plane",
        expected=Verdict.REFUTED,
        check=check_thm1_readings,
        repaired_by="conv-corrected",
        references=("Danskin 1967, The Theory of Max-Min: the gradient of a maximum",),
    ),
    Claim(
        id="thm1-strongly-convex",
        where="Theorem 1, what it misses",
        statement=r"On every $\mu$-strongly convex loss the bound of Theorem 1 fails after a finite $T_0$. For SAM "
        r"$\lVert\nabla L(w^{asc})\rVert\geq\lVert\nabla L(w)\rVert+\mu\rho$; for any $w$ and any maximiser "
        r"$\epsilon^*$ of $L$ over its ball, whatever the algorithm, "
        r"$\lVert\nabla L(w+\epsilon^*)\rVert\geq\mu(\lVert w-w^*\rVert+\rho)$. So the left side stays at least "
        r"$\mu^2\rho^2$, and the right side is below that for all $T>T_0=\exp\!\big(-\frac AB"
        r"-2W_{-1}\big(-\frac{\mu^2\rho^2}{2B}e^{-A/2B}\big)\big)$, $A=(L_p(w_1)-L_{\min})/\eta_0$, "
        r"$B=(LG^2+\rho^2L\Gamma^2)\eta_0$.",
        assumptions=(
            r"$L_p$ in reading R2 (the ascent point, for the first inequality) or R1 (the maximum, for the second)",
            r"$L$ is differentiable and $\mu$-strongly convex on a convex set with the minimiser $w^*$ and the "
            r"$\rho$-balls of all iterates (on all of space no gradient bound $G$ could hold)",
            r"$\nabla L(w_t)\neq0$ at every step of SAM, so that its ascent point is defined",
            r"$T_0$ is read as 0 where $\mu^2\rho^2>2Be^{A/2B-1}$, which is the most that the bound ever is",
        ),
        scope="every dimension. The steps are identities in inner products that computer algebra expands; all that is "
        "left to the reader is that a sum of terms that are not negative is not negative. The first inequality, "
        r"without $\lVert\nabla L(w)\rVert$, holds for DISAM too where $\langle\nabla L,\nabla L_{DI}\rangle\geq0$",
        expected=Verdict.PROVED,
        check=check_strongly_convex,
        references=(
            "Danskin 1967, The Theory of Max-Min: the gradient of a maximum",
            "Corless et al. 1996, On the Lambert W function",
        ),
    ),
    Claim(
        id="lambda-remark",
        where="App. B.3, the influence of lambda",
        statement=r"$\lambda$ regulates the adjustment of the weights $\beta_i$, a higher $\lambda$ adjusting more; "
        r"too large a $\lambda$ adjusts over-aggressively early in the training.",
        assumptions=(r"over-aggressive is read as: some $\beta_i$ is negative, so that the ascent goes down a domain",),
        scope=r"the first half holds for every $M$ (symbolic); the second where the domain losses are furthest apart "
        "early, which two exact runs show to be a condition. The variance over repeated experiments is a measurement, "
        "and not judged here",
        expected=Verdict.CONDITIONAL,
        check=check_lambda_remark,
    ),
    Claim(
        id="rho-remark",
        where="Sec. 3.3 and App. B.4, the role of rho",
        statement=r"At the same value of $\rho^2L\Gamma^2$, as DISAM's $\Gamma$ is smaller than SAM's, DISAM permits a "
        r"larger $\rho$ than SAM, and so (Theorem 2) generalises better.",
        assumptions=(
            r"$\Gamma$ is what the proof makes it: a bound on $\phi_t/\eta_t$, $\phi_t$ the angle by which the ascent "
            "direction turns in a step",
        ),
        scope="one exact problem on which the premise is reversed; it says nothing of how often the premise holds. "
        "Beside it: the bound that the remark reads is refuted, the corrected one has a floor without $\\Gamma$, and "
        r"Theorem 2's right side can rise with $\rho$",
        expected=Verdict.REFUTED,
        check=check_rho_remark,
        repaired_by="conv-corrected",
    ),
)
