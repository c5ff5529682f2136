r"""Theorem 1's proof, Eq. 16 and Eq. 17, and the theorem's $\Gamma$: how far does the ascent direction turn in a step?

The proof bounds the turning angle $\phi_t$ by $\eta_t\Gamma$ with $\Gamma\leq L$. Single steps of SAM and DISAM, in
balls (:mod:`proofs_checks.one_step`), turn faster; the rate that does hold is certified for every dimension.
Letters as in :mod:`proofs_checks.theorem1_descent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import flint
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from proofs_checks.enclosures import to_ball
from proofs_checks.exact import dot
from proofs_checks.method import eq8_weight
from proofs_checks.one_step import (
    BITS,
    Number,
    Problem,
    Step,
    Vector,
    X,
    Y,
    add,
    certified_step,
    certify,
    enclose,
    first_order,
    identity,
    judge,
    named,
    shown,
    with_sam,
)
from proofs_checks.theorem1_descent import FULL_BATCH, LAM, SADDLE, STEP_SCOPE, VALLEY, falling_errors

# The same premises on the upper side of a wave, where gradients grow downhill.
HILL = replace(
    VALLEY,
    losses=(5 + 2 * sp.cos(X), 4 + sp.cos(X)),
    start=(Fraction(1, 2),),
    smoothness=Fraction(3, 2),
    gradient_bound=Fraction(3, 2),
)
# L = 1 - cos x + (1 - cos y)/10 near its minimum: the perturbation, far longer than w, brings in a large gradient.
BOWL = Problem(
    losses=(2 - 2 * sp.cos(X), (1 - sp.cos(Y)) / 5),
    start=(Fraction(3, 1000), Fraction(4, 100)),
    rho=Fraction(1, 20),
    eta=Fraction(1, 10000),
    lam=LAM,
    smoothness=Fraction(1),
    gradient_bound=Fraction(101, 100),
)
# L_1 is nearly 2x + 2 + 1000 and L_2 nearly y + 1000: almost no curvature, so all turning comes from the weights.
PLANES = Problem(
    losses=(1000 + 1000 * sp.sin((X + 1) / 500), 1000 + 1000 * sp.sin(Y / 1000)),
    start=(Fraction(0), Fraction(0)),
    rho=Fraction(1, 20),
    eta=Fraction(1, 1000),
    lam=LAM,
    smoothness=Fraction(1, 500),
    gradient_bound=Fraction(9, 8),
)

Order = Callable[[Vector, Vector], Number]
EQ16_READINGS: dict[str, tuple[Problem, Order]] = {
    "in each component": (replace(VALLEY, start=(Fraction(-1),)), lambda left, right: left[0] - right[0]),
    "between norms": (HILL, lambda left, right: dot(left, left) - dot(right, right)),
}


def check_eq16(study: object, *, readings: dict[str, tuple[Problem, Order]] = EQ16_READINGS) -> Evidence:
    r"""Is left less right positive in some reading of $\leq$, where the text's premises hold?"""
    rows: list[dict[str, Any]] = []
    premises: list[dict[str, Any]] = []
    for reading, (problem, excess) in readings.items():
        for run in with_sam(problem):
            step = certified_step(run)
            with flint.ctx.workprec(BITS):
                gap = excess(step.g_next, step.now_reweighted)
                sides = {"left": [shown(x) for x in step.g_next], "right": [shown(x) for x in step.now_reweighted]}
                rows.append({"reading": reading, **named(run), **sides, "violated": bool(gap > 0)})
                premises += _eq16_premises(run, step)
    reason = (
        "between vectors the inequality has no meaning; it fails in each component "
        f"({rows[0]['left'][0]} against {rows[0]['right'][0]}) and between norms, with both premises met"
    )
    return judge((problem for problem, _ in readings.values()), rows, reason, premises=premises)


