r"""(model, domains) -> how sharp each domain's loss is, how sure, and what that does and does not say.

Each source domain, each unseen domain, and three losses over the sources: ``pooled`` $\sum_i\alpha_iL_i$,
``beta-weighted`` $\sum_i\beta_iL_i$ with the weights of Eq. (8) held fixed, and $L_{DI}=L-\lambda\,\mathrm{Var}\{L_i\}$
itself. The outputs are made in :mod:`disam_theory.audit_report`.

| letter | meaning |
|---|---|
| ``rho`` | radius of SAM's and DISAM's step, in the units of the weights |
| ``lam`` | $\lambda$ of DISAM's weights |
| ``k`` | number of eigenvalues |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from disam_theory.audit_measures import (
    ASAM_FACTOR,
    DEFAULT,
    Outcomes,
    Settings,
    Subject,
    Table,
    bounds_of,
    densities_of,
    draws_of,
    felt_shares,
    losses_and_gradients,
    of_samples,
    outcomes_of,
    overlaps_of,
    plain_bound,
    prepared,
    rises,
    sampling_errors,
    slices_of,
    trace_probes,
    warnings_of,
)
from disam_theory.dependence import require_dependence, require_gradients
from disam_theory.domains import Domain, require_names
from disam_theory.errors import UsageError, unknown_name
from disam_theory.operators import Curvature, domain_hessian
from disam_theory.progress import Through, silently
from disam_theory.ranks import ALONE, Ranks
from disam_theory.spectrum import Eigenpairs, Progress, bytes_of, domain_spectra, ended_early, top_eigenpairs


@dataclass(frozen=True)
class Row:
    r"""One loss. None stands for what has no meaning for it.

    Errors of means over samples (``loss_error``, the Wilson interval of ``accuracy``) are those of an estimate for the
    distribution that the samples come from; all else is a fact about these samples, with the numerical or Monte
    Carlo error that stands beside it.
    """

    name: str
    role: str  # source, unseen, or over the sources
    n: int
    share: float
    beta: float | None
    loss: float
    loss_error: float | None  # standard error
    accuracy: float | None
    accuracy_low: float | None  # 95 %
    accuracy_high: float | None
    ece: float | None  # expected calibration error
    ece_by_chance: float | None  # its 95th percentile for a calibrated model
    grad_norm: float
    gradient_variance: float | None  # of batches, summed over the parameters
    gradient_variance_error: float | None  # standard error
    eigenvalues: tuple[float, ...]  # (k,), largest first
    residuals: tuple[float, ...]  # (k,)
    lower: tuple[float, ...]  # (k,) certified interval of each eigenvalue, see Eigenpairs
    upper: tuple[float, ...]  # (k,)
    converged: bool
    products: int
    trace: float
    trace_error: float  # standard error
    sam: float | None  # rise after one step of length rho along the loss's own gradient
    worst_lower: float | None  # largest rise found within rho
    worst_upper: float | None  # second-order estimate of the largest rise, no bound
    average: float | None  # mean rise under Gaussian noise of length about rho
    average_error: float | None  # standard error
    asam: float | None  # rise after ASAM's step


ROW_LISTS = ("eigenvalues", "residuals", "lower", "upper")


@dataclass(frozen=True)
class Audit:
    """All that was measured on one checkpoint; ``draws`` holds what a paired comparison needs, by name."""

    rows: tuple[Row, ...]
    about: dict[str, Any]  # the settings; parameters, norm, radii, bins, cosine of SAM's and DISAM's step
    shares: Table  # domain, method, weight, share, first_order, rise, cosine
    overlaps: Table  # first, second, overlap of the top eigenspaces, at_random
    warnings: Table  # name, message, value, threshold
    bounds: Table  # name, of, terms, right_side, complete, vacuous, assumes
    sampling: Table  # name, n, population and standard errors as estimates of the whole domains
    densities: Table  # loss, eigenvalue, density, standard_error
    slices: Table  # a, and the loss of each domain and pooled at w + a v
    draws: dict[str, Tensor] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row of the loss called ``name``."""
        return next(row for row in self.rows if row.name == name)

    def to_plain(self) -> dict[str, Any]:
        """All but ``draws``, ready for JSON."""
        return {**asdict(replace(self, draws={}))} | {"rows": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_plain(plain: Mapping[str, Any], draws: dict[str, Tensor]) -> Audit:
        """The inverse of :meth:`to_plain`, after a way through JSON."""
        rows = (Row(**{**row, **{name: tuple(row[name]) for name in ROW_LISTS}}) for row in plain["rows"])
        tables = {name: tuple(table) for name, table in plain.items() if name not in ("rows", "about", "draws")}
        return Audit(rows=tuple(rows), about=plain["about"], draws=draws, **tables)


def audit(
    model: nn.Module,
    domains: Sequence[Domain],
    settings: Settings = DEFAULT,
    *,
    unseen: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    start: Mapping[str, Tensor] | None = None,
    progress: Callable[[str], Progress] = lambda what: lambda products, running, error: None,
    through: Through = silently,
) -> Audit:
    """Measure a copy of ``model`` in evaluation mode on ``domains``; those named in ``unseen`` are no sources.

    ``start`` is :func:`~disam_theory.spectrum.domain_spectra`'s, and so is what ``progress`` gives for each search that
    it is told of; ``through`` goes through the parts of all other work.

    Raises:
        UsageError: an impossible setting, NaN or Inf weights, or outputs that do not fit the labels.
        ComputationError: a loss, a gradient or a Hessian product is not finite.
        InterruptedSpectra: on Ctrl-C, with the eigenvectors found so far.
        StarvedSpectra: the memory was not enough, also with those.
    """
    _check(settings, [domain.name for domain in domains], unseen)
    subject = replace(prepared(model, domains, settings, unseen, dtype, device, ranks), through=through)
    sizes = [len(domain) for domain in subject.domains]
    outcomes = {
        domain.name: outcomes_of(subject.model, domain, settings.chunk)
        for domain in through("outcomes of domain", subject.domains, sizes)
    }
    require_dependence(subject.model, subject.domains[0].inputs[:1])
    require_gradients(subject.model, subject.domains[0].inputs[:1])
    subject = subject.with_losses(ranks)
    spectra = _spectra(subject, start or {}, progress)
    with ended_early(lambda: _vectors(spectra)):
        return _assembled(subject, outcomes, spectra)


def _check(settings: Settings, names: Sequence[str], unseen: Sequence[str]) -> None:
    if not (settings.lam >= 0 and math.isfinite(settings.lam)):
        raise UsageError(f"lambda is {settings.lam}; it must be finite and at least 0, such as 0.1")
    if not (settings.rho > 0 and math.isfinite(settings.rho)):
        raise UsageError(f"rho is {settings.rho}; it must be finite and above 0, such as 0.05")
    require_names(names)
    for name in unseen:
        if name not in names:
            raise unknown_name("domain", name, names)
    if set(names) <= set(unseen):
        raise UsageError("every domain is named as unseen; leave at least one source")


def _spectra(
    subject: Subject, start: Mapping[str, Tensor], progress: Callable[[str], Progress]
) -> dict[str, Eigenpairs]:
    """The top eigenpairs of each source, of the three losses over them, then of each unseen domain."""
    chosen, params = subject.settings, subject.params
    subject.losses.checked(params)
    curvature = Curvature(subject.losses, params)
    options: dict[str, Any] = {"tol": chosen.tol, "max_products": chosen.max_products, "rng": chosen.rng}
    k = min(chosen.k, curvature.size)
    found = domain_spectra(curvature, k, lam=chosen.lam, start=start, progress=progress("eigenvalues"), **options)
    with ended_early(lambda: _vectors(found)):
        for name, losses in subject.others.items():
            losses.checked(params)
            operator, shown = domain_hessian(losses, params, name), progress(f"eigenvalues of {name}")
            own: dict[str, Any] = {"start": start.get(name), "held": bytes_of(found), "progress": shown}
            found[name] = top_eigenpairs(operator, k, **own, **options)
    return found


def _vectors(spectra: Mapping[str, Eigenpairs]) -> dict[str, Tensor]:
    return {name: pairs.vectors for name, pairs in spectra.items()}


def _assembled(subject: Subject, outcomes: Mapping[str, Outcomes], spectra: Mapping[str, Eigenpairs]) -> Audit:
    facts = losses_and_gradients(subject)
    for name, more in of_samples(subject, outcomes).items():
        facts[name] |= more
    probes = trace_probes(subject, facts)
    for name, more in rises(subject, spectra).items():
        facts[name] |= more
    shares, steps = felt_shares(subject)
    warnings = warnings_of(subject, spectra)
    about, found = bounds_of(subject, outcomes, steps)
    cosine = nn.functional.cosine_similarity(steps["SAM"], steps["DISAM"], dim=0)
    return Audit(
        rows=tuple(_row(name, spectra[name], probes[name], facts[name]) for name in facts),
        about={
            **asdict(subject.settings),
            **about,
            "cosine_sam_disam": float(cosine),
            "asam_rho": ASAM_FACTOR * subject.settings.rho,
        },
        shares=shares,
        overlaps=overlaps_of(spectra),
        warnings=warnings,
        bounds=tuple(plain_bound(bound) for bound in found),
        sampling=sampling_errors(subject, outcomes, spectra),
        densities=densities_of(subject) if subject.settings.full else (),
        slices=slices_of(subject, spectra["pooled"].vectors[:, 0]),
        draws=draws_of(outcomes, probes),
    )


def _row(name: str, pairs: Eigenpairs, probes: Tensor, facts: Mapping[str, Any]) -> Row:
    empty = dict.fromkeys(Row.__dataclass_fields__)
    estimate = {"trace": float(probes.mean()), "trace_error": float(probes.std()) / math.sqrt(len(probes))}
    intervals = {
        "eigenvalues": tuple(pairs.values.tolist()),
        "residuals": tuple(pairs.residuals.tolist()),
        "lower": tuple(pairs.lower.tolist()),
        "upper": tuple(pairs.upper.tolist()),
    }
    kept = {"name": name, "converged": pairs.converged, "products": pairs.products}
    return Row(**{**empty, **intervals, **estimate, **kept, **facts})


def aligned(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Rows under a head as text, the first column to the left and the others to the right."""
    widths = [max(len(line[c]) for line in [head, *rows]) for c in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if c else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0].rstrip()), *lines[1:]])
