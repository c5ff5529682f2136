r"""Theorem 1's proof, Eq. 10 to Eq. 13, line by line: does each follow from the one before it?

A line that follows is certified: right side less left side is written as a sum of squares and of known inequalities
that a computer algebra system expands to zero, in inner products that stand for vectors of every dimension. Exact
rational instances are the second path. Letters: $d_t=w_{t+1}-w_t$, $e=\epsilon_{t+1}-\epsilon_t$,
$v=\nabla L(w_t^{asc})$, $g=\nabla L_d(w_t)$.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from math import isqrt
from typing import Any

import flint
import sympy as sp

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.errors import ComputationError
from proofs_checks.enclosures import to_ball
from proofs_checks.exact import dot, exact_strings
from proofs_checks.one_step import BITS, Number, add, certify, identity

# (value of each sample, its probability); one domain, batches of one sample
POPULATION = ((Fraction(1), Fraction(3, 4)), (Fraction(-3), Fraction(1, 4)))
Pairs = Callable[[list[Fraction]], dict[tuple[int, int], Fraction]]
Statements = dict[str, Callable[[list[Fraction], Fraction, list[Fraction]], bool]]


def eq10_right(value: Number, inner: Number, square: Number, L: Number) -> Number:
    r"""$L(a)+\langle\nabla L(a),b-a\rangle+\frac L2\lVert b-a\rVert^2$."""
    return value + inner + L * square / 2


def check_eq10(study: object, *, right: Callable[..., Number] = eq10_right) -> Evidence:
    r"""$L(b)-L(a)-\langle\nabla L(a),b-a\rangle=\int_0^1\langle\Delta_s,b-a\rangle ds$, $\lVert\Delta_s\rVert\leq
    Ls\lVert b-a\rVert$; so $\langle\Delta_s,b-a\rangle\leq Ls\lVert b-a\rVert^2$, as a square and $L$-smoothness."""
    value, inner, x = sp.symbols("f inner x", real=True)
    square, delta2 = sp.symbols("square delta2", nonnegative=True)
    L, s = sp.symbols("L s", positive=True)
    a_square, smooth = L**2 * s**2 * square - 2 * L * s * x + delta2, L**2 * s**2 * square - delta2
    remainders = {
        "Cauchy-Schwarz from a square": L * s * square - x - (a_square + smooth) / (2 * L * s),
        "after the integral over s": right(value, inner, square, L)
        - (value + inner + sp.integrate(L * s * square, (s, 0, 1))),
    }
    reason = "integrating the smoothness inequality along the segment gives exactly the printed right side"
    return certify(remainders, _smooth_instances(right), reason)


def _smooth_instances(right: Callable[..., Number]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Two coordinates of curvature at most L, the third quadratic up to 1 and linear from there on."""
    rng = random.Random(0)
    for _ in range(60):
        L = Fraction(rng.randint(1, 6), 2)
        h = [L * Fraction(rng.choice((-4, -3, 0, 2, 4)), 4) for _ in range(2)]
        a, b = ([Fraction(rng.randint(-9, 9), rng.randint(1, 4)) for _ in range(3)] for _ in range(2))

        def loss(w: list[Fraction], h: list[Fraction] = h, L: Fraction = L) -> Fraction:
            tail = w[2] ** 2 / 2 if abs(w[2]) <= 1 else abs(w[2]) - Fraction(1, 2)
            return h[0] * w[0] ** 2 / 2 + h[1] * w[1] ** 2 / 2 + L * tail

        gradient = [h[0] * a[0], h[1] * a[1], L * max(Fraction(-1), min(Fraction(1), a[2]))]
        move = add(b, a, -1)
        slack = right(loss(a), dot(gradient, move), dot(move, move), L) - loss(b)
        yield exact_strings({"L": L, "curvatures": h, "a": a, "b": b, "right_minus_left": slack}), slack < 0


