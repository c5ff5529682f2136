r"""Theorem 1's proof, the cross term, Eq. 14 and Eq. 15: the perturbed loss and the perturbation from step to step.

The proof drops one term because the perturbation turns "at random". Single steps of SAM and DISAM, enclosed in balls
(:mod:`proofs_checks.one_step`), refute that; what does hold is certified for every dimension.
Letters: $v=\nabla L(w_t^{asc})$, $g=\nabla L_d(w_t)$, $u=g/\lVert g\rVert$, $P=I-uu^T$, $H_d=\nabla^2L_{DI}(w_t)$,
$h=H_dv$.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import flint
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from proofs_checks.enclosures import to_ball
from proofs_checks.exact import dot, exact_strings
from proofs_checks.one_step import (
    BITS,
    Number,
    Problem,
    Step,
    X,
    Y,
    add,
    certified_step,
    certify,
    first_order,
    identity,
    judge,
    named,
    shown,
    with_sam,
)
from proofs_checks.theorem1_steps import (
    arc_remainders,
    eq11_right,
    exact_norm,
    pythagorean_gradients,
    squared_chord,
)

LAM = Fraction(1, 10)  # the paper's default, as is rho = 0.05
# L = 7 - cos x + 2 cos y: a saddle at the origin, where the ascent direction turns fast. The two domains' losses are
# nearly equal there, so that DISAM does almost what SAM does.
SADDLE = Problem(
    losses=(10 - 2 * sp.cos(X), 4 + 4 * sp.cos(Y)),
    start=(Fraction(6, 1000), Fraction(-4, 1000)),
    rho=Fraction(1, 20),
    eta=Fraction(1, 10000),
    lam=LAM,
    smoothness=Fraction(2),
    gradient_bound=Fraction(9, 4),
)
# One coordinate, both weights positive: the ascent direction is a sign. The domain with the larger loss has the larger
# gradient, and the losses draw nearer as w goes to 0.
VALLEY = Problem(
    losses=(2 - sp.cos(X) + sp.sin(X) / 2, 2 - sp.cos(X) - sp.sin(X) / 2),
    start=(Fraction(1),),
    rho=Fraction(1, 20),
    eta=Fraction(1, 10),
    lam=LAM,
    smoothness=Fraction(1),
    gradient_bound=Fraction(1),
)
STEP_SCOPE = (
    "a counterexample: one step in balls, recomputed with numerical derivatives of $L_{DI}$ in 70 digits; the "
    "assumptions are checked on all of $R^k$"
)
FULL_BATCH = "full batches, so that the expectation is the value itself"


def cross_term_itself(problem: Problem, step: Step) -> Number:
    r"""$\langle v,\epsilon_{t+1}-\epsilon_t\rangle$, which the proof takes for 0."""
    return step.cross


def corrected_cross_term(vg: Number, vh: Number, gh: Number, size: Number, rho: Number) -> Number:
    r"""$-\kappa\lVert v\rVert^2$ with $\kappa=\rho\,v^TPH_dv/(\lVert g\rVert\lVert v\rVert^2)$; $h=H_dv$."""
    return -rho * (vh - vg * gh / size**2) / size


def check_cross_term(
    study: object,
    *,
    neglected: Callable[[Problem, Step], Number] = cross_term_itself,
    problem: Problem = SADDLE,
    etas: tuple[Fraction, ...] = (Fraction(1, 10**4), Fraction(1, 10**5), Fraction(1, 10**6)),
) -> Evidence:
    r"""Is what is neglected larger than the descent term $\eta_t\lVert v\rVert^2$ that is kept, for every ``eta``?"""
    runs = with_sam(problem, *etas)
    rows = []
    with flint.ctx.workprec(BITS):
        for run in runs:
            step = certified_step(run)
            ratio = neglected(run, step) / (to_ball(run.eta) * step.descent)
            rows.append({**named(run), "neglected_over_descent": shown(ratio), "violated": bool(ratio > 1)})
    reason = (
        f"the neglected term is positive and {rows[-1]['neglected_over_descent']} times the descent term that is kept, "
        f"for SAM and DISAM, at every rate down to {etas[-1]}: it is of the same order"
    )
    ratios = [run.rho / run.eta for run in runs]
    premise = {"assumption": "rho >= 500 eta", "value": str(min(ratios)), "holds": min(ratios) >= 500}
    return judge(runs, rows, reason, premises=[premise])


def check_cross_term_repaired(study: object, *, corrected: Callable[..., Number] = corrected_cross_term) -> Evidence:
    r"""The derivative of $\rho\langle v,g(\eta)\rangle/\lVert g(\eta)\rVert$ at 0, where $g(\eta)=g-\eta h$, against
    ``corrected``; and on a problem what is left falls like $\eta^2$."""
    vg, vh, gh, hh = sp.symbols("vg vh gh hh", real=True)
    size, rho, eta = sp.symbols("size rho eta", positive=True)
    cross = rho * (vg - eta * vh) / sp.sqrt(size**2 - 2 * eta * gh + eta**2 * hh)
    difference = cross.diff(eta).subs(eta, 0) - corrected(vg, vh, gh, size, rho)

    def error(run: Problem) -> Number:
        terms = first_order(run)
        value = corrected(*(terms[name] for name in ("vg", "vh", "gh", "size")), to_ball(run.rho))
        return abs(certified_step(run).cross / to_ball(run.eta) - value)

    reason = r"the derivative in $\eta_t$ at 0 is exactly $-\kappa\lVert v\rVert^2$"
    errors = falling_errors(error, SADDLE)
    return certify(identity("derivative less the statement", difference), errors, reason, refutes=False)


def falling_errors(error: Callable[[Problem], Number], *problems: Problem) -> Iterator[tuple[dict[str, Any], bool]]:
    """A first-order value is wrong where a hundredth of the rate does not bring its error down fifty times."""
    for problem in problems:
        for run in with_sam(problem):
            with flint.ctx.workprec(BITS):
                errors = [error(run), error(replace(run, eta=run.eta / 100))]
                yield {**named(run), "errors": [shown(x) for x in errors]}, bool(errors[1] * 50 > errors[0])


def eq14_right(
    loss: Number, descent: Number, G2: Number, cross: Number, phi2: Number, eta: Number, L: Number, rho: Number
) -> Number:
    r"""$L(w_t^{asc})-\eta_t\lVert v\rVert^2+\eta_t^2LG^2+L\rho^2\phi_t^2$."""
    return loss - eta * descent + eta**2 * L * G2 + L * rho**2 * phi2


def eq14_repaired_right(
    loss: Number, descent: Number, G2: Number, cross: Number, phi2: Number, eta: Number, L: Number, rho: Number
) -> Number:
    r"""The same with the cross term $\langle v,\epsilon_{t+1}-\epsilon_t\rangle$ kept."""
    return eq14_right(loss, descent, G2, cross, phi2, eta, L, rho) + cross


def check_eq14(study: object, *, right: Callable[..., Number] = eq14_right, problem: Problem = SADDLE) -> Evidence:
    r"""Does $L_p(w_{t+1})$ exceed ``right``? $\tan\phi_t$, an upper bound of $\phi_t$, stands for it."""
    runs = with_sam(problem)
    rows = []
    with flint.ctx.workprec(BITS):
        for run in runs:
            step, limit = certified_step(run), _eq14_value(run, right)
            change, allowed = step.next_loss - step.loss, limit - step.loss
            violated = bool(step.cosine > 0) and bool(step.next_loss > limit)
            rows.append({**named(run), "change": shown(change), "allowed": shown(allowed), "violated": violated})
    sides = "; ".join(f"{row['method']}: change {row['change']}, allowed {row['allowed']}" for row in rows)
    return judge(runs, rows, f"the perturbed loss rises in one step where the right side has it fall. {sides}")


def _eq14_value(run: Problem, right: Callable[..., Number]) -> Number:
    step, G2 = certified_step(run), to_ball(run.gradient_bound) ** 2
    constants = (to_ball(run.eta), to_ball(run.smoothness), to_ball(run.rho))
    return right(step.loss, step.descent, G2, step.cross, step.tangent2, *constants)


def check_eq14_repaired(
    study: object,
    *,
    right: Callable[..., Number] = eq14_repaired_right,
    arc: Callable[[Number], Number] = lambda phi: phi,
) -> Evidence:
    r"""Right side less Eq. 11's is $\eta_t^2L(G^2-\lVert v\rVert^2)+L\rho^2(\phi_t^2-\mathrm{chord}^2)$."""
    loss, cross = sp.symbols("loss cross", real=True)
    descent, below_G2, below_arc2, chord2 = sp.symbols("vv below_G2 below_arc2 chord2", nonnegative=True)
    eta, L, rho = sp.symbols("eta L rho", positive=True)
    before = eq11_right(loss, -eta * descent, cross, eta**2 * descent, rho**2 * chord2, L)
    after = right(loss, descent, descent + below_G2, cross, chord2 + below_arc2, eta, L, rho)

    def instances() -> Iterator[tuple[dict[str, Any], bool]]:
        for problem in (SADDLE, VALLEY, replace(SADDLE, start=(Fraction(1, 2), Fraction(2)), eta=Fraction(1, 10))):
            for run in with_sam(problem):
                with flint.ctx.workprec(BITS):
                    step = certified_step(run)
                    yield named(run), bool(step.cosine > 0) and bool(step.next_loss > _eq14_value(run, right))

    reason = "the gap to Eq. 11 is two terms that are at least 0: a gradient is at most G, and a chord at most its arc"
    return certify({"right - Eq. 11's right": after - before, **arc_remainders(arc)}, instances(), reason)


