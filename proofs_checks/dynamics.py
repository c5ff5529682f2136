r"""DISAM against SAM, one step and in the limit -> expansions in inner products, exact steps, an exact fixed point.

Notation: $p=\nabla L(w)$, $q=\nabla\mathrm{Var}\{L_i\}(w)$, $g_\lambda=\nabla L_{DI}(w)=p-\lambda q$ and
$u_\lambda=g_\lambda/\lVert g_\lambda\rVert$, so that $w^{asc}=w+\rho u_\lambda$, with $\lambda=0$ for SAM. What is said
of every dimension is proved with the three inner products of $p$ and $q$ as symbols. What happens at a finite $\rho$ is
computed on domains with quadratic losses, where a step with a rational $\lVert g_\lambda\rVert$ stays rational.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import flint
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.errors import ComputationError
from proofs_checks.enclosures import to_ball
from proofs_checks.exact import dot, exact_strings, total
from proofs_checks.method import eq6_summand, eq8_weight

LAM_DEFAULT, RHO_DEFAULT = Fraction(1, 10), Fraction(1, 20)
SAM = Fraction(0)  # the lambda of SAM
SQUARE = ((-1, -1), (1, -1), (1, 1), (-1, 1))
Number = Any  # a Fraction, a ball, a float or a sympy expression
Vector = Sequence[Number]
LAM = sp.Symbol("lambda", nonnegative=True)
P, Q = sp.symbols("p q")  # formal vectors: only products of two of them are read
PP, PQ, QQ = sp.symbols("pp pq qq", real=True)  # |p|^2, <p,q>, |q|^2
GRAM = PP * QQ - PQ**2
EVERY_DIMENSION = (
    "every dimension, every number of domains and every loss: only the inner products of $p$ and $q$ enter"
)


def _fractions(*values: int | str) -> tuple[Fraction, ...]:
    return tuple(Fraction(x) for x in values)


@dataclass(frozen=True)
class Domains:
    r"""Domains with losses $L_i(w)=c_i+\langle s_i,w\rangle+\frac12w^\top H_iw$ and shares $\alpha_i$ of the data."""

    shares: Vector
    heights: Vector
    slopes: tuple[Vector, ...]
    curvatures: tuple[tuple[Vector, ...], ...]

    def losses(self, w: Vector) -> list[Number]:
        r"""$L_i(w)$."""
        terms = zip(self.heights, self.slopes, self.curvatures, strict=True)
        return [c + dot(s, w) + dot(w, _apply(H, w)) / 2 for c, s, H in terms]

    def gradients(self, w: Vector) -> list[Vector]:
        r"""$\nabla L_i(w)$."""
        return [_plus(s, 1, _apply(H, w)) for s, H in zip(self.slopes, self.curvatures, strict=True)]

    def mapped(self, convert: Callable[[Fraction], Number]) -> Domains:
        """The same domains in another arithmetic."""
        slopes = tuple([convert(x) for x in s] for s in self.slopes)
        curvatures = tuple(tuple([convert(x) for x in row] for row in H) for H in self.curvatures)
        shares, heights = ([convert(x) for x in values] for values in (self.shares, self.heights))
        return Domains(shares, heights, slopes, curvatures)


@dataclass(frozen=True)
class Case:
    r"""Domains, and one step's point and constants; $\rho$ and $\lambda$ are the paper's defaults."""

    domains: Domains
    start: Vector
    lam: Fraction = LAM_DEFAULT
    rho: Fraction = RHO_DEFAULT
    eta: Fraction = Fraction(1, 20)


def two_domains(p: Vector, q: Vector, first: Vector, second: Vector) -> Domains:
    r"""Two domains of equal size with $\nabla L=p$, $\nabla\mathrm{Var}=q$, $L_1=5$ and $L_2=1$ at $w=0$.

    ``first`` and ``second`` are the diagonals of their Hessians. As $\mathrm{Var}=(L_1-L_2)^2/4$, $q=2(s_1-s_2)$.
    """
    slopes = tuple([a + sign * b / 4 for a, b in zip(p, q, strict=True)] for sign in (1, -1))
    curvatures = tuple(
        tuple([x if i == j else Fraction(0) for j in range(len(p))] for i, x in enumerate(diagonal))
        for diagonal in (first, second)
    )
    return Domains(_fractions("1/2", "1/2"), _fractions(5, 1), slopes, curvatures)


ORIGIN = _fractions(0, 0)
# p = (3,4)/10 and g = p - q/10 = (4,3)/10 have rational lengths; the first domain is sharp along the first axis
FINITE = Case(two_domains(_fractions("3/10", "2/5"), _fractions(-1, 1), _fractions(33, 1), _fractions(1, 1)), ORIGIN)
WIDENED = Case(two_domains(_fractions("3/10", "2/5"), _fractions(-1, 1), _fractions(1, 1), _fractions(1, 1)), ORIGIN)
# here g = (4,3)/10 again, and the common Hessian turns the two ascent points' difference against q
NARROWED = Case(two_domains(_fractions("3/5", "4/5"), _fractions(2, 5), _fractions(4, 1), _fractions(4, 1)), ORIGIN)


def disam_direction(p: Number, q: Number, lam: Number) -> Number:
    r"""$g_\lambda=p-\lambda q$, coordinate by coordinate."""
    return p - lam * q


def variance_slope_rate(pp: Number, pq: Number, qq: Number, lam: Number) -> Number:
    r"""$\frac{d}{d\lambda}\langle q,u_\lambda\rangle=-\frac{\lVert p\rVert^2\lVert q\rVert^2-\langle p,q\rangle^2}
    {\lVert g_\lambda\rVert^3}$."""
    square = pp - 2 * lam * pq + lam**2 * qq
    return -(pp * qq - pq**2) / (square * _root(square))


def loss_slope_rate(pp: Number, pq: Number, qq: Number, lam: Number) -> Number:
    r"""$\frac{d}{d\lambda}\langle p,u_\lambda\rangle=\lambda\frac{d}{d\lambda}\langle q,u_\lambda\rangle$."""
    return lam * variance_slope_rate(pp, pq, qq, lam)


def ascent_radius(gain: Number, lipschitz: Number) -> Number:
    r"""The $\rho$ up to which the first order decides: $(\langle q,u_0\rangle-\langle q,u_\lambda\rangle)/L_V$."""
    return gain / lipschitz


def iterate_rate(q: Vector, hessian: Sequence[Vector], sam: Vector, disam: Vector) -> Number:
    r"""$q^\top H(u_0-u_\lambda)$."""
    return dot(q, _apply(hessian, _plus(sam, -1, disam)))


def disam_jacobian(H: Any, projector: Any, hessian_di: Any, rho: Number, norm: Number) -> Any:
    r"""$H+\rho HP\,\nabla^2L_{DI}/\lVert g_\lambda\rVert$ with $P=I-u_\lambda u_\lambda^\top$, for a constant $H$."""
    return H + rho * H * projector * hessian_di / norm


def sam_objective(loss: Number, norm: Number, rho: Number) -> Number:
    r"""$L+\rho\lVert\nabla L\rVert$."""
    return loss + rho * norm


def ascent_point(
    domains: Domains, w: Vector, lam: Number, rho: Number, root: Callable[[Number], Number] | None = None
) -> Vector:
    r"""$w^{asc}=w+\rho\frac{\sum_i\beta_i\nabla L_i}{\lVert\sum_i\beta_i\nabla L_i\rVert}$ with $\beta_i$ of Eq. 8."""
    g = _direction(domains, w, lam)
    norm = (root or _root)(dot(g, g))
    return [x + rho * y / norm for x, y in zip(w, g, strict=True)]


def step(domains: Domains, w: Vector, lam: Number, rho: Number, eta: Number) -> Vector:
    """One step of Algorithm 1 on full batches; SAM's with ``lam`` 0."""
    return _plus(w, -eta, _pooled(domains, domains.gradients(ascent_point(domains, w, lam, rho))))


def variance(domains: Domains, w: Vector) -> Number:
    r"""$\mathrm{Var}\{L_i(w)\}=\frac1M\sum_i(L_i-\bar L)^2$."""
    losses = domains.losses(w)
    deviations = [loss - sum(losses) / len(losses) for loss in losses]
    return dot(deviations, deviations) / len(losses)