def eq11_right(value: Number, along: Number, turned: Number, dd: Number, ee: Number, L: Number) -> Number:
    r"""Eq. 11, last line; ``along`` $=\langle v,d_t\rangle$, ``turned`` $=\langle v,e\rangle$, ``dd``
    $=\lVert d_t\rVert^2$, ``ee`` $=\lVert e\rVert^2$, $e=\epsilon_{t+1}-\epsilon_t$."""
    return value + along + L * dd + turned + L * ee


def check_eq11(study: object, *, right: Callable[..., Number] = eq11_right) -> Evidence:
    r"""Right side less Eq. 10's is $\frac L2\lVert d_t-e\rVert^2$."""
    value, along, turned, dd, de, ee = sp.symbols("f along turned dd de ee", real=True)
    L = sp.Symbol("L", positive=True)
    before = eq10_right(value, along + turned, dd + 2 * de + ee, L)
    remainder = right(value, along, turned, dd, ee, L) - before - L / 2 * (dd - 2 * de + ee)

    def instances() -> Iterator[tuple[dict[str, Any], bool]]:
        rng = random.Random(0)
        for _ in range(60):
            d, e, v = ([Fraction(rng.randint(-9, 9), rng.randint(1, 5)) for _ in range(3)] for _ in range(3))
            both, smooth = add(d, e, 1), Fraction(rng.randint(1, 6), 2)
            left = eq10_right(0, dot(v, both), dot(both, both), smooth)
            slack = right(0, dot(v, d), dot(v, e), dot(d, d), dot(e, e), smooth) - left
            yield exact_strings({"L": smooth, "d": d, "e": e, "v": v, "right_minus_left": slack}), slack < 0

    reason = r"the right side exceeds Eq. 10's by exactly $\frac L2\lVert d_t-(\epsilon_{t+1}-\epsilon_t)\rVert^2$"
    return certify({"right - left - a square": remainder}, instances(), reason)


def independent_batches(probabilities: list[Fraction]) -> dict[tuple[int, int], Fraction]:
    """(ascent sample, descent sample) -> probability, both drawn afresh."""
    return {(i, j): p * q for (i, p), (j, q) in product(enumerate(probabilities), repeat=2)}


def same_batch(probabilities: list[Fraction]) -> dict[tuple[int, int], Fraction]:
    """Algorithm 1: one batch for both gradients."""
    return {(i, i): p for i, p in enumerate(probabilities)}


def eq12_sides(
    curvature: int,
    population: tuple[tuple[Fraction, Fraction], ...],
    w: Fraction,
    rho: Fraction,
    pairs: Pairs,
    *,
    at_pooled: bool = False,
) -> tuple[Fraction, Fraction]:
    r"""$E\langle\nabla L(w^{asc}),g_p\rangle$ and $E\lVert\nabla L(w^{asc})\rVert^2$ for $\ell(w;\xi)=h(w-\xi)^2/2$.

    $g_p$ is the sample's gradient at the batch's ascent point. $w^{asc}$ in the paper's gradient is that point, or,
    ``at_pooled``, the ascent point of the pooled loss, as Sec. 2.1 defines it.
    """
    mean = sum(x * p for x, p in population)
    inner = square = Fraction(0)
    for (i, j), probability in pairs([p for _, p in population]).items():
        ascent = w + rho * (1 if curvature * (w - population[i][0]) > 0 else -1)
        whole = w + rho * (1 if curvature * (w - mean) > 0 else -1) if at_pooled else ascent
        gradient = curvature * (whole - mean)
        inner += probability * gradient * curvature * (ascent - population[j][0])
        square += probability * gradient**2
    return inner, square


def _eq12_by_differences(curvature: int, w: Fraction, rho: Fraction, *, at_pooled: bool) -> tuple[Fraction, Fraction]:
    """The same for one batch of one of four equally likely samples, gradients as central differences (exact here)."""
    samples = [x for x, p in POPULATION for _ in range(int(4 * p))]

    def slope(point: Fraction, drawn: list[Fraction]) -> Fraction:
        ends = [sum((curvature * (point + h - x) ** 2 / 2 for x in drawn), Fraction(0)) for h in (1, -1)]
        return (ends[0] - ends[1]) / (2 * len(drawn))

    def climbed(drawn: list[Fraction]) -> Fraction:
        return w + rho * slope(w, drawn) / abs(slope(w, drawn))

    inner = square = Fraction(0)
    for sample in samples:
        gradient = slope(climbed(samples if at_pooled else [sample]), samples)
        inner += gradient * slope(climbed([sample]), [sample]) / len(samples)
        square += gradient**2 / len(samples)
    return inner, square


