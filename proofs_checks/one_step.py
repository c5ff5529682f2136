r"""A problem and a point -> one step of SAM or DISAM in balls, every assumption of Theorem 1 checked on the problem.

The losses are sums of sines and cosines: a bound of their derivatives that holds on all of $R^k$ is exact arithmetic on
the coefficients, with 1 in place of every sine and cosine. Two paths run the step. One evaluates symbolic
derivatives and the weights of Eq. 8 in ball arithmetic (Arb). The other knows $L_{DI}=L-\lambda\mathrm{Var}\{L_i\}$
alone and differentiates it numerically in 70 digits (mpmath). They must agree.

=================  ==================================================================
``w``, ``w_next``  $w_t$, $w_{t+1}=w_t-\eta_tv$, with $v=\nabla L(w_t^{asc})$
``g``, ``g_next``  $\nabla L_d(w_t)=\nabla L_{DI}(w_t)$, $\nabla L_d(w_{t+1})$
``u``              $g/\lVert g\rVert$, and $P=I-uu^T$
``phi``            $\phi_t$, the angle between $g$ and ``g_next``; $\sin\phi\leq\phi\leq\tan\phi$
=================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import prod
from typing import Any

import flint
import mpmath
import sympy as sp

from disam_theory.claims import Evidence, Verdict
from disam_theory.errors import ComputationError
from proofs_checks.enclosures import to_ball
from proofs_checks.exact import dot
from proofs_checks.method import eq6_summand, eq8_weight

BITS = 256
DIGITS = 70
AGREEMENT = "1e-40"  # the numerical derivatives are good to about 10^-70, the balls to 10^-70 as well
X, Y = sp.symbols("x y", real=True)
Number = Any  # a ball, an mpf, a Fraction or a sympy expression
Vector = list[Number]


@dataclass(frozen=True)
class Problem:
    r"""$M$ domains of equal size, full batches, and the constants that the theorem is told. ``lam`` 0 is SAM."""

    losses: tuple[sp.Expr, ...]  # (M,)
    start: tuple[Fraction, ...]  # (k,), k at most 2
    rho: Fraction
    eta: Fraction
    lam: Fraction
    smoothness: Fraction
    gradient_bound: Fraction

    @property
    def variables(self) -> tuple[sp.Symbol, ...]:
        return (X, Y)[: len(self.start)]

    @property
    def pooled(self) -> sp.Expr:
        r"""$L=\sum_i\alpha_iL_i$."""
        return sp.expand(sum(self.losses) / len(self.losses))

    @property
    def domain_inspired(self) -> sp.Expr:
        r"""$L_{DI}=L-\lambda\mathrm{Var}\{L_i\}$."""
        return self.pooled - sp.Rational(self.lam) * _variance(self.losses)


@dataclass(frozen=True)
class Step:
    """One step, in balls or in digits."""

    loss: Number  # L(w_asc), the proof's L_p(w_t)
    next_loss: Number  # L(w_asc_{t+1})
    descent: Number  # |v|^2
    cross: Number  # <v, epsilon_{t+1} - epsilon_t>
    sine2: Number  # sin(phi)^2
    tangent2: Number  # tan(phi)^2
    cosine: Number  # cos(phi)
    losses: Vector  # (M,) L_i(w_t)
    next_losses: Vector  # (M,) L_i(w_{t+1})
    g: Vector  # (k,)
    g_next: Vector  # (k,)
    now_reweighted: Vector  # (k,) sum of beta_{t+1}^i grad L_i(w_t)
    weight_part: Vector  # (k,) sum of (beta_{t+1}^i - beta_t^i) grad L_i(w_{t+1})
    curvature_part: Vector  # (k,) sum of beta_t^i (grad L_i(w_{t+1}) - grad L_i(w_t)) = H d_t + O(|d_t|^2)


def enclose(expression: sp.Expr, values: dict[sp.Symbol, flint.arb]) -> flint.arb:
    """A ball that contains the expression where the symbols have these values."""
    if isinstance(expression, sp.Rational):
        return to_ball(Fraction(int(expression.p), int(expression.q)))
    if isinstance(expression, sp.Symbol):
        return values[expression]
    if isinstance(expression, sp.Pow):
        return enclose(expression.base, values) ** int(expression.exp)
    parts = [enclose(part, values) for part in expression.args]
    if isinstance(expression, sp.Add):
        return sum(parts, flint.arb(0))
    if isinstance(expression, sp.Mul):
        return prod(parts, start=flint.arb(1))
    functions = {sp.sin: flint.arb.sin, sp.cos: flint.arb.cos, sp.log: flint.arb.log}
    if expression.func not in functions:
        raise ComputationError(f"{expression.func} cannot be enclosed; write the loss with sines and cosines")
    return functions[expression.func](parts[0])


def amplitude(expression: sp.Expr) -> Fraction:
    """A bound of the absolute value everywhere, whatever stands in the sines and cosines."""
    if isinstance(expression, sp.Rational):
        return abs(Fraction(int(expression.p), int(expression.q)))
    if isinstance(expression, sp.sin | sp.cos):
        return Fraction(1)
    if isinstance(expression, sp.Add):
        return sum((amplitude(part) for part in expression.args), Fraction(0))
    if isinstance(expression, sp.Mul):
        return prod((amplitude(part) for part in expression.args), start=Fraction(1))
    raise ComputationError(f"{expression} has no bound here; write the loss with sines and cosines")


@lru_cache(maxsize=64)
def certified_step(problem: Problem) -> Step:
    """The step in balls, and the same numbers by the other path.

    Raises:
        ComputationError: the paths differ by more than ``AGREEMENT``.
    """
    balls, digits = ball_step(problem), digit_step(problem)
    with flint.ctx.workprec(BITS):
        for name, value in vars(balls).items():
            pairs = zip(_as_list(value), _as_list(getattr(digits, name)), strict=True)
            if not all(abs(mine - flint.arb(other)) < flint.arb(AGREEMENT) for mine, other in pairs):
                raise ComputationError(f"{name} of the step differs between balls and digits; one path is wrong")
    return balls


def ball_step(problem: Problem) -> Step:
    """The step from symbolic derivatives and the weights of Eq. 8, in ball arithmetic."""
    number, variables = len(problem.losses), problem.variables
    share = to_ball(Fraction(1, number))

    def at(w: Vector) -> tuple[Vector, Vector, list[Vector]]:
        point = dict(zip(variables, w, strict=True))
        losses = [enclose(loss, point) for loss in problem.losses]
        weights = [eq8_weight(share, loss, sum(losses) / number, to_ball(problem.lam), number) for loss in losses]
        return losses, weights, [[enclose(loss.diff(x), point) for x in variables] for loss in problem.losses]

    with flint.ctx.workprec(BITS):
        w, rho = [to_ball(x) for x in problem.start], to_ball(problem.rho)
        losses, weights, now = at(w)
        g = combine(weights, now)
        u = [x / dot(g, g).sqrt() for x in g]
        ascent = add(w, u, rho)
        v = combine([share] * number, at(ascent)[2])
        w_next = add(w, v, -to_ball(problem.eta))
        next_losses, weights_next, then = at(w_next)
        g_next = combine(weights_next, then)
        u_next = [x / dot(g_next, g_next).sqrt() for x in g_next]
        chord = add(u_next, u, -1)
        across = add(g_next, u, -dot(u, g_next))  # P g_next
        return Step(
            loss=enclose(problem.pooled, dict(zip(variables, ascent, strict=True))),
            next_loss=enclose(problem.pooled, dict(zip(variables, add(w_next, u_next, rho), strict=True))),
            descent=dot(v, v),
            cross=rho * dot(v, chord),
            sine2=dot(across, across) / dot(g_next, g_next),
            tangent2=dot(across, across) / dot(u, g_next) ** 2,
            cosine=dot(u, u_next),
            losses=losses,
            next_losses=next_losses,
            g=g,
            g_next=g_next,
            now_reweighted=combine(weights_next, now),
            weight_part=combine(add(weights_next, weights, -1), then),
            curvature_part=combine(weights, [add(b, a, -1) for a, b in zip(now, then, strict=True)]),
        )


def digit_step(problem: Problem) -> Step:
    r"""The step from $L_{DI}$ alone, differentiated numerically; the angle by the arc cosine."""
    functions = [sp.lambdify(problem.variables, loss, "mpmath") for loss in problem.losses]
    number = len(functions)

    def pooled(*point: Number) -> Number:
        return sum(f(*point) for f in functions) / number

    with mpmath.workdps(DIGITS):
        rho, eta, lam, *w = (mpmath.mpf(x.numerator) / x.denominator for x in _exact_numbers(problem))

        def domain_inspired(*point: Number) -> Number:
            return pooled(*point) - lam * _variance([f(*point) for f in functions])

        g = _gradient(domain_inspired, w)
        ascent = add(w, g, rho / mpmath.norm(g))
        v = _gradient(pooled, ascent)
        w_next = add(w, v, -eta)
        g_next = _gradient(domain_inspired, w_next)
        ascent_next = add(w_next, g_next, rho / mpmath.norm(g_next))
        phi = mpmath.acos(max(-1, min(1, dot(g, g_next) / mpmath.norm(g) / mpmath.norm(g_next))))
        losses, next_losses = ([f(*point) for f in functions] for point in (w, w_next))
        # Eq. 8's weights again: the derivative of L_DI with respect to each domain's loss
        weights, weights_next = (
            [mpmath.mpf(1) / number - lam * _variance_slope(values, i) for i in range(number)]
            for values in (losses, next_losses)
        )
        now, then = ([_gradient(f, point) for f in functions] for point in (w, w_next))
        return Step(
            loss=pooled(*ascent),
            next_loss=pooled(*ascent_next),
            descent=dot(v, v),
            cross=dot(v, ascent_next) - dot(v, ascent) + eta * dot(v, v),
            sine2=mpmath.sin(phi) ** 2,
            tangent2=mpmath.tan(phi) ** 2,
            cosine=mpmath.cos(phi),
            losses=losses,
            next_losses=next_losses,
            g=g,
            g_next=g_next,
            now_reweighted=combine(weights_next, now),
            weight_part=add(g_next, combine(weights, then), -1),
            curvature_part=add(combine(weights, then), g, -1),
        )


def first_order(problem: Problem) -> dict[str, flint.arb]:
    r"""Inner products at $w_t$ with $h=H_dv$, $H_d=\nabla^2L_{DI}(w_t)$: ``vh`` is $\langle v,h\rangle$, and so on;
    ``size`` is $\lVert g\rVert$."""
    with flint.ctx.workprec(BITS):
        variables = problem.variables
        w = [to_ball(x) for x in problem.start]
        point = dict(zip(variables, w, strict=True))
        g = [enclose(problem.domain_inspired.diff(x), point) for x in variables]
        ascent = add(w, g, to_ball(problem.rho) / dot(g, g).sqrt())
        there = dict(zip(variables, ascent, strict=True))
        v = [enclose(problem.pooled.diff(x), there) for x in variables]
        hessian = [[enclose(problem.domain_inspired.diff(x, y), point) for y in variables] for x in variables]
        h = [dot(row, v) for row in hessian]
        return {"vg": dot(v, g), "vh": dot(v, h), "gh": dot(g, h), "hh": dot(h, h), "size": dot(g, g).sqrt()}


def assumptions_on(problem: Problem) -> list[dict[str, Any]]:
    r"""Theorem 1's assumptions on the problem, on all of $R^k$: the bounds are exact."""
    pooled, variables = problem.pooled, problem.variables
    smooth = max(sum(amplitude(pooled.diff(x, y)) for y in variables) for x in variables)
    steepest2 = sum(amplitude(pooled.diff(x)) ** 2 for x in variables)
    splits = [sp.expand(loss).as_coeff_Add() for loss in problem.losses]
    least = min(Fraction(int(c.p), int(c.q)) - amplitude(waves) for c, waves in splits)
    with flint.ctx.workprec(BITS):
        points = [[to_ball(x + shift) for x in problem.start] for shift in (0, 3)]
        at = [dict(zip(variables, w, strict=True)) for w in points]
        bent = min((enclose(pooled.diff(x, 2), values) for values in at for x in variables), key=float)
        positive = min(problem.rho, problem.eta) > 0 and problem.lam >= 0
        checks = [
            ("L-smooth on all of R^k: largest row sum of the Hessian at most", smooth, smooth <= problem.smoothness),
            ("squared gradient norm on all of R^k at most", steepest2, steepest2 <= problem.gradient_bound**2),
            ("bounded below: every domain's loss is at least", least, least >= 0),
            ("not convex: a second derivative is negative", bent, bool(bent < 0)),
            ("rho > 0 fixed, eta > 0, lambda >= 0", problem.rho, positive),
        ]
        return [{"assumption": name, "value": shown(value), "holds": holds} for name, value, holds in checks]


