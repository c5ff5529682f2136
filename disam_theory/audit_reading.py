"""Audits -> one paragraph in plain words that claims no more than the numbers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disam_theory.audit import Audit, Row
from disam_theory.audit_differences import CERTIFIED, Difference
from disam_theory.audit_measures import SOURCE, UNSEEN

CAVEAT = (
    "All of this is about these weights on these samples: no sharpness here says by itself how well a checkpoint does "
    "on data that were not audited."
)


def reading(audits: Mapping[str, Audit], differences: Sequence[Difference]) -> str:
    """What the audits say of one checkpoint, or of each and then of the differences."""
    if len(audits) == 1:
        sentences = _of_one(next(iter(audits.values())))
    else:
        sentences = [f"{label}: {' '.join(filter(None, _of_each(audit)))}" for label, audit in audits.items()]
        sentences += _of_differences(differences)
    return " ".join(sentence for sentence in [*sentences, CAVEAT] if sentence)


def _of_one(audit: Audit) -> list[str]:
    return [
        _accuracies(audit),
        _sharpest(audit),
        _sampled(audit),
        _perturbation(audit),
        _warnings(audit),
        _bounds(audit),
    ]


def _of_each(audit: Audit) -> list[str]:
    """Of one among several: what the differences do not say."""
    return [_sharpest(audit), _sampled(audit), _warnings(audit)]


def _accuracies(audit: Audit) -> str:
    sources = [row.name for row in audit.rows if row.role == SOURCE]
    said = (
        f"On {audit.row('pooled').n} samples of {_some(sources)} the model is right in {_accuracy(audit.row('pooled'))}"
    )
    unseen = [f"{_accuracy(row)} of the unseen domain {row.name}" for row in audit.rows if row.role == UNSEEN]
    return f"{'; '.join([said, *unseen])} (95 % intervals)."


def _accuracy(row: Row) -> str:
    low, high = row.accuracy_low or 0.0, row.accuracy_high or 0.0
    return f"{100 * (row.accuracy or 0.0):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _sharpest(audit: Audit) -> str:
    """Which domain has the largest eigenvalue, where the certified intervals tell."""
    domains = [row for row in audit.rows if row.role in (SOURCE, UNSEEN)]
    unsure = [row.name for row in audit.rows if not row.converged]
    if unsure:
        return f"The eigenvalues of {_some(unsure)} did not converge, so no domain is called the sharpest."
    if len(domains) == 1:
        return f"The top Hessian eigenvalue of {domains[0].name} is {_eigenvalue(domains[0])}."
    ordered = sorted(domains, key=lambda row: row.eigenvalues[0])
    last, first, second = ordered[0], ordered[-1], ordered[-2]
    if first.lower[0] <= second.upper[0]:
        return (
            f"The largest top Hessian eigenvalues, of {first.name} {_eigenvalue(first)} and of {second.name} "
            f"{_eigenvalue(second)}, lie in intervals that overlap, so no domain is called the sharpest."
        )
    pooled = audit.row("pooled")
    return (
        f"On these samples the loss bends most on {first.name} (top Hessian eigenvalue {_eigenvalue(first)}) and least "
        f"on {last.name} ({_eigenvalue(last)}); the pooled sources have {_eigenvalue(pooled)}."
    )


def _eigenvalue(row: Row) -> str:
    return f"{row.eigenvalues[0]:.4g} [{row.lower[0]:.5g}, {row.upper[0]:.5g}]"


def _sampled(audit: Audit) -> str:
    if not audit.sampling:
        return ""
    errors = [f"{row['lambda_1_error']:.2g} on {row['name']}" for row in audit.sampling]
    return (
        f"Only a part of the data was audited: as estimates for the whole, these eigenvalues have standard errors of "
        f"{_some(errors)}, and a bias upward besides."
    )


def _perturbation(audit: Audit) -> str:
    """The domain that feels most of the two steps, and how far apart these are."""
    said = []
    for method in ("SAM", "DISAM"):
        own = [row for row in audit.shares if row["method"] == method and row["weight"] is not None]
        most = max(own, key=lambda row: row["rise"])
        said.append(f"{most['domain']} under {method}'s step ({most['rise']:+.3g})")
    cosine = audit.about["cosine_sam_disam"]
    return (
        f"Of the sources the loss rises most on {said[0]} and on {said[1]}; these steps have a cosine of {cosine:.4f}."
    )


def _warnings(audit: Audit) -> str:
    if not audit.warnings:
        return "No warning of a fake flat or a hallucinated minimum is raised at the thresholds used."
    return "Warnings: " + "; ".join(f"{row['name']}, as {row['message']}" for row in audit.warnings) + "."


def _bounds(audit: Audit) -> str:
    vacuous = [row for row in audit.bounds if row["vacuous"]]
    others = [row for row in audit.bounds if not row["vacuous"]]
    said = f"{len(vacuous)} of the {len(audit.bounds)} generalisation bounds are vacuous (1 or more for an error)"
    if not others:
        return f"{said}, and say nothing."
    complete = [
        f"{row['name']} on {row['of']} gives {row['right_side']:.3f}"
        if row["complete"]
        else f"{row['name']} on {row['of']} is at least {row['right_side']:.3f}, with terms that are not known"
        for row in others
    ]
    return f"{said}; {'; '.join(complete)}, if what it assumes is so."


def _of_differences(differences: Sequence[Difference]) -> list[str]:
    """Loss and top eigenvalue, each where its interval excludes zero and where not."""
    said = []
    for checkpoint in dict.fromkeys(each.checkpoint for each in differences):
        for quantity, words in (("loss", "loss"), ("accuracy", "accuracy in %"), ("lambda_1", "top eigenvalue")):
            own = [each for each in differences if (each.checkpoint, each.quantity) == (checkpoint, quantity)]
            clear = [f"{each.name} ({each.shown})" for each in own if each.excludes_zero]
            rest = [each.name for each in own if not each.excludes_zero]
            base = own[0].baseline
            where = " (on these samples)" if all(each.interval == CERTIFIED for each in own) else ""
            if clear:
                said.append(
                    f"The {words} of {checkpoint} less that of {base}{where} differs from 0 for {_some(clear)}."
                )
            if rest:
                said.append(f"For the {words}{where} the interval contains 0, or there is none, for {_some(rest)}.")
    said.append("Each interval stands at its level alone: among many some miss by chance.")
    return said


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