def check_ascent_slope(
    study: object,
    *,
    of: sp.Symbol = Q,
    rate: Callable[..., Number] = variance_slope_rate,
    direction: Callable[..., Number] = disam_direction,
) -> Evidence:
    r"""Is ``rate`` the derivative in $\lambda$ of $\langle$ ``of`` $,u_\lambda\rangle$, and never positive?

    Three steps: the derivative with the inner products as symbols; ``rate`` as a factor that is nonnegative times
    $-D/\lVert g_\lambda\rVert^3$; $D=\lVert p\rVert^2\lVert q\rVert^2-\langle p,q\rangle^2\geq0$ as Lagrange's sum of
    squares. Automatic differentiation in ball arithmetic repeats the first on random vectors of 1 to 6 dimensions.
    """
    g = direction(P, Q, LAM)
    square = _inner(g, g)
    remainder = sp.simplify(sp.diff(_inner(of, g) / sp.sqrt(square), LAM) - rate(PP, PQ, QQ, LAM))
    factor = sp.simplify(-rate(PP, PQ, QQ, LAM) * square * sp.sqrt(square) / GRAM)
    rows = list(_slopes_in_balls(of, rate, direction))
    wrong = [row for row in rows if not row["agrees"]]
    if remainder == 0 and wrong:
        raise ComputationError(f"the symbolic derivative agrees, and ball arithmetic does not: {wrong[0]}")
    data: dict[str, Any] = {
        "symbolic_remainder": str(remainder),
        "factor_of_minus_D_over_the_cubed_norm": str(factor),
        "remainder_of_lagranges_identity": str(_lagrange_remainder()),
        "vectors_differentiated_in_balls": len(rows),
    }
    if remainder != 0 and wrong:
        return Evidence(Verdict.REFUTED, "the derivative in balls excludes this rate", data | {"witness": wrong[0]})
    if remainder == 0 and factor.is_nonnegative and _lagrange_remainder() == 0:
        reason = r"the derivative in $\lambda$ is $-D/\lVert g_\lambda\rVert^3$ times " + (
            f"{factor}, and $D\\geq0$ is a sum of squares (Lagrange); {len(rows)} vectors agree in ball arithmetic"
        )
        return Evidence(Verdict.PROVED, reason, data)
    return Evidence(Verdict.UNDECIDED, "the derivative does not come out as a nonpositive rate", data)


def check_ascent_variance(
    study: object,
    *,
    rate: Callable[..., Number] = variance_slope_rate,
    direction: Callable[..., Number] = disam_direction,
    radius: Callable[..., Number] = ascent_radius,
) -> Evidence:
    r"""The slope of the variance, and up to which $\rho$ it decides.

    With $r_\lambda=\mathrm{Var}(w+\rho u_\lambda)-\mathrm{Var}(w)-\rho\langle q,u_\lambda\rangle$ and
    $|r_\lambda|\leq L_V\rho^2/2$, SAM's variance less DISAM's is at least $\rho\,$gain$\,-L_V\rho^2$. That is concave
    in $\rho$ and 0 at 0: what remains is its sign at ``radius``.
    """
    slope = check_ascent_slope(study, rate=rate, direction=direction)
    gain, lipschitz = sp.symbols("gain L_V", positive=True)
    end = radius(gain, lipschitz)
    left_over = sp.simplify(end * gain - lipschitz * end**2)
    data = slope.data | {"left_over_at_the_radius": str(left_over)}
    if slope.verdict is Verdict.PROVED and not left_over.is_nonnegative:
        return Evidence(Verdict.UNDECIDED, f"at the stated radius only {left_over} is left over", data)
    return Evidence(slope.verdict, slope.reason, data)


def check_ascent_finite(
    study: object, *, case: Case = FINITE, ordered: Callable[[Number, Number], bool] = operator.le
) -> Evidence:
    r"""``ordered``(DISAM's variance, SAM's) at the two ascent points: exact on ``case``, counted on random domains."""
    assumptions = _assumptions(case)
    paths = {name: _both_paths(case, lam)["ascent_variance"] for name, lam in (("disam", case.lam), ("sam", SAM))}
    data: dict[str, Any] = {
        "witness": _shown(case),
        "variance_at_w": str(variance(case.domains, case.start)),
        "variance_at_the_ascent_point": exact_strings(paths),
        "assumptions_checked": assumptions,
        "at_the_ascent_points_of_random_domains": [
            _ordering_counts(replace(case, rho=rho)) for rho in _fractions("1/1000", "1/20", "1/2")
        ],
    }
    return _judge_witness(
        holds=ordered(paths["disam"], paths["sam"]),
        assumptions=assumptions,
        reason=f"exactly, at $\\rho={case.rho}$: variance {float(paths['disam']):.4f} at DISAM's ascent point, "
        f"{float(paths['sam']):.4f} at SAM's, as one domain curves sharply along DISAM's direction",
        data=data,
    )


def check_iterate_variance(
    study: object, *, case: Case = WIDENED, ordered: Callable[[Number, Number], bool] = operator.le
) -> Evidence:
    r"""``ordered``(DISAM's variance, SAM's) after one step from the same point, exact on ``case``."""
    assumptions = _assumptions(case)
    values = {name: _both_paths(case, lam)["next_variance"] for name, lam in (("disam", case.lam), ("sam", SAM))}
    counts = _ordering_counts(replace(case, eta=Fraction(1, 100)), after_step=True)
    data = {
        "witness": _shown(case),
        "variance_before": str(variance(case.domains, case.start)),
        "variance_after_one_step": exact_strings(values),
        "assumptions_checked": assumptions,
        "after_a_step_on_random_domains": counts,
    }
    return _judge_witness(
        holds=ordered(values["disam"], values["sam"]),
        assumptions=assumptions,
        reason=f"exactly: variance {float(values['disam']):.6f} after one step of DISAM, {float(values['sam']):.6f} "
        "after one of SAM, as the descent step goes against the shift of the ascent point; so too in "
        f"{counts['larger']} of {counts['larger'] + counts['smaller']} random convex problems",
        data=data,
    )


def check_iterate_rate(
    study: object, *, rate: Callable[..., Number] = iterate_rate, cases: tuple[Case, ...] = (WIDENED, NARROWED)
) -> Evidence:
    r"""The coefficient of $\eta\rho$ in $\mathrm{Var}(w_{t+1})$, DISAM's less SAM's, and both of its signs.

    Symbolic 2-jets of $L$ and $\mathrm{Var}$ in 1 to 4 dimensions; for $H=hI$ the coefficient is $h$ times what the
    ascent gains (every dimension); at small $\lambda$ it is $\lambda q^\top HP_pq/\lVert p\rVert$, with
    $P_p=I-pp^\top/\lVert p\rVert^2$. ``cases`` are exact steps with convex losses.
    """
    remainders = [_jet_remainder(n, rate) for n in range(1, 5)]
    isotropic = [_isotropic_remainder(n, rate) for n in range(1, 5)]
    ascent = check_ascent_slope(study)
    g = disam_direction(P, Q, LAM)
    turn = sp.diff(g / sp.sqrt(_inner(g, g)), LAM).subs(LAM, 0)
    turning_remainder = sp.simplify(turn + (Q - P * PQ / PP) / sp.sqrt(PP))
    rows = [_iterate_row(case) for case in cases]
    signs = {row["sign"] for row in rows}
    data: dict[str, Any] = {
        "remainders_in_1_to_4_dimensions": [str(r) for r in remainders],
        "remainder_of_the_turning_rate": str(turning_remainder),
        "remainders_for_isotropic_H": [str(r) for r in isotropic],
        "gain_at_the_ascent_point_is_nonnegative": ascent.verdict.value,
        "exact_steps": rows,
        "sign_of_the_coefficient_on_random_convex_problems": _sign_counts(),
    }
    if any([*remainders, *isotropic, turning_remainder]) or ascent.verdict is not Verdict.PROVED:
        return Evidence(Verdict.UNDECIDED, "the coefficient is not the one of the expansion", data)
    if signs != {1, -1} or not all(a["holds"] for row in rows for a in row["assumptions_checked"]):
        return Evidence(Verdict.UNDECIDED, "the exact steps do not show both signs", data)
    reason = (
        "the expansion has this coefficient, nonnegative for $H=hI$; exact convex steps show both signs: "
        + ", ".join(f"{float(Fraction(row['disam_minus_sam'])):+.6f}" for row in rows)
    )
    return Evidence(Verdict.PROVED, reason, data)