def judge(
    problems: Iterable[Problem],
    rows: list[dict[str, Any]],
    reason: str,
    *,
    premises: Sequence[dict[str, Any]] = (),
) -> Evidence:
    """Refuted where each row is ``violated`` on a problem that meets every assumption; otherwise undecided."""
    kept = list(dict.fromkeys(problems))
    met = [assumptions_on(problem) for problem in kept]
    checked = [{"problem": described(p), "assumptions": found} for p, found in zip(kept, met, strict=True)]
    data = {"rows": rows, "assumptions_checked": checked, "premises_checked": list(premises)}
    everything = [row for found in met for row in found] + list(premises)
    failed = sorted({row["assumption"] for row in everything if not row["holds"]})
    if failed:
        return Evidence(Verdict.UNDECIDED, f"not a counterexample, as this fails on it: {'; '.join(failed)}", data)
    if not rows or not all(row["violated"] for row in rows):
        return Evidence(Verdict.UNDECIDED, "the statement is not violated in every case tried", data)
    return Evidence(Verdict.REFUTED, reason, data)


def certify(
    remainders: dict[str, sp.Expr],
    instances: Iterable[tuple[dict[str, Any], bool]],
    reason: str,
    *,
    refutes: bool = True,
) -> Evidence:
    """Proved where every symbolic remainder is at least 0 and no instance (its values, is it violated) disagrees.

    Without ``refutes`` a violated instance is evidence against the statement that falls short of a counterexample.

    Raises:
        ComputationError: the remainders close the proof, and an instance violates the statement.
    """
    tried = list(instances)
    simplified = {name: sp.factor(sp.simplify(remainder)) for name, remainder in remainders.items()}
    closes = all(remainder.is_nonnegative for remainder in simplified.values())
    witness = next((values for values, violated in tried if violated), None)
    data: dict[str, Any] = {
        "remainders_at_least_0": {name: str(remainder) for name, remainder in simplified.items()},
        "instances": len(tried),
    }
    if closes and witness is not None:
        raise ComputationError(f"the certificate closes, and an instance violates the statement: {witness}")
    if closes:
        return Evidence(Verdict.PROVED, f"{reason}; {len(tried)} instances agree", data)
    if witness is not None and refutes:
        return Evidence(Verdict.REFUTED, "a certified instance violates it", data | {"witness": witness})
    return Evidence(Verdict.UNDECIDED, "the certificate does not close, and no instance is a counterexample", data)


