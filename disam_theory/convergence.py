r"""A recorded trace -> how far each inequality of the convergence theory holds along it, and the rate of convergence.

Six inequalities, three as Theorem 1 has them and three that do hold:

| id | inequality | recorded columns that it needs |
|---|---|---|
| ``turning`` | (17): $\phi_t\leq\eta_t\Gamma$ with $\Gamma=L$ | ``phi``, ``lr`` |
| ``eq18`` | (18), one step of $L_p(w_t)=L(w_t^{asc})$ | ``losses_ascent``, ``grad_norm_ascent``, ``lr`` |
| ``theorem1`` | (9), for every number $T$ of steps | those of ``eq18`` |
| ``corrected_step`` | one step of the corrected theorem | ``losses``, ``grad_norm``, ``grad_norm_ascent``, ``lr`` |
| ``corrected_sum`` | its sum over $t\leq T$ | the same |
| ``corrected_average`` | its average over $t\leq T$ | the same |

All six speak of a loss that stays the same from step to step and of $w_{t+1}=w_t-\eta_t\nabla L(w_t^{asc})$, so they
are evaluated for full batches without momentum and weight decay; of other traces they cannot be had. Each is monotone
in the smoothness constant $L$ and in the bound $G$ of the gradients: what holds with lower bounds of them holds, and
what is exceeded with one may only say that it is larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import optimize, special, stats

from disam_theory.errors import UsageError
from disam_theory.traces import Trace

Array = np.ndarray
Sides = tuple[Array, Array, Array]  # left, right and what rounding may do to their difference, each (T,)
Number = Any  # a float, an array, a tensor, or an exact number

# What rounding may do to one term of an inequality, relative to it: of float32, or of the nine digits that a file has.
ROUNDING = {"float32": 1e-6, "float64": 1e-8}

HOLDS = "holds"
FAILS = "fails"
LARGER = "L is larger"  # exceeded, and so proved of L: the inequality is a theorem
OPEN = "open"  # exceeded with a lower bound of L or of G; with the true ones it may hold
ABSENT = "cannot be had"

FIRST, RATIO, FEWEST = 8, math.sqrt(2), 6  # windows of a fit: where they start, how they grow, how many are needed
COSINES = 2  # of the variance of a fitted exponent
BETTER = 4  # times less squared error: then a geometric decay is said to fit better
SIGNIFICANCE = 0.01  # of the F test for a floor


def thm1_bound(gap: Number, rate: Number, L: Number, G: Number, rho: Number, turning: Number, T: Number) -> Number:
    r"""$\frac{L_p(w_0)-L_{\min}}{\eta_0}\frac1{\sqrt T}+\frac{(LG^2+\rho^2L\Gamma^2)\,\eta_0\log T}{\sqrt T}$."""
    return gap / rate / T.sqrt() + (L * G**2 + rho**2 * L * turning**2) * rate * T.log() / T.sqrt()


def eq18_right(
    now: Number, eta: Number, at_ascent: Number, L: Number, G: Number, rho: Number, turning: Number
) -> Number:
    r"""$L_p(w_t)-\eta_t\lVert\nabla L(w_t^{asc})\rVert^2+\eta_t^2LG^2+L\rho^2\eta_t^2\Gamma^2$, of the squared norm."""
    return now - eta * at_ascent + eta**2 * L * G**2 + L * rho**2 * eta**2 * turning**2


def corrected_left(eta: Number, L: Number, at_w: Number, at_ascent: Number) -> Number:
    r"""$\eta_t[\lVert\nabla L(w_t)\rVert^2+(1-L\eta_t)\lVert\nabla L(w_t^{asc})\rVert^2]$, from the squared norms."""
    return eta * (at_w + (1 - L * eta) * at_ascent)


def corrected_floor(eta: Number, L: Number, rho: Number) -> Number:
    r"""$L^2\eta_t\rho_t^2$."""
    return L**2 * eta * rho**2


def corrected_average(largest_gap: Number, eta: Number, T: Number, L: Number, rho: Number) -> Number:
    r"""$\frac{2B}{\eta_TT}+L^2\rho^2$ with $B=\max_{t\leq T}L(w_t)-L_{\min}$, for step sizes that do not rise."""
    return 2 * largest_gap / (eta * T) + corrected_floor(1, L, rho)


@dataclass(frozen=True)
class Inequality:
    """One inequality left <= right. ``printed``: as the paper has it, else a theorem. ``by``: what counts its rows."""

    title: str
    columns: tuple[str, ...]
    printed: bool
    by: str  # "step" t, counted from 0, or the number "T" of steps


_ASCENT = ("losses_ascent", "grad_norm_ascent", "lr")
_BOTH = ("losses", "grad_norm", "grad_norm_ascent", "lr")
INEQUALITIES = {
    "turning": Inequality("(17)", ("phi", "lr"), True, "step"),
    "eq18": Inequality("(18)", _ASCENT, True, "step"),
    "theorem1": Inequality("Thm 1", _ASCENT, True, "T"),
    "corrected_step": Inequality("one step", _BOTH, False, "step"),
    "corrected_sum": Inequality("sum", _BOTH, False, "T"),
    "corrected_average": Inequality("average", _BOTH, False, "T"),
}
QUANTITIES = {  # of the theorem, each with the columns that it takes; those of a group are alternatives
    "training_loss": (("losses", "losses_ascent"),),
    "gradient_at_w": (("grad_norm",),),
    "gradient_at_ascent_and_G": (("grad_norm_ascent",),),
    "eta": (("lr",),),
    "Gamma": (("phi",), ("lr",)),
    "beta": (("beta",),),
}
MEASURES = {
    "gamma": ("phi", "lr"),
    "local_smoothness": ("grad_norm", "grad_norm_ascent", "lr"),
    "cross_over_main": ("cross_term", "grad_norm_ascent", "lr"),
    "beta_min": ("beta", "losses"),
    "rate_at_w": ("grad_norm",),
    "rate_at_ascent": ("grad_norm_ascent",),
    "rate_loss": ("losses",),
}


@dataclass(frozen=True)
class Rows:
    """What each row of a log stands for: the average over the steps, or epochs, after the row before, to its own."""

    unit: str  # "step", or "epoch", which is of many steps
    ends: Array  # (n,), rising: how many units are over at the end of each row

    @classmethod
    def each_step(cls, steps: int) -> Rows:
        """A row a step, as a trace of this project has them."""
        return cls("step", np.arange(1.0, steps + 1))

    @classmethod
    def counted(cls, unit: str, at: Array) -> Rows:
        """From the numbers that a log gives its rows, which count from 0 where the first of them is 0."""
        return cls(unit, at + (at[0] == 0))

    @property
    def starts(self) -> Array:
        """(n,). The first row is as long as the second, or from the start."""
        first = max(2 * self.ends[0] - self.ends[1], 0.0) if len(self.ends) > 1 else 0.0
        return np.append(first, self.ends[:-1])

    @property
    def logs(self) -> Array:
        r"""The mean of $\log t$ over each row (n,); of an epoch's many steps, the integral."""
        a, b = self.starts, self.ends
        if self.unit == "step":
            return (special.gammaln(b + 1) - special.gammaln(a + 1)) / (b - a)
        return (special.xlogy(b, b) - special.xlogy(a, a)) / (b - a) - 1


