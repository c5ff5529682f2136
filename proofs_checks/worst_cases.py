r"""The corrected bound -> the exact worst case of its left side, by performance estimation with PEPit.

Over all $L$-smooth functions and all ascent points within $\rho$ the left side of ``conv-corrected`` is largest for
gradients, points and values that solve a semidefinite program: the conditions under which some $L$-smooth function
interpolates them are linear in their Gram matrix. Its dual value is the upper side. A run on the quadratic $w^2/2$ in
exact rationals is the lower side. As $w$ and the loss can be rescaled, $L=\rho=1$ is general.

PEPit is no requirement: a recorded run is in ``tables/worst_cases.csv``, made by
``python -c "from proofs_checks.worst_cases import record; record()"``.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from disam_theory.claims import Evidence, Verdict
from disam_theory.convergence import corrected_floor, corrected_left
from disam_theory.files import csv_text, write_atomically

TABLE = Path(__file__).parent / "tables" / "worst_cases.csv"
CLASSES = ("smooth", "smooth and convex")
ROOTS = (Fraction(1), Fraction(3))  # of twice the gap: the quadratic starts there
RATES = (Fraction(1, 2), Fraction(1))
SOLVER = "CLARABEL"
TOLERANCE = 1e-5  # relative: the solver stops at 1e-8, and reports some of its solutions as inaccurate

Number = Any  # a Fraction, a float or an expression of PEPit
Row = dict[str, str]


def corrected_right(gap: Number, rates: tuple[Number, ...], L: Number, rho: Number) -> Number:
    r"""$2(L(w_1)-L_{\min})+L^2\sum_t\eta_t\rho^2$."""
    return 2 * gap + sum(corrected_floor(rate, L, rho) for rate in rates)


def worst_case(kind: str, steps: int, rate: float, gap: float) -> tuple[float, float]:
    r"""The solver's primal and dual value of $\max\sum_t\eta[\lVert a_t\rVert^2+(1-\eta)\lVert b_t\rVert^2]$.

    A function with $L_{\min}$ as its least value exists where, beside the interpolation conditions,
    $L(w)-L_{\min}\geq\lVert\nabla L(w)\rVert^2/2$ at every point. For convex ones a minimum is interpolated as well.
    """
    from PEPit import PEP, Expression
    from PEPit.functions import SmoothConvexFunction, SmoothFunction

    problem = PEP()
    convex = kind == CLASSES[1]
    loss = problem.declare_function(SmoothConvexFunction if convex else SmoothFunction, L=1.0)
    least = loss(loss.stationary_point()) if convex else Expression()
    w = problem.set_initial_point()
    problem.set_initial_condition(loss(w) - least <= gap)
    left = Expression(is_leaf=False, decomposition_dict={})
    for _ in range(steps):
        ascent = problem.set_initial_point()
        problem.add_constraint((ascent - w) ** 2 <= 1)
        (a, now), (b, above) = loss.oracle(w), loss.oracle(ascent)
        for gradient, value in ((a, now), (b, above)):
            problem.add_constraint(value - least >= gradient**2 / 2)
        left = left + corrected_left(rate, 1, a**2, b**2)
        w = w - rate * b
    problem.set_performance_metric(left)
    primal, dual = (problem.solve(verbose=0, return_primal_or_dual=s, solver=SOLVER) for s in ("primal", "dual"))
    return float(primal), float(dual)


def on_the_quadratic(steps: int, rate: Fraction, root: Fraction) -> Fraction:
    r"""The largest left side on $w^2/2$ from $w_1=$ ``root``, where each ascent goes up or down by $\rho=1$."""
    best = Fraction(0)
    for signs in product((1, -1), repeat=steps):
        w, left = root, Fraction(0)
        for sign in signs:
            left += corrected_left(rate, 1, w**2, (w + sign) ** 2)
            w -= rate * (w + sign)
        best = max(best, left)
    return best


def solve() -> list[Row]:
    """All worst cases, from the solver."""
    rows = []
    for kind, steps, rate, root in product(CLASSES, (1, 2, 3), RATES, ROOTS):
        primal, dual = worst_case(kind, steps, float(rate), float(root**2 / 2))
        inputs = {"functions": kind, "T": str(steps), "eta": str(rate), "root": str(root)}
        rows.append({**inputs, "primal": f"{primal:.9f}", "dual": f"{dual:.9f}"})
    return rows


def recorded() -> list[Row]:
    """The worst cases of the recorded run."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def record() -> None:
    """Solve again and write the table."""
    rows = solve()
    head = f"# PEPit {version('PEPit')} with {SOLVER}; L = rho = 1, the gap is root^2/2\n"
    write_atomically(TABLE, head + csv_text(rows))


def check_conv_worst_case(
    study: object,
    *,
    right: Callable[..., Number] = corrected_right,
    rows: Callable[[], list[Row]] | None = None,
) -> Evidence:
    r"""Do the solver's worst cases stay below the bound, and does the quadratic attain them?

    ``rows`` gives the worst cases; without it they are solved for here, which takes PEPit.
    """
    if rows is None and find_spec("PEPit") is None:
        reason = f"PEPit is not installed; the run recorded in tables/{TABLE.name} is shown, and not made again"
        return Evidence(Verdict.SKIPPED, reason, {"recorded": [_compare(row, right) for row in recorded()]})
    compared = [_compare(row, right) for row in (rows or solve)()]
    above = [row for row in compared if row["quadratic_above_bound"] or row["dual_above_bound"]]
    data = {"tolerance": TOLERANCE, "rows": compared}
    if above:
        first = {k: above[0][k] for k in ("functions", "T", "eta", "root", "quadratic", "dual", "bound")}
        return Evidence(Verdict.REFUTED, f"{len(above)} of {len(compared)} worst cases exceed it, first {first}", data)
    attained = [row for row in compared if row["quadratic"] == row["bound"]]
    if not attained or not all(row["quadratic_is_worst"] for row in compared):
        return Evidence(Verdict.UNDECIDED, "no worst case exceeds the bound, and not every one is attained", data)
    reason = f"none of {len(compared)} worst cases exceeds the bound, a quadratic attains each of them"
    return Evidence(Verdict.SUPPORTED, f"{reason}, and {len(attained)} equal the bound exactly", data)


def _compare(row: Row, right: Callable[..., Number]) -> dict[str, Any]:
    steps, rate, root = int(row["T"]), Fraction(row["eta"]), Fraction(row["root"])
    bound, lower = right(root**2 / 2, (rate,) * steps, 1, 1), on_the_quadratic(steps, rate, root)
    dual, slack = float(row["dual"]), TOLERANCE * float(lower)
    return {
        **row,
        "quadratic": str(lower),
        "bound": str(bound),
        "quadratic_above_bound": lower > bound,
        "dual_above_bound": dual > float(bound) + slack,
        "quadratic_is_worst": abs(dual - float(lower)) <= slack,
    }