def identity(name: str, difference: sp.Expr) -> dict[str, sp.Expr]:
    """Remainders for :func:`certify` that are both at least 0 only where the difference is 0."""
    return {name: difference, f"{name}, negative": -difference}


def with_sam(problem: Problem, *etas: Fraction) -> list[Problem]:
    """SAM (lambda 0) and DISAM on the problem, at each of these learning rates."""
    return [replace(problem, lam=lam, eta=eta) for lam in (Fraction(0), problem.lam) for eta in etas or (problem.eta,)]


def named(problem: Problem) -> dict[str, str]:
    """Which run a row is about."""
    return {"method": "DISAM" if problem.lam else "SAM", "eta": str(problem.eta), "lambda": str(problem.lam)}


def described(problem: Problem) -> dict[str, Any]:
    """The problem as text, exact."""
    numbers = {name: str(getattr(problem, name)) for name in ("rho", "eta", "lam", "smoothness", "gradient_bound")}
    return {"losses": [str(x) for x in problem.losses], "start": [str(x) for x in problem.start], **numbers}


def shown(value: Number) -> str:
    """A ball with its radius, an exact number as it is."""
    return value.str(8) if isinstance(value, flint.arb) else str(value)


def add(a: Vector, b: Vector, factor: Number) -> Vector:
    """``a + factor * b``."""
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def combine(weights: Vector, vectors: list[Vector]) -> Vector:
    """The weighted sum of the vectors."""
    return [dot(weights, column) for column in zip(*vectors, strict=True)]


def _exact_numbers(problem: Problem) -> list[Fraction]:
    return [Fraction(x) for x in (problem.rho, problem.eta, problem.lam, *problem.start)]


def _gradient(function: Callable[..., Number], point: Vector) -> Vector:
    axes = range(len(point))
    return [mpmath.diff(function, tuple(point), tuple(int(i == j) for j in axes)) for i in axes]


def _variance(losses: Sequence[Number]) -> Number:
    return sum(eq6_summand(a, b) for a in losses for b in losses) / len(losses) ** 2


def _variance_slope(losses: Vector, index: int) -> Number:
    r"""$\partial\mathrm{Var}/\partial L_i=\frac{2}{M^2}\sum_j(L_i-L_j)$."""
    return 2 * sum(losses[index] - other for other in losses) / mpmath.mpf(len(losses)) ** 2


def _as_list(value: Number) -> Vector:
    return value if isinstance(value, list) else [value]