@dataclass(frozen=True)
class Finding:
    """What a trace says of one inequality; ``first`` is the first step, or ``T``, at which it is exceeded."""

    verdict: str
    why: str
    checked: int = 0  # rows with both sides
    first: int | None = None
    least_slack: float = math.nan  # of right less left
    tightness: float = math.nan  # the largest left / right


@dataclass(frozen=True)
class Rate:
    r"""$a$ of $\lVert\nabla L\rVert^2$ or $L-L_{\min}\sim C\,T^{-a}$ with its interval, or ``why`` there is none."""

    exponent: float = math.nan
    low: float = math.nan
    high: float = math.nan
    windows: int = 0
    floor: float = math.nan
    why: str = ""


@dataclass(frozen=True)
class Convergence:
    """All that :func:`analyse` finds in one trace. ``series`` has one value a step, NaN where there is none."""

    algorithm: str
    end: str
    steps: int
    smoothness: float
    smoothness_is: str  # "given" or "estimated", see analyse
    smoothness_implied: float  # no L below it keeps the one-step inequality
    gradient_bound: float
    step_sizes_above: int  # steps with eta_t > 1/L, of which the corrected theorem says less
    findings: dict[str, Finding]
    series: dict[str, Array]
    rates: dict[str, Rate]
    held: dict[str, bool]  # of QUANTITIES: whether the trace has a number of it
    rows: Rows