def eq15_ratio2(g: list[Number], g_next: list[Number]) -> Number:
    r"""$\lVert\nabla L_d(w_{t+1})-\nabla L_d(w_t)\rVert^2/\lVert\nabla L_d(w_t)\rVert^2$."""
    change = add(g_next, g, -1)
    return dot(change, change) / dot(g, g)


def check_eq15(
    study: object,
    *,
    ratio2: Callable[..., Number] = eq15_ratio2,
    problem: Problem = VALLEY,
    etas: tuple[Fraction, ...] = (Fraction(1, 10), Fraction(1, 100), Fraction(1, 1000)),
) -> Evidence:
    r"""In one coordinate $\phi_t=0$ as long as $\nabla L_d$ keeps its sign: is the ratio $O(\phi_t^2)=0$ too?"""
    runs = with_sam(problem, *etas)
    rows = []
    for run in runs:
        step = certified_step(run)
        with flint.ctx.workprec(BITS):
            kept = bool(step.g[0] * step.g_next[0] > 0)
            ratio = ratio2(step.g, step.g_next)
            phi = "0" if kept else "pi"
            rows.append({**named(run), "phi": phi, "squared_ratio": shown(ratio), "violated": kept and bool(ratio > 0)})
    reason = (
        "a gradient that shrinks along its own direction does not turn: "
        f"phi = 0 on $w_t=1$, and the squared ratio is {rows[0]['squared_ratio']} at eta = {rows[0]['eta']}"
    )
    small = all(row["phi"] == "0" for row in rows)
    premise = {"assumption": "the angle is small", "value": "0" if small else "pi", "holds": small}
    return judge(runs, rows, reason, premises=[premise])


