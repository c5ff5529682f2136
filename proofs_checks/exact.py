r"""Exact arithmetic for statements about any number of domains: sums over $i=1..M$ with $M$ a symbol, and rationals.

A sum over domains of a polynomial in $\alpha_i$ and $L_i$ is a combination of the moments
$p_{ab}=\sum_i\alpha_i^aL_i^b$, where $p_{00}=M$ and $p_{10}=1$. An identity between such combinations that holds with
the moments as free symbols holds for every $M$. Whatever is decided so is decided again by plain sums of rationals.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy as sp

from disam_theory.claims import Evidence, Verdict
from disam_theory.errors import ComputationError

M = sp.Symbol("M", positive=True, integer=True)
_P = sp.IndexedBase("p")


def moment(a: int, b: int) -> sp.Expr:
    r"""$p_{ab}=\sum_i\alpha_i^aL_i^b$, with the number of domains and $\sum_i\alpha_i=1$ filled in."""
    known = {(0, 0): M, (1, 0): sp.Integer(1)}
    return known.get((a, b), _P[a, b])


def total(summand: sp.Expr, alpha: sp.Symbol, loss: sp.Symbol) -> sp.Expr:
    r"""$\sum_i$ of a polynomial in ``alpha`` $=\alpha_i$ and ``loss`` $=L_i$."""
    return sum((c * moment(a, b) for (a, b), c in sp.Poly(summand, alpha, loss).terms()), sp.Integer(0))


def double_total(summand: sp.Expr, first: sp.Symbol, second: sp.Symbol) -> sp.Expr:
    r"""$\sum_{i,j}$ of a polynomial in ``first`` $=L_i$ and ``second`` $=L_j$."""
    terms = sp.Poly(summand, first, second).terms()
    return sum((c * moment(0, a) * moment(0, b) for (a, b), c in terms), sp.Integer(0))


def derivative(expression: sp.Expr, alpha: sp.Symbol, loss: sp.Symbol) -> sp.Expr:
    r"""$\partial/\partial L_k$ of an expression in moments: $\partial p_{ab}/\partial L_k=b\,\alpha_k^aL_k^{b-1}$."""
    return sum(
        (sp.diff(expression, p) * p.indices[1] * alpha ** p.indices[0] * loss ** (p.indices[1] - 1))
        for p in expression.atoms(sp.Indexed)
    )


@dataclass(frozen=True)
class Instance:
    """Domains with rational values: sizes, losses, gradients along one direction; and a positive coefficient."""

    sizes: tuple[int, ...]
    losses: tuple[Fraction, ...]
    gradients: tuple[Fraction, ...]
    coefficient: Fraction

    @property
    def shares(self) -> tuple[Fraction, ...]:
        r"""$\alpha_i=n_i/N$."""
        return tuple(Fraction(n, sum(self.sizes)) for n in self.sizes)


def instances(count: int = 60) -> Iterator[Instance]:
    """Domains drawn with a fixed seed, two to five of them in turn."""
    rng = random.Random(0)
    for index in range(count):
        number = 2 + index % 4

        def rationals(low: int, number: int = number) -> tuple[Fraction, ...]:
            return tuple(Fraction(rng.randint(low, 20), rng.randint(1, 9)) for _ in range(number))

        sizes = tuple(rng.randint(1, 9) for _ in range(number))
        yield Instance(sizes, rationals(0), rationals(-20), Fraction(rng.randint(1, 9), 10))


def decide_identity(difference: sp.Expr, checks: Iterable[tuple[dict[str, Any], Fraction]]) -> Evidence:
    """Is ``difference`` zero for every $M$? ``checks`` are (the values of an instance, the exact
    difference of both sides on it).

    Proved where the symbolic difference is zero and every instance agrees; refuted by an instance where the sides
    differ; undecided where the symbols say that they differ and no instance shows it.

    Raises:
        ComputationError: the symbols say zero, and an instance contradicts them.
    """
    remainder = sp.simplify(difference)
    results = list(checks)
    witness = next(((instance, value) for instance, value in results if value), None)
    if remainder == 0 and witness is not None:
        raise ComputationError(f"the symbolic difference is 0, and {witness[0]} gives {witness[1]}")
    data: dict[str, Any] = {"symbolic_difference": f"${sp.latex(remainder)}$", "rational_instances": len(results)}
    if remainder == 0:
        reason = f"the difference of both sides is 0 for symbolic $M$, and on {len(results)} rational instances"
        return Evidence(Verdict.PROVED, reason, data)
    if witness is None:
        return Evidence(Verdict.UNDECIDED, "the symbolic difference is not 0, and no instance shows it", data)
    data["witness"] = {**exact_strings(witness[0]), "difference": str(witness[1])}
    return Evidence(Verdict.REFUTED, f"on an exact rational instance the sides differ by {witness[1]}", data)


def dot(a: Sequence[Any], b: Sequence[Any]) -> Any:
    """The inner product of two vectors of numbers of any kind."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def exact_strings(values: dict[str, Any]) -> dict[str, Any]:
    """Fractions as text ``a/b``, so that no digit is lost in JSON."""
    return {k: [str(x) for x in v] if isinstance(v, list | tuple) else str(v) for k, v in values.items()}