@dataclass(frozen=True)
class _Run:
    """A trace's columns as the inequalities take them; norms are squared."""

    eta: Array
    at_w: Array
    at_ascent: Array
    loss: Array  # (T+1,): L(w_t), and after the last step where the run was evaluated there
    loss_ascent: Array
    phi: Array  # between eps_t and eps_{t+1}
    rho: float
    minimum: float
    rounding: float

    @property
    def T(self) -> Array:
        """1, 2, ... up to the number of steps."""
        return np.arange(1, len(self.eta) + 1)


def analyse(
    trace: Trace,
    *,
    smoothness: float | None = None,
    gradient_bound: float | None = None,
    minimum: float = 0.0,
    rows: Rows | None = None,
) -> Convergence:
    r"""Evaluate all that ``trace`` allows. ``smoothness`` is $L$, ``minimum`` is $L_{\min}$ (cross-entropy's is 0).

    Without ``smoothness``, $L$ is estimated by the largest :func:`local_smoothness`, a lower bound of it. Without
    ``gradient_bound``, $G$ is the largest $\lVert\nabla L(w_t^{asc})\rVert$ of the trace, the least that it can be.
    ``rows`` are those of a log that other code wrote, whose absent columns are NaN; else a row is a step.

    Raises:
        UsageError: an impossible constant, a trace without steps, or one that refutes a constant.
    """
    try:
        _check(trace, smoothness, minimum)
        run, unmet = _columns(trace, minimum), _unmet(trace)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the header is not as a trace has it ({type(error).__name__}: {error})") from error
    if not unmet:
        _check_minimum(run)
    local = local_smoothness(run, between=not unmet)
    L = _largest(local) if smoothness is None else smoothness
    G = _gradient_bound(run, gradient_bound)
    unmet = unmet or ("" if L > 0 else "the trace gives no estimate of the smoothness constant; give it")
    implied = math.nan if unmet else _largest(_implied(run))
    sides = {} if unmet else _printed_sides(run, L, G) | _corrected_sides(run, L)
    below = smoothness is None or np.fmax(implied, _largest(local)) * (1 - run.rounding) > L
    loose = _loose(given_L=not below, given_G=gradient_bound is not None)
    absent = _absent(trace) if rows else {}
    findings = {
        name: _finding(
            name, run, sides.get(name), unmet=absent.get(name) or unmet, implied=implied, loose=loose.get(name, "")
        )
        for name in INEQUALITIES
    }
    rows = rows or Rows.each_step(len(run.eta))
    return Convergence(
        algorithm=trace.header.get("settings", {}).get("algorithm", "unknown"),
        end=trace.end or "interrupted",
        steps=len(run.eta),
        smoothness=L,
        smoothness_is="given" if smoothness is not None else "estimated",
        smoothness_implied=implied,
        gradient_bound=G,
        step_sizes_above=int((run.eta * L > 1 + run.rounding).sum()),
        findings=findings,
        series=_series(findings, sides, run) | _measures(trace, run) | {"local_smoothness": local},
        rates={
            "at_w": fit_rate(run.at_w, rows=rows),
            "at_ascent": fit_rate(run.at_ascent, rows=rows),
            "loss": _loss_rate(run, rows),
        },
        held={
            name: all(any(_has(trace, column) for column in group) for group in groups)
            for name, groups in QUANTITIES.items()
        },
        rows=rows,
    )


def _loss_rate(run: _Run, rows: Rows) -> Rate:
    """Of the loss at w; at the ascent point where a log has that alone."""
    loss = run.loss[:-1] if np.isfinite(run.loss[:-1]).any() else run.loss_ascent
    if (loss < run.minimum).any():
        return Rate(why=f"a loss of {np.nanmin(loss):.6g} is below the minimum {run.minimum:g}; give a lower one")
    return fit_rate(loss - run.minimum, rows=rows, of="loss")


def _has(trace: Trace, column: str) -> bool:
    return bool(np.isfinite(trace.steps[column]).any())


