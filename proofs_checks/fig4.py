r"""Adapters tuned on half of the classes -> is DISAM's accuracy on the other half the higher one? Fig. 4, paired.

What the paper says: "ERM tends to overfit to both in-domain and base class. While SAM outperforms ERM, it struggles
with sharp minima perturbations" (Sec. 4.4), and "DISAM, by minimizing sharpness more effectively, shows improved
performance on new classes, especially in domain shift scenarios" (App. C.6).

Fixed here before an accuracy of SAM or DISAM was looked at. Estimand: the accuracy on the new classes of the unseen
domain, all classes competing, SAM's minus DISAM's in points, at the end of tuning and averaged over it, at either
radius. Every arm starts from the same frozen classifier, so a higher accuracy is at the same time a smaller loss of
it since the start. Direction: below zero. Test: Student's intervals, paired over seeds that redraw the data and
averaged over held-out domains, Bonferroni over the four cases (:func:`disam_theory.statistics.over_cases`). Margin:
half a point, less than a third of the least gain over SAM that Table 3 has for new classes (1.7). Beside it, at the
end of tuning and without a verdict: ERM's arm, and the controls of every comparison with SAM (:data:`BESIDE`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.pretrained import HELD_OUT, PACKAGES, RHOS, Curves, are_recorded, arms, curves, missing, trace_path
from disam_theory.statistics import over_cases, paired_interval
from disam_theory.study import Study
from disam_theory.traces import read_trace

MARGIN = 0.5  # points
PERIODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of accuracies (S, H, E)
    "end of tuning": lambda accuracy: accuracy[..., -1],
    "averaged over tuning": lambda accuracy: accuracy[..., 1:].mean(-1),
}
BESIDE = (("sam", "erm"), ("disam", "erm"), ("disam", "sam"), ("disam, -lambda", "sam"), ("weaker-sam", "sam"))


def check_fig4(
    study: Study,
    *,
    first: str = "disam",
    second: str = "sam",
    accuracies: Callable[[Study], Curves] | None = None,
    cosines: Callable[[Study], list[dict[str, Any]]] | None = None,
) -> Evidence:
    """Is the accuracy on new classes of the unseen domain higher with ``first`` than with ``second``?

    ``accuracies`` and ``cosines`` give what was measured; without them the study's runs are taken, and made where
    they are not there.
    """
    if accuracies is None and missing() and not are_recorded(study.folder, seeds_of(study)):
        return Evidence(
            Verdict.SKIPPED, f"{missing()} is not installed, and no accuracies of its features are recorded"
        )
    found = (accuracies or measured)(study)
    cases = {
        f"{period}, rho={rho:g}": _difference(found, second, first, rho, period) for rho in RHOS for period in PERIODS
    }
    what = f"{second.upper()} minus {first.upper()}, accuracy on new classes of the unseen domain"
    evidence = over_cases(cases, margin=MARGIN, unit="points", what=what)
    data = {"beside": beside(found), "start_to_end": start_to_end(found), "directions": (cosines or directions)(study)}
    return Evidence(evidence.verdict, f"{evidence.reason}; {_in_words(data)}", {**evidence.data, **data})


def measured(study: Study) -> Curves:
    """The accuracies in the study's folder, for as many seeds as its blocks have."""
    return curves(study.folder, seeds_of(study), progress=study.progress)


def seeds_of(study: Study) -> int:
    """How many seeds the study has."""
    return max(block.seeds for block in study.blocks)


def _difference(found: Curves, first: str, second: str, rho: float, period: str) -> np.ndarray:
    """The first's accuracy on unseen, new classes minus the second's (S, H), in points."""
    one, other = (found.accuracy[arms(rho)[name].name, "unseen new"] for name in (first, second))
    return PERIODS[period](one) - PERIODS[period](other)


def beside(found: Curves) -> list[dict[str, Any]]:
    """Every comparison of :data:`BESIDE` at the end of tuning, each with its own 95 % interval."""
    rows = []
    for rho in RHOS:
        for first, second in BESIDE:
            interval = paired_interval(_difference(found, first, second, rho, "end of tuning"))
            rows.append({"first": first, "second": second, "rho": rho, **asdict(interval)})
    return rows


def start_to_end(found: Curves) -> list[dict[str, Any]]:
    """How accuracy on base and on new classes of the unseen domain changes over tuning, with 95 % intervals."""
    rows = []
    for rho in RHOS:
        for name in ("erm", "sam", "disam"):
            for place in ("unseen base", "unseen new"):
                accuracy = found.accuracy[arms(rho)[name].name, place]
                interval = paired_interval(accuracy[..., -1] - accuracy[..., 0])
                rows.append({"algorithm": name, "rho": rho, "scored": place, **asdict(interval)})
    return rows


def directions(study: Study) -> list[dict[str, Any]]:
    r"""How different the arms were: the cosine of $\nabla L$ and $\nabla L_{DI}$ over the steps of DISAM's runs."""
    rows = []
    for rho in RHOS:
        paths = [
            trace_path(study.folder, held, arms(rho)["disam"], seed)
            for seed in range(seeds_of(study))
            for held in HELD_OUT
        ]
        cosine = np.concatenate([read_trace(path).steps["cos_sam"] for path in paths])
        rows.append({"rho": rho, "mean_cosine": float(np.nanmean(cosine)), "least_cosine": float(np.nanmin(cosine))})
    return rows


def _in_words(data: dict[str, Any]) -> str:
    """What stands beside the verdict: what tuning by ERM does, and the other comparisons, at each radius."""
    erm = next(r for r in data["start_to_end"] if r["algorithm"] == "erm" and r["scored"] == "unseen new")
    parts = [f"ERM's changes by {_shown(erm)} over tuning"]
    for rho in RHOS:
        against = {(r["first"], r["second"]): _shown(r) for r in data["beside"] if r["rho"] == rho}
        parts.append(
            f"at the end with rho={rho:g}: SAM minus ERM {against['sam', 'erm']}; minus SAM, DISAM "
            f"{against['disam', 'sam']}, with -lambda {against['disam, -lambda', 'sam']}, a weaker SAM "
            f"{against['weaker-sam', 'sam']}"
        )
    return "; ".join(parts)


def _shown(interval: dict[str, Any]) -> str:
    return f"{interval['estimate']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"


FIG4 = Claim(
    id="fig4",
    where="Fig. 4 (lower right), Sec. 4.4, App. C.6",
    statement="Where a pretrained model is tuned on base classes, its accuracy on new classes in the unseen domain "
    "stays higher with DISAM than with SAM.",
    assumptions=(
        r"$\lambda=0.1$, at $\rho=0.05$ and at $\rho=0.5$",
        "a class's embedding, which CLIP makes from text, is here the mean feature of 15 labelled images of the source "
        "domains, for new classes too",
        "the first half of the classes is base, and all classes compete",
    ),
    scope="an adapter of 2,128 weights on frozen features of EfficientNet-Lite0, handwritten digits in four domains, "
    "paired over seeds that redraw the data. It does not speak of CLIP, CoOp or CLIPOOD, of OfficeHome or DomainNet",
    expected=Verdict.REFUTED,
    check=check_fig4,
    statistical=True,
    references=("Gao et al. 2021, CLIP-Adapter: better vision-language models with feature adapters",),
    needs=missing() or PACKAGES[0],
)
FIG4_CLAIMS = (FIG4,)
