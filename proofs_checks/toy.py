"""The toy example of Fig. 2 -> how often what it shows happens, over a family of toy problems drawn by seed.

The family, its constants, the margins and the rule below are fixed before any of the problems is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from disam_theory.algorithms import Settings
from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.toy import (
    ANGLE_MARGIN,
    BOX,
    CONTROLS,
    DISAM,
    ERM,
    FAMILY,
    LAMS,
    SAM,
    SHARPNESS_MARGIN,
    Count,
    K,
    M,
    flatter,
    nearer,
    outcome,
)

Contrast = Callable[[Settings], Count]  # DISAM's settings -> in how many problems what is claimed holds ("below")


def sam_is_pulled(disam: Settings) -> Count:
    """SAM's ascent is nearer to the largest domain gradient than DISAM's."""
    return nearer(outcome(SAM).angles, outcome(disam).angles)


def flatter_than_sam(disam: Settings) -> Count:
    """DISAM ends flatter on the unseen domain than SAM."""
    return flatter(outcome(disam).sharpness, outcome(SAM).sharpness)


def flatter_than_erm(disam: Settings) -> Count:
    """DISAM ends flatter on the unseen domain than ERM."""
    return flatter(outcome(disam).sharpness, outcome(ERM).sharpness)


CONTRASTS: dict[str, Contrast] = {
    "SAM's ascent is nearer to the largest domain gradient than DISAM's": sam_is_pulled,
    "DISAM ends flatter on the unseen domain than SAM": flatter_than_sam,
    "DISAM ends flatter on the unseen domain than ERM": flatter_than_erm,
}


def verdict_on(counted: Count, level: float) -> Verdict:
    r"""The sign test's verdict, from exact intervals.

    ``REFUTED`` where most problems are ties (no practical difference), or where among the others the claimed sign is
    the rarer one; ``SUPPORTED`` where it is the more frequent one; both with their intervals clear of one half.
    """
    low, high = counted.interval(level)
    if counted.tied_interval(level)[0] > 0.5 or high < 0.5:
        return Verdict.REFUTED
    return Verdict.SUPPORTED if low > 0.5 else Verdict.UNDECIDED


def over_strengths(verdicts: set[Verdict]) -> Verdict:
    r"""One verdict from those at each $\lambda$: conditional where they are opposite, refuted where none supports."""
    if len(verdicts) == 1:
        return verdicts.pop()
    if Verdict.REFUTED in verdicts:
        return Verdict.CONDITIONAL if Verdict.SUPPORTED in verdicts else Verdict.REFUTED
    return Verdict.UNDECIDED


def check_fig2(study: object, *, contrasts: Mapping[str, Contrast] = CONTRASTS) -> Evidence:
    """Every part on the whole family at every strength; the claim is as strong as its weakest part.

    Beside it, without a say in the verdict, each part with a control in DISAM's place.
    """
    level = 1 - 0.05 / (len(contrasts) * len(DISAM))
    parts: dict[str, Verdict] = {}
    cases: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    words = []
    for what, contrast in contrasts.items():
        counts = [contrast(settings) for settings in DISAM]
        found = [verdict_on(counted, level) for counted in counts]
        parts[what] = over_strengths(set(found))
        for lam, counted, verdict in zip(LAMS, counts, found, strict=True):
            cases.append({"what": what, "lambda": lam, **_numbers(counted, level), "verdict": verdict.value})
        words.append(f"{parts[what].value} that {what} ({_counted(counts)})")
        for control, arms in CONTROLS.items():
            instead = [contrast(settings) for settings in arms]
            for lam, counted in zip(LAMS, instead, strict=True):
                beside.append({"what": what, "control": control, "lambda": lam, **_numbers(counted, level)})
            if parts[what] is Verdict.SUPPORTED:
                words[-1] += f", with {control} in DISAM's place ({_counted(instead)})"
    weakest_first = (Verdict.REFUTED, Verdict.UNDECIDED, Verdict.CONDITIONAL, Verdict.SUPPORTED)
    overall = next(verdict for verdict in weakest_first if verdict in parts.values())
    data = {
        "problems": len(FAMILY),
        "margins": {"degrees": ANGLE_MARGIN, "relative sharpness": SHARPNESS_MARGIN},
        "multiplicity": f"Bonferroni over {len(cases)} cases, joint level 0.95",
        "cases": cases,
        "controls": beside,
    }
    return Evidence(overall, f"over {len(FAMILY)} random toy problems it is " + "; ".join(words), data)


def _counted(counts: Sequence[Count]) -> str:
    return ", ".join(
        f"{c.below} yes, {c.above} no, {c.tied} ties at lambda = {lam:g}" for lam, c in zip(LAMS, counts, strict=True)
    )


def _numbers(counted: Count, level: float) -> dict[str, Any]:
    low, high = counted.interval(level)
    tied_low, tied_high = counted.tied_interval(level)
    return {
        **asdict(counted),
        "share_below_low": low,
        "share_below_high": high,
        "share_tied_low": tied_low,
        "share_tied_high": tied_high,
        "sign_test_p": counted.p_value(),
    }


FIG2 = Claim(
    id="fig2",
    where="Fig. 2, Sec. 3.1",
    statement="SAM's ascent is pulled towards the domain with the largest gradient, more than DISAM's is; and DISAM "
    "ends flatter on the unseen domain than SAM and ERM do.",
    assumptions=(
        "the paper does not state its toy example, so a family of them stands for it: read as what happens in most of "
        f"{len(FAMILY)} problems drawn by seed, with {M} source domains and an unseen one that share one surface of "
        f"{K} wells of random place, width and depth, each shifted and scaled at random",
        r"$\rho=0.5$, $\lambda=0.1$ and $0.7$, 300 full-batch steps with $\eta=0.1$, a tenth of it in the last fifth",
        f"the pull: the angle between the ascent and the largest domain gradient at the start, drawn in $[-{BOX:g},"
        rf"{BOX:g}]^2$; a difference below {ANGLE_MARGIN:g}° is a tie",
        r"flatter: a smaller $\lambda_{\max}$ of the unseen domain's Hessian at the last weights, converged or not; "
        f"a difference below {SHARPNESS_MARGIN:.0%} is a tie",
        "supported or refuted by the sign test over the problems that are not ties, or refuted as most are ties; "
        "Bonferroni over the parts and strengths; the claim is as strong as its weakest part",
    ),
    scope="this family of toy problems alone, which are not the paper's; undecided means that the sign test finds "
    "neither direction in as many problems as this",
    expected=Verdict.UNDECIDED,
    check=check_fig2,
)
TOY_CLAIMS = (FIG2,)