def _absent(trace: Trace) -> dict[str, str]:
    """For each inequality the columns that a log lacks."""
    lacking = {
        name: [column for column in inequality.columns if not _has(trace, column)]
        for name, inequality in INEQUALITIES.items()
    }
    return {name: f"there is no {' and no '.join(columns)} in the file" for name, columns in lacking.items() if columns}


def _gradient_bound(run: _Run, given: float | None) -> float:
    largest = math.sqrt(_largest(run.at_ascent))
    if given is not None and not np.fmax(largest, 0.0) * (1 - run.rounding) <= given < math.inf:
        raise UsageError(f"gradient bound is {given:g}; it must be finite, and the trace has a norm of {largest:.6g}")
    return largest if given is None else given


def _loose(*, given_L: bool, given_G: bool) -> dict[str, str]:
    """For each printed inequality the constants that may be larger than those it is evaluated with."""
    L, G = ("" if given_L else "L", "" if given_G else "G")
    both = " and ".join(filter(None, (L, G)))
    return {"turning": L, "eq18": both, "theorem1": both}


def _series(findings: Mapping[str, Finding], sides: Mapping[str, Sides], run: _Run) -> dict[str, Array]:
    nothing = np.full(len(run.eta), math.nan)
    return {
        f"{name}_{side}": nothing if finding.verdict == ABSENT else sides[name][k]
        for name, finding in findings.items()
        for k, side in enumerate(("left", "right"))
    }


def _check(trace: Trace, smoothness: float | None, minimum: float) -> None:
    if smoothness is not None and not 0 < smoothness < math.inf:
        raise UsageError(f"smoothness is {smoothness}; L must be finite and above 0")
    if not math.isfinite(minimum):
        raise UsageError(f"minimum is {minimum}; L_min must be finite")
    if len(trace.steps["lr"]) == 0:
        raise UsageError("the trace holds no step; nothing can be said of it")
    trace.check_every_step()
    shape = (len(trace.steps["lr"]), len(trace.domains))
    for name in ("losses", "losses_ascent", "beta"):
        if trace.steps[name].shape != shape:
            raise UsageError(f"column {name!r} has shape {trace.steps[name].shape}; steps and domains make {shape}")


def _unmet(trace: Trace) -> str:
    """Which assumption of the inequalities the trace does not meet, or does not say that it meets; "" for none."""
    settings = trace.header.get("settings", {})
    if settings.get("algorithm") not in ("erm", "sam", "disam") or "rho" not in settings:
        return "the trace does not say by which rule and on which batches the loop moves w"
    if settings.get("objective", "average") != "average":
        return f"the loop descends the objective {settings['objective']!r}, not the average loss"
    if settings.get("sampling") != "full":
        return "the batch changes from step to step, so that consecutive losses are not of one function"
    moved = {name: settings.get(name, 0.0) for name in ("momentum", "weight_decay")}
    if any(moved.values()):
        named = " and ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in moved.items() if value)
        return f"with {named} the step is not -eta_t grad L(w_t^asc)"
    if len(trace.header.get("sizes", ())) != len(trace.domains):
        return "the header has no sizes of the domains, so that their pooled loss is not known"
    if not (trace.steps["lr"] > 0).all():
        return "a step size is not above 0"
    return ""


def _columns(trace: Trace, minimum: float) -> _Run:
    settings, columns, domains = trace.header.get("settings", {}), trace.steps, len(trace.domains)
    sizes = np.array(trace.header.get("sizes", [math.nan] * domains), dtype=float)
    shares = sizes / sizes.sum() if len(sizes) == domains else np.full(domains, math.nan)
    T = len(columns["lr"])
    last = trace.evaluations["losses"][trace.evaluations["step"] == T]  # w after the last step
    after = last[0] @ shares if len(last) else math.nan
    dtype = trace.header.get("provenance", {}).get("dtype")
    return _Run(
        eta=columns["lr"],
        at_w=columns["grad_norm"] ** 2,
        at_ascent=columns["grad_norm_ascent"] ** 2,
        loss=np.append(columns["losses"] @ shares, after),
        loss_ascent=columns["losses_ascent"] @ shares,
        phi=_next(columns["phi"]),
        rho=0.0 if settings.get("algorithm") == "erm" else float(settings.get("rho", math.nan)),
        minimum=minimum,
        rounding=ROUNDING.get(dtype, ROUNDING["float32"]),
    )


