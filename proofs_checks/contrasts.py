r"""Arms of the study -> paired differences over seeds and held-out domains, with the controls that belong to them.

Beside every comparison of DISAM with SAM stand two controls, DISAM with $-\lambda$ (is it the mechanism?) and SAM with
its radius shortened to what DISAM goes along it (is it just a weaker perturbation?), and how far the two directions
were apart at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from disam_theory.claims import Evidence, Verdict
from disam_theory.directions import variance_weights
from disam_theory.errors import ComputationError
from disam_theory.statistics import over_cases, paired_interval
from disam_theory.study import Record, Study
from disam_theory.traces import Trace

SUITES = ("digits-rotated", "digits-corrupted", "digits-sources")
RHOS = (0.05, 0.5)  # the default of Sec. 4.1, and what App. C.1 gives for PACS, VLCS, OfficeHome and DomainNet
RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # Figs. 1(a), 3(c, d) and 5
LAM = 0.1
LAMBDAS = (0.3, 0.5, 0.7, 1.0)  # Fig. 5, beside the default: its range of stable accuracy, and one above
SCOPE = (
    "an MLP 64-32-10 on the embedded suites, minibatch momentum SGD; paired over seeds that redraw the data. It says "
    "nothing of ResNet-50 or CLIP on DomainBed"
)

CONTROLS = {  # of arms(), in words
    "disam": "DISAM minus SAM",
    "reversed": "DISAM with -lambda minus SAM",
    "weaker": "weaker SAM minus SAM",
}
Arm = dict[str, Any]  # settings that pick one arm's runs
Statistic = Callable[[Trace], float]


def arms(rho: float, sampling: str = "pooled") -> dict[str, Arm]:
    """The arms of the study at one radius: ERM, SAM, DISAM and the two controls."""
    return {
        "erm": {"algorithm": "erm", "sampling": sampling},
        "sam": {"algorithm": "sam", "rho": rho, "sampling": sampling},
        "disam": {"algorithm": "disam", "rho": rho, "lam": LAM, "sampling": sampling},
        "reversed": {"algorithm": "disam", "rho": rho, "lam": -LAM, "sampling": sampling},
        "weaker": {"algorithm": "weaker-sam", "rho": rho, "lam": LAM, "sampling": sampling},
    }


def training_loss(trace: Trace) -> float:
    r"""Mean over the evaluated steps after the first of $L(w_t)=\sum_i\alpha_iL_i(w_t)$ on all training data."""
    return float((trace.evaluations["losses"][1:] @ _shares(trace)).mean())


def last_training_loss(trace: Trace) -> float:
    r"""$L(w_T)=\sum_i\alpha_iL_i(w_T)$ on all training data, after the last step."""
    return float(trace.evaluations["losses"][-1] @ _shares(trace))


def weight_change(trace: Trace) -> np.ndarray:
    r"""$2\lambda(L_i-\bar L)/(M\alpha_i)$ at each recorded step, (T, M), NaN for a domain that is not in the batch.

    It is how far $\beta_i/\alpha_i$ lies from one; $\alpha$ is the share of all data, as traces hold no batch's.
    """
    losses, lam = trace.steps["losses"], trace.header["settings"]["lam"]
    present = np.isfinite(losses)
    return lam * variance_weights(losses, present) / np.where(present, _shares(trace), np.nan)


def difference(
    study: Study, suite: str, first: Arm, second: Arm, statistic: Statistic, *, relative: bool = False
) -> np.ndarray:
    r"""$a-b$ for each seed and held-out domain (S, H), or $100(a-b)/b$: how far ``first`` lies from ``second``."""
    a = study.measure(study.records(suite, **first), statistic)
    b = study.measure(study.records(suite, **second), statistic)
    if relative and not b.all():
        raise ComputationError(f"{suite}: a run of {second} has zero of what others are compared with; train longer")
    return 100.0 * (a - b) / b if relative else a - b


def over_suites(
    study: Study,
    first: str,
    second: str,
    statistic: Statistic,
    *,
    rhos: Sequence[float] = RHOS,
    relative: bool = False,
) -> dict[str, np.ndarray]:
    """The differences of two of :func:`arms` on each suite at each radius."""
    return {
        f"{suite}, rho={rho:g}": difference(
            study, suite, arms(rho)[first], arms(rho)[second], statistic, relative=relative
        )
        for suite in SUITES
        for rho in rhos
    }


def disam_against_sam(
    study: Study,
    statistic: Statistic,
    *,
    what: str,
    unit: str,
    margin: float,
    above: bool = False,
    relative: bool = False,
    first: str = "disam",
    second: str = "sam",
) -> Evidence:
    """Evidence on "``what``, ``first`` minus ``second``, is below zero" on each suite and radius, with the controls."""
    cases = over_suites(study, first, second, statistic, relative=relative)
    title = f"{first.upper()} minus {second.upper()}, {what}"
    evidence = over_cases(cases, margin=margin, unit=unit, what=title, above=above)
    beside: dict[str, Any] = {"controls": controls(study, statistic, relative=relative)}
    supported = [row["case"] for row in evidence.data["cases"] if row["verdict"] == Verdict.SUPPORTED.value]
    reason = evidence.reason + controls_in_words(beside["controls"], supported)
    return Evidence(evidence.verdict, reason, {**evidence.data, **beside, "how_far_apart": how_far_apart(study)})


def controls(study: Study, statistic: Statistic, *, relative: bool = False) -> dict[str, list[dict[str, Any]]]:
    """:func:`control_rows` of a statistic of the traces."""
    return control_rows(lambda arm: over_suites(study, arm, "sam", statistic, relative=relative))


def control_rows(from_sam: Callable[[str], dict[str, np.ndarray]]) -> dict[str, list[dict[str, Any]]]:
    """What the controls and DISAM differ from SAM by (arm -> case -> (S, H)), each interval at 95 % for itself."""
    return {
        title: [{"case": case, **asdict(paired_interval(values))} for case, values in from_sam(arm).items()]
        for arm, title in CONTROLS.items()
    }


def controls_in_words(
    rows: dict[str, list[dict[str, Any]]],
    cases: Sequence[str],
    *,
    base: str = "SAM",
    words: Sequence[str] = ("DISAM", "-lambda", "a weaker SAM"),
) -> str:
    """What DISAM and the controls differ from ``base`` by in these ``cases``, to follow a reason; nothing of none.

    ``words`` are for the titles of ``rows``, in their order.
    """
    parts = []
    for case in cases:
        found = [next((row for row in of if row["case"] == case), None) for of in rows.values()]
        values = [
            f"{what} {row['estimate']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})" if row else f"{what} diverged"
            for what, row in zip(words, found, strict=True)
        ]
        parts.append(f"; minus {base} in {case}, at 95 % each: {', '.join(values)}")
    return "".join(parts)


def how_far_apart(study: Study) -> list[dict[str, Any]]:
    r"""Along DISAM's runs: the cosine of the two ascent directions, and the size of the weights' change."""
    return apart(
        study,
        {f"{suite}, rho={rho:g}": study.records(suite, **arms(rho)["disam"]) for suite in SUITES for rho in RHOS},
    )


def apart(study: Study, runs: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """The same along the runs of each case."""
    rows = []
    for case, records in runs.items():
        cosine = paired_interval(study.measure(records, lambda trace: float(np.nanmean(trace.steps["cos_sam"]))))
        change = study.measure(records, lambda trace: float(np.nanmean(np.abs(weight_change(trace)))))
        negative = study.measure(records, lambda trace: float((trace.steps["beta"] < 0).mean()))
        rows.append(
            {"case": case, "cosine": cosine.estimate, "cosine_low": cosine.low, "cosine_high": cosine.high}
            | {"mean_relative_weight_change": paired_interval(change).estimate}
            | {"share_of_negative_weights": paired_interval(negative).estimate}
        )
    return rows


def _shares(trace: Trace) -> np.ndarray:
    sizes = np.array(trace.header["sizes"], dtype=float)
    return sizes / sizes.sum()