def check_fixed_point(
    study: object,
    *,
    lam: Fraction = LAM_DEFAULT,
    rho: Fraction = RHO_DEFAULT,
    eta: Fraction = Fraction(1, 10),
    fixed: Callable[[Fraction], Fraction] = operator.neg,
    largest_rho: Callable[[Number], Number] = lambda lam: 2 * lam / (1 - 2 * lam),
) -> Evidence:
    r"""Algorithm 1 on $L_1=\frac12(w-1)^2+2$, $L_2=\frac12(w+1)^2$ in exact rationals, against the stated fixed point.

    $w^{asc}=w\pm\rho$, so that a fixed point has $w=\mp\rho$: both candidates are tried for each $\rho$.
    """
    line, point = _line(), [fixed(rho)]
    identities = _line_identities(largest_rho)
    existence = [
        _fixed_candidates(line, lam, r, eta, largest_rho) for r in (rho, *_fractions("1/5", "6/25", "3/10", "1/2"))
    ]
    runs = [_run(line, start, lam, rho, eta, point[0]) for start in _fractions(-3, "-3/10", "1/7", 5)]
    at = {
        "w": point[0],
        "step_away": step(line, point, lam, rho, eta)[0] - point[0],
        "gradient_at_ascent_point": _slope(line, ascent_point(line, point, lam, rho)),
        "gradient_at_w": _slope(line, point),
        "loss_above_minimum": dot(line.shares, line.losses(point)) - dot(line.shares, line.losses([Fraction(0)])),
        "variance": variance(line, point),
        "variance_at_minimum": variance(line, [Fraction(0)]),
    }
    data = {"fixed_point": exact_strings(at), "identities": identities, "existence": existence, "runs": runs}
    if at["step_away"] != 0 or at["gradient_at_ascent_point"] != 0:
        return Evidence(Verdict.REFUTED, f"a step from {at['w']} moves by {at['step_away']}: not a fixed point", data)
    if not all(row["as_predicted"] for row in existence):
        return Evidence(Verdict.REFUTED, "a fixed point exists where none is predicted, or the reverse", data)
    if any(r != "0" for r in identities.values()) or not all(run["contracts"] and run["sam_bounded"] for run in runs):
        return Evidence(Verdict.UNDECIDED, "the contraction is not the one stated", data)
    reason = (
        f"every run contracts to $w={at['w']}$ by exactly $1-\\eta$ a step: there the gradient is 0 at the ascent "
        f"point and at $w$ it is {at['gradient_at_w']}, while SAM's at its ascent point never falls below $\\rho$"
    )
    return Evidence(Verdict.PROVED, reason, data)


def check_fixed_point_general(
    study: object,
    *,
    contraction: Callable[[Number], Number] = lambda t: t / (1 - t),
    limit: Fraction = Fraction(1, 2),
    largest_step: Callable[[Number], Number] = lambda kappa: 2 * (1 - kappa) / (1 + kappa) ** 2,
    side: int = -1,
) -> Evidence:
    r"""The inequalities behind the theorem, and random convex problems in 2 and 3 dimensions that meet its condition.

    With $t=r/(\lambda\lVert q_*\rVert)$, ``contraction`` bounds the Lipschitz constant $\kappa$ of
    $w\mapsto w_*-\rho u(w)$ on the ball: $2\rho\lVert g-g'\rVert/(\lVert g\rVert+\lVert g'\rVert)$ (Dunkl-Williams),
    both norms at least $\lambda\lVert q_*\rVert-r$. It must be below 1 for $t<$ ``limit``. ``largest_step`` is the
    $\eta L$ at which $2(1-\kappa)-\eta L(1+\kappa)^2$, the relative decrease of a step over $\eta$, is 0.
    """
    t, kappa, s, s2, cosine, reach, pull = sp.symbols("t kappa s s2 c r Lambda", real=True)
    chord, arc = s**2 + s2**2 - 2 * s * s2 * cosine, 2 - 2 * cosine
    algebra = {
        "dunkl_williams": sp.expand(chord - (s + s2) ** 2 / 4 * arc - (1 + cosine) * (s - s2) ** 2 / 2),
        "contraction": sp.simplify(contraction(reach / pull) - 2 * reach / (2 * (pull - reach))),
        "contraction_at_the_limit": sp.simplify(1 - contraction(t).subs(t, sp.Rational(limit))),
        "decrease_at_the_largest_step": sp.simplify(2 * (1 - kappa) - largest_step(kappa) * (1 + kappa) ** 2),
    }
    rows = [_settle(*problem, side) for problem in _pulled_problems(limit)]
    data: dict[str, Any] = {
        "algebra": {name: str(value) for name, value in algebra.items()},
        "problems_that_meet_the_condition": len(rows),
        "certified_in_a_box": sum(row["certified"] for row in rows),
        "algorithm_1_arrives": sum(row["arrives"] for row in rows),
        "variance_above_that_at_the_minimum": sum(row["wider"] for row in rows),
        "largest_ratio_t": max(row["t"] for row in rows),
    }
    counts = f"{data['certified_in_a_box']} certified and {data['algorithm_1_arrives']} reached of {len(rows)}"
    if not all(value == 0 for value in algebra.values()):
        return Evidence(Verdict.UNDECIDED, "the inequalities do not give the stated constants", data)
    if not all(row["arrives"] for row in rows):
        return Evidence(Verdict.REFUTED, f"Algorithm 1 does not go to the stated point: {counts}", data)
    if not all(row["certified"] for row in rows):
        return Evidence(Verdict.UNDECIDED, f"not every fixed point could be certified: {counts}", data)
    reason = f"the constants follow; on random convex problems that meet the condition, {counts} are as stated"
    return Evidence(Verdict.SUPPORTED, reason, data)


def check_not_gradient(
    study: object,
    *,
    case: Case = NARROWED,
    jacobian: Callable[..., Any] = disam_jacobian,
    objective: Callable[..., Number] = sam_objective,
) -> Evidence:
    r"""The Jacobian of $w\mapsto\nabla L(w^{asc})$ by its formula and by differentiating the update; line integrals.

    The gradient of a function has a symmetric Jacobian, and no circulation around a closed curve. SAM's field on a
    quadratic loss is compared with the gradient of ``objective``.
    """
    stated = _stated_jacobian(case, jacobian)
    derived = _derived_jacobian(case)
    asymmetry = derived[0, 1] - derived[1, 0]
    around = {name: _circulation(case, lam) for name, lam in (("disam", case.lam), ("sam", SAM))}
    n = sp.Symbol("n", positive=True, integer=True)
    H, projector = sp.MatrixSymbol("H", n, n), sp.MatrixSymbol("P", n, n)
    stretched = H * projector * H  # what SAM's Jacobian has beside H, up to a factor
    transposed = sp.refine(stretched.T, sp.Q.symmetric(H) & sp.Q.symmetric(projector)) - stretched
    remainders = [_sam_remainder(size, objective) for size in (2, 3)]
    data: dict[str, Any] = {
        "witness": _shown(case),
        "jacobian_of_disam": [[str(x) for x in row] for row in derived.tolist()],
        "asymmetry_of_disam": str(asymmetry),
        "circulation": {name: str(ball) for name, ball in around.items()},
        "sam_field_minus_gradient_in_2_and_3_dimensions": [str(r) for r in remainders],
        "sam_jacobian_minus_its_transpose": str(transposed),
    }
    if stated != derived:
        return Evidence(Verdict.REFUTED, "differentiating the update gives another Jacobian than the stated one", data)
    if any(r != 0 for r in remainders):
        return Evidence(Verdict.REFUTED, "SAM's field is not the gradient of the stated objective", data)
    if not around["sam"].contains(0):
        raise ComputationError("SAM's field is a gradient, and its circulation is not 0")
    if asymmetry == 0 or around["disam"].contains(0) or transposed != sp.ZeroMatrix(n, n):
        return Evidence(Verdict.UNDECIDED, "no asymmetry is certified here", data)
    reason = (
        f"at a rational point the Jacobian of DISAM's field is not symmetric (by {asymmetry}), and its integral around "
        "a square is not 0; SAM's is the gradient of the stated objective"
    )
    return Evidence(Verdict.PROVED, reason, data)