def _eq16_premises(run: Problem, step: Step) -> list[dict[str, Any]]:
    point = {x: to_ball(value) for x, value in zip(run.variables, run.start, strict=True)}
    slopes = [[enclose(loss.diff(x), point) for x in run.variables] for loss in run.losses]
    first, second = (dot(slope, slope) for slope in slopes)
    before, after = (abs(losses[0] - losses[1]) for losses in (step.losses, step.next_losses))
    larger = bool((step.losses[0] - step.losses[1]) * (first - second) > 0)
    return [
        {"assumption": "the larger loss has the larger gradient", "value": shown(first - second), "holds": larger},
        {"assumption": "the losses draw nearer in the step", "value": shown(after - before), "holds": after < before},
    ]


def largest_turning(problem: Problem) -> Number:
    r"""$\Gamma=L$, the largest that the theorem allows."""
    return to_ball(problem.smoothness)


def sams_turning(problem: Problem) -> Number:
    r"""An upper bound of $\phi_t/\eta_t$ for SAM on the same problem."""
    step = certified_step(replace(problem, lam=Fraction(0)))
    return step.tangent2.sqrt() / to_ball(problem.eta)


def check_eq17(
    study: object,
    *,
    limit: Callable[[Problem], Number] = largest_turning,
    problems: Sequence[Problem] = (*with_sam(BOWL), PLANES),
) -> Evidence:
    r"""Is $\lVert S+C\rVert/\lVert\nabla L_d(w_t)\rVert>\eta_t\Gamma$, with
    $S=\sum_i(\beta^i_{t+1}-\beta^i_t)\nabla L_i(w_{t+1})$ and $C=Hd_t+O(\lVert d_t\rVert^2)$? On the last problem: is a
    component of $S$ positive, and $\lVert S+C\rVert>\lVert C\rVert$?"""
    rows = []
    with flint.ctx.workprec(BITS):
        for run in problems:
            step, allowed = certified_step(run), limit(run)
            both = add(step.weight_part, step.curvature_part, 1)
            ratio = (dot(both, both) / dot(step.g, step.g)).sqrt() / to_ball(run.eta)
            sizes = {"middle_over_eta": shown(ratio), "Gamma": shown(allowed)}
            rows.append({"part": "middle <= eta Gamma", **named(run), **sizes, "violated": bool(ratio > allowed)})
        grows = bool(dot(both, both) > dot(step.curvature_part, step.curvature_part))
        positive = any(bool(x > 0) for x in step.weight_part)
        parts = {"S": [shown(x) for x in step.weight_part], "C": [shown(x) for x in step.curvature_part]}
        rows.append({"part": "S <= 0 and makes it smaller", **named(run), **parts, "violated": grows and positive})
    shown_rows = "; ".join(f"{r['method']} {r['middle_over_eta']} > {r['Gamma']}" for r in rows[:-1])
    reason = f"the middle over eta exceeds L ({shown_rows}), and the sum said to be at most 0 has a positive component"
    return judge(problems, rows, reason)


def turning_rate2(gh: Number, hh: Number, size: Number) -> Number:
    r"""$\lVert PH_dv\rVert^2/\lVert g\rVert^2$."""
    return (hh - gh**2 / size**2) / size**2


def hessian_along(weights: Vector, slopes: Vector, bends: Vector, lam: Number) -> Number:
    r"""$z^TH_dz$ with $H_d=\sum_i\beta_iH_i-2\lambda\frac1M\sum_i(\nabla L_i-\overline{\nabla L})(\cdot)^T$, from
    $z^T\nabla L_i$ and $z^TH_iz$."""
    mean = sum(slopes) / len(slopes)
    return dot(weights, bends) - 2 * lam * sum((x - mean) ** 2 for x in slopes) / len(slopes)


