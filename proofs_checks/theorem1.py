r"""Theorem 1 as printed -> an exact problem on which both sides are enclosed in intervals; and a bound that does hold.

The problem: $L(w)=w^2/2$ (so $L=1$, $L_{\min}=0$), $\rho=1$, $w_1=1/100$, $\eta_t=\eta_0/\sqrt t$ with $\eta_0=1/2$.
The ascent point lies $\rho$ further from the minimum than $w_t$: $|L'(w_t^{asc})|=|w_t|+\rho\geq1$ for ever, while the
printed bound goes to 0. Two paths decide it. One runs SAM on $w^2/2$ in ball arithmetic (Arb). The other
runs Algorithm 1 itself, domain by domain with the weights of Eq. 8, on two domains whose pooled loss is $w^2/2+1/2$, in
mpmath's interval arithmetic. Their enclosures must overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import flint
import mpmath
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.convergence import corrected_floor, corrected_left, thm1_bound
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
from proofs_checks.method import eq8_weight


@dataclass(frozen=True)
class Problem:
    r"""Two domains $L_i(w)=(w\mp1)^2/2$ of equal size, full batches; and the constants that the theorem is told.

    $L(w)=w^2/2+1/2$ and $\mathrm{Var}\{L_i\}=w^2$, so that $L_{DI}'=(1-2\lambda)w$: SAM's and DISAM's ascent points
    agree for $\lambda<1/2$.
    """

    start: Fraction = Fraction(1, 100)
    rho: Fraction = Fraction(1)
    rate: Fraction = Fraction(1, 2)
    smoothness: Fraction = Fraction(1)
    gradient_bound: Fraction = Fraction(3, 2)
    turning: Fraction = Fraction(1)


@dataclass(frozen=True)
class Sides:
    """Enclosures of the theorem's two sides after ``steps`` steps, and an upper bound of every gradient norm met."""

    steps: int
    left: Ends
    right: Ends
    largest: Fraction


def thm1_bound_harmonic(
    gap: Number, rate: Number, L: Number, G: Number, rho: Number, turning: Number, T: Number
) -> Number:
    r"""The same with $1+\log T\geq\sum_{t\leq T}1/t$; the printed $\log T$ is below that sum for every $T$."""
    return gap / rate / T.sqrt() + (L * G**2 + rho**2 * L * turning**2) * rate * (1 + T.log()) / T.sqrt()


def ball_path(problem: Problem, steps: int, bound: Callable[..., Number]) -> Sides:
    r"""SAM on $w^2/2$ in ball arithmetic: $w_{t+1}=w_t-\eta_t(w_t+\rho\,\mathrm{sign}(w_t))$."""
    with flint.ctx.workprec(BITS):
        w, rho, rate = to_ball(problem.start), to_ball(problem.rho), to_ball(problem.rate)
        total, largest = flint.arb(0), abs(w)
        gap = (abs(w) + rho) ** 2 / 2
        for t in range(1, steps + 1):
            gradient = w + _signed(rho, positive=w > 0, negative=w < 0, step=t)
            total += gradient**2
            largest = largest.max(abs(gradient)).max(abs(w))
            w -= rate / flint.arb(t).sqrt() * gradient
        constants = map(to_ball, (problem.smoothness, problem.gradient_bound, problem.rho, problem.turning))
        right = bound(gap, rate, *constants, flint.arb(steps))
        return Sides(steps, ball_ends(total / steps), ball_ends(right), ball_ends(largest)[1])


