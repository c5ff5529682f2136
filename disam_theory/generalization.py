r"""(model's size, length of its weights, radius, samples) -> generalisation bounds, each with its terms.

Every bound here is read for the 0-1 error, where 1 says nothing. A term that an audit cannot measure enters by its
least value, so that the right side is at least what is shown: a bound that is vacuous by that is so in truth.

| letter | meaning |
|---|---|
| ``k`` | number of parameters |
| ``n`` | number of samples |
| ``delta`` | probability with which the bound may fail |
| ``norm`` | $\lVert w\rVert_2$ |
| ``rho`` | radius $\rho$ of the ball around the weights |
| ``sigma`` | standard deviation of each entry of a random perturbation |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from disam_theory.errors import UsageError

EXACT, AT_LEAST, UNKNOWN = "exact", "at least", "unknown"
LEVELS = 64  # of prior scales: factors of 2 of the variance, more than float64 weights ever need


@dataclass(frozen=True)
class Term:
    """A summand of a bound's right side, at least 0. One that is ``unknown`` has no value and counts as 0."""

    name: str
    value: float | None
    known: str = EXACT  # or AT_LEAST, UNKNOWN


@dataclass(frozen=True)
class Bound:
    """A bound on the expected 0-1 error on the distribution of ``of``; it holds under ``assumes``."""

    name: str
    of: str
    terms: tuple[Term, ...]
    assumes: str

    @property
    def right_side(self) -> float:
        """The sum of the terms, or a lower bound of it where a term is not known exactly."""
        return sum(term.value or 0.0 for term in self.terms)

    @property
    def complete(self) -> bool:
        """Whether every term is known exactly, so that the right side is what is shown."""
        return all(term.known == EXACT for term in self.terms)

    @property
    def vacuous(self) -> bool:
        """Whether the right side is 1 or more for certain: no error is larger."""
        return self.right_side >= 1.0


# --- the widths, one formula each ---


def pac_bayes_root(k: int, n: int, delta: float, norm: float, rho: float, constant: float = 0.0) -> float:
    r"""$\sqrt{\frac{k\log(1+r^2(1+\sqrt{\log(n)/k})^2)+4\log\frac n\delta+C}{n-1}}$, $r=\lVert w\rVert/\rho$ (Thm. 2).

    ``constant`` $C$ stands for $\tilde O(1)$, which is not printed: 0 is the least that it can be.
    """
    _check(k=k, n=n, delta=delta, norm=norm, rho=rho)
    grown = math.log1p((norm / rho) ** 2 * (1 + math.sqrt(math.log(n) / k)) ** 2)
    return math.sqrt((k * grown + 4 * math.log(n / delta) + constant) / (n - 1))


def vc_term(d: int, n: int, delta: float) -> float:
    r"""$\sqrt{\frac{\log d+\log(1/\delta)}{2N}}$, the third term of Theorem 3 (Eq. 23), ``d`` the VC dimension."""
    _check(n=n, delta=delta)
    return math.sqrt((math.log(d) + math.log(1 / delta)) / (2 * n))


def covering_level(norm: float, rho: float) -> int:
    r"""$j=\max(0,\lceil\log_2(2\lVert w\rVert/\rho)\rceil)$: least $j\geq0$ with $\lVert w\rVert\leq2^{j-1}\rho$."""
    _check(norm=norm, rho=rho)
    j = 0
    while 2.0 * norm > rho * 2.0**j:
        j += 1
    return j


def covering_width(k: int, n: int, delta: float, norm: float, rho: float) -> float:
    r"""$\sqrt{\frac{k\log(1+2^{j+1})1[j\geq1]+\log\frac{(j+1)(j+2)}\delta}{2n}}$ at the level $j$ of ``norm``.

    With probability at least $1-\delta$, for all $w$ at once, the expected loss of $w$ is at most the largest empirical
    loss in the ball of radius $\rho$ around it plus this; for losses in [0, 1] and a $\rho$ fixed before the data.
    """
    _check(k=k, n=n, delta=delta)
    j = covering_level(norm, rho)
    cells = k * math.log1p(2.0 ** (j + 1)) if j else 0.0
    return math.sqrt((cells + math.log((j + 1) * (j + 2) / delta)) / (2 * n))