def check_eq17_repaired(
    study: object,
    *,
    rate2: Callable[..., Number] = turning_rate2,
    hessian: Callable[..., Number] = hessian_along,
) -> Evidence:
    r"""The limit of $\sin^2\phi/\eta^2$ for $g(\eta)=g-\eta h$; the second derivative of $L_{DI}$ along a line; and on
    three problems what is left of the rate falls like $\eta$."""
    gh, hh = sp.symbols("gh hh", real=True)
    size, eta = sp.symbols("size eta", positive=True)
    sine2 = 1 - (size**2 - eta * gh) ** 2 / (size**2 * (size**2 - 2 * eta * gh + eta**2 * hh))
    limit = sp.cancel(sine2 / eta**2).subs(eta, 0)
    remainders = identity("limit of the squared rate, less the statement", limit - rate2(gh, hh, size))
    for number in (2, 3, 4):
        remainders |= identity(f"second derivative, M = {number}", _second_derivative_gap(number, hessian))

    def error(run: Problem) -> Number:
        terms, step = first_order(run), certified_step(run)
        return abs(step.sine2 / to_ball(run.eta) ** 2 - rate2(terms["gh"], terms["hh"], terms["size"]))

    reason = r"$\sin^2\phi_t/\eta_t^2$ goes to exactly $\lVert PH_dv\rVert^2/\lVert g\rVert^2$"
    return certify(remainders, falling_errors(error, SADDLE, BOWL, PLANES), reason, refutes=False)


def _second_derivative_gap(number: int, hessian: Callable[..., Number]) -> sp.Expr:
    s, lam = sp.symbols("s lambda", real=True)
    shares, losses, slopes, bends = (sp.symbols(f"{name}1:{number + 1}", real=True) for name in ("a", "l", "p", "q"))
    along = [loss + p * s + q * s**2 / 2 for loss, p, q in zip(losses, slopes, bends, strict=True)]
    mean = sum(along) / number
    objective = dot(shares, along) - lam * sum((x - mean) ** 2 for x in along) / number
    weights = [eq8_weight(a, loss, sum(losses) / number, lam, number) for a, loss in zip(shares, losses, strict=True)]
    return sp.expand(objective.diff(s, 2).subs(s, 0) - hessian(weights, slopes, bends, lam))


Limits = dict[str, Callable[[Problem], Number]]


def check_gamma(study: object, *, runs: Sequence[Problem], limits: Limits) -> Evidence:
    r"""Is $\phi_t\geq\sin\phi_t>\eta_t$ times each of the limits, on each run?"""
    rows = []
    with flint.ctx.workprec(BITS):
        for run, (name, limit) in product(runs, limits.items()):
            rate, allowed = certified_step(run).sine2.sqrt() / to_ball(run.eta), limit(run)
            rows.append(
                {**named(run), "start": [str(x) for x in run.start], "turning_rate_at_least": shown(rate.lower()),
                 "limit": name, "limit_at_most": shown(allowed), "violated": bool(rate > allowed)}
            )  # fmt: skip
    told = "; ".join(f"{row['turning_rate_at_least']} > {row['limit']} = {row['limit_at_most']}" for row in rows)
    return judge(runs, rows, f"the turning rate phi_t/eta_t of {rows[0]['method']} exceeds it: {told}")


# nearer and nearer the minimum
SAM_RUNS = tuple(
    replace(BOWL, lam=Fraction(0), start=(x * scale, y * scale))
    for x, y in [BOWL.start]
    for scale in (Fraction(1), Fraction(1, 10), Fraction(1, 100))
)
check_gamma_sam = partial(check_gamma, runs=SAM_RUNS, limits={"Gamma = L": largest_turning})
check_gamma_disam = partial(
    check_gamma, runs=(PLANES,), limits={"Gamma <= L": largest_turning, "SAM's rate there": sams_turning}
)