def dunkl_williams_factor(a: Number, b: Number) -> Number:
    r"""$2/(\lVert g\rVert+\lVert g'\rVert)$."""
    return 2 / (a + b)


def projected_change2(change2: Number, along: Number, gg: Number) -> Number:
    r"""$\lVert P(g'-g)\rVert^2$ from $\lVert g'-g\rVert^2$ and ``along`` $=\langle g,g'-g\rangle$."""
    return change2 - along**2 / gg


def check_eq15_repaired(
    study: object,
    *,
    factor: Callable[..., Number] = dunkl_williams_factor,
    projected2: Callable[..., Number] = projected_change2,
) -> Evidence:
    r"""With $a=\lVert g\rVert$, $b=\lVert g'\rVert$, $c=\cos\phi$: (bound)$^2-$(chord)$^2=2(1+c)(a-b)^2/(a+b)^2$; and
    $b^2\sin^2\phi=\lVert P(g'-g)\rVert^2$."""
    a, b = sp.symbols("a b", positive=True)
    above = sp.Symbol("one_plus_c", nonnegative=True)
    c = above - 1
    change2 = a**2 + b**2 - 2 * a * b * c
    bound = factor(a, b) ** 2 * change2 - (2 - 2 * c) - 2 * above * (a - b) ** 2 / (a + b) ** 2
    sine = b**2 * (1 - c**2) - projected2(change2, a * b * c - a**2, a**2)
    remainders = {"Dunkl-Williams less its gap": bound, **identity("sine", sine)}

    def instances() -> Iterator[tuple[dict[str, Any], bool]]:
        for g, g_next in product(pythagorean_gradients(), repeat=2):
            change, norms = add(g_next, g, -1), (exact_norm(g), exact_norm(g_next))
            cosine = dot(g, g_next) / norms[0] / norms[1]
            longer = squared_chord(g, g_next) > factor(*norms) ** 2 * dot(change, change)
            sine2 = norms[1] ** 2 * (1 - cosine**2)
            other = sine2 != projected2(dot(change, change), dot(g, change), dot(g, g))
            yield exact_strings({"g": g, "g_next": g_next}), longer or other

    reason = "both statements are identities between inner products with a remainder that is a square"
    return certify(remainders, instances(), reason)


THEOREM1_DESCENT_CLAIMS = (
    Claim(
        id="thm1-cross-term",
        where="Proof of Theorem 1, text below Eq. (13)",
        statement=r"$E\langle\nabla L(w_t^{asc}),\epsilon_{t+1}-\epsilon_t\rangle\approx0$: it is negligible beside "
        r"the terms that are kept, as $\rho\gg\eta_t$ and the difference is a random noise in the gradient direction.",
        assumptions=(
            "the assumptions of Theorem 1",
            r"read as: small beside $\eta_t\lVert\nabla L(w_t^{asc})\rVert^2$, at least for small $\eta_t$",
            FULL_BATCH,
        ),
        scope=STEP_SCOPE,
        expected=Verdict.REFUTED,
        check=check_cross_term,
        repaired_by="thm1-cross-term-repaired",
    ),
    Claim(
        id="thm1-cross-term-repaired",
        where="Proof of Theorem 1, text below Eq. (13), corrected",
        statement=r"$\langle v,\epsilon_{t+1}-\epsilon_t\rangle=-\eta_t\kappa_t\lVert v\rVert^2+o(\eta_t)$ with "
        r"$\kappa_t=\rho\,v^TPH_dv/(\lVert g\rVert\lVert v\rVert^2)$: of the order of the descent term itself.",
        assumptions=(
            r"$L_{DI}$ is twice differentiable at $w_t$, $g=\nabla L_{DI}(w_t)\neq0$, $v=\nabla L(w_t^{asc})\neq0$",
            r"$w_{t+1}=w_t-\eta_tv$",
            r"$u=g/\lVert g\rVert$, $P=I-uu^T$, $H_d=\nabla^2L_{DI}(w_t)$",
        ),
        scope=r"every dimension; $g^{(t+1)}=g-\eta_tH_dv+o(\eta_t)$ is the definition of the second derivative",
        expected=Verdict.PROVED,
        check=check_cross_term_repaired,
    ),
    Claim(
        id="thm1-eq14",
        where="Proof of Theorem 1, Eq. (14)",
        statement=r"$E[L_p(w_{t+1})]\leq L(w_t^{asc})-\eta_tE\lVert\nabla L(w_t^{asc})\rVert^2+\eta_t^2LG^2"
        r"+L\rho^2\phi_t^2$.",
        assumptions=("the assumptions of Theorem 1", r"$L_p(w_t)=L(w_t^{asc})$, as in the proof", FULL_BATCH),
        scope=STEP_SCOPE,
        expected=Verdict.REFUTED,
        check=check_eq14,
        repaired_by="thm1-eq14-repaired",
    ),
    Claim(
        id="thm1-eq14-repaired",
        where="Proof of Theorem 1, Eq. (14), corrected",
        statement=r"$L_p(w_{t+1})\leq L(w_t^{asc})-\eta_t\lVert v\rVert^2+\eta_t^2LG^2+L\rho^2\phi_t^2"
        r"+\langle v,\epsilon_{t+1}-\epsilon_t\rangle$, with $v=\nabla L(w_t^{asc})$.",
        assumptions=("$L$ is $L$-smooth", r"$\lVert v\rVert\leq G$", FULL_BATCH),
        scope="every dimension, both ascent rules",
        expected=Verdict.PROVED,
        check=check_eq14_repaired,
    ),
    Claim(
        id="thm1-eq15",
        where="Proof of Theorem 1, Eq. (15)",
        statement=r"$\tan\phi_t=\frac{\lVert\epsilon_{t+1}-\epsilon_t\rVert}{\lVert\epsilon_t\rVert}+O(\phi_t^2)"
        r"=\frac{\lVert\nabla L_d(w_{t+1})-\nabla L_d(w_t)\rVert}{\lVert\nabla L_d(w_t)\rVert}+O(\phi_t^2)$.",
        assumptions=("the assumptions of Theorem 1", "the angle is small", FULL_BATCH),
        scope=STEP_SCOPE + "; it is the second equality that is refuted",
        expected=Verdict.REFUTED,
        check=check_eq15,
        repaired_by="thm1-eq15-repaired",
    ),
    Claim(
        id="thm1-eq15-repaired",
        where="Proof of Theorem 1, Eq. (15), corrected",
        statement=r"$\sin\phi_t=\lVert P(\nabla L_d(w_{t+1})-\nabla L_d(w_t))\rVert/\lVert\nabla L_d(w_{t+1})\rVert$, "
        r"and $\lVert\epsilon_{t+1}-\epsilon_t\rVert\leq\frac{2\rho\lVert\nabla L_d(w_{t+1})-\nabla L_d(w_t)\rVert}"
        r"{\lVert\nabla L_d(w_t)\rVert+\lVert\nabla L_d(w_{t+1})\rVert}$.",
        assumptions=(
            r"both gradients are not 0",
            r"$P$ projects on the space orthogonal to $\nabla L_d(w_t)$",
        ),
        scope="every dimension, every pair of gradients",
        expected=Verdict.PROVED,
        check=check_eq15_repaired,
        references=("Dunkl and Williams 1964, A simple norm inequality",),
    ),
)