def check_equals_sam(
    study: object,
    *,
    turning: Callable[..., Number] = lambda pp, pq, qq, lam: lam**2 * (pp * qq - pq**2),
    same_side: Callable[..., bool] = lambda pp, pq, lam: lam * pq < pp,
) -> Evidence:
    r"""$\lVert p\rVert^2\lVert g_\lambda\rVert^2-\langle p,g_\lambda\rangle^2$ against ``turning``, and the sign of
    $\langle p,g_\lambda\rangle$; exact vectors compare the two directions coordinate by coordinate."""
    g = disam_direction(P, Q, LAM)
    remainder = sp.expand(PP * _inner(g, g) - _inner(P, g) ** 2 - turning(PP, PQ, QQ, LAM))
    counts = {"equal": 0, "reversed": 0, "different": 0}
    for lam, p, q in _direction_cases():
        d = [disam_direction(a, b, lam) for a, b in zip(p, q, strict=True)]
        parallel = all(d[i] * p[j] == d[j] * p[i] for i in range(len(p)) for j in range(i))
        found = ("equal" if dot(d, p) > 0 else "reversed") if parallel else "different"
        pp, pq = dot(p, p), dot(p, q)
        on_a_line = turning(pp, pq, dot(q, q), lam) == 0
        stated = ("equal" if same_side(pp, pq, lam) else "reversed") if on_a_line else "different"
        if stated != found:
            data = exact_strings({"p": p, "q": q, "lambda": lam}) | {"stated": stated, "found": found}
            return Evidence(Verdict.REFUTED, f"the directions are {found}, not {stated}, on an exact instance", data)
        counts[found] += 1
    turned, goes_down = _reversed_case()
    data = {"symbolic_remainder": str(remainder), "exact_instances": counts, "reversed": turned}
    if remainder != 0 or not all(counts.values()) or not goes_down:
        return Evidence(Verdict.UNDECIDED, "the stated condition is not the one of the inner products", data)
    reason = (
        r"the Gram determinant of $p$ and $g_\lambda$ is $\lambda^2$ times that of $p$ and $q$; "
        f"{sum(counts.values())} exact instances agree ({counts['equal']} equal, {counts['reversed']} reversed)"
    )
    return Evidence(Verdict.PROVED, reason, data)


def _apply(matrix: Sequence[Vector], x: Vector) -> Vector:
    return [dot(row, x) for row in matrix]


def _plus(x: Vector, factor: Number, y: Vector) -> Vector:
    return [a + factor * b for a, b in zip(x, y, strict=True)]


def _root(square: Number) -> Number:
    """The square root in the arithmetic of its argument; of a fraction only where it is a fraction."""
    if isinstance(square, float):
        return math.sqrt(square)
    if not isinstance(square, Fraction):
        return sp.sqrt(square) if isinstance(square, sp.Expr) else square.sqrt()
    root = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    if root == 0 or root**2 != square:
        raise ComputationError(f"the length of the ascent direction, root of {square}, is 0 or not rational")
    return root


def _pooled(domains: Domains, values: Sequence[Vector]) -> Vector:
    return [dot(domains.shares, column) for column in zip(*values, strict=True)]


def _weights(domains: Domains, w: Vector, lam: Number) -> Vector:
    losses = domains.losses(w)
    mean = sum(losses) / len(losses)
    pairs = zip(domains.shares, losses, strict=True)
    return [eq8_weight(alpha, loss, mean, lam, len(losses)) for alpha, loss in pairs]


def _direction(domains: Domains, w: Vector, lam: Number) -> Vector:
    weights = _weights(domains, w, lam)
    return [dot(weights, column) for column in zip(*domains.gradients(w), strict=True)]


def _inner(x: sp.Expr, y: sp.Expr) -> sp.Expr:
    """The inner product of two combinations of the formal vectors p and q."""
    products = {(2, 0): PP, (1, 1): PQ, (0, 2): QQ}
    return sum(c * products[powers] for powers, c in sp.Poly(sp.expand(x * y), P, Q).terms())


def _lagrange_remainder() -> sp.Expr:
    r"""$\frac12\sum_{i,j}(p_iq_j-p_jq_i)^2-\lVert p\rVert^2\lVert q\rVert^2+\langle p,q\rangle^2$, any dimension."""
    p_i, q_i, p_j, q_j = sp.symbols("p_i q_i p_j q_j")
    squares = total(total((p_i * q_j - p_j * q_i) ** 2 / 2, p_j, q_j), p_i, q_i)
    norms = total(p_i**2, p_i, q_i) * total(q_i**2, p_i, q_i)
    return sp.expand(squares - norms + total(p_i * q_i, p_i, q_i) ** 2)


def _slopes_in_balls(
    of: sp.Symbol, rate: Callable[..., Number], direction: Callable[..., Number]
) -> Iterator[dict[str, Any]]:
    """Does the derivative of the slope, by power series of balls, overlap ``rate`` on random vectors?"""
    rng = random.Random(0)
    for index in range(120):
        p, q = ([Fraction(rng.randint(-9, 9), rng.randint(1, 5)) for _ in range(1 + index % 6)] for _ in range(2))
        lam = Fraction(rng.randint(1, 9), 10)
        if not any(direction(a, b, lam) for a, b in zip(p, q, strict=True)):
            continue
        p_series, q_series = ([flint.arb_series([to_ball(x)], prec=2) for x in v] for v in (p, q))
        moving = flint.arb_series([to_ball(lam), 1], prec=2)
        g = [direction(a, b, moving) for a, b in zip(p_series, q_series, strict=True)]
        slope = (dot(q_series if of == Q else p_series, g) / dot(g, g).sqrt())[1]
        stated = rate(*(to_ball(dot(x, y)) for x, y in ((p, p), (p, q), (q, q))), to_ball(lam))
        yield exact_strings({"p": p, "q": q, "lambda": lam, "derivative": slope}) | {"agrees": slope.overlaps(stated)}


def _shown(case: Case) -> dict[str, Any]:
    """The case as exact text."""
    domains = case.domains
    shown = exact_strings({"w": case.start, "lambda": case.lam, "rho": case.rho, "eta": case.eta})
    shown |= exact_strings({"alpha": domains.shares, "losses_at_0": domains.heights})
    shown["gradients_at_0"] = [[str(x) for x in s] for s in domains.slopes]
    return shown | {"hessians": [[[str(x) for x in row] for row in H] for H in domains.curvatures]}


def _assumptions(case: Case) -> list[dict[str, Any]]:
    """What the statements take for granted, each checked on the case."""
    domains = case.domains
    hessians = [_exact_matrix(H) for H in domains.curvatures]
    slopes = [_exact_matrix([[x] for x in s]) for s in domains.slopes]
    convex = all(H.is_positive_definite for H in hessians)
    minima = [
        sp.Rational(c) - (s.T * H.inv() * s)[0] / 2 for c, s, H in zip(domains.heights, slopes, hessians, strict=True)
    ]
    weights = _weights(domains, case.start, case.lam)
    trace = sum(alpha * H.trace() for alpha, H in zip(domains.shares, hessians, strict=True))
    rows = {
        "every domain's loss is strictly convex": (convex, "positive definite"),
        "every domain's loss is nonnegative": (min(minima) >= 0, [str(x) for x in minima]),
        "the shares sum to 1": (sum(domains.shares) == 1, [str(x) for x in domains.shares]),
        "DISAM's weights are positive": (min(weights) > 0, [str(x) for x in weights]),
        "lambda > 0 and rho > 0": (case.lam > 0 and case.rho > 0, [str(case.lam), str(case.rho)]),
        "0 < eta <= 1/L": (case.eta > 0 and case.eta * trace <= 1, f"L at most {trace}"),
    }
    return [{"assumption": name, "holds": bool(holds), "value": value} for name, (holds, value) in rows.items()]