def interval_path(problem: Problem, steps: int, bound: Callable[..., Number], *, lam: Fraction = Fraction(0)) -> Sides:
    r"""Algorithm 1 on the two domains in interval arithmetic: the ascent goes along $\sum_i\beta_iL_i'$ of Eq. 8."""
    centres = (1, -1)
    with interval_precision(BITS):
        w, rho, rate, lam_ = map(to_interval, (problem.start, problem.rho, problem.rate, lam))
        share = mpmath.iv.mpf(1) / len(centres)
        total, largest = mpmath.iv.mpf(0), abs(w).b
        gap = None
        for t in range(1, steps + 1):
            losses = [(w - c) ** 2 / 2 for c in centres]
            weights = [eq8_weight(share, loss, sum(losses) * share, lam_, len(centres)) for loss in losses]
            direction = sum(weight * (w - c) for weight, c in zip(weights, centres, strict=True))
            ascent = w + _signed(rho, positive=direction.a > 0, negative=direction.b < 0, step=t)
            if gap is None:  # the pooled loss at the first ascent point, less its minimum 1/2 at 0
                gap = sum((ascent - c) ** 2 / 2 for c in centres) * share - sum(share * c**2 / 2 for c in centres)
            gradient = sum(ascent - c for c in centres) * share
            total += gradient**2
            largest = max(largest, abs(gradient).b, abs(w).b)
            w -= rate / mpmath.iv.sqrt(mpmath.iv.mpf(t)) * gradient
        constants = map(to_interval, (problem.smoothness, problem.gradient_bound, problem.rho, problem.turning))
        right = bound(gap, rate, *constants, IntervalSteps(steps))
        return Sides(steps, interval_ends(total / steps), interval_ends(right), interval_ends(largest)[1])


def assumptions_on(problem: Problem, largest: Fraction) -> list[dict[str, Any]]:
    r"""Theorem 1's assumptions, each checked on the problem; ``largest`` bounds every gradient norm that was met.

    A loss that is $w^2/2$ on $[-G,G]$ and goes on outside with the derivative that ``knots`` draw (odd, piecewise
    linear) gives the same run, and meets the assumptions everywhere: smooth, not convex, with a bounded gradient.
    """
    G, L = problem.gradient_bound, problem.smoothness
    knots = [(Fraction(0), Fraction(0)), (G, G), (3 * G / 2, G / 2), (2 * G, G / 2)]  # w, derivative; then constant
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(knots)]
    heights = [height for _, height in knots]
    return [
        {"assumption": "every gradient met is at most G", "value": decimal(largest, up=True), "holds": largest <= G},
        {"assumption": "the gradient is at most G on all of R", "value": str(max(heights)), "holds": max(heights) <= G},
        {
            "assumption": "L-smooth on all of R",
            "value": str(max(map(abs, slopes))),
            "holds": max(map(abs, slopes)) <= L,
        },
        {"assumption": "not convex", "value": str(min(slopes)), "holds": min(slopes) < 0},
        {"assumption": "bounded below by L_min, attained at 0", "value": "0", "holds": min(heights) >= 0},
        {"assumption": "Gamma <= L", "value": str(problem.turning), "holds": problem.turning <= L},
        {"assumption": "rho > 0 fixed", "value": str(problem.rho), "holds": problem.rho > 0},
    ]


def check_thm1(
    study: object,
    *,
    bound: Callable[..., Number] = thm1_bound,
    problem: Problem = Problem(),
    steps: tuple[int, ...] = (2, 64, 256),
    lam: Fraction = Fraction(1, 10),
) -> Evidence:
    """Does the left side exceed ``bound`` for SAM and DISAM, certified by both paths, with every assumption met?"""
    pairs = [_certified_sides(problem, T, bound, lam) for T in steps]
    rows = [_row(sides) for sides in pairs]
    largest = max(side.largest for sides in pairs for side in sides)
    assumptions = assumptions_on(problem, largest)
    failed = [row["assumption"] for row in assumptions if not row["holds"]]
    data: dict[str, Any] = {
        "problem": {k: str(v) for k, v in vars(problem).items()},
        "lambda_of_disam": str(lam),
        "sides": rows,
    }
    harmonic = _row(_certified_sides(problem, steps[-1], thm1_bound_harmonic, lam))
    data |= {
        "with_1_plus_log_T": harmonic,
        "violated_for_every_T_from": first_violation(problem, bound),
        "with_1_plus_log_T_from": first_violation(problem, thm1_bound_harmonic),
        "assumptions_checked": assumptions,
    }
    if failed:
        return Evidence(Verdict.UNDECIDED, f"not a counterexample, as this fails on it: {'; '.join(failed)}", data)
    shown = "; ".join(f"T={r['T']}: {r['left_at_least']} > {r['right_at_most']}" for r in rows if r["violated"])
    if not all(row["violated"] for row in rows):
        return Evidence(Verdict.UNDECIDED, f"the bound is not exceeded at every T tried ({shown or 'at none'})", data)
    reason = f"on $L(w)=w^2/2$ with $\\rho=1$ the left side exceeds the bound, for SAM and DISAM: {shown}"
    return Evidence(Verdict.REFUTED, reason, data)