def _check_minimum(run: _Run) -> None:
    if (run.loss < run.minimum - run.rounding * np.abs(run.loss[0])).any():
        lowest = float(np.nanmin(run.loss))
        raise UsageError(f"the trace has a loss of {lowest:.6g}, below the minimum {run.minimum:g}; give a lower one")


def local_smoothness(run: _Run, *, between: bool) -> Array:
    r"""A lower bound of $L$ at each step (T,): the secant from $w_t$ to $w_t^{asc}$, and to $w_{t+1}$ if ``between``.

    A trace has the gradients' norms only, and no Hessian's eigenvalue:
    $\big|\lVert\nabla L(a)\rVert-\lVert\nabla L(b)\rVert\big|\leq\lVert\nabla L(a)-\nabla L(b)\rVert\leq L\lVert
    a-b\rVert$. What rounding may have added is taken off.
    """
    norm, up = np.sqrt(run.at_w), np.sqrt(run.at_ascent)
    doubt = 2 * run.rounding * np.fmax(_largest(norm), _largest(up))
    secant = _secant(norm, up, np.full(len(norm), run.rho), doubt)
    return np.fmax(secant, _secant(norm, _next(norm), run.eta * up, doubt)) if between else secant


def _secant(a: Array, b: Array, distance: Array, doubt: float) -> Array:
    return _ratio(np.maximum(np.abs(a - b) - doubt, 0.0), distance)


def _implied(run: _Run) -> Array:
    r"""The least $L$ at each step with which the corrected theorem's step holds: the root of a quadratic in $L$.

    $\eta_t\rho^2L^2+\eta_t^2\lVert\nabla L(w_t^{asc})\rVert^2L=\eta_t(\lVert\nabla L(w_t)\rVert^2+\lVert\nabla
    L(w_t^{asc})\rVert^2)-2(L(w_t)-L(w_{t+1}))$.
    """
    square, linear = run.eta * run.rho**2, run.eta**2 * run.at_ascent
    both = run.eta * (run.at_w + run.at_ascent)
    fallen = 2 * (run.loss[:-1] - run.loss[1:])
    doubt = run.rounding * (both + 2 * np.abs(run.loss[:-1]) + 2 * np.abs(run.loss[1:]))
    needed = np.maximum(both - fallen - doubt, 0.0)
    below = linear + np.sqrt(linear**2 + 4 * square * needed)
    return _ratio(2 * needed, below)


def _printed_sides(run: _Run, L: float, G: float) -> dict[str, Sides]:
    r"""With $\Gamma=L$, the largest that the paper allows."""
    eta, loss, T = run.eta, run.loss_ascent, torch.from_numpy(run.T.astype(float))
    step = eq18_right(loss, eta, run.at_ascent, L, G, run.rho, L)
    average = np.cumsum(run.at_ascent) / run.T
    bound = thm1_bound(loss[0] - run.minimum, eta[0], L, G, run.rho, L, T).numpy()
    start = (abs(loss[0]) + abs(run.minimum)) / eta[0] / np.sqrt(run.T)
    terms = {
        "turning": (run.phi, L * eta, np.full(len(eta), math.sqrt(2 / run.rounding))),  # an arc cosine near 1
        "eq18": (_next(loss), step, np.abs(_next(loss)) + 2 * np.abs(loss) + np.abs(step) + 2 * eta * run.at_ascent),
        "theorem1": (average, bound, average + bound + 2 * start),
    }
    return {name: (left, right, run.rounding * size) for name, (left, right, size) in terms.items()}


def _corrected_sides(run: _Run, L: float) -> dict[str, Sides]:
    eta, T, before, after = run.eta, run.T, run.loss[:-1], run.loss[1:]
    left, floor = corrected_left(eta, L, run.at_w, run.at_ascent), corrected_floor(eta, L, run.rho)
    size = corrected_left(eta, 0.0, run.at_w, run.at_ascent) * (1 + L * eta) + floor
    largest_gap = np.maximum.accumulate(before) - run.minimum
    average = corrected_average(largest_gap, eta, T, L, run.rho)
    either = np.abs(before) + np.abs(after)
    gap_size = 2 * (np.abs(before[0]) + abs(run.minimum))
    terms = {
        "corrected_step": (left, 2 * (before - after) + floor, size + 2 * either),
        "corrected_sum": (
            np.cumsum(left),
            2 * (before[0] - run.minimum) + np.cumsum(floor),
            np.cumsum(size) + gap_size,
        ),
        "corrected_average": (
            np.cumsum(left / eta) / T,
            average,
            np.cumsum(size / eta) / T + average + 2 * gap_size / (eta * T),
        ),
    }
    return {name: (left, right, run.rounding * size) for name, (left, right, size) in terms.items()}