def _judge_witness(*, holds: bool, assumptions: list[dict[str, Any]], reason: str, data: dict[str, Any]) -> Evidence:
    failed = [row["assumption"] for row in assumptions if not row["holds"]]
    if failed:
        return Evidence(Verdict.UNDECIDED, f"not a counterexample, as this fails on it: {'; '.join(failed)}", data)
    if holds:
        return Evidence(Verdict.UNDECIDED, "the case does not contradict the statement", data)
    return Evidence(Verdict.REFUTED, reason, data)


def _both_paths(case: Case, lam: Number) -> dict[str, Fraction]:
    r"""The variance at the ascent point and after the step: by the weights of Eq. 8 in fractions, and by sympy's
    derivatives of $L-\lambda\mathrm{Var}$; raises where they differ."""
    domains, w = case.domains, case.start
    first = {
        "ascent_variance": variance(domains, ascent_point(domains, w, lam, case.rho)),
        "next_variance": variance(domains, step(domains, w, lam, case.rho, case.eta)),
    }
    x, pooled, spread = _symbolic(case)
    here = dict(zip(x, map(sp.Rational, w), strict=True))
    g = sp.Matrix([pooled - sp.Rational(lam) * spread]).jacobian(x).subs(here)
    ascent = sp.Matrix([list(here.values())]) + sp.Rational(case.rho) * g / sp.sqrt(g.dot(g))
    down = sp.Matrix([pooled]).jacobian(x).subs(dict(zip(x, ascent, strict=True)))
    after = sp.Matrix([list(here.values())]) - sp.Rational(case.eta) * down
    second = {
        "ascent_variance": spread.subs(dict(zip(x, ascent, strict=True))),
        "next_variance": spread.subs(dict(zip(x, after, strict=True))),
    }
    if any(sp.Rational(first[k]) != sp.nsimplify(second[k]) for k in first):
        raise ComputationError(f"fractions and symbols disagree about the step: {first}, {second}")
    return first


def _symbolic(case: Case) -> tuple[list[sp.Symbol], sp.Expr, sp.Expr]:
    """Coordinates, the pooled loss, and the variance as Eq. 6 prints it, for sympy to differentiate."""
    x = list(sp.symbols(f"w1:{len(case.start) + 1}", real=True))
    exact = case.domains.mapped(sp.Rational)
    losses = exact.losses(x)
    pairs = [eq6_summand(a, b) for a in losses for b in losses]
    return x, dot(exact.shares, losses), sum(pairs) / len(pairs)


def _random_domains(count: int) -> Iterator[tuple[Domains, Vector]]:
    """Two to four domains with convex quadratic losses in two or three dimensions, and a point."""
    rng = random.Random(0)
    for index in range(count):
        number, n = 2 + index % 3, 2 + index % 2

        def integers(bound: int, n: int = n) -> list[Fraction]:
            return [Fraction(rng.randint(-bound, bound)) for _ in range(n)]

        factors = [[integers(2) for _ in range(n)] for _ in range(number)]
        sizes = [rng.randint(1, 4) for _ in range(number)]
        yield (
            Domains(
                [Fraction(size, sum(sizes)) for size in sizes],
                [Fraction(rng.randint(0, 9)) for _ in range(number)],
                tuple(integers(5) for _ in range(number)),
                tuple(tuple([dot(a, b) for b in A] for a in A) for A in factors),
            ),
            integers(1),
        )


def _p_and_q(domains: Domains, w: Vector) -> tuple[Vector, Vector]:
    r"""$p=g_0$ and $q=g_0-g_1$."""
    p = _direction(domains, w, SAM)
    return p, _plus(p, -1, _direction(domains, w, Fraction(1)))


def _ordering_counts(case: Case, *, after_step: bool = False, count: int = 150) -> dict[str, Any]:
    """How often the variance is smaller at DISAM's ascent point, or after its step, than at SAM's, decided in balls.

    On random domains, with the constants of ``case``; those where the two directions are parallel are left out.
    """
    rho, eta = to_ball(case.rho), to_ball(case.eta)
    counts = {"smaller": 0, "larger": 0, "not_decided": 0}
    for domains, w in _random_domains(count):
        p, q = _p_and_q(domains, w)
        if dot(p, p) * dot(q, q) == dot(p, q) ** 2:
            continue
        balls, here, values = domains.mapped(to_ball), [to_ball(x) for x in w], []
        for lam in (to_ball(SAM), to_ball(case.lam)):
            point = step(balls, here, lam, rho, eta) if after_step else ascent_point(balls, here, lam, rho)
            values.append(variance(balls, point))
        sam, disam = values
        counts["smaller" if disam < sam else "larger" if disam > sam else "not_decided"] += 1
    return exact_strings({"rho": case.rho, "eta": case.eta, "lambda": case.lam}) | counts


def _jet_remainder(n: int, rate: Callable[..., Number]) -> sp.Expr:
    r"""Coefficient of $\eta\rho$ in $\mathrm{Var}(w_{t+1})$, DISAM's less SAM's, less ``rate``, in $n$ dimensions."""
    eta, rho = sp.symbols("eta rho", positive=True)
    p, q, sam, disam = (list(sp.symbols(f"{name}1:{n + 1}", real=True)) for name in ("p", "q", "u", "v"))
    hessian, second = (_symmetric(name, n) for name in ("h", "b"))

    def moved(u: Vector, remainder: str) -> sp.Expr:
        rest = sp.symbols(f"{remainder}1:{n + 1}", real=True)  # of order rho^2 in the gradient at the ascent point
        d = [-eta * (a + rho * b + rho**2 * c) for a, b, c in zip(p, _apply(hessian, u), rest, strict=True)]
        return dot(q, d) + dot(d, _apply(second, d)) / 2

    difference = moved(disam, "y") - moved(sam, "x")
    coefficient = sp.diff(sp.diff(difference, eta).subs(eta, 0), rho).subs(rho, 0)
    return sp.expand(coefficient - rate(q, hessian, sam, disam))


def _isotropic_remainder(n: int, rate: Callable[..., Number]) -> sp.Expr:
    r"""``rate`` for $H=hI$ less $h(\langle q,u_0\rangle-\langle q,u_\lambda\rangle)$, in $n$ dimensions."""
    h = sp.Symbol("h", positive=True)
    q, sam, disam = (list(sp.symbols(f"{name}1:{n + 1}", real=True)) for name in ("q", "u", "v"))
    hessian = [[h if i == j else sp.Integer(0) for j in range(n)] for i in range(n)]
    return sp.expand(rate(q, hessian, sam, disam) - h * (dot(q, sam) - dot(q, disam)))


def _symmetric(name: str, n: int) -> list[list[sp.Symbol]]:
    return [[sp.Symbol(f"{name}{min(i, j)}{max(i, j)}", real=True) for j in range(n)] for i in range(n)]


def _iterate_row(case: Case) -> dict[str, Any]:
    """The exact difference of the variances after one step, and its sign."""
    difference = _both_paths(case, case.lam)["next_variance"] - _both_paths(case, SAM)["next_variance"]
    sign = (difference > 0) - (difference < 0)
    row = {"witness": _shown(case), "disam_minus_sam": str(difference), "sign": sign}
    return row | {"assumptions_checked": _assumptions(case)}


def _sign_counts(count: int = 1000) -> dict[str, int]:
    r"""The exact sign of $\lVert p\rVert^2q^\top HP_pq$ for random integer $p$, $q$, $H=A^\top A$ in 3 dimensions."""
    rng = random.Random(0)
    counts = {"positive": 0, "negative": 0, "zero": 0}
    for _ in range(count):
        p, q, *factor = ([rng.randint(-5, 5) for _ in range(3)] for _ in range(5))
        hessian = [[dot(a, b) for b in zip(*factor, strict=True)] for a in zip(*factor, strict=True)]
        value = dot(p, p) * dot(q, _apply(hessian, q)) - dot(p, q) * dot(q, _apply(hessian, p))
        counts["positive" if value > 0 else "negative" if value < 0 else "zero"] += 1
    return counts


