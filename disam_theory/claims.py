"""Claims: (statement, assumptions, check) -> Finding with a verdict and its evidence.

A :class:`Claim` is a record around a check function. The check returns :class:`Evidence`: a verdict, one plain
sentence that says why, and the numbers behind it. :func:`run` times the check, compares the verdict with the one
the ledger expects and never lets one broken check stop the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

from disam_theory.errors import DisamError


class Verdict(StrEnum):
    """What a check can conclude, from the strongest to the weakest.

    ``PROVED``: a symbolic, exact-rational or ball-arithmetic argument, within the claim's printed scope.
    ``SUPPORTED``: a proof with a step left to the reader, named in the scope; or a pre-declared statistic agrees.
    ``REFUTED``: a certified counterexample, or an interval that excludes what is claimed.
    ``CONDITIONAL``: holds under an extra assumption that the claim does not make.
    ``UNDECIDED``: the evidence does not settle it.
    ``SKIPPED``: not run, with the reason.
    """

    PROVED = "proved"
    SUPPORTED = "supported"
    REFUTED = "refuted"
    CONDITIONAL = "conditional"
    UNDECIDED = "undecided"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Evidence:
    """What a check found: ``verdict``, the ``reason`` in one sentence, and the JSON-ready numbers in ``data``."""

    verdict: Verdict
    reason: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One statement of the paper and the function that checks it.

    ``statement`` is text with LaTeX between dollar signs. ``scope`` says within what range the verdict holds.
    ``expected`` makes a changed verdict an error: a misprint that stays refuted is success. A study cut short
    (``--quick``) has less power and another regime: there a ``statistical`` claim counts as changed only where it
    contradicts what is expected, supported in place of refuted or the reverse.
    ``repaired_by`` names the claim that states what does hold. ``references`` are works that the check rests on.
    ``needs`` is a package, not installed with this one, without which the check is skipped.
    """

    id: str
    where: str
    statement: str
    assumptions: tuple[str, ...]
    scope: str
    expected: Verdict
    check: Callable[[Any], Evidence]
    statistical: bool = False
    repaired_by: str | None = None
    references: tuple[str, ...] = ()
    needs: str | None = None

    def expects(self, verdict: Verdict, *, quick: bool = False) -> bool:
        """Whether a check that gives ``verdict`` says what the ledger expects."""
        if verdict is Verdict.SKIPPED and self.needs:
            return find_spec(self.needs) is None
        contrary = {verdict, self.expected} == {Verdict.SUPPORTED, Verdict.REFUTED}
        return verdict is self.expected or (quick and self.statistical and not contrary)


@dataclass(frozen=True)
class Finding:
    """A claim with the evidence its check returned and the seconds it took."""

    claim: Claim
    evidence: Evidence
    seconds: float
    as_expected: bool

    def to_json(self) -> dict[str, Any]:
        """The finding as one entry of ``claims.json``."""
        claim = self.claim
        return {
            "id": claim.id,
            "where": claim.where,
            "statement": claim.statement,
            "assumptions": list(claim.assumptions),
            "scope": claim.scope,
            "verdict": self.evidence.verdict.value,
            "expected": claim.expected.value,
            "as_expected": self.as_expected,
            "repaired_by": claim.repaired_by,
            "references": list(claim.references),
            "reason": self.evidence.reason,
            "evidence": self.evidence.data,
            "seconds": round(self.seconds, 3),
        }


def run(claim: Claim, study: Any, *, quick: bool = False) -> Finding:
    """Check one claim. A check that raises a :class:`DisamError` is undecided, and the reason is its message."""
    start = time.perf_counter()
    try:
        evidence = claim.check(study)
    except DisamError as error:
        evidence = Evidence(Verdict.UNDECIDED, f"the check could not finish: {error}")
        return Finding(claim, evidence, time.perf_counter() - start, as_expected=False)
    return Finding(claim, evidence, time.perf_counter() - start, claim.expects(evidence.verdict, quick=quick))