def covering_width_any_radius(k: int, n: int, delta: float, norm: float, rho: float, unit: float = 1.0) -> float:
    r"""The same for every $\rho>0$ at once: at $\rho_i=2^i\rho_0\leq\rho$ with $\frac\delta{2(|i|+1)(|i|+2)}$.

    Needed where the radius was chosen after the data were seen; ``unit`` $\rho_0$ is fixed before.
    """
    _check(rho=rho, unit=unit)
    i = math.floor(math.log2(rho / unit))
    share = delta / (2 * (abs(i) + 1) * (abs(i) + 2))
    return covering_width(k, n, share, norm, unit * 2.0**i)


def gaussian_divergence(k: int, norm: float, sigma: float, prior: float) -> float:
    r"""$\mathrm{KL}(N(w,\sigma^2I)\,\|\,N(0,\sigma_0^2I))$ with ``prior`` $\sigma_0$, in ``k`` dimensions, in nats."""
    _check(k=k, norm=norm, sigma=sigma, prior=prior)
    ratio = (sigma / prior) ** 2
    return 0.5 * (k * (ratio - 1 - math.log(ratio)) + (norm / prior) ** 2)


def pac_bayes_width(k: int, n: int, delta: float, norm: float, sigma: float) -> float:
    r"""$\min_j\sqrt{\frac{\mathrm{KL}_j+\log\frac{2\sqrt n(j+1)(j+2)}\delta}{2n}}$, priors $N(0,2^j\sigma^2I)$.

    With probability at least $1-\delta$ the expected loss of $w+\epsilon$, $\epsilon\sim N(0,\sigma^2I)$, averaged over
    $\epsilon$, exceeds its empirical mean by no more, for all $w$ (McAllester 1999; the constant is Maurer's, 2004);
    for losses in [0, 1], $n\geq8$ and a $\sigma$ fixed before the data. The levels' shares of $\delta$,
    $\frac1{(j+1)(j+2)}$, add up to 1, so that the best level may be taken.
    """
    _check(k=k, n=n, delta=delta, norm=norm, sigma=sigma)
    if n < 8:
        raise UsageError(f"n is {n}; Maurer's bound needs at least 8 samples")
    return min(
        math.sqrt((gaussian_divergence(k, norm, sigma, sigma * 2.0 ** (j / 2)) + _log_price(n, j, delta)) / (2 * n))
        for j in range(LEVELS)
    )


def _log_price(n: int, j: int, delta: float) -> float:
    return math.log(2 * math.sqrt(n) * (j + 1) * (j + 2) / delta)


def hoeffding_width(n: int, delta: float) -> float:
    r"""$\sqrt{\log(1/\delta)/(2n)}$ (Hoeffding 1963): for weights that are independent of the ``n`` samples."""
    _check(n=n, delta=delta)
    return math.sqrt(math.log(1 / delta) / (2 * n))


def _check(**given: float) -> None:
    least = {"k": 1, "n": 2}
    for name, value in given.items():
        sound = math.isfinite(value) and (value >= least.get(name, 0) if name in (*least, "norm") else value > 0)
        if not sound or (name == "delta" and value >= 1):
            raise UsageError(f"{name} is {value}; it must be finite and {_range(name)}")


def _range(name: str) -> str:
    return {"k": "at least 1", "n": "at least 2", "norm": "at least 0", "delta": "between 0 and 1"}.get(name, "above 0")


# --- the bounds of a checkpoint ---


@dataclass(frozen=True)
class Measured:
    """What the bounds need of a checkpoint and of the samples it was trained on."""

    k: int
    norm: float
    rho: float
    sigma: float
    n: int  # samples of all source domains together
    worst_error: float  # the largest empirical error found within rho of the weights: at least that
    random_error: float  # the mean empirical error of w + N(0, sigma^2 I) over the draws
    draws: int
    unseen: Mapping[str, tuple[int, float]]  # by domain: samples, and the error at the weights