def _line(first: int | str = "5/2", second: int | str = "1/2") -> Domains:
    r"""$\frac12(w-1)^2$ and $\frac12(w+1)^2$, moved to the given values at 0."""
    one = (_fractions(1),)
    return Domains(_fractions("1/2", "1/2"), _fractions(first, second), (_fractions(-1), _fractions(1)), (one, one))


def _slope(domains: Domains, w: Vector) -> Fraction:
    return _pooled(domains, domains.gradients(w))[0]


def _line_identities(largest_rho: Callable[[Number], Number]) -> dict[str, str]:
    r"""What the convergence on the line rests on, each as a remainder: $L_{DI}'$, its zero, a step on either side."""
    w, lam, rho, eta = sp.symbols("w lambda rho eta", real=True)
    losses = [(w - 1) ** 2 / 2 + 2, (w + 1) ** 2 / 2]
    pooled, spread = sum(losses) / 2, (losses[0] - losses[1]) ** 2 / 4
    g, down = sp.diff(pooled - lam * spread, w), sp.diff(pooled, w)
    remainders = {
        "L_slope_at_w_is_w": down - w,
        "L_DI_slope_increases_for_lambda_below_1/2": sp.diff(g, w) - (1 - 2 * lam),
        "L_DI_slope_is_zero_at_minus_the_largest_rho": g.subs(w, -largest_rho(lam)),
        "right_of_it_a_step_contracts_to_minus_rho": w - eta * down.subs(w, w + rho) + rho - (1 - eta) * (w + rho),
        "left_of_it_a_step_contracts_to_rho": w - eta * down.subs(w, w - rho) - rho - (1 - eta) * (w - rho),
    }
    return {name: str(sp.simplify(value)) for name, value in remainders.items()}


def _fixed_candidates(
    line: Domains, lam: Fraction, rho: Fraction, eta: Fraction, largest_rho: Callable[[Number], Number]
) -> dict[str, Any]:
    r"""Which of $w=\pm\rho$ does a step leave where it is? $-\rho$ alone, and for $\rho$ below the limit alone."""
    found = [w for w in (-rho, rho) if step(line, [w], lam, rho, eta) == [w]]
    expected = [-rho] if rho < largest_rho(lam) else []
    return {"rho": str(rho), "fixed_points": [str(w) for w in found], "as_predicted": found == expected}


def _run(
    line: Domains, start: Fraction, lam: Fraction, rho: Fraction, eta: Fraction, fixed: Fraction, steps: int = 120
) -> dict[str, Any]:
    r"""Algorithm 1 and SAM in exact rationals: every step where $L_{DI}'>0$ must contract to ``fixed`` by $1-\eta$."""
    w: Vector = [start]
    v: Vector = [start]
    contracts, waited, least = True, 0, None
    for _ in range(steps):
        right = _direction(line, w, lam)[0] > 0
        after = step(line, w, lam, rho, eta)
        contracts &= not right or after[0] - fixed == (1 - eta) * (w[0] - fixed)
        waited += not right
        w = after
        slope = abs(_slope(line, ascent_point(line, v, SAM, rho)))
        least = slope if least is None else min(least, slope)
        v = step(line, v, SAM, rho, eta)
    end = abs(_slope(line, ascent_point(line, w, lam, rho)))
    return {
        "start": str(start),
        "steps": steps,
        "steps_before_the_contraction": waited,
        "contracts": contracts and end < Fraction(1, 1000),
        "disam_gradient_at_ascent_point": float(end),
        "sam_bounded": least is not None and least >= rho,
        "sam_least_gradient_at_ascent_point": float(least or 0),
    }


def _pulled_problems(limit: Fraction, count: int = 40) -> Iterator[tuple[Domains, float]]:
    r"""Random domains with $w_*=0$ and one Hessian, where $r=\rho(L+\lambda L_V)<$ ``limit`` $\lambda\lVert q_*\rVert$.

    The one Hessian makes the variance quadratic, so that its smoothness is known: $L_V\leq\frac2M\sum_i
    \lVert\nabla L_i-\overline{\nabla L}\rVert^2$. Traces bound the Hessians. The condition is decided in rationals;
    yields the domains and the ratio $t=r/(\lambda\lVert q_*\rVert)$.
    """
    rng = random.Random(0)
    for index in range(count):
        n, number = 2 + index % 2, 2 + index % 3

        def tenths(bound: int, n: int = n) -> list[Fraction]:
            return [Fraction(rng.randint(-bound, bound), 10) for _ in range(n)]

        drawn, factor = [tenths(10) for _ in range(number)], [tenths(6) for _ in range(n)]
        mean = [sum(column) / number for column in zip(*drawn, strict=True)]
        slopes = tuple(_plus(s, -1, mean) for s in drawn)
        hessian = tuple([Fraction(i == j, 2) + dot(a, b) for j, b in enumerate(factor)] for i, a in enumerate(factor))
        heights = [Fraction(rng.randint(0, 90), 10) for _ in range(number)]
        domains = Domains([Fraction(1, number)] * number, heights, slopes, (hessian,) * number)
        _, q = _p_and_q(domains, [Fraction(0)] * n)
        smoothness = _trace(domains) + LAM_DEFAULT * Fraction(2, number) * sum(dot(s, s) for s in slopes)
        reach, pull = RHO_DEFAULT * smoothness, LAM_DEFAULT**2 * dot(q, q)
        if reach**2 < limit**2 * pull:
            yield domains, float(reach) / math.sqrt(pull)


def _trace(domains: Domains) -> Number:
    return sum(row[i] for i, row in enumerate(domains.curvatures[0]))


def _settle(domains: Domains, ratio: float, side: int) -> dict[str, Any]:
    r"""The point $w=$ ``side`` $\rho u(w)$ beside $w_*=0$: found, certified in a box, met by Algorithm 1 from $w_*$.

    A continuous map that takes a box into itself has a fixed point in it (Brouwer).
    """
    floats, lam, rho = domains.mapped(float), float(LAM_DEFAULT), float(RHO_DEFAULT)
    minimum: Vector = [0.0] * len(domains.slopes[0])
    fixed = minimum
    for _ in range(200):
        fixed = [side * x for x in _plus(ascent_point(floats, fixed, lam, rho), -1, fixed)]
    box = [flint.arb(x, 1e-9) for x in fixed]
    towards = _unit_times(domains.mapped(to_ball), box)
    certified = all(x.contains_interior(side * y) for x, y in zip(box, towards, strict=True))
    w = minimum
    for _ in range(800):
        w = step(floats, w, lam, rho, 1 / (2 * float(_trace(domains))))
    away = math.sqrt(sum((a - b) ** 2 for a, b in zip(w, fixed, strict=True)))
    return {
        "t": ratio,
        "certified": certified,
        "arrives": away < 1e-9,
        "wider": variance(floats, w) > variance(floats, minimum),
    }


def _unit_times(domains: Domains, w: Vector) -> Vector:
    r"""$\rho u(w)$ in balls: not as a difference of points, in which the width of $w$ would count twice."""
    g = _direction(domains, w, to_ball(LAM_DEFAULT))
    norm = dot(g, g).sqrt()
    return [to_ball(RHO_DEFAULT) * x / norm for x in g]


def _stated_jacobian(case: Case, jacobian: Callable[..., Any]) -> sp.Matrix:
    r"""``jacobian`` from exact rationals.

    $\nabla^2L_{DI}=\sum_i\beta_iH_i-\frac{2\lambda}M\sum_i(\nabla L_i-\bar g)(\nabla L_i-\bar g)^\top$, with $\bar g$
    the plain mean of the gradients.
    """
    domains, w, lam = case.domains, case.start, case.lam
    number, weights, gradients = len(domains.heights), _weights(domains, w, lam), domains.gradients(w)
    centre = [sum(column) / number for column in zip(*gradients, strict=True)]
    hessian, hessian_di = sp.zeros(len(w)), sp.zeros(len(w))
    for alpha, weight, gradient, H in zip(domains.shares, weights, gradients, domains.curvatures, strict=True):
        deviation = _exact_matrix([[x] for x in _plus(gradient, -1, centre)])
        hessian += sp.Rational(alpha) * _exact_matrix(H)
        hessian_di += sp.Rational(weight) * _exact_matrix(H)
        hessian_di -= sp.Rational(2 * lam / number) * deviation * deviation.T
    g = _direction(domains, w, lam)
    norm = sp.Rational(_root(dot(g, g)))
    unit = _exact_matrix([[x] for x in g]) / norm
    return sp.Matrix(jacobian(hessian, sp.eye(len(w)) - unit * unit.T, hessian_di, sp.Rational(case.rho), norm))


