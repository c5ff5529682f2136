r"""Traces of the embedded study -> what the paper says of convergence, as paired statistics with a verdict.

Every estimand, direction, margin and correction below is fixed here, before a run is made. The data are small
models on embedded images: a verdict is about that regime, and does not speak of ResNet-50 or CLIP on DomainBed.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.losses import model_losses
from disam_theory.operators import hessian
from disam_theory.spectrum import top_eigenpairs
from disam_theory.statistics import over_cases, paired_interval
from disam_theory.study import Record, Study
from disam_theory.traces import Trace
from proofs_checks.contrasts import (
    RHOS,
    SCOPE,
    arms,
    control_rows,
    controls,
    difference,
    disam_against_sam,
    how_far_apart,
    last_training_loss,
    over_suites,
    training_loss,
)

MARGIN = 0.5  # per cent; a smaller change of the training loss makes no practical difference


def turning_rate(trace: Trace) -> float:
    r"""$\Gamma=\max_t\phi_t/\eta_{t-1}$ along a run: the least with $\phi_t\le\eta_t\Gamma$ on it."""
    trace.check_every_step()
    return float(np.nanmax(trace.steps["phi"][1:] / trace.steps["lr"][:-1]))


def check_fig3ab(study: Study, *, first: str = "disam", second: str = "sam") -> Evidence:
    r"""Is the training loss, averaged over training, lower with DISAM than with SAM?

    Beside it, by the same rule and without a say in the verdict, the loss after the last step: an average is below
    SAM's where DISAM is faster at first and slower later, too. Added after a look at the curves of the full study.
    """
    averaged, last = (
        disam_against_sam(study, loss, what=what, unit="%", margin=MARGIN, relative=True, first=first, second=second)
        for loss, what in (
            (training_loss, "training loss averaged over training"),
            (last_training_loss, "training loss after the last step"),
        )
    )
    reason = f"{averaged.reason}; beside it, {last.verdict.value}, {last.reason}"
    return Evidence(
        averaged.verdict, reason, {**averaged.data, "last_step": {"verdict": last.verdict.value, **last.data}}
    )


def check_fig8(study: Study, *, order: tuple[str, str, str] = ("erm", "disam", "sam")) -> Evidence:
    """Does the training loss, averaged over training, rise in the claimed order? Both steps must hold.

    Bonferroni over the cases of both.
    """
    steps = {(a, b): over_suites(study, a, b, training_loss, relative=True) for a, b in itertools.pairwise(order)}
    parts = [
        over_cases(
            cases,
            margin=MARGIN,
            unit="%",
            what=f"{a.upper()} minus {b.upper()}, training loss averaged over training",
            of=sum(map(len, steps.values())),
        )
        for (a, b), cases in steps.items()
    ]
    verdicts = {part.verdict for part in parts}
    # the order holds as far as its weaker step does
    weakest_first = (Verdict.REFUTED, Verdict.UNDECIDED, Verdict.CONDITIONAL, Verdict.SUPPORTED)
    overall = next(verdict for verdict in weakest_first if verdict in verdicts)
    reason = "; and ".join(f"{part.verdict.value}: {part.reason}" for part in parts)
    beside = {"controls": controls(study, training_loss, relative=True), "how_far_apart": how_far_apart(study)}
    return Evidence(overall, reason, {"contrasts": [{"verdict": p.verdict.value, **p.data} for p in parts], **beside})


def check_thm1_gamma(study: Study, *, first: str = "disam", second: str = "sam") -> Evidence:
    r"""Is the turning rate $\Gamma_t=\phi_t/\eta_t$ of the perturbation smaller along DISAM's runs than along SAM's?

    Full-batch runs with $\eta_t=\eta_0/\sqrt t$ and fixed $\rho$, as Theorem 1 has them.
    """
    rho = RHOS[0]
    suites = [block.suite for block in study.blocks if block.arms[0].sampling == "full"]
    pair = arms(rho, "full")

    def turning(one: str, other: str) -> dict[str, np.ndarray]:
        return {s: difference(study, s, pair[one], pair[other], turning_rate, relative=True) for s in suites}

    evidence = over_cases(
        turning(first, second), margin=1.0, unit="%", what=f"{first.upper()} minus {second.upper()}, Gamma"
    )
    runs = [(suite, name, study.records(suite, **pair[name])) for suite in suites for name in (second, first)]
    details = {
        title: [{"suite": suite, "algorithm": name, **measured(study, records)} for suite, name, records in runs]
        for title, measured in (("angles", _angles), ("against_local_smoothness", _against_smoothness))
    }
    beside = {"controls": control_rows(lambda arm: turning(arm, "sam"))}
    return Evidence(evidence.verdict, evidence.reason, {**evidence.data, **details, **beside})


def _angles(study: Study, records: list[Record]) -> dict[str, Any]:
    """How large the angle and the dropped cross term are along the runs of one arm."""
    traces = [record.trace for record in records]
    phi = np.concatenate([t.steps["phi"][1:] for t in traces])
    main = np.concatenate([t.steps["lr"][:-1] * t.steps["grad_norm_ascent"][:-1] ** 2 for t in traces])
    cross = np.concatenate([t.steps["cross_term"][1:] for t in traces]) / main
    rates = paired_interval(study.measure(records, turning_rate))
    return {
        "gamma": rates.estimate,
        "gamma_low": rates.low,
        "gamma_high": rates.high,
        "median_phi_degrees": math.degrees(float(np.nanmedian(phi))),
        "p95_phi_degrees": math.degrees(float(np.nanpercentile(phi, 95))),
        "median_cross_term_over_main_term": float(np.nanmedian(cross)),
        "share_of_steps_with_negative_cross_term": float(np.nanmean(cross < 0)),
        "steps": int(np.isfinite(phi).sum()),
    }


def _against_smoothness(study: Study, records: list[Record]) -> dict[str, Any]:
    r"""$\phi_{t+1}/\eta_t$ against $\lambda_{\max}(\nabla^2L(w_t))$, which no smoothness constant $L$ can be below.

    Taken where weights were kept. A ratio below one agrees with $\Gamma=L$; one above it would not refute it, as $L$
    may be larger elsewhere.
    """
    steps = next(block.snapshot_steps for block in study.blocks if block.arms[0].sampling == "full")
    ratios, residuals = [], []
    for record in records:
        split, rate = study.split(record), record.trace.steps["phi"][1:] / record.trace.steps["lr"][:-1]
        for step in (s for s in steps if s < len(rate) and record.weights_path(s).exists()):
            params = {name: p.double() for name, p in record.weights(step).items()}
            data = [domain.to(dtype=torch.float64) for domain in split.sources]
            losses = model_losses(study.model().double(), data, chunk=4096)
            top = top_eigenpairs(hessian(losses, params, weights=losses.shares), tol=1e-3)
            ratios.append(float(rate[step] / top.values[0]))
            residuals.append(float(top.residuals[0] / top.values[0]))
    return {
        "ratio_median": float(np.median(ratios)),
        "ratio_max": max(ratios),
        "points": len(ratios),
        "largest_relative_residual": max(residuals),
    }


THM1_GAMMA = Claim(
    id="thm1-gamma",
    where="Theorem 1, Eq. (15)-(17)",
    statement=r"Along training, the least $\Gamma$ with $\phi_t\le\eta_t\Gamma$ ($\phi_t$ the angle between "
    r"consecutive perturbations) is smaller with DISAM than with SAM; on this the faster rate of Theorem 1 rests.",
    assumptions=(r"full-batch gradients, fixed $\rho=0.05$, $\lambda=0.1$, $\eta_t=\eta_0/\sqrt{t}$",),
    scope=SCOPE.replace("minibatch momentum SGD", "full-batch gradient steps"),
    expected=Verdict.REFUTED,
    check=check_thm1_gamma,
    statistical=True,
)
FIG3AB = Claim(
    id="fig3ab",
    where="Fig. 3(a, b)",
    statement=r"The training loss $L(w_t)$ falls faster with DISAM than with SAM.",
    assumptions=(r"$\lambda=0.1$, at $\rho=0.05$ and at $\rho=0.5$",),
    scope=SCOPE,
    expected=Verdict.CONDITIONAL,
    check=check_fig3ab,
    statistical=True,
)
FIG8 = Claim(
    id="fig8",
    where="Fig. 8",
    statement="ERM converges faster than DISAM, and DISAM faster than SAM.",
    assumptions=(r"$\lambda=0.1$, at $\rho=0.05$ and at $\rho=0.5$",),
    scope=SCOPE,
    expected=Verdict.CONDITIONAL,
    check=check_fig8,
    statistical=True,
)
EMPIRICAL_CLAIMS = (FIG3AB, FIG8)