def check_eq12(study: object, *, fresh: Pairs = independent_batches, reused: Pairs = same_batch) -> Evidence:
    r"""Is $E\langle\nabla L(w_t^{asc}),g_p\rangle\geq E\lVert\nabla L(w_t^{asc})\rVert^2$, with ``fresh`` and
    ``reused`` batches? In exact rationals; random populations for the first, one for each reading of the second."""
    rng = random.Random(0)
    gaps = []
    for _ in range(60):
        values = [Fraction(rng.randint(-12, 12), 3) for _ in range(4)]
        parts = [rng.randint(1, 5) for _ in values]
        drawn = tuple((x, Fraction(n, sum(parts))) for x, n in zip(values, parts, strict=True))
        inner, square = eq12_sides(rng.choice((1, -1)), drawn, Fraction(rng.randint(1, 9), 7), Fraction(1, 2), fresh)
        gaps.append(inner - square)
    readings = {
        "w_asc is the batch's ascent point, loss -(w - xi)^2/2": (-1, False),
        "w_asc is the pooled loss's ascent point, loss (w - xi)^2/2": (1, True),
    }
    rows = []
    start, rho = Fraction(1, 4), Fraction(1)
    for name, (curvature, at_pooled) in readings.items():
        inner, square = eq12_sides(curvature, POPULATION, start, rho, reused, at_pooled=at_pooled)
        again = _eq12_by_differences(curvature, start, rho, at_pooled=at_pooled)
        if reused is same_batch and again != (inner, square):
            raise ComputationError(f"{name}: the two paths give {inner}, {square} and {again}")
        rows.append({"reading": name, "inner": str(inner), "square": str(square), "fails": inner < square})
    samples = [exact_strings({"xi": xi, "probability": p}) for xi, p in POPULATION]
    data = {
        "independent_batches": {"populations": len(gaps), "largest_gap": str(max(map(abs, gaps)))},
        "same_batch": {"samples": samples, "w": str(start), "rho": str(rho), "rows": rows},
    }
    if any(gaps):
        return Evidence(Verdict.REFUTED, "with the batches meant to be independent the two sides differ", data)
    failing = [row for row in rows if row["fails"]]
    if not failing:
        return Evidence(Verdict.PROVED, "the two sides agree with both kinds of batches", data)
    if len(failing) < len(rows):
        return Evidence(Verdict.UNDECIDED, "with a reused batch it fails on one reading only", data)
    shown_rows = "; ".join(f"{row['inner']} < {row['square']}" for row in rows)
    reason = (
        "the gradient at the ascent point is unbiased where the ascent uses another batch (or all data), "
        f"and biased where Algorithm 1 reuses its batch: {shown_rows}"
    )
    return Evidence(Verdict.CONDITIONAL, reason, data)


EQ13_PRINTED: Statements = {
    "epsilon_t is parallel to grad L_d(w_t) and points along it": lambda g, rho, eps: (
        g[0] * eps[1] == g[1] * eps[0] and dot(g, eps) > 0
    ),
    "epsilon_t is a unit vector": lambda g, rho, eps: dot(eps, eps) == 1,
    "epsilon_t = grad L_d(w_t)": lambda g, rho, eps: eps == g,
}