def _finding(name: str, run: _Run, sides: Sides | None, *, unmet: str, implied: float, loose: str) -> Finding:
    """The verdict on one inequality; rows in which a side is NaN are not counted. ``loose``: see :func:`_loose`."""
    unmet = unmet or _unmet_by(name, run)
    if unmet or sides is None:
        return Finding(ABSENT, unmet)
    left, right, doubt = sides
    have = np.isfinite(left) & np.isfinite(right)
    if not have.any():
        return Finding(ABSENT, f"no step has a number in all of {' and '.join(INEQUALITIES[name].columns)}")
    slack = (right - left)[have]
    over = np.flatnonzero(have & (left - right > doubt))
    verdict, why = HOLDS, "within rounding, at every step that the trace holds"
    if len(over) and not INEQUALITIES[name].printed:
        verdict = LARGER
        why = f"it is a theorem and exceeded with this L, so that L is larger; its steps say at least {implied:.6g}"
    elif len(over):
        verdict, why = FAILS, "exceeded with the given constants"
        if loose:
            verdict, why = OPEN, f"exceeded with a lower bound of {loose}; with the true value it may hold"
    return Finding(
        verdict,
        why,
        checked=int(have.sum()),
        first=int(over[0]) + (INEQUALITIES[name].by == "T") if len(over) else None,
        least_slack=float(slack.min()),
        tightness=_largest(_ratio(left, right)[have & (right > 100 * doubt)]),  # within a per cent,
    )


def _unmet_by(name: str, run: _Run) -> str:
    """What one inequality asks of the run beyond what all ask."""
    if name == "turning" and run.rho == 0:
        return "there is no ascent, so that no angle is defined"
    scaled = run.eta * np.sqrt(run.T)
    if name == "theorem1" and not np.allclose(scaled, scaled[0], rtol=run.rounding):
        return "its step sizes are eta_0/sqrt(t), those of the trace are not"
    if name == "corrected_average" and (np.diff(run.eta) > run.rounding * run.eta[1:]).any():
        return "its step sizes do not rise, those of the trace do"
    return ""


def _measures(trace: Trace, run: _Run) -> dict[str, Array]:
    r"""$\Gamma_t=\phi_t/\eta_t$, the dropped cross term over $\eta_t\lVert\nabla L(w_t^{asc})\rVert^2$, and the least
    weight $\beta_i$ among the domains present."""
    present = np.isfinite(trace.steps["losses"])
    least = np.where(present, trace.steps["beta"], math.inf).min(axis=1)
    return {
        "squared_norm_at_w": run.at_w,
        "squared_norm_at_ascent": run.at_ascent,
        "gamma": _ratio(run.phi, run.eta),
        "loss": run.loss[:-1],
        "cross_over_main": _ratio(_next(trace.steps["cross_term"]), run.eta * run.at_ascent),
        "beta_min": np.where(np.isfinite(least), least, math.nan),
    }


def fit_rate(values: Array, *, level: float = 0.95, rows: Rows | None = None, of: str = "gradient") -> Rate:
    r"""Fit $a$ in $\lVert\nabla L\rVert^2\sim C\,t^{-a}$ to squared norms (T,), with an interval.

    ``of="loss"`` says that the values are $L-L_{\min}$. A point is the average over a window of steps; windows are
    disjoint, grow by $\sqrt2$, and the last ends at $T$; they are made of whole rows, each a step without ``rows``. As
    long as $a<1$, $\frac1T\sum_{t\leq T}\lVert\nabla L\rVert^2$ falls with the same $a$; else with $1/T$. The slope of
    the logarithms has an interval that allows for correlated errors: two cosine transforms of the scores make its
    variance, Student's t with two degrees of freedom its quantile (Lazarus, Lewis, Stock & Watson, 2018). There is no
    rate where a geometric decay fits far better, or a power law with a floor does and most of what is left is floor.
    """
    if not (np.isfinite(values) & (values >= 0)).all():
        return Rate(why="a gradient norm is missing" if of == "gradient" else "a training loss is missing")
    rows = rows or Rows.each_step(len(values))
    edges = _edges(rows)
    if len(edges) <= FEWEST:
        return Rate(windows=max(len(edges) - 1, 0), why=_too_few(rows, len(edges) - 1))
    lengths, logs = rows.ends - rows.starts, rows.logs
    windows = [slice(a, b) for a, b in pairwise(edges)]
    means, at = (
        np.array([np.average(column[window], weights=lengths[window]) for window in windows])
        for column in (values, logs)
    )
    if (means == 0).any():
        return Rate(
            windows=len(windows), why="the gradient is zero" if of == "gradient" else "the loss is at its minimum"
        )
    return _power(at, np.log(means), level)


