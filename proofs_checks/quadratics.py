r"""Losses of one parameter that are quadratic with rational coefficients, $au^2+bu+c$: everything of them is exact."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from proofs_checks.method import eq6_summand

Number = Any  # a sympy expression or a Fraction
Quadratic = tuple[Fraction, Fraction, Fraction]  # (a, b, c) of a u^2 + b u + c


def quadratic(a: Number, b: Number, c: Number) -> Quadratic:
    """Its coefficients as fractions."""
    return Fraction(a), Fraction(b), Fraction(c)


def value_at(loss: Quadratic, u: Fraction) -> Fraction:
    """The loss at ``u``."""
    return loss[0] * u**2 + loss[1] * u + loss[2]


def slope_at(loss: Quadratic, u: Fraction) -> Fraction:
    """Its derivative at ``u``."""
    return 2 * loss[0] * u + loss[1]


def spread(values: Sequence[Fraction]) -> Fraction:
    r"""$\mathrm{Var}$ as Eq. 6 prints it: the mean of $(L_i-L_j)^2/2$ over all pairs."""
    return sum((eq6_summand(a, b) for a in values for b in values), Fraction(0)) / len(values) ** 2
