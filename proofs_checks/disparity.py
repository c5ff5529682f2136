r"""Traces of the embedded study -> does SAM drive the domains' convergence apart? Figs. 1(b) and 7, paired.

What the paper says: "SAM exacerbates the disparity in convergence degree among different domains in domain shift
scenarios" (Fig. 1), "the optimization overshoot observed in Figure 7(a)", "the consistency issue encountered during
the early phase of convergence" (App. C.5, on SAM and ERM), and of DISAM that the perturbation "directs towards a
location with a more consistent convergence degree" (Sec. 1).

Fixed here before a run is made. Estimands, each averaged over held-out domains, on each suite at each of two radii:

* disparity: the standard deviation over the source domains of the losses normalised as the paper does, averaged over
  the evaluated steps after the first; relative difference in per cent, margin 2 %. The verdict is on these curves.
  Beside it, without a say in the verdict, the same of the curves scaled to all of [0, 1] and of the raw losses.
* overshoot: the largest rise of a normalised curve in the first third of training, averaged over the source domains;
  difference in per cent of the largest loss, margin half a per cent, which no plot shows.

Test: Student's intervals paired over seeds that redraw the data, Bonferroni over the six cases of a claim
(:func:`disam_theory.statistics.over_cases`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.disparity import normalised_losses, overshoot, raw_losses, scaled_losses, spread
from disam_theory.statistics import over_cases
from disam_theory.study import Study
from disam_theory.traces import Trace
from proofs_checks.contrasts import SCOPE, Statistic, controls, disam_against_sam, how_far_apart, over_suites

DISPARITY_MARGIN = 2.0  # per cent of the second arm's; a narrower or wider band of curves by this much looks the same
OVERSHOOT_MARGIN = 0.5  # per cent of a domain's largest loss
READINGS: dict[str, Callable[[Trace], np.ndarray]] = {  # the first decides
    "normalised as the paper does": normalised_losses,
    "scaled to all of [0, 1]": scaled_losses,
    "raw": raw_losses,
}


def disparity(curves: Callable[[Trace], np.ndarray]) -> Statistic:
    """The standard deviation over domains of these curves, averaged over the evaluated steps after the first."""
    return lambda trace: float(spread(curves(trace)[1:]).mean())


def check_fig1b(study: Study, *, first: str = "sam", second: str = "erm") -> Evidence:
    """Is the disparity of the domains' convergence wider with ``first`` than with ``second``?"""
    return _by_readings(study, first, second, above=True)


def check_fig7_disam(study: Study, *, first: str = "disam", second: str = "sam") -> Evidence:
    """Is the disparity of the domains' convergence narrower with ``first`` than with ``second``?"""
    found = _by_readings(study, first, second, above=False)
    beside = {
        "controls": controls(study, disparity(normalised_losses), relative=True),
        "how_far_apart": how_far_apart(study),
    }
    return Evidence(found.verdict, found.reason, {**found.data, **beside})


def check_fig7(study: Study, *, first: str = "sam", second: str = "erm") -> Evidence:
    """Does ``first`` overshoot more than ``second`` early in training? Beside it DISAM against SAM."""
    what = "overshoot early in training"
    found = over_cases(
        over_suites(study, first, second, overshoot),
        margin=OVERSHOOT_MARGIN,
        unit="% of the largest loss",
        what=f"{first.upper()} minus {second.upper()}, {what}",
        above=True,
    )
    disam = disam_against_sam(study, overshoot, what=what, unit="% of the largest loss", margin=OVERSHOOT_MARGIN)
    data = {**found.data, "disam_against_sam": {"verdict": disam.verdict.value, **disam.data}}
    return Evidence(found.verdict, f"{found.reason}; beside it, without a verdict: {disam.reason}", data)


def _by_readings(study: Study, first: str, second: str, *, above: bool) -> Evidence:
    """Evidence from the paper's normalisation, with the other readings and where they say something else."""
    found = {
        name: over_cases(
            over_suites(study, first, second, disparity(curves), relative=True),
            margin=DISPARITY_MARGIN,
            unit="%",
            what=f"{first.upper()} minus {second.upper()}, disparity of the losses {name}",
            above=above,
        )
        for name, curves in READINGS.items()
    }
    decides, *others = READINGS
    parts = [found[decides].reason]
    parts += [f"beside it, {found[name].verdict.value}, {found[name].reason}" for name in others]
    data: dict[str, Any] = {
        **found[decides].data,
        "readings": {name: {"verdict": found[name].verdict.value, **found[name].data} for name in others},
        "readings_differ": [
            f"{name}: {one['case']} {one['verdict']}, not {own['verdict']}"
            for name in others
            for own, one in zip(found[decides].data["cases"], found[name].data["cases"], strict=True)
            if one["verdict"] != own["verdict"]
        ],
    }
    return Evidence(found[decides].verdict, "; ".join(parts), data)


FIG1B = Claim(
    id="fig1b",
    where="Fig. 1(b), Fig. 7",
    statement=r"SAM widens the disparity in convergence between domains: the losses of the source domains, each "
    r"normalised as $(L_i-\min L_i)/\max L_i$, lie further apart through training than with ERM.",
    assumptions=(r"at $\rho=0.05$ and at $\rho=0.5$", "disparity read as the standard deviation over the domains"),
    scope=SCOPE,
    expected=Verdict.REFUTED,
    check=check_fig1b,
    statistical=True,
)
FIG7 = Claim(
    id="fig7",
    where="Fig. 7(a), App. C.5",
    statement="Early in training SAM overshoots: the normalised losses of the source domains rise again further than "
    "with ERM.",
    assumptions=(r"at $\rho=0.05$ and at $\rho=0.5$", "early read as the first third of training"),
    scope=SCOPE,
    expected=Verdict.CONDITIONAL,
    check=check_fig7,
    statistical=True,
)
FIG7_DISAM = Claim(
    id="fig7-disam",
    where="Sec. 1, Sec. 3.2, of what Fig. 7 shows",
    statement="DISAM narrows the disparity in convergence between domains: their normalised losses lie closer together "
    "through training than with SAM.",
    assumptions=(r"$\lambda=0.1$, at $\rho=0.05$ and at $\rho=0.5$", "disparity read as in fig1b"),
    scope=SCOPE,
    expected=Verdict.REFUTED,
    check=check_fig7_disam,
    statistical=True,
)
DISPARITY_CLAIMS = (FIG1B, FIG7, FIG7_DISAM)