def _power(at: Array, y: Array, level: float) -> Rate:
    slope, error, residual = _slope(at, y)
    floor, floor_residual = _floor(at, y)
    if BETTER * _slope(np.exp(at), y)[2] < residual:
        return Rate(windows=len(at), why="it falls geometrically, faster than by a power")
    needed = stats.f.isf(SIGNIFICANCE, 1, len(at) - 3) * floor_residual / (len(at) - 3)
    if residual - floor_residual > needed and floor > math.exp(y[-1]) / 2:
        return Rate(windows=len(at), floor=floor, why=f"it has come down to a floor near {floor:.3g}")
    reach = float(stats.t.ppf(0.5 + level / 2, COSINES)) * error
    return Rate(-slope, -slope - reach, -slope + reach, len(at))


def _edges(rows: Rows) -> list[int]:
    """Rows at which windows end: a row of one step is little to average over, and windows start at ``FIRST`` steps."""
    if not len(rows.ends):
        return []
    total, first = float(rows.ends[-1]), max(FIRST if rows.unit == "step" else 1, float(rows.ends[0]))
    count = int(math.log(total / first, RATIO) + 1e-9) if total >= first else -1
    ends = [round(total / RATIO**k) for k in range(count, -1, -1)]
    return np.unique(np.searchsorted(rows.ends, ends, side="right")).tolist()


def _too_few(rows: Rows, windows: int) -> str:
    count = len(rows.ends)
    if rows.unit == "step" and rows.ends[-1] == count:
        return f"{count} steps are too few; {round(FIRST * RATIO**FEWEST)} are needed"
    return f"{count} rows are too few; they make {max(windows, 0)} windows and {FEWEST} are needed"


def _slope(x: Array, y: Array) -> tuple[float, float, float]:
    """Slope of the least-squares line, its standard error under correlated errors, and the sum of squared residuals.

    Scores are raised by their leverage, as few points stand at the ends.
    """
    n, centred = len(x), x - x.mean()
    spread = centred @ centred
    slope = centred @ y / spread
    residuals = y - y.mean() - slope * centred
    scores = centred * residuals / (1 - 1 / n - centred**2 / spread)
    phases = np.pi * np.outer(np.arange(1, COSINES + 1), np.arange(n) + 0.5) / n
    variance = ((math.sqrt(2 / n) * np.cos(phases) @ scores) ** 2).mean()
    return float(slope), float(math.sqrt(n * variance) / spread), float(residuals @ residuals)


def _floor(at: Array, y: Array) -> tuple[float, float]:
    r"""$c$ of the best $C\,t^{-a}+c$ with $a,c\geq0$, and the sum of squared residuals of the logarithms."""

    def residuals(p: Array) -> Array:
        return np.logaddexp(p[0] - p[1] * (at - at[0]), p[2]) - y

    low = float(y.min())
    start = [float(y[0]), 1.0, low - 1.0]
    fit = optimize.least_squares(residuals, start, bounds=([-np.inf, 0, low - 50], [np.inf, 50, low + 50]))
    return math.exp(fit.x[2]), 2 * float(fit.cost)


