r"""Theorem 1's proof, Eq. 18 to Eq. 21: from one step to the sum over steps.

Eq. 18 is refuted by one step (:mod:`proofs_checks.one_step`). The later lines are statements about all numbers that
meet the earlier ones: losses $p_t=L_p(w_t)$, squared norms $s_t=E\lVert\nabla L(w_t^{asc})\rVert^2$ and
$c=LG^2+\rho^2L\Gamma^2$. A line that follows has a certificate; one that does not has numbers that meet all that it
rests on, and not the line. $w_0$ is read as the first iterate $w_1$, as $\eta_0/\sqrt t$ is infinite at $t=0$.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import isqrt
from typing import Any

import flint
import mpmath
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.errors import ComputationError
from proofs_checks.enclosures import to_ball
from proofs_checks.one_step import (
    AGREEMENT,
    BITS,
    DIGITS,
    Number,
    Problem,
    certified_step,
    certify,
    described,
    enclose,
    judge,
    named,
    shown,
    with_sam,
)
from proofs_checks.theorem1_descent import FULL_BATCH, STEP_SCOPE, VALLEY

N, ETA0, C = sp.symbols("T eta_0 c", positive=True)
LOG = sp.log(N)
HORIZONS = (1, 2, 4, 16, 64, 256)
SQUARES = (1, 4, 16, 64)
INDUCTION = r"the bound is at least 1 at $T=1$ and grows by at least $\frac1{T+1}$ from $T$ to $T+1$"
# The ascent goes to the other side of the minimum after one step.
ACROSS = replace(VALLEY, start=(Fraction(1, 1000),), rho=Fraction(1))


def eq18_right(
    loss: Number, descent: Number, G2: Number, eta: Number, L: Number, rho: Number, turning: Number
) -> Number:
    r"""$L(w_t^{asc})-\eta_t\lVert v\rVert^2+\eta_t^2LG^2+L\rho^2\eta_t^2\Gamma^2$."""
    return loss - eta * descent + eta**2 * L * G2 + L * rho**2 * eta**2 * turning**2


def check_eq18(
    study: object,
    *,
    right: Callable[..., Number] = eq18_right,
    problem: Problem = ACROSS,
    etas: tuple[Fraction, ...] = (Fraction(1, 10), Fraction(1, 100)),
) -> Evidence:
    r"""Does $L_p(w_{t+1})$ exceed ``right`` with $\Gamma=L$, the largest allowed?"""
    runs = with_sam(problem, *etas)
    rows = []
    with flint.ctx.workprec(BITS):
        for run in runs:
            step, L = certified_step(run), to_ball(run.smoothness)
            constants = (to_ball(run.gradient_bound) ** 2, to_ball(run.eta), L, to_ball(run.rho), L)
            limit = right(step.loss, step.descent, *constants)
            sides = {"left": shown(step.next_loss), "right": shown(limit)}
            rows.append({**named(run), **sides, "violated": bool(step.next_loss > limit)})
    reason = (
        "the step crosses the minimum and the ascent goes to the other side, so that the perturbed loss rises: "
        f"{rows[0]['left']} > {rows[0]['right']} for SAM and DISAM, and by a gap of order eta, not eta squared"
    )
    return judge(runs, rows, reason)


def check_harmonic(study: object, *, bound: sp.Expr = LOG) -> Evidence:
    r"""Is $H_T=\sum_{t\leq T}1/t\leq$ ``bound`` for every $T\geq1$? By induction on $T$; for $\log T$, is it false for
    every $T$?"""
    evidence = certify(_harmonic_remainders(bound), [_harmonic_row(bound, T) for T in HORIZONS], INDUCTION)
    x = sp.Symbol("x", positive=True)
    gap = x - sp.log(1 + x)  # 1/t - log((t+1)/t) at x = 1/t: 0 at x = 0, and it rises
    every = sp.simplify(bound - LOG) == 0 and gap.subs(x, 0) == 0 and sp.factor(gap.diff(x)).is_positive
    if evidence.verdict is not Verdict.REFUTED or not every:
        return evidence
    last, excess = HORIZONS[-1], _harmonic_row(bound, HORIZONS[-1])[0]["sum_less_bound"]
    reason = (
        r"$1/t>\log\frac{t+1}t$ for every $t$, so that $H_T>\log(T+1)>\log T$ for every $T$: "
        f"the sum exceeds $\\log T$ by 1 at T = 1 and by {excess} at T = {last}"
    )
    return Evidence(Verdict.REFUTED, reason, evidence.data | {"fails_for_every_T": every})


def _harmonic_remainders(bound: sp.Expr) -> dict[str, sp.Expr]:
    r"""The start, and the growth less $\frac1{T+1}$ with $x=1/T$: it is 0 at $x\to0$ and its slope is at least 0."""
    x = sp.Symbol("x", positive=True)
    growth = sp.expand_log(bound.subs(N, (1 + x) / x) - bound.subs(N, 1 / x), force=True) - x / (1 + x)
    return {
        "bound - 1 at T = 1": bound.subs(N, 1) - 1,
        "growth - 1/(T+1) for T to infinity": sp.limit(growth, x, 0),
        "slope in 1/T of growth - 1/(T+1)": growth.diff(x),
    }


def _harmonic_row(bound: sp.Expr, T: int) -> tuple[dict[str, Any], bool]:
    """In balls with the exact sum; again with the digamma function in 70 digits."""
    with flint.ctx.workprec(BITS):
        gap = to_ball(_harmonic(T)) - enclose(bound, {N: flint.arb(T)})
    with mpmath.workdps(DIGITS):
        again = mpmath.harmonic(T) - sp.lambdify(N, bound, "mpmath")(mpmath.mpf(T))
        if bool(gap > 0) != (again > mpmath.mpf(AGREEMENT)):
            raise ComputationError(f"the two paths give {gap} and {again} for H_T less the bound at T={T}")
    return {"T": T, "sum_less_bound": shown(gap)}, bool(gap > 0)


def _harmonic(T: int) -> Fraction:
    return sum((Fraction(1, t) for t in range(1, T + 1)), Fraction(0))


def check_eq19(study: object, *, bound: sp.Expr = LOG, last: int = 0) -> Evidence:
    r"""Does $p_{T+\mathrm{last}}-p_1\leq-\sum_{t\leq T}\eta_ts_t+c\,\eta_0^2\,$``bound`` follow from Eq. 18?

    Eq. 18 sums up to the same with $H_T$ in place of the bound, as far as $p_{T+1}$; where the left side ends at $p_T$
    it has a term less. Instances: a step of a run that meets Eq. 18, and numbers that meet it with equality.
    """
    total, H = sp.symbols("sum_eta_s H_T", real=True)
    eta_s = sp.Symbol("eta_T_s_T", nonnegative=True)
    summed = -total + C * ETA0**2 * H - (1 - last) * (C * ETA0**2 / N - eta_s)
    printed = -total + C * ETA0**2 * bound
    remainders = {
        "right - sum of Eq. 18 - c eta_0^2 (bound - H_T)": printed - summed - C * ETA0**2 * (bound - H),
        **_harmonic_remainders(bound),
    }
    rows = [_first_step(bound, last), *(_extremal_row(T, bound, last) for T in HORIZONS)]
    evidence = certify(remainders, rows, "Eq. 18 is summed, and " + INDUCTION)
    if evidence.verdict is not Verdict.REFUTED:
        return evidence
    failing = [values["T"] for values, violated in rows[1:] if violated]
    run = "; so does the first step of a run" if rows[0][1] else ""
    reason = f"numbers that meet Eq. 18 with equality violate it at T = {', '.join(map(str, failing))}{run}"
    return Evidence(Verdict.REFUTED, reason, evidence.data | {"rows": [values for values, _ in rows]})


def _extremal_row(T: int, bound: sp.Expr, last: int) -> tuple[dict[str, Any], bool]:
    r"""Left less right for $p_{t+1}=p_t-\eta_ts_t+c\,\eta_t^2$, $s_t=1$, $\eta_0=1/4$, $L=G=\rho=\Gamma=1$ (so $c=2$).

    In balls term by term, and as $c\,\eta_0^2(H_{T-1+\mathrm{last}}-\mathrm{bound})+(1-\mathrm{last})\eta_T$ in digits.
    """
    eta0, c = Fraction(1, 4), 2
    with flint.ctx.workprec(BITS):
        rates = [to_ball(eta0) / flint.arb(t).sqrt() for t in range(1, T + 1)]
        change = sum((-eta + c * eta**2 for eta in rates[: T - 1 + last]), flint.arb(0))
        gap = change + sum(rates, flint.arb(0)) - c * to_ball(eta0) ** 2 * enclose(bound, {N: flint.arb(T)})
    with mpmath.workdps(DIGITS):
        rate = mpmath.mpf(1) / 4
        beyond = mpmath.harmonic(T - 1 + last) - sp.lambdify(N, bound, "mpmath")(mpmath.mpf(T))
        again = c * rate**2 * beyond + (1 - last) * rate / mpmath.sqrt(T)
        if bool(gap > 0) != (again > mpmath.mpf(AGREEMENT)):
            raise ComputationError(f"the two paths give {gap} and {again} for left less right at T={T}")
    return {"T": T, "left_less_right": shown(gap)}, bool(gap > 0)


def _first_step(bound: sp.Expr, last: int) -> tuple[dict[str, Any], bool]:
    """T = 1 on a run of DISAM that does meet Eq. 18."""
    step = certified_step(VALLEY)
    with flint.ctx.workprec(BITS):
        L, eta = to_ball(VALLEY.smoothness), to_ball(VALLEY.eta)
        constants = (to_ball(VALLEY.gradient_bound) ** 2, eta, L, to_ball(VALLEY.rho), L)
        slack18 = eq18_right(step.loss, step.descent, *constants) - step.next_loss
        allowed = eq18_right(0, step.descent, *constants) + eta * step.descent  # c eta_0^2
        gap = last * (step.next_loss - step.loss) + eta * step.descent - allowed * enclose(bound, {N: flint.arb(1)})
        row = {"run": described(VALLEY), "T": 1, "slack_of_eq18": shown(slack18), "left_less_right": shown(gap)}
        return row, bool(slack18 > 0) and bool(gap > 0)


@dataclass(frozen=True)
class Numbers:
    r"""$s_t=0$ for $t<T$, and $s_T$ such that $\eta_Ts_T=p_1-L_{\min}+c\,\eta_0^2\,$``budget``.

    $L=G=\Gamma=1$ and $\rho=0.1$. With Eq. 18 as an equality and the budget $H_T$ the losses rise by $c\eta_t^2$ a step
    and end at $L_{\min}$.
    """

    T: int  # a square, so that its root is rational
    budget: Fraction
    eta0: Fraction = Fraction(1, 100)
    c: Fraction = Fraction(101, 100)
    gap: Fraction = Fraction(1, 10000)  # p_1 - L_min

    @property
    def root(self) -> int:
        return isqrt(self.T)

    @property
    def s(self) -> Fraction:
        r"""$s_T$, which is to be at most $G^2=1$."""
        return (self.gap + self.c * self.eta0**2 * self.budget) * self.root / self.eta0

    def losses(self) -> list[Fraction]:
        r"""$p_t-L_{\min}$ for $t=1..T+1$, Eq. 18 as an equality."""
        p = [self.gap]
        for t in range(1, self.T + 1):
            p.append(p[-1] + self.c * self.eta0**2 / t - (self.eta0 / self.root * self.s if t == self.T else 0))
        return p


def eq20_right(gap: Number, c: Number, eta0: Number, logarithm: Number, root: Number) -> Number:
    r"""$L_p(w_0)-L_{\min}+(LG^2+\rho^2L\Gamma^2)\,\eta_0^2\log T$; ``root`` is $\sqrt T$."""
    return gap + c * eta0**2 * logarithm


def eq20_factor(eta0: Number, root: Number) -> Number:
    r"""$\eta_T$, which multiplies $\sum_ts_t$ on the left of Eq. 20."""
    return eta0 / root


def eq21_right(gap: Number, c: Number, eta0: Number, logarithm: Number, root: Number) -> Number:
    r"""$\frac{L_p(w_0)-L_{\min}}{\eta_0}\frac1{\sqrt T}+\frac{(LG^2+\rho^2L\Gamma^2)\,\eta_0\log T}{\sqrt T}$."""
    return gap / eta0 / root + c * eta0 * logarithm / root


def eq21_factor(eta0: Number, root: Number) -> Number:
    r"""$1/T$, which multiplies $\sum_ts_t$ on the left of Eq. 21."""
    return 1 / root**2


def check_divided(
    study: object, *, right: Callable[..., Number] = eq20_right, factor: Callable[..., Number] = eq20_factor
) -> Evidence:
    r"""Does factor $\sum_ts_t\leq$ right follow from Eq. 19 as printed; and does it from Eq. 18?

    $\eta_T\sum_ts_t\leq S=\sum_t\eta_ts_t$, as $\eta_t$ falls. Multiplied by $\eta_T$/factor, right less $S$ is
    Eq. 19's slack plus $p_T-L_{\min}$.
    """
    S, first, final, least, logarithm = sp.symbols("S p_0 p_T L_min log_T", real=True)
    now, later = sp.symbols("root_t root_T_less_root_t", positive=True)
    root = sp.sqrt(N)
    slack19 = -S + C * ETA0**2 * logarithm - final + first
    scaled = right(first - least, C, ETA0, logarithm, root) * (ETA0 / root) / factor(ETA0, root)
    remainders = {
        "eta_t - eta_T for t < T": ETA0 / now - ETA0 / (now + later),
        "scaled right - S - slack of Eq. 19 - (p_T - L_min)": scaled - S - slack19 - (final - least),
    }
    # H_T - 1 <= log T, so that these numbers meet Eq. 19 as printed; the next ones meet Eq. 18
    with_19 = [_divided_row(Numbers(T, _harmonic(T) - 1), right, factor) for T in SQUARES]
    with_18 = [_divided_row(Numbers(T, _harmonic(T)), right, factor) for T in SQUARES]
    follows = certify(remainders, [(row, row["violated"]) for row in with_19], "it is Eq. 19, divided")
    data = {"condition_holds": follows.data, "rows_of_the_condition": with_19, "rows_of_eq18_alone": with_18}
    if follows.verdict is not Verdict.PROVED:
        return Evidence(follows.verdict, f"from Eq. 19: {follows.reason}", data)
    if not all(row["meets_eq18_and_the_bounds"] for row in with_18):
        return Evidence(Verdict.UNDECIDED, "the numbers tried do not meet Eq. 18 and the theorem's bounds", data)
    if not all(row["violated"] for row in with_18):
        return Evidence(Verdict.PROVED, f"{follows.reason}; the numbers tried that meet Eq. 18 meet it too", data)
    reason = (
        "it follows exactly from Eq. 19 as printed, which is wrong; numbers that meet Eq. 18 violate it at T = "
        + ", ".join(str(T) for T in SQUARES)
    )
    return Evidence(Verdict.CONDITIONAL, reason, data)


def _divided_row(numbers: Numbers, right: Callable[..., Number], factor: Callable[..., Number]) -> dict[str, Any]:
    with flint.ctx.workprec(BITS):
        left = to_ball(factor(numbers.eta0, Fraction(numbers.root)) * numbers.s)
        constants = [to_ball(x) for x in (numbers.gap, numbers.c, numbers.eta0)]
        limit = right(*constants, flint.arb(numbers.T).log(), flint.arb(numbers.root))
        return {
            "T": numbers.T,
            "s_T": str(numbers.s),
            "meets_eq18_and_the_bounds": 0 <= numbers.s <= 1 and min(numbers.losses()) >= 0,
            "left": shown(left),
            "right": shown(limit),
            "violated": bool(left > limit),
        }


check_eq21 = partial(check_divided, right=eq21_right, factor=eq21_factor)

THEOREM1_SUM_CLAIMS = (
    Claim(
        id="thm1-eq18",
        where="Proof of Theorem 1, Eq. (18)",
        statement=r"$E[L_p(w_{t+1})]\leq L(w_t^{asc})-\eta_tE\lVert\nabla L(w_t^{asc})\rVert^2+\eta_t^2LG^2"
        r"+L\rho^2\eta_t^2\Gamma^2$.",
        assumptions=("the assumptions of Theorem 1", r"$\Gamma=L$, the largest that the theorem allows", FULL_BATCH),
        scope=STEP_SCOPE,
        expected=Verdict.REFUTED,
        check=check_eq18,
        repaired_by="conv-corrected",
    ),
    Claim(
        id="thm1-eq19",
        where="Proof of Theorem 1, Eq. (19)",
        statement=r"$E L_p(w_T)-L_p(w_0)\leq-\sum_{t=1}^T\eta_tE\lVert\nabla L(w_t^{asc})\rVert^2"
        r"+(LG^2+\rho^2L\Gamma^2)\,\eta_0^2\log T$.",
        assumptions=(
            r"Eq. (18) at $t=1..T$, $\eta_t=\eta_0/\sqrt t$",
            r"$w_0$ is read as $w_1$, as $\eta_0/\sqrt t$ is infinite at $t=0$",
        ),
        scope="numbers that meet Eq. (18) and violate it, in balls; the last loss reached by $T$ steps is "
        r"$L_p(w_{T+1})$, and $\log T$ is below $\sum_{t\leq T}1/t$",
        expected=Verdict.REFUTED,
        check=check_eq19,
        repaired_by="thm1-eq19-repaired",
    ),
    Claim(
        id="thm1-eq19-repaired",
        where="Proof of Theorem 1, Eq. (19), corrected",
        statement=r"If Eq. (18) holds at $t=1..T$, then $E L_p(w_{T+1})-L_p(w_1)\leq"
        r"-\sum_{t=1}^T\eta_tE\lVert\nabla L(w_t^{asc})\rVert^2+(LG^2+\rho^2L\Gamma^2)\,\eta_0^2(1+\log T)$.",
        assumptions=(r"Eq. (18) at $t=1..T$ (which does not hold in general)", r"$\eta_t=\eta_0/\sqrt t$"),
        scope=r"every $T\geq1$",
        expected=Verdict.PROVED,
        check=partial(check_eq19, bound=1 + LOG, last=1),
    ),
    Claim(
        id="thm1-harmonic",
        where="Proof of Theorem 1, Eq. (19), second line",
        statement=r"$\sum_{t=1}^T\frac1t\leq\log T$.",
        assumptions=(r"$T\geq1$",),
        scope="false for every $T$",
        expected=Verdict.REFUTED,
        check=check_harmonic,
        repaired_by="thm1-harmonic-repaired",
    ),
    Claim(
        id="thm1-harmonic-repaired",
        where="Proof of Theorem 1, Eq. (19), second line, corrected",
        statement=r"$\sum_{t=1}^T\frac1t\leq1+\log T$.",
        assumptions=(r"$T\geq1$",),
        scope="every $T$, by induction",
        expected=Verdict.PROVED,
        check=partial(check_harmonic, bound=1 + LOG),
    ),
    Claim(
        id="thm1-eq20",
        where="Proof of Theorem 1, Eq. (20)",
        statement=r"$\eta_T\sum_{t=1}^TE\lVert\nabla L(w_t^{asc})\rVert^2\leq"
        r"\sum_{t=1}^T\eta_tE\lVert\nabla L(w_t^{asc})\rVert^2"
        r"\leq L_p(w_0)-L_{\min}+(LG^2+\rho^2L\Gamma^2)\,\eta_0^2\log T$.",
        assumptions=(
            "the condition: Eq. (19) holds as printed",
            r"$\eta_t$ falls, $L_p(w_T)\geq L_{\min}$, and $w_0$ is read as $w_1$",
        ),
        scope="certified for every $T$ where Eq. (19) holds; where Eq. (18) alone holds, numbers that meet it violate "
        r"the line at $T=1,4,16,64$",
        expected=Verdict.CONDITIONAL,
        check=check_divided,
    ),
    Claim(
        id="thm1-eq21",
        where="Proof of Theorem 1, Eq. (21)",
        statement=r"$\frac1T\sum_{t=1}^TE\lVert\nabla L(w_t^{asc})\rVert^2\leq"
        r"\frac{L_p(w_0)-L_{\min}}{\eta_0}\frac1{\sqrt T}+\frac{(LG^2+\rho^2L\Gamma^2)\,\eta_0\log T}{\sqrt T}$.",
        assumptions=(
            "the condition: Eq. (19), and so Eq. (20), holds as printed",
            r"$\eta_T=\eta_0/\sqrt T$, and $w_0$ is read as $w_1$",
        ),
        scope=r"it is Eq. (20) divided by $T\eta_T$, for every $T$; where Eq. (18) alone holds, numbers that meet it "
        r"violate the line at $T=1,4,16,64$",
        expected=Verdict.CONDITIONAL,
        check=check_eq21,
    ),
)