def _exact_matrix(rows: Sequence[Vector]) -> sp.Matrix:
    return sp.Matrix(rows).applyfunc(sp.Rational)


def _derived_jacobian(case: Case) -> sp.Matrix:
    r"""The derivative of $w\mapsto\nabla L(w+\rho g/\lVert g\rVert)$, $g=\nabla(L-\lambda\mathrm{Var})$, by sympy."""
    x, pooled, spread = _symbolic(case)
    g = sp.Matrix([pooled - sp.Rational(case.lam) * spread]).jacobian(x)
    ascent = sp.Matrix([x]) + sp.Rational(case.rho) * g / sp.sqrt(g.dot(g))
    moved = dict(zip(x, ascent, strict=True))
    field = sp.Matrix([pooled]).jacobian(x).subs(moved, simultaneous=True)
    here = dict(zip(x, map(sp.Rational, case.start), strict=True))
    return field.jacobian(x).subs(here).applyfunc(sp.nsimplify)


def _circulation(case: Case, lam: Fraction, half: Fraction = Fraction(1, 10)) -> flint.arb:
    r"""$\oint\langle\nabla L(w^{asc}),dw\rangle$ around the square with ``half`` side about the point, as a ball."""
    corners = [[x + half * s for x, s in zip(case.start, signs, strict=True)] for signs in SQUARE]
    edges = zip(corners, corners[1:] + corners[:1], strict=True)
    return sum((flint.acb.integral(_along(case, lam, a, b), 0, 1) for a, b in edges), flint.acb(0)).real


def _along(case: Case, lam: Fraction, start: Vector, end: Vector) -> Callable[[flint.acb, bool], flint.acb]:
    r"""$\langle\nabla L(w^{asc}),\dot w\rangle$ on the segment, as an integrand that says where it is not analytic."""
    balls = case.domains.mapped(to_ball)
    origin, edge = ([to_ball(x) for x in v] for v in (start, _plus(end, -1, start)))

    def integrand(t: flint.acb, analytic: bool) -> flint.acb:
        def root(square: flint.acb) -> flint.acb:
            return flint.acb(square).sqrt(analytic=analytic)

        ascent = ascent_point(balls, _plus(origin, t, edge), to_ball(lam), to_ball(case.rho), root)
        return dot(_pooled(balls, balls.gradients(ascent)), edge)

    return integrand


def _sam_remainder(n: int, objective: Callable[..., Number]) -> sp.Expr:
    r"""$\sum_j(\nabla_j$ ``objective`` $-\nabla_jL(w^{asc}))z_j$ for SAM on a quadratic loss, as a polynomial times
    $1/\lVert\nabla L\rVert$."""
    rho = sp.Symbol("rho", positive=True)
    x, b, z = (list(sp.symbols(f"{name}1:{n + 1}", real=True)) for name in ("w", "b", "z"))
    hessian = _symmetric("h", n)
    p = _plus(b, 1, _apply(hessian, x))
    norm = sp.sqrt(dot(p, p))
    stated = objective(dot(x, _apply(hessian, x)) / 2 + dot(b, x), norm, rho)
    field = _plus(p, rho / norm, _apply(hessian, p))
    return sp.expand(sum((sp.diff(stated, x[j]) - field[j]) * norm * z[j] for j in range(n)))


def _direction_cases() -> Iterator[tuple[Fraction, Vector, Vector]]:
    r"""$\lambda$, $p$, $q$: at random; parallel, either way; in one dimension; of domains with equal losses; of one."""
    rng = random.Random(0)
    for index in range(80):
        n, lam = 2 + index % 3, Fraction(rng.randint(1, 9), 10)
        p, q = ([Fraction(rng.randint(1, 9)) for _ in range(n)] for _ in range(2))
        yield lam, p, q
        yield SAM, p, q
        scale = (-3, 0, Fraction(1, 2), 11)[index % 4]
        yield lam, p, [x * scale for x in p]
        yield lam, p[:1], [x * 23 for x in q[:1]]
    for domains, w in _random_domains(20):
        level = replace(
            domains, heights=[-loss + c for loss, c in zip(domains.losses(w), domains.heights, strict=True)]
        )
        alone = Domains([Fraction(1)], domains.heights[:1], domains.slopes[:1], domains.curvatures[:1])
        for special in (level, alone):
            if any(_direction(special, w, SAM)):
                yield LAM_DEFAULT, *_p_and_q(special, w)


def _reversed_case() -> tuple[dict[str, Any], bool]:
    """A step in one dimension: are both weights positive, and does DISAM's ascent go down the pooled loss?"""
    line, w, lam, rho = _line("1/2", "5/2"), _fractions("1/10"), LAM_DEFAULT, RHO_DEFAULT
    losses = line.losses(w)
    weights = _weights(line, w, lam)
    ascent = ascent_point(line, w, lam, rho)
    values = {"w": w[0], "w_asc": ascent[0], "beta": weights, "g": _direction(line, w, lam)[0], "p": _slope(line, w)}
    pooled = {"loss_at_w": dot(line.shares, losses), "loss_at_w_asc": dot(line.shares, line.losses(ascent))}
    goes_down = min(weights) > 0 and pooled["loss_at_w_asc"] < pooled["loss_at_w"]
    return exact_strings(values | pooled), goes_down