def _certified_sides(problem: Problem, steps: int, bound: Callable[..., Number], lam: Fraction) -> list[Sides]:
    """SAM's by both paths and DISAM's; raises where their enclosures do not overlap."""
    ball = ball_path(problem, steps, bound)
    others = [interval_path(problem, steps, bound), interval_path(problem, steps, bound, lam=lam)]
    if not all(overlap(ball.left, o.left) and overlap(ball.right, o.right) for o in others):
        raise ComputationError(f"ball and interval arithmetic disagree at T={steps}; one of the two paths is wrong")
    return [ball, *others]


def _row(all_sides: list[Sides]) -> dict[str, Any]:
    left, right = min(s.left[0] for s in all_sides), max(s.right[1] for s in all_sides)
    return {
        "T": all_sides[0].steps,
        "left_at_least": decimal(left),
        "right_at_most": decimal(right, up=True),
        "violated": left > right,
    }


def first_violation(problem: Problem, bound: Callable[..., Number], limit: int = 2000) -> int | None:
    r"""The least $T\geq8$ with bound$(T)<\rho^2$, or None: as the left side is at least $\rho^2$ for every $T$, and
    $\log T/\sqrt T$ and $1/\sqrt T$ fall from $T=8>e^2$ on, the printed bound fails from there on, as long as no $w_t$
    is exactly 0 (where no ascent direction is defined)."""
    for T in range(8, limit):
        with flint.ctx.workprec(BITS):
            gap = (abs(to_ball(problem.start)) + to_ball(problem.rho)) ** 2 / 2
            constants = map(to_ball, (problem.smoothness, problem.gradient_bound, problem.rho, problem.turning))
            if bound(gap, to_ball(problem.rate), *constants, flint.arb(T)) < to_ball(problem.rho) ** 2:
                return T
    return None


def check_conv_corrected(
    study: object,
    *,
    left: Callable[..., Number] = corrected_left,
    floor: Callable[..., Number] = corrected_floor,
) -> Evidence:
    r"""Is one step's inequality $2(L(w_t)-L(w_{t+1}))+$ floor $\geq$ left a combination of two known ones?

    With $a=\nabla L(w_t)$, $b=\nabla L(w_t^{asc})$, $w_{t+1}=w_t-\eta b$: twice the descent lemma
    $L(w_t)-L(w_{t+1})-\eta\langle a,b\rangle+\frac{L\eta^2}2\lVert b\rVert^2\geq0$, and $\eta$ times
    $L^2\rho^2-\lVert a-b\rVert^2\geq0$ ($L$-smooth, $\lVert\epsilon_t\rVert\leq\rho_t$). The sum over $t$ telescopes.
    Exact runs in one dimension look for a violation.
    """
    eta, L, rho, now, then, aa, ab, bb = sp.symbols("eta L rho f_now f_then aa ab bb", real=True)
    descent_lemma = now - then - eta * ab + L * eta**2 / 2 * bb
    smoothness = L**2 * rho**2 - (aa - 2 * ab + bb)
    step = 2 * (now - then) + floor(eta, L, rho) - left(eta, L, aa, bb)
    remainder = sp.expand(step - 2 * descent_lemma - eta * smoothness)
    slacks = list(_exact_slacks(left, floor))
    worst = min(slacks, key=lambda row: row["slack"])
    shown = {k: str(v) for k, v in worst.items()}
    data = {"remainder_of_the_certificate": str(remainder), "exact_runs": len(slacks), "least_slack": shown}
    if remainder == 0 and worst["slack"] < 0:
        raise ComputationError(f"the certificate closes, and an exact run violates the bound: {shown}")
    if remainder == 0:
        reason = "one step is exactly twice the descent lemma plus $\\eta_t$ times the smoothness inequality"
        return Evidence(Verdict.PROVED, f"{reason}; {len(slacks)} exact runs agree", data)
    if worst["slack"] < 0:
        return Evidence(Verdict.REFUTED, f"an exact run exceeds the bound by {-worst['slack']}", data)
    return Evidence(Verdict.UNDECIDED, "the certificate does not close, and no exact run violates the bound", data)