def check_eq13(study: object, *, statements: Statements = EQ13_PRINTED) -> Evidence:
    r"""Each of the statements about $\epsilon_t=\rho g/\lVert g\rVert$, on gradients whose norm is rational."""
    rows = []
    for rho, g in product((Fraction(1, 20), Fraction(1, 2)), pythagorean_gradients()):
        length = exact_norm(g)
        eps = [rho * x / length for x in g]
        wrong = [name for name, holds in statements.items() if not holds(g, rho, eps)]
        squared = {"g": g, "rho": rho, "epsilon": eps, "squared_norm_of_epsilon": dot(eps, eps)}
        rows.append({**exact_strings(squared), "fail": wrong})
    failing = max(rows, key=lambda row: len(row["fail"]))
    if not failing["fail"]:
        return Evidence(Verdict.UNDECIDED, "all statements hold on every gradient tried", {"rows": rows})
    reason = (
        f"for g = ({', '.join(failing['g'])}) and rho = {failing['rho']} the squared norm of epsilon is "
        f"{failing['squared_norm_of_epsilon']} = rho^2, so this fails: {'; '.join(failing['fail'])}"
    )
    return Evidence(Verdict.REFUTED, reason, {"witness": failing, "instances": len(rows)})


def check_eq13_repaired(
    study: object,
    *,
    length: Callable[[Number], Number] = lambda rho: rho,
    arc: Callable[[Number], Number] = lambda phi: phi,
) -> Evidence:
    r"""Is $\lVert\epsilon_t\rVert=$ ``length``$(\rho)$ and the chord $2\sin(\phi/2)\leq$ ``arc``$(\phi)$?"""
    rho, gg = sp.symbols("rho gg", positive=True)
    difference = rho**2 * gg / sp.sqrt(gg) ** 2 - length(rho) ** 2
    remainders = {**identity("|epsilon|^2 less the stated square", difference), **arc_remainders(arc)}

    def instances() -> Iterator[tuple[dict[str, Any], bool]]:
        for g, g_next in product(pythagorean_gradients(), repeat=2):
            chord2 = squared_chord(g, g_next)
            with flint.ctx.workprec(BITS):
                phi = 2 * (to_ball(chord2).sqrt() / 2).asin()
                chord_longer = bool(to_ball(chord2) > arc(phi) ** 2)
            for size in (Fraction(1, 20), Fraction(2)):
                eps = [size * x / exact_norm(g) for x in g]
                violated = chord_longer or dot(eps, eps) != length(size) ** 2
                yield exact_strings({"g": g, "g_next": g_next, "rho": size}), violated

    reason = r"$\rho g/\lVert g\rVert$ has norm $\rho$, and $\phi-2\sin(\phi/2)$ starts at 0 and never falls"
    return certify(remainders, instances(), reason)


def arc_remainders(arc: Callable[[Number], Number]) -> dict[str, sp.Expr]:
    r"""Remainders of $2\sin(\phi/2)\leq$ arc: at 0, and the slope less $1-\cos(\phi/2)$, which is at least 0."""
    phi = sp.Symbol("phi", nonnegative=True)
    gap = arc(phi) - 2 * sp.sin(phi / 2)
    return {
        "arc - chord at 0": gap.subs(phi, 0),
        "slope of arc - chord, less 1 - cos(phi/2)": gap.diff(phi) - (1 - sp.cos(phi / 2)),
    }


def pythagorean_gradients() -> list[list[Fraction]]:
    """Gradients with a rational norm: in several directions, opposite ones among them, and of several lengths."""
    directions = ((3, 4), (-3, 4), (5, -12), (-5, 12), (8, 15), (4, 3))
    return [[scale * x for x in pair] for pair in directions for scale in (Fraction(1, 100), Fraction(1), Fraction(5))]


def exact_norm(g: list[Fraction]) -> Fraction:
    r"""$\lVert g\rVert$ where it is rational."""
    square = dot(g, g)
    return Fraction(isqrt(square.numerator), isqrt(square.denominator))


def squared_chord(g: list[Fraction], g_next: list[Fraction]) -> Fraction:
    r"""$\lVert g'/\lVert g'\rVert-g/\lVert g\rVert\rVert^2=2-2\cos\phi$."""
    return 2 - 2 * dot(g, g_next) / (exact_norm(g) * exact_norm(g_next))