DYNAMICS_CLAIMS = (
    Claim(
        id="disam-ascent-variance",
        where="Sec. 3.2, after Eq. (8), to first order",
        statement=r"To first order in $\rho$ DISAM's ascent point has no larger variance of the domains' losses than "
        r"SAM's: $\frac{d}{d\lambda}\langle q,u_\lambda\rangle=-D/\lVert g_\lambda\rVert^3\leq0$ with "
        r"$D=\lVert p\rVert^2\lVert q\rVert^2-\langle p,q\rangle^2$. The order is certain for "
        r"$\rho\leq(\langle q,u_0\rangle-\langle q,u_\lambda\rangle)/L_V$. Here $p=\nabla L(w)$, "
        r"$q=\nabla\mathrm{Var}\{L_i\}(w)$, $g_\lambda=p-\lambda q$, $u_\lambda=g_\lambda/\lVert g_\lambda\rVert$.",
        assumptions=(
            r"$\lambda\geq0$, and $p-\lambda'q\neq0$ for $0\leq\lambda'\leq\lambda$",
            r"$\mathrm{Var}\{L_i\}$ is differentiable at $w$; for the range of $\rho$, its gradient is $L_V$-Lipschitz "
            r"on the ball of radius $\rho$ about $w$",
        ),
        scope=f"{EVERY_DIMENSION}. "
        r"$\langle q,u_\lambda\rangle$ is the slope of the variance along the ascent, at $\rho=0$",
        expected=Verdict.PROVED,
        check=check_ascent_variance,
    ),
    Claim(
        id="disam-ascent-finite",
        where="Sec. 3.2, after Eq. (8)",
        statement="'The variance constraint ensures that the perturbation location is at a more consistent point': for "
        r"every $\rho$ and $\lambda>0$ the variance of the domains' losses at DISAM's $w^{asc}$ is at most that at "
        "SAM's.",
        assumptions=(
            "'more consistent' is read as a smaller variance of the domains' losses, Eq. (6), than at SAM's ascent "
            "point",
            r"the losses are smooth, nonnegative and (on the counterexample) strictly convex, and every $\beta_i>0$",
        ),
        scope=r"one exact counterexample at the default $\rho=1/20$, $\lambda=1/10$. On random domains the order "
        r"mostly holds, and fails more often the larger $\rho$ is",
        expected=Verdict.REFUTED,
        check=check_ascent_finite,
        repaired_by="disam-ascent-variance",
    ),
    Claim(
        id="disam-ascent-loss",
        where="Sec. 3.2, Eq. (7) and (8), to first order",
        statement=r"To first order in $\rho$ DISAM's ascent point has no larger mean loss than SAM's: "
        r"$\frac{d}{d\lambda}\langle p,u_\lambda\rangle=-\lambda D/\lVert g_\lambda\rVert^3\leq0$, with $p$, "
        r"$u_\lambda$, $g_\lambda$ and $D$ as for the variance. That gains at order $\lambda$, and the ascent loses at "
        r"order $\lambda^2$.",
        assumptions=(r"$\lambda\geq0$, and $p-\lambda'q\neq0$ for $0\leq\lambda'\leq\lambda$",),
        scope=f"{EVERY_DIMENSION}. SAM's direction is the steepest, so that no other can climb faster",
        expected=Verdict.PROVED,
        check=partial(check_ascent_slope, of=P, rate=loss_slope_rate),
    ),
    Claim(
        id="disam-iterate-variance",
        where="Sec. 4.2 and App. B.3, before Eq. (16)",
        statement="DISAM makes the domains' convergence more even than SAM does: from the same $w_t$, one step of "
        r"DISAM leaves $\mathrm{Var}\{L_i(w_{t+1})\}$ at most what one step of SAM leaves.",
        assumptions=(
            "the paper says in words that DISAM addresses SAM's inconsistent convergence; it is read here for one step",
            r"full batches, $0<\eta\leq1/L$, nonnegative losses, strictly convex on the counterexample, every "
            r"$\beta_i>0$",
        ),
        scope=r"one exact counterexample at $\rho=1/20$, $\lambda=1/10$, $\eta=1/20$. The reverse order does not hold "
        "either; how often each occurs in a deep network's training is not decided here",
        expected=Verdict.REFUTED,
        check=check_iterate_variance,
        repaired_by="disam-iterate-rate",
    ),
    Claim(
        id="disam-iterate-rate",
        where="Sec. 4.2 and App. B.3, before Eq. (16), what does hold",
        statement="From the same $w_t$ the variance after one step of DISAM less that after one of SAM is "
        r"$\eta\rho\,q^\top H(u_0-u_\lambda)+O(\eta\rho^2+\eta^2\rho)$, and $q^\top H(u_0-u_\lambda)="
        r"\lambda\,q^\top HP_pq/\lVert p\rVert+O(\lambda^2)$ with $P_p=I-pp^\top/\lVert p\rVert^2$. For $H=hI$, $h>0$, "
        r"it is nonnegative to this order: $\eta h$ times what the ascent point gains. For general $H\succ0$ either "
        "sign occurs.",
        assumptions=(
            r"$H=\nabla^2L(w_t)$, and $\nabla^2L$ and $\nabla\mathrm{Var}\{L_i\}$ are Lipschitz near $w_t$",
            r"$p\neq0$ and $g_\lambda\neq0$; full batches",
        ),
        scope="the coefficient, a sum of the same term over the coordinates: symbolic in 1 to 4 dimensions; its sign "
        "for $H=hI$: every dimension; either sign: exact steps on convex losses",
        expected=Verdict.PROVED,
        check=check_iterate_rate,
    ),
    Claim(
        id="disam-fixed-point",
        where="Algorithm 1, on a line",
        statement=r"On $L_1=\frac12(w-1)^2+2$, $L_2=\frac12(w+1)^2$ with $\lambda=1/10$, $\rho=1/20$, Algorithm 1 "
        r"converges to $w=-\rho$ exactly, not to the minimum 0 of $L$: there $\nabla L(w^{asc})=0$ and "
        r"$\nabla L(w)=-\rho$. SAM has $|\nabla L(w^{asc})|\geq\rho$ for ever. Such a point exists, and is the only "
        r"one, exactly for $\rho<2\lambda/(1-2\lambda)$.",
        assumptions=(
            r"equal shares, full batches, a constant $0<\eta\leq1$, $0<\lambda<1/2$",
            r"no iterate is exactly the zero $-2\lambda/(1-2\lambda)$ of $L_{DI}'$ (SAM: 0), where no direction is "
            "defined",
        ),
        scope=r"this problem: right of that zero a step contracts to $-\rho$ by exactly $1-\eta$, left of it to $\rho$ "
        r"and so across it. Runs in rationals from four starts, and $\rho$ on both sides of the limit",
        expected=Verdict.PROVED,
        check=check_fixed_point,
    ),
    Claim(
        id="disam-fixed-point-general",
        where="Algorithm 1, in every dimension",
        statement=r"Let $\nabla L(w_*)=0$, $q_*=\nabla\mathrm{Var}\{L_i\}(w_*)\neq0$ and "
        r"$r=\rho(L+\lambda L_V)<\frac12\lambda\lVert q_*\rVert$. Then exactly one $w_\rho$ has $w_\rho^{asc}=w_*$, "
        r"where DISAM stops: $w_\rho=w_*-\rho u_\lambda(w_\rho)$. With $\kappa=r/(\lambda\lVert q_*\rVert-r)$ it "
        r"attracts nearby iterates for $\eta L<2(1-\kappa)/(1+\kappa)^2$ where $\nabla^2L(w_*)\succ0$.",
        assumptions=(
            r"$\nabla L$ is $L$-Lipschitz and $\nabla\mathrm{Var}\{L_i\}$ is $L_V$-Lipschitz on the ball of radius "
            r"$\rho$ about $w_*$",
            "full batches and a constant step size; for the attraction, each $L_i$ is twice continuously "
            "differentiable",
        ),
        scope=r"the constants are derived; human steps: $\lVert g_\lambda\rVert\geq\lambda\lVert q_*\rVert-r$ on the "
        "ball, Banach's fixed-point theorem with the Dunkl-Williams inequality, and stability by linearisation: the "
        r"Jacobian $I-\eta H(I+K)$ with $\lVert K\rVert\leq\kappa$ contracts in the norm of $H^{-1}$. How far it "
        "attracts is seen in the runs alone",
        expected=Verdict.SUPPORTED,
        check=check_fixed_point_general,
        references=("Dunkl and Williams, A simple norm inequality, American Mathematical Monthly 71, 1964",),
    ),
    Claim(
        id="disam-not-a-gradient",
        where="Eq. (7), Table 4",
        statement=r"The field $w\mapsto\nabla L(w^{asc})$ that DISAM descends need not be the gradient of a function, "
        r"even for convex quadratic losses: its Jacobian $H+\rho HP\,\nabla^2L_{DI}/\lVert g_\lambda\rVert$ is not "
        r"symmetric in general. SAM's is, for every quadratic $L$, the gradient of $L+\rho\lVert\nabla L\rVert$.",
        assumptions=(
            r"$g_\lambda\neq0$ (SAM: $\nabla L\neq0$)",
            r"$P=I-u_\lambda u_\lambda^\top$, and $H=\nabla^2L$ is constant",
        ),
        scope="DISAM: one exact problem at the default constants, by its Jacobian and by a certified line integral "
        "around a closed curve. SAM: the objective in 2 and 3 dimensions, the symmetry of the Jacobian in every one",
        expected=Verdict.PROVED,
        check=check_not_gradient,
    ),
    Claim(
        id="disam-equals-sam",
        where="Algorithm 1, against SAM",
        statement=r"DISAM's ascent direction is SAM's exactly where $\lambda^2D=0$ and $\lambda\langle p,q\rangle<"
        r"\lVert p\rVert^2$, with $D=\lVert p\rVert^2\lVert q\rVert^2-\langle p,q\rangle^2$: for one domain, for "
        r"domains with equal losses, for $q=sp$ with $\lambda s<1$. Where $\lambda^2D=0$ and "
        r"$\lambda\langle p,q\rangle>\lVert p\rVert^2$ it is SAM's reversed, down the pooled loss, which occurs even "
        r"with every $\beta_i>0$. In one dimension nothing else occurs.",
        assumptions=(r"$p\neq0$ and $g_\lambda\neq0$",),
        scope=EVERY_DIMENSION,
        expected=Verdict.PROVED,
        check=check_equals_sam,
    ),
)