THEOREM1_TURNING_CLAIMS = (
    Claim(
        id="thm1-eq16",
        where="Proof of Theorem 1, Eq. (16)",
        statement=r"$\sum_i\beta^i_{t+1}\nabla L_i(w_{t+1})\leq\sum_i\beta^i_{t+1}\nabla L_i(w_t)$.",
        assumptions=(
            "the assumptions of Theorem 1",
            "granted, as the text assumes: the larger loss has the larger gradient, and a step draws the losses nearer",
            "between vectors, $\\leq$ is read in each component, or between norms",
            FULL_BATCH,
        ),
        scope=STEP_SCOPE + "; one for each reading",
        expected=Verdict.REFUTED,
        check=check_eq16,
        repaired_by="thm1-eq17-repaired",
    ),
    Claim(
        id="thm1-eq17",
        where="Proof of Theorem 1, Eq. (17)",
        statement=r"$\phi_t\leq\lVert\sum_i(\beta^i_{t+1}-\beta^i_t)\nabla L_i(w_{t+1})+Hd_t"
        r"+O(\lVert d_t\rVert^2)\rVert"
        r"/\lVert\nabla L_d(w_t)\rVert+O(\phi_t^2)\leq\eta_t\Gamma$, and as the first sum is $\leq0$, $\Gamma\leq L$.",
        assumptions=(
            "the assumptions of Theorem 1",
            r"$Hd_t+O(\lVert d_t\rVert^2)$ is $\sum_i\beta_t^i(\nabla L_i(w_{t+1})-\nabla L_i(w_t))$, as in Eq. (15)",
            FULL_BATCH,
        ),
        scope=STEP_SCOPE + "; it concerns the second inequality and the sum said to be at most 0",
        expected=Verdict.REFUTED,
        check=check_eq17,
        repaired_by="thm1-eq17-repaired",
    ),
    Claim(
        id="thm1-eq17-repaired",
        where="Proof of Theorem 1, Eq. (17), corrected",
        statement=r"$\phi_t/\eta_t\to\lVert PH_dv\rVert/\lVert g\rVert$ as $\eta_t\to0$, with "
        r"$H_d=\sum_i\beta^iH_i"
        r"-2\lambda\frac1M\sum_i(\nabla L_i-\overline{\nabla L})(\nabla L_i-\overline{\nabla L})^T$"
        ": the change of the weights adds the covariance of the domains' gradients.",
        assumptions=(
            r"$L_{DI}$ is twice differentiable at $w_t$ and $g=\nabla L_{DI}(w_t)\neq0$",
            r"$w_{t+1}=w_t-\eta_tv$, $v=\nabla L(w_t^{asc})$, $P=I-gg^T/\lVert g\rVert^2$",
            r"$\overline{\nabla L}$ is the mean of the domains' gradients",
        ),
        scope="the rate in every dimension; the form of $H_d$ with symbols for $M=2,3,4$ along every line",
        expected=Verdict.PROVED,
        check=check_eq17_repaired,
    ),
    Claim(
        id="thm1-gamma-sam",
        where='Theorem 1, "in SAM $\\Gamma=L$"',
        statement=r"SAM's ascent direction turns by $\phi_t\leq\eta_tL$.",
        assumptions=("the assumptions of Theorem 1", FULL_BATCH),
        scope=STEP_SCOPE + "; at three points, each ten times nearer the minimum than the last, and with a larger rate",
        expected=Verdict.REFUTED,
        check=check_gamma_sam,
        repaired_by="thm1-eq17-repaired",
    ),
    Claim(
        id="thm1-gamma-disam",
        where='Theorem 1, "when use DISAM $\\Gamma\\leq L$"',
        statement=r"DISAM's ascent direction turns by $\phi_t\leq\eta_t\Gamma$, $\Gamma\leq L$, no faster than SAM's.",
        assumptions=("the assumptions of Theorem 1", FULL_BATCH),
        scope=STEP_SCOPE,
        expected=Verdict.REFUTED,
        check=check_gamma_disam,
        repaired_by="thm1-eq17-repaired",
    ),
)
