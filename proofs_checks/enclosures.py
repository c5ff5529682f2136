"""Enclosures of real numbers in two arithmetics, Arb's balls and mpmath's intervals, and their ends as rationals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import flint
import mpmath
from mpmath.libmp import to_rational

BITS = 256
Number = Any  # a ball, an interval, a Fraction or a sympy expression
Ends = tuple[Fraction, Fraction]


def to_ball(x: Fraction | int) -> flint.arb:
    """The ball around a rational."""
    return flint.arb(flint.fmpq(Fraction(x).numerator, Fraction(x).denominator))


def ball_ends(x: flint.arb) -> Ends:
    """The ends of a ball as exact rationals."""
    ends = [end.man_exp() for end in (x.lower(), x.upper())]
    low, high = (Fraction(int(mantissa)) * Fraction(2) ** int(exponent) for mantissa, exponent in ends)
    return low, high


class IntervalSteps:
    """The number of steps, with the methods that a ball has."""

    def __init__(self, steps: int) -> None:
        self.steps = mpmath.iv.mpf(steps)

    def sqrt(self) -> Number:
        return mpmath.iv.sqrt(self.steps)

    def log(self) -> Number:
        return mpmath.iv.log(self.steps)


def to_interval(x: Fraction) -> Number:
    """The interval around a rational."""
    return mpmath.iv.mpf(x.numerator) / x.denominator


def interval_ends(x: Number) -> Ends:
    """The ends of an interval as exact rationals."""
    low, high = (Fraction(*map(int, to_rational(end))) for end in mpmath.iv.mpf(x)._mpi_)
    return low, high


@contextmanager
def interval_precision(bits: int) -> Iterator[None]:
    """mpmath's intervals have ``bits`` bits inside."""
    before, mpmath.iv.prec = mpmath.iv.prec, bits
    try:
        yield
    finally:
        mpmath.iv.prec = before


def overlap(first: Ends, second: Ends) -> bool:
    """Whether two enclosures can hold the same number."""
    return first[0] <= second[1] and second[0] <= first[1]


def decimal(x: Fraction, *, up: bool = False, digits: int = 5) -> str:
    """``x`` rounded down, or up, to ``digits`` decimals."""
    scaled = x * 10**digits
    return f"{(-(-scaled // 1) if up else scaled // 1) / 10**digits:.{digits}f}"