THEOREM1_STEP_CLAIMS = (
    Claim(
        id="thm1-eq10",
        where="Proof of Theorem 1, Eq. (10)",
        statement=r"$L(w^{asc}_{t+1})\leq L(w^{asc}_t)+\langle\nabla L(w^{asc}_t),w^{asc}_{t+1}-w^{asc}_t\rangle"
        r"+\frac L2\lVert w^{asc}_{t+1}-w^{asc}_t\rVert^2$.",
        assumptions=("$L$ is $L$-smooth: its gradient is Lipschitz with constant $L$",),
        scope="every dimension, every pair of points",
        expected=Verdict.PROVED,
        check=check_eq10,
    ),
    Claim(
        id="thm1-eq11",
        where="Proof of Theorem 1, Eq. (11)",
        statement=r"$L(w^{asc}_{t+1})\leq L(w^{asc}_t)+\langle\nabla L(w^{asc}_t),d_t\rangle+L\lVert d_t\rVert^2"
        r"+\langle\nabla L(w^{asc}_t),\epsilon_{t+1}-\epsilon_t\rangle+L\lVert\epsilon_{t+1}-\epsilon_t\rVert^2$.",
        assumptions=(
            "Eq. (10)",
            r"$w^{asc}_{t+1}-w^{asc}_t=d_t+\epsilon_{t+1}-\epsilon_t$, by the definition of $w^{asc}$",
        ),
        scope="every dimension",
        expected=Verdict.PROVED,
        check=check_eq11,
    ),
    Claim(
        id="thm1-eq12",
        where="Proof of Theorem 1, Eq. (12)",
        statement=r"$-\eta_tE\langle\nabla L(w_t^{asc}),g_p^{(t)}\rangle\leq-\eta_tE\lVert\nabla L(w_t^{asc})\rVert^2$ "
        r"for the stochastic gradient $g_p^{(t)}$ of Algorithm 1.",
        assumptions=(
            r"a sample's gradient at a point that does not depend on the sample is unbiased",
            r"the condition: $g_p$ is taken at $w_t^{asc}$, and that point depends on no sample of the descent batch "
            "(it comes from another batch, or from all data)",
            r"$E\lVert g_p\rVert^2\leq G^2$ is an assumption of the theorem",
        ),
        scope="under the condition both sides are equal, as the conditional mean over the descent batch is the "
        "gradient there (checked on random finite populations); with one batch for both, as Algorithm 1 has it, an "
        "exact instance for each reading of $w_t^{asc}$",
        expected=Verdict.CONDITIONAL,
        check=check_eq12,
    ),
    Claim(
        id="thm1-eq13",
        where="Proof of Theorem 1, Eq. (13) and the text below it",
        statement=r"$\epsilon_t=\rho\,g^{(t)}/\lVert g^{(t)}\rVert$; $\epsilon_t=\nabla L_d(w_t)$; $\epsilon_t$ and "
        r"$\epsilon_{t+1}$ are unit length vectors.",
        assumptions=(r"$g^{(t)}=\nabla L_d(w_t)\neq0$, $\rho>0$ fixed", "the three statements hold together"),
        scope="an exact counterexample at the default $\\rho=0.05$",
        expected=Verdict.REFUTED,
        check=check_eq13,
        repaired_by="thm1-eq13-repaired",
    ),
    Claim(
        id="thm1-eq13-repaired",
        where="Proof of Theorem 1, Eq. (13), corrected",
        statement=r"$\lVert\epsilon_t\rVert=\rho$, and "
        r"$\lVert\epsilon_{t+1}-\epsilon_t\rVert=2\rho\sin(\phi_t/2)\leq\rho\,\phi_t$.",
        assumptions=(r"$\epsilon_t=\rho\,g^{(t)}/\lVert g^{(t)}\rVert$, $g^{(t)}$ and $g^{(t+1)}$ not 0",),
        scope=r"every dimension, $0\leq\phi_t\leq\pi$",
        expected=Verdict.PROVED,
        check=check_eq13_repaired,
    ),
)