def _exact_slacks(left: Callable[..., Number], floor: Callable[..., Number]) -> Iterator[dict[str, Any]]:
    r"""Right side less left side on $L(w)=w^2/2$, in rationals; the rule steps up (SAM), down, or half way up."""
    for rate in (Fraction(1), Fraction(1, 2), Fraction(1, 7)):
        for start in (Fraction(1), Fraction(-1, 10), Fraction(3)):
            for rule in (Fraction(1), Fraction(-1), Fraction(1, 2)):
                for steps in (1, 3, 40):
                    w, total = start, Fraction(0)
                    for _ in range(steps):
                        ascent = w + rule * (1 if w > 0 else -1)
                        total += floor(rate, 1, 1) - left(rate, 1, w**2, ascent**2)
                        w -= rate * ascent
                    yield {"eta": rate, "w_1": start, "epsilon": rule, "T": steps, "slack": start**2 + total}


def _signed(rho: Number, *, positive: bool, negative: bool, step: int) -> Number:
    if not (positive or negative):
        raise ComputationError(f"the sign of the ascent direction at step {step} is not certain; use more bits")
    return rho if positive else -rho


THEOREM1_CLAIMS = (
    Claim(
        id="thm1",
        where="Theorem 1, Eq. (9)",
        statement=r"$\frac1T\sum_{t=1}^T\lVert\nabla L_p(w_t)\rVert^2\leq\frac{L_p(w_0)-L_{\min}}{\eta_0\sqrt T}"
        r"+\frac{(LG^2+\rho^2L\Gamma^2)\,\eta_0\log T}{\sqrt T}$, for SAM with $\Gamma=L$ and DISAM with "
        r"$\Gamma\leq L$.",
        assumptions=(
            r"$L$ is $L$-smooth, not convex, bounded below by $L_{\min}$",
            r"gradients bounded by $G$ (here without noise), $\eta_t=\eta_0/\sqrt t$, $\rho$ fixed",
            r"$w_0$ is read as the first iterate $w_1$, as $\eta_0/\sqrt t$ is infinite at $t=0$",
        ),
        scope="a counterexample: every assumption is checked on it, both sides are enclosed in balls and, by another "
        "program, in intervals",
        expected=Verdict.REFUTED,
        check=check_thm1,
        repaired_by="conv-corrected",
    ),
    Claim(
        id="conv-corrected",
        where="Theorem 1, corrected",
        statement=r"$\sum_{t=1}^T\eta_t\big[\lVert\nabla L(w_t)\rVert^2"
        r"+(1-L\eta_t)\lVert\nabla L(w_t^{asc})\rVert^2\big]\leq2\big(L(w_1)-L_{\min}\big)"
        r"+L^2\sum_{t=1}^T\eta_t\rho_t^2$ "
        r"for $w_{t+1}=w_t-\eta_t\nabla L(w_t^{asc})$ and any ascent rule, SAM's and DISAM's among them.",
        assumptions=(r"$L$ is $L$-smooth and bounded below by $L_{\min}$", r"$\lVert w_t^{asc}-w_t\rVert\leq\rho_t$"),
        scope="every dimension, every step size (it says something about the ascent points where $\\eta_t<1/L$), full "
        "batches",
        expected=Verdict.PROVED,
        check=check_conv_corrected,
    ),
)