SAMPLED = "the audited samples are those trained on, drawn independently"
BOUNDED = f"rho fixed before the data; {SAMPLED}"


def bounds(at: Measured, *, delta: float = 0.05) -> tuple[Bound, ...]:
    """Every bound: on the sources' mixture ``pooled``, then on each unseen domain."""
    on_sources = (theorem2(at, delta), *covering_bounds(at, delta), pac_bayes(at, delta))
    return on_sources + tuple(
        bound
        for name, (n, error) in at.unseen.items()
        for bound in (theorem3(at, delta, name), theorem3_corrected(at, delta, name), held_out(n, error, delta, name))
    )


def theorem2(at: Measured, delta: float) -> Bound:
    """Theorem 2 as printed; for a loss without an upper bound, such as the paper's, it is false."""
    root = Term("root", pac_bayes_root(at.k, at.n, delta, at.norm, at.rho), AT_LEAST)
    assumes = f"{BOUNDED}; and no smaller expected error on average around the weights than at them"
    return Bound("Theorem 2, as printed", "pooled", (_worst(at), root), assumes)


def covering_bounds(at: Measured, delta: float) -> tuple[Bound, Bound]:
    """The bounds that replace Theorem 2: by a covering of the weights' space, for one radius and for every radius."""
    one = covering_width(at.k, at.n, delta, at.norm, at.rho)
    every = covering_width_any_radius(at.k, at.n, delta, at.norm, at.rho)
    return (
        Bound("covering", "pooled", (_worst(at), Term("width", one)), BOUNDED),
        Bound(
            "covering, any radius",
            "pooled",
            (_worst(at), Term("width", every)),
            SAMPLED,
        ),
    )


def pac_bayes(at: Measured, delta: float) -> Bound:
    r"""On the error of the weights plus Gaussian noise; half of $\delta$ pays for its mean over finitely many draws."""
    terms = (
        Term("random error", at.random_error),
        Term("Monte Carlo error", hoeffding_width(max(at.draws, 2), delta / 2)),
        Term("width", pac_bayes_width(at.k, at.n, delta / 2, at.norm, at.sigma) if at.n >= 8 else None, _if(at.n >= 8)),
    )
    assumes = f"sigma fixed before the data; {SAMPLED}; it bounds the randomly perturbed network, not the weights"
    return Bound("PAC-Bayes", "pooled", terms, assumes)


def theorem3(at: Measured, delta: float, unseen: str) -> Bound:
    """Theorem 3 as printed: divergence, VC dimension and best combined risk are not to be had from a checkpoint."""
    terms = (
        _worst(at),
        Term("divergence / 2", None, UNKNOWN),
        Term("VC term", vc_term(1, at.n, delta), AT_LEAST),
        Term("best combined risk", None, UNKNOWN),
        Term("root", pac_bayes_root(at.k, at.n, delta, at.norm, at.rho), AT_LEAST),
    )
    return Bound("Theorem 3, as printed", unseen, terms, f"{BOUNDED}; for cross-entropy it is false")


def theorem3_corrected(at: Measured, delta: float, unseen: str) -> Bound:
    """The triangle inequality between domains plus the covering bound on the sources."""
    terms = (
        _worst(at),
        Term("divergence / 2", None, UNKNOWN),
        Term("best combined risk", None, UNKNOWN),
        Term("width", covering_width(at.k, at.n, delta, at.norm, at.rho)),
    )
    return Bound("Theorem 3, corrected", unseen, terms, BOUNDED)


def held_out(n: int, error: float, delta: float, unseen: str) -> Bound:
    """Hoeffding's bound on a domain that had no part in training."""
    terms = (Term("error", error), Term("width", hoeffding_width(n, delta)))
    return Bound("test set", unseen, terms, "the domain's samples were used neither in training nor for any choice")


def _worst(at: Measured) -> Term:
    return Term("error near w", at.worst_error, AT_LEAST)


def _if(known: bool) -> str:
    return EXACT if known else UNKNOWN