def row(found: Convergence) -> dict[str, Any]:
    """What was found as one flat row of numbers and words; None where there is no number."""
    series = found.series
    gamma, local, cross = (series[name] for name in ("gamma", "local_smoothness", "cross_over_main"))
    both = np.isfinite(gamma) & np.isfinite(local)
    values: dict[str, Any] = {
        "algorithm": found.algorithm,
        "end": found.end,
        "steps": found.steps,
        "unit": found.rows.unit,
        "ends_at": float(found.rows.ends[-1]),
        "smoothness": found.smoothness,
        "smoothness_is": found.smoothness_is,
        "smoothness_implied": found.smoothness_implied,
        "gradient_bound": found.gradient_bound,
        "steps_with_lr_above_1_over_smoothness": found.step_sizes_above,
        "gamma_max": _largest(gamma),
        "local_smoothness_max": _largest(local),
        "share_gamma_above_local_smoothness": float((gamma > local)[both].mean()) if both.any() else math.nan,
        "cross_over_main_median": _median(cross),
        "cross_over_main_largest": _largest(np.abs(cross)),
        "share_cross_negative": float((cross[np.isfinite(cross)] < 0).mean()) if np.isfinite(cross).any() else math.nan,
        "beta_min": -_largest(-series["beta_min"]),
    }
    values |= {f"has_{name}": held for name, held in found.held.items()}
    for name, finding in found.findings.items():
        values |= {f"{name}_{field}": value for field, value in asdict(finding).items()}
    for name, rate in found.rates.items():
        values |= {f"rate_{name}_{field}": value for field, value in asdict(rate).items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def points(found: Convergence) -> list[dict[str, Any]]:
    """The series as a row a step, ``T`` counted from 1 (step t = T - 1), or a row of a log, ``T`` being the steps or
    epochs that are over at its end; None where there is no number."""
    columns = {name: values.tolist() for name, values in found.series.items()}
    return [
        {
            "T": int(found.rows.ends[t]),
            **{name: value if math.isfinite(value := values[t]) else None for name, values in columns.items()},
        }
        for t in range(found.steps)
    ]


COLOURS = {  # of Okabe & Ito, with a line style each
    "theorem1_left": ("#D55E00", "-", r"mean $\|\nabla L(w_t^{asc})\|^2$"),
    "theorem1_right": ("#D55E00", "--", "Theorem 1 as printed"),
    "corrected_average_left": ("#0072B2", "-", "corrected, left side"),
    "corrected_average_right": ("#0072B2", "--", "corrected, right side"),
    "gamma": ("#000000", "-", r"$\Gamma_t=\phi_t/\eta_t$"),
    "local_smoothness": ("#009E73", "--", "secant of gradient norms ($\\leq L$)"),
    "loss": ("#CC79A7", "-", "training loss"),
}
PANELS = (tuple(COLOURS)[:4], tuple(COLOURS)[4:6])
LOSS_PANEL = tuple(COLOURS)[6:]


def draw(
    figure: Any,
    columns: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    panels: Sequence[Sequence[str]] = PANELS,
    units: Sequence[str] = (),
) -> None:
    """Draw the rows of :func:`points` of each trace on a matplotlib figure, a column a trace under its title.

    Above are both theorems' sides over $T$, below is the turning rate. ``units`` is what each trace's $T$ counts,
    steps unless given.
    """
    axes = figure.subplots(len(panels), len(columns), squeeze=False, sharey="row")
    for k, (column, (title, rows)) in enumerate(zip(axes.T, columns.items(), strict=True)):
        for ax, quantities in zip(column, panels, strict=True):
            _draw_lines(ax, quantities, rows)
        column[0].set_title(title, fontsize=8)
        column[-1].set_xlabel(f"{units[k] if units else 'step'}s $T$")
    drawn = [pair for ax in axes.flat for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in drawn}
    ncols = 3 if len(columns) > 1 else 1
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False, fontsize=8)


def _draw_lines(ax: Any, quantities: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    for quantity in quantities:
        mine = [(row["T"], row[quantity]) for row in rows if (row[quantity] or 0) > 0]
        colour, style, label = COLOURS[quantity]
        if mine:
            ax.plot(*zip(*mine, strict=True), color=colour, linestyle=style, label=label)
    if ax.lines:
        ax.set(xscale="log", yscale="log")
    else:
        ax.text(0.5, 0.5, "cannot be had\nfrom this trace", ha="center", va="center", transform=ax.transAxes)
        ax.set_xticks([])


def _next(values: Array) -> Array:
    """The value of the step after, NaN after the last."""
    return np.append(values[1:], math.nan)


def _ratio(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.full(len(a), math.nan), where=b != 0)


def _largest(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan


def _median(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan
