r"""Eq. 3, 5, 6 and 8, each as its formula in plain arithmetic -> an identity for every number of domains.

A formula below acts on symbols, for the proof with symbolic $M$, and on fractions, for the second path that adds the
terms one by one. Every check takes the formula as an argument: a wrong one must not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from proofs_checks.exact import Instance, M, decide_identity, derivative, double_total, instances, moment, total

ALPHA, LOSS, OTHER, LAM = sp.symbols("alpha_i L_i L_j lambda", real=True)
Number = Any  # a sympy expression or a Fraction
Checks = Iterator[tuple[dict[str, Any], Fraction]]
ALL_M = r"every number of domains $M$ (symbolic), and every value of the losses"


def eq3_summand(size: Number, mean_loss: Number, everything: Number) -> Number:
    r"""$\alpha_iL_i$ with $\alpha_i=n_i/N$."""
    return size / everything * mean_loss


def eq5_left(alpha: Number, c: Number, beta: Number, sum_c: Number) -> Number:
    r"""$\frac{\alpha_i+\beta C_i}{\sum_j(\alpha_j+\beta C_j)}$, with $\sum_j\alpha_j=1$."""
    return (alpha + beta * c) / (1 + beta * sum_c)


def eq5_right(alpha: Number, c: Number, beta: Number, sum_c: Number) -> Number:
    r"""$\frac{\beta(C_i-\alpha_i\sum_jC_j)}{1+\beta\sum_jC_j}$, as printed."""
    return beta * (c - alpha * sum_c) / (1 + beta * sum_c)


def eq5_repaired_right(alpha: Number, c: Number, beta: Number, sum_c: Number) -> Number:
    r"""$\alpha_i+\frac{\beta(C_i-\alpha_i\sum_jC_j)}{1+\beta\sum_jC_j}$."""
    return alpha + eq5_right(alpha, c, beta, sum_c)


def eq6_summand(first: Number, second: Number) -> Number:
    r"""$(L_i-L_j)^2/2$, whose mean over all pairs is the variance."""
    return (first - second) ** 2 / 2


def eq8_weight(alpha: Number, loss: Number, mean_loss: Number, lam: Number, number: Number) -> Number:
    r"""$\beta_i=\alpha_i-\frac{2\lambda}{M}\big(L_i-\frac1M\sum_jL_j\big)$."""
    return alpha - 2 * lam / number * (loss - mean_loss)


def check_eq3(study: object, *, summand: Callable[..., Number] = eq3_summand) -> Evidence:
    """The sum over all samples divided by N, against the sum over domains; domain i's samples sum to ``s``."""
    size, everything, s = sp.symbols("n_i N s_i", positive=True)
    # linear in the domains: the two sums agree for every M when their i-th terms do
    difference = s / everything - summand(size, s / size, everything)

    def checks() -> Checks:
        for case in instances():
            n = sum(case.sizes)
            pooled = Fraction(sum(size * loss for size, loss in zip(case.sizes, case.losses, strict=True))) / n
            values = {"n": case.sizes, "L": case.losses}
            yield values, pooled - sum(summand(Fraction(a), b, n) for a, b in zip(case.sizes, case.losses, strict=True))

    return decide_identity(difference, checks())


def check_eq5(study: object, *, right: Callable[..., Number] = eq5_right) -> Evidence:
    r"""Coefficient of $\nabla L_i$ on both sides; the instances compare the whole sums along one direction."""
    c, beta, sum_c = sp.symbols("C_i beta S_C", real=True)
    difference = eq5_left(ALPHA, c, beta, sum_c) - right(ALPHA, c, beta, sum_c)

    def checks() -> Checks:
        for case in instances():
            degrees = [-loss for loss in case.losses]  # C_i = L_i* - L_i <= 0, with L_i* = 0
            sum_c = sum(degrees)
            if 1 + case.coefficient * sum_c == 0:
                continue
            sides = [
                sum(
                    side(alpha, c, case.coefficient, sum_c) * g
                    for alpha, c, g in zip(case.shares, degrees, case.gradients, strict=True)
                )
                for side in (eq5_left, right)
            ]
            values = {"alpha": case.shares, "C": degrees, "beta": case.coefficient, "gradients": case.gradients}
            yield values, sides[0] - sides[1]

    return decide_identity(difference, checks())


def check_eq6(study: object, *, summand: Callable[..., Number] = eq6_summand) -> Evidence:
    r"""The mean over pairs, against $\frac1M\sum_i(L_i-\bar L)^2$."""
    mean = moment(0, 1) / M
    variance = total((LOSS - mean) ** 2, ALPHA, LOSS) / M
    difference = double_total(summand(LOSS, OTHER), LOSS, OTHER) / M**2 - variance

    def checks() -> Checks:
        for case in instances():
            pairs = [summand(a, b) for a in case.losses for b in case.losses]
            yield {"L": case.losses}, sum(pairs) / len(pairs) - _variance(case.losses)

    return decide_identity(difference, checks())


def check_eq8(study: object, *, weight: Callable[..., Number] = eq8_weight) -> Evidence:
    r"""$\partial L_{DI}/\partial L_i$ for symbolic $M$; on the instances by central differences, exact for a quadratic.

    By the chain rule $\nabla L_{DI}=\sum_i\frac{\partial L_{DI}}{\partial L_i}\nabla L_i$.
    """
    mean = moment(0, 1) / M
    variance = double_total(eq6_summand(LOSS, OTHER), LOSS, OTHER) / M**2
    objective = total(ALPHA * LOSS, ALPHA, LOSS) - LAM * variance
    difference = derivative(objective, ALPHA, LOSS) - weight(ALPHA, LOSS, mean, LAM, M)

    def checks() -> Checks:
        for case in instances():
            number = len(case.losses)
            mean = sum(case.losses) / number
            for i in range(number):
                ends = [_domain_inspired(case.shares, _moved(case.losses, i, h), case.coefficient) for h in (1, -1)]
                printed = weight(case.shares[i], case.losses[i], mean, case.coefficient, number)
                yield {**_weights_of(case), "i": i + 1}, (ends[0] - ends[1]) / 2 - printed

    return decide_identity(difference, checks())


def check_eq8_sum(study: object, *, weight: Callable[..., Number] = eq8_weight) -> Evidence:
    r"""$\sum_i\beta_i$ against 1."""
    difference = total(weight(ALPHA, LOSS, moment(0, 1) / M, LAM, M), ALPHA, LOSS) - 1

    def checks() -> Checks:
        for case in instances():
            number = len(case.losses)
            mean = sum(case.losses) / number
            pairs = zip(case.shares, case.losses, strict=True)
            yield (
                _weights_of(case),
                sum(weight(alpha, loss, mean, case.coefficient, number) for alpha, loss in pairs) - 1,
            )

    return decide_identity(difference, checks())


def _weights_of(case: Instance) -> dict[str, Any]:
    return {"alpha": case.shares, "L": case.losses, "lambda": case.coefficient}


def _variance(losses: tuple[Fraction, ...]) -> Fraction:
    mean = sum(losses) / len(losses)
    return Fraction(sum((loss - mean) ** 2 for loss in losses)) / len(losses)


def _domain_inspired(shares: tuple[Fraction, ...], losses: tuple[Fraction, ...], lam: Fraction) -> Fraction:
    return sum(alpha * loss for alpha, loss in zip(shares, losses, strict=True)) - lam * _variance(losses)


def _moved(losses: tuple[Fraction, ...], index: int, step: int) -> tuple[Fraction, ...]:
    return tuple(loss + step if i == index else loss for i, loss in enumerate(losses))


METHOD_CLAIMS = (
    Claim(
        id="eq3",
        where="Eq. (3)",
        statement=r"The mean loss over all samples is $\frac1N\sum_i\sum_j\ell(w;\xi^i_j)=\sum_i\alpha_iL_i(w)$.",
        assumptions=(r"$\alpha_i=n_i/N$ and $n_i\geq1$",),
        scope=ALL_M,
        expected=Verdict.PROVED,
        check=check_eq3,
    ),
    Claim(
        id="eq5",
        where="Eq. (5)",
        statement=r"$\sum_i\frac{\alpha_i+\beta C_i}{\sum_j(\alpha_j+\beta C_j)}\nabla L_i"
        r"=\sum_i\frac{\beta(C_i-\alpha_i\sum_jC_j)}{1+\beta\sum_jC_j}\nabla L_i$.",
        assumptions=(r"$\sum_i\alpha_i=1$", r"$1+\beta\sum_jC_j\neq0$"),
        scope="one exact rational instance refutes it",
        expected=Verdict.REFUTED,
        check=check_eq5,
        repaired_by="eq5-repaired",
    ),
    Claim(
        id="eq5-repaired",
        where="Eq. (5), corrected",
        statement=r"$\sum_i\frac{\alpha_i+\beta C_i}{\sum_j(\alpha_j+\beta C_j)}\nabla L_i"
        r"=\sum_i\Big(\alpha_i+\frac{\beta(C_i-\alpha_i\sum_jC_j)}{1+\beta\sum_jC_j}\Big)\nabla L_i$: "
        r"the printed right side lacks $\nabla L=\sum_i\alpha_i\nabla L_i$.",
        assumptions=(r"$\sum_i\alpha_i=1$", r"$1+\beta\sum_jC_j\neq0$"),
        scope=ALL_M,
        expected=Verdict.PROVED,
        check=partial(check_eq5, right=eq5_repaired_right),
    ),
    Claim(
        id="eq6",
        where="Eq. (6)",
        statement=r"$\frac1{2M^2}\sum_{i,j}(L_i-L_j)^2=\frac1M\sum_i\big(L_i-\frac1M\sum_jL_j\big)^2$: "
        "the printed form is the variance.",
        assumptions=(),
        scope=ALL_M,
        expected=Verdict.PROVED,
        check=check_eq6,
    ),
    Claim(
        id="eq8",
        where="Eq. (8)",
        statement=r"$\nabla L_{DI}=\sum_i\beta_i\nabla L_i$ with "
        r"$\beta_i=\alpha_i-\frac{2\lambda}{M}\big(L_i-\frac1M\sum_jL_j\big)$, where "
        r"$L_{DI}=L-\lambda\mathrm{Var}\{L_i\}$.",
        assumptions=("each $L_i$ is differentiable at $w$",),
        scope=ALL_M,
        expected=Verdict.PROVED,
        check=check_eq8,
    ),
    Claim(
        id="eq8-sum",
        where="Eq. (8)",
        statement=r"DISAM's weights sum to one: $\sum_i\beta_i=1$.",
        assumptions=(r"$\sum_i\alpha_i=1$",),
        scope=ALL_M,
        expected=Verdict.PROVED,
        check=check_eq8_sum,
    ),
)
