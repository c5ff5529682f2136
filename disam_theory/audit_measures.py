r"""(model, domains) -> each measure of an audit, by the name of its loss; assembled in :mod:`disam_theory.audit`."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disam_theory import sharpness
from disam_theory.calibration import BINS, calibration
from disam_theory.domains import Domain, sample
from disam_theory.errors import DisamError, UsageError, first_line
from disam_theory.generalization import Bound, Measured, bounds
from disam_theory.landscape import eigen_direction, slice_1d
from disam_theory.losses import DomainLosses, ModelPart, Params, cross_entropy, model_losses, parameters_of
from disam_theory.memory import out_of_memory
from disam_theory.operators import Curvature, domain_gradients, fitting_chunk, flatten, unflatten, weights_at
from disam_theory.progress import Through, silently
from disam_theory.ranks import Ranks
from disam_theory.spectrum import Eigenpairs
from disam_theory.stochastic import overlap, sampling_error, spectral_density

SOURCE, UNSEEN = "source", "unseen"
ASAM_FACTOR = 10.0  # ASAM's radius is relative to the weights; its authors' 0.5 goes with SAM's 0.05
BATCH = 32  # of the gradient variance; at most half of the smallest domain, as drawing all of it would show none
Z95 = 1.959964  # of the standard normal distribution
Table = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Settings:
    """What is measured; ``full`` takes several times as long, for smaller errors, and adds the spectral densities."""

    k: int = 3
    lam: float = 0.1
    rho: float = 0.05
    delta: float = 0.05  # with which a generalisation bound may fail
    tol: float = 1e-3  # relative residual of the eigenvalues
    max_products: int = 300
    chunk: int = 1024  # samples in memory at once, at most; fewer where their graph would take more than 1.25 GiB
    rng: int = 0
    full: bool = False
    max_samples: int | None = None  # of each domain, drawn at random


DEFAULT = Settings()


@dataclass(frozen=True)
class Effort:
    """How many random vectors and steps the measures take."""

    probes: int  # for the trace
    pairs: int  # antithetic perturbations, average case
    draws: int  # perturbations for the PAC-Bayes bound
    steps: int  # of ascent, worst case
    restarts: int
    batches: int  # for the gradient variance


QUICK, FULL = Effort(10, 10, 10, 5, 0, 8), Effort(50, 50, 200, 20, 3, 30)


# --- what is measured ---


@dataclass(frozen=True)
class Subject:
    """The private model, its data, and the losses of the sources together and of each unseen domain alone."""

    settings: Settings
    model: nn.Module
    sources: tuple[Domain, ...]
    unseen: tuple[Domain, ...]
    populations: dict[str, int]  # samples of each domain before any were left out
    params: Params
    losses: DomainLosses | Any = None
    others: Mapping[str, DomainLosses] = field(default_factory=dict)
    through: Through = silently

    @property
    def domains(self) -> tuple[Domain, ...]:
        return self.sources + self.unseen

    @property
    def effort(self) -> Effort:
        return FULL if self.settings.full else QUICK

    def with_losses(self, ranks: Ranks) -> Subject:
        """After the outcomes, which say it better where model and data do not fit."""

        def of(domains: Sequence[Domain]) -> DomainLosses:
            return model_losses(self.model, domains, chunk=self.settings.chunk, ranks=ranks)

        whole = tuple(self.populations[domain.name] for domain in self.sources)  # shares are those of all samples
        others = {domain.name: of([domain]) for domain in self.unseen}
        return replace(self, losses=replace(of(self.sources), sizes=whole), others=others)

    def groups(self) -> Iterator[tuple[DomainLosses, tuple[Domain, ...], tuple[str, ...]]]:
        """Losses that measures of (M+1,) entries are taken of, with the names of the entries that are wanted."""
        yield self.losses, self.sources, (*self.losses.names, "pooled")
        for domain in self.unseen:
            yield self.others[domain.name], (domain,), (domain.name,)


def prepared(
    model: nn.Module,
    domains: Sequence[Domain],
    settings: Settings,
    unseen: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str,
    ranks: Ranks,
) -> Subject:
    private = copy.deepcopy(model).to(device, dtype).eval()
    if settings.max_samples is not None and ranks.world > 1:
        raise UsageError("max_samples is for one process; leave it away, or do not use torchrun")
    data = [_drawn(domain, settings, i).to(device=device, dtype=dtype) for i, domain in enumerate(domains)]
    chunk = fitting_chunk(private, data, settings.chunk)
    return Subject(
        replace(settings, chunk=chunk),
        private,
        tuple(d for d in data if d.name not in unseen),
        tuple(d for d in data if d.name in unseen),
        {d.name: d.drawn_from or len(d) for d in data},
        parameters_of(private),
    )


def _drawn(domain: Domain, settings: Settings, number: int) -> Domain:
    """At most ``max_samples`` of the domain, which may be drawn from a larger one already."""
    drawn = sample(domain, settings.max_samples, seed=1000 * settings.rng + number)
    return domain if drawn is domain else replace(drawn, drawn_from=domain.drawn_from or len(domain))


@dataclass(frozen=True)
class Outcomes:
    loss: Tensor  # (n,) float64 on the CPU
    right: Tensor  # (n,) 1.0 or 0.0
    confidence: Tensor  # (n,)


@torch.no_grad()
def outcomes_of(model: nn.Module, domain: Domain, chunk: int) -> Outcomes:
    """Each sample's outcome; also where a model that does not fit the data is found out."""
    pieces = []
    for inputs, labels in zip(domain.inputs.split(chunk), domain.labels.split(chunk), strict=True):
        outputs, losses = fitting_outputs(model, domain.name, inputs, labels)
        right, confidence = outputs.argmax(1) == labels, outputs.double().softmax(1).amax(1)
        pieces.append(torch.stack([losses.double(), right.double(), confidence]).cpu())
    return Outcomes(*torch.cat(pieces, dim=1))


def fitting_outputs(model: nn.Module, name: str, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs (n, classes) and losses (n,) of samples of the domain ``name``.

    Raises:
        UsageError: the model fails on them, or gives something else than a score for each of the classes.
    """
    try:
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            raise UsageError(
                f"the model's outputs are a {type(outputs).__name__}; it must give a tensor of one score for each of "
                "the classes, so wrap it in a module that returns that one"
            )
        shape, low, high = tuple(outputs.shape), int(labels.min()), int(labels.max())
        if len(shape) != 2:
            raise UsageError(f"the model's outputs have shape {shape}; it must give one score for each of the classes")
        if low < 0 or high >= shape[1]:
            raise UsageError(
                f"the model's outputs have shape {shape}, and domain {name!r} has label {low if low < 0 else high}; "
                f"labels must lie in 0..{shape[1] - 1}"
            )
        return outputs, cross_entropy(outputs, labels)
    except DisamError:
        raise
    except Exception as error:  # torch's, or whatever the model's own code raises
        if out_of_memory(error):
            raise
        reason = first_line(error)
        raise UsageError(
            f"the model cannot take inputs of shape {tuple(inputs.shape[1:])} of domain {name!r}: {reason}"
        ) from error


# --- the measures, each by the name of its loss ---


def losses_and_gradients(subject: Subject) -> dict[str, dict[str, Any]]:
    """Role, size, share, weight, loss and gradient norm of every row, in the rows' order."""
    losses, params, lam = subject.losses, subject.params, subject.settings.lam
    values, gradients = losses.checked(params).double(), domain_gradients(losses, params).double()
    alpha = torch.tensor(losses.shares, dtype=torch.float64, device=values.device)
    beta = weights_at(losses, params, lam).double()
    total = sum(len(domain) for domain in subject.sources)
    facts: dict[str, dict[str, Any]] = {}
    for i, (name, share) in enumerate(zip(losses.names, losses.shares, strict=True)):
        facts[name] = {"role": SOURCE, "n": len(subject.sources[i]), "share": share, "beta": float(beta[i])}
        facts[name]["loss"] = float(values[i])
        facts[name]["grad_norm"] = float(gradients[i].norm())
    for name, other in subject.through("gradient of unseen domain", list(subject.others.items())):
        own = domain_gradients(other, params).double()[0]
        facts[name] = {"role": UNSEEN, "n": other.sizes[0], "share": 0.0, "grad_norm": float(own.norm())}
        facts[name]["loss"] = float(other.checked(params)[0])
    inspired = float(alpha @ values - lam * values.var(correction=0))
    for name, weights, loss in (
        ("pooled", alpha, float(alpha @ values)),
        ("beta-weighted", beta, float(beta @ values)),
        ("L_DI", beta, inspired),
    ):
        facts[name] = {"role": "over the sources", "n": total, "share": 1.0, "loss": loss}
        facts[name]["grad_norm"] = float((weights @ gradients).norm())
    return facts


def of_samples(subject: Subject, outcomes: Mapping[str, Outcomes]) -> dict[str, dict[str, Any]]:
    """Accuracy, calibration and the errors of means over samples, of each domain and pooled."""
    found = {name: _of_outcomes([each], [1.0], subject.settings.rng) for name, each in outcomes.items()}
    own = [outcomes[domain.name] for domain in subject.sources]
    found["pooled"] = _of_outcomes(own, subject.losses.shares, subject.settings.rng)
    return found


def _of_outcomes(strata: Sequence[Outcomes], shares: Sequence[float], rng: int) -> dict[str, Any]:
    """Of strata with these shares of the whole: their errors add up by the squares of the shares.

    The interval of the accuracy takes Kish's (1965) effective number of samples, that of all where shares are sizes'.
    """
    sizes = [len(each.loss) for each in strata]
    weights = np.repeat([share / n for share, n in zip(shares, sizes, strict=True)], sizes)
    variance = sum(s**2 * float(o.loss.var()) / n for s, n, o in zip(shares, sizes, strata, strict=True))
    right = torch.cat([each.right for each in strata]).numpy()
    confidence = torch.cat([each.confidence for each in strata]).numpy()
    accuracy = float(right @ weights) if right.min() < 1 else 1.0
    low, high = wilson(accuracy, 1 / float(weights @ weights))
    calibrated = calibration(confidence, right, weights=weights, rng=rng)
    return {
        "loss_error": math.sqrt(variance),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "ece": calibrated.error,
        "ece_by_chance": calibrated.by_chance,
    }


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a proportion found to be ``share`` among ``n`` (Wilson 1927)."""
    centre = (share * n + Z95**2 / 2) / (n + Z95**2)
    reach = Z95 / (n + Z95**2) * math.sqrt(max(n * share * (1 - share), 0.0) + Z95**2 / 4)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def trace_probes(subject: Subject, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    r"""$v^\top A\,v$ for random signs $v$ (Hutchinson 1990), (S,) for each loss: its mean estimates the trace.

    One pass over the data serves every weighting of the domains; $-2\lambda\,\mathrm{tr\,Cov}(\nabla L_i)$ of
    $L_{DI}$ is exact.
    """
    params, chosen = subject.params, subject.settings
    like = flatten(params)
    generator = torch.Generator().manual_seed(chosen.rng)
    state = generator.get_state()

    def vectors() -> Iterator[Tensor]:
        """The same each time, one in memory at once."""
        generator.set_state(state)
        for _ in subject.through("trace", range(subject.effort.probes)):
            yield (torch.randint(0, 2, (len(like),), generator=generator) * 2 - 1).to(like)

    forms = _forms(subject.losses, params, vectors())
    alpha = torch.tensor(subject.losses.shares, dtype=torch.float64)
    beta = torch.tensor([facts[name]["beta"] for name in subject.losses.names], dtype=torch.float64)
    spread = float(sharpness.squared_distances(subject.losses, params).mean())
    found = dict(zip(subject.losses.names, forms.T, strict=True))
    found |= {"pooled": forms @ alpha, "beta-weighted": forms @ beta}
    found["L_DI"] = found["beta-weighted"] - 2 * chosen.lam * spread
    for name, other in subject.others.items():
        found[name] = _forms(other, params, vectors())[:, 0]
    return found


def _forms(losses: DomainLosses, params: Params, vectors: Iterable[Tensor]) -> Tensor:
    r"""$v^\top\nabla^2L_iv$ for each vector and domain, (S, M) float64 on the CPU."""
    curvature, eye = Curvature(losses, params), torch.eye(losses.M)
    rows = []
    for v in vectors:
        images = curvature.products([v] * losses.M, eye)
        rows.append(torch.stack([v.double() @ image.double() for image in images]).cpu())
    return torch.stack(rows)


def rises(subject: Subject, spectra: Mapping[str, Eigenpairs]) -> dict[str, dict[str, Any]]:
    chosen, effort, params = subject.settings, subject.effort, subject.params
    found: dict[str, dict[str, Any]] = {}
    for losses, domains, names in subject.groups():
        sharpest = [spectra[name] for name in names] + ([spectra[names[0]]] if len(names) == 1 else [])
        worst = sharpness.worst_case_sharpness(
            losses,
            params,
            rho=chosen.rho,
            steps=effort.steps,
            restarts=effort.restarts,
            rng=chosen.rng,
            sharpest=sharpest,
            through=subject.through,
        )
        average = sharpness.average_case_sharpness(
            losses, params, sigma=_sigma(subject), samples=effort.pairs, rng=chosen.rng, through=subject.through
        )
        variance = sharpness.gradient_variance(
            subject.model,
            domains,
            params,
            batch_size=_batch_size(subject),
            batches=effort.batches,
            rng=chosen.rng,
            chunk=chosen.chunk,
            through=subject.through,
        )
        steps = (
            functools.partial(sharpness.sam_sharpness, rho=chosen.rho),
            functools.partial(sharpness.adaptive_sharpness, rho=ASAM_FACTOR * chosen.rho),
        )
        sam, asam = (measure(losses, params) for measure in subject.through("ascent step", steps))
        columns = {
            "sam": sam,
            "worst_lower": worst.lower,
            "worst_upper": worst.upper,
            "average": average.mean,
            "average_error": average.standard_error,
            "asam": asam,
            "gradient_variance": variance.mean,
            "gradient_variance_error": variance.standard_error,
        }
        for j, name in enumerate(names):
            found[name] = {column: float(values[j]) for column, values in columns.items()}
    return found


def _sigma(subject: Subject) -> float:
    r"""$\rho/\sqrt k$ for ``k`` parameters: noise of the length $\rho$, in the mean of squares."""
    return subject.settings.rho / math.sqrt(len(flatten(subject.params)))


def _batch_size(subject: Subject) -> int:
    return max(1, min(BATCH, min(len(domain) for domain in subject.domains) // 2))


def felt_shares(subject: Subject) -> tuple[Table, dict[str, Tensor]]:
    """What each domain feels of SAM's and of DISAM's step, and the two steps."""
    params, rho = subject.params, subject.settings.rho
    rows: list[dict[str, Any]] = []
    steps = {}
    for method, lam in subject.through("perturbation", (("SAM", 0.0), ("DISAM", subject.settings.lam))):
        felt = sharpness.perturbation_shares(subject.losses, params, rho=rho, lam=lam)
        steps[method] = felt.step
        whole = float(felt.beta @ felt.first_order[:-1])
        for i, name in enumerate(subject.losses.names):
            part = float(felt.beta[i] * felt.first_order[i])
            own = {"weight": float(felt.beta[i]), "share": part / whole if whole > 0 else None}
            measured = {name: float(getattr(felt, name)[i]) for name in ("first_order", "rise", "cosine")}
            rows.append({"domain": name, "method": method, **own, **measured})
        for name, losses in subject.others.items():
            rows.append({"domain": name, "method": method, "weight": None, "share": None})
            rows[-1] |= _felt(losses, params, felt.step)
    return tuple(rows), steps


def _felt(losses: DomainLosses, params: Params, step: Tensor) -> dict[str, float]:
    """What an unseen domain feels of a step that the sources' losses chose."""
    gradient = domain_gradients(losses, params).double()[0]
    moved = losses(_moved(params, step)).double() - losses.checked(params).double()
    cosine = nn.functional.cosine_similarity(gradient, step.double(), dim=0)
    return {"first_order": float(gradient @ step.double()), "rise": float(moved[0]), "cosine": float(cosine)}


def _moved(params: Params, step: Tensor) -> Params:
    flat = flatten(params)
    return unflatten((flat + step).to(flat.dtype), params)


def overlaps_of(spectra: Mapping[str, Eigenpairs]) -> Table:
    """The overlap of the top eigenspaces of every two losses, and that of two random spaces of these dimensions."""
    names = [name for name in spectra if name not in ("beta-weighted", "L_DI")]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    n, k = spectra[names[0]].vectors.shape
    return tuple(
        {
            "first": a,
            "second": b,
            "overlap": overlap(spectra[a].vectors, spectra[b].vectors),
            "k": k,
            "at_random": k / n,
        }
        for a, b in pairs
    )


def warnings_of(subject: Subject, spectra: Mapping[str, Eigenpairs]) -> Table:
    """What the pooled loss alone does not show; empty where none of the thresholds is passed."""
    losses, params, chosen = subject.losses, subject.params, subject.settings
    sharpest = [spectra[name] for name in (*losses.names, "pooled")]
    checks = (
        functools.partial(sharpness.fake_flat_minimum, sharpest=sharpest),
        functools.partial(sharpness.hallucinated_minimum, rho=chosen.rho),
        functools.partial(sharpness.hallucinated_minimum, rho=chosen.rho, lam=chosen.lam),
    )
    found = [check(losses, params) for check in subject.through("warning", checks)]
    for name, weight in zip(losses.names, weights_at(losses, params, chosen.lam).tolist(), strict=True):
        if weight < 0:
            message = f"DISAM's ascent goes down the loss of domain {name!r}: its weight is {weight:.3g} (Eq. 8)"
            found.append(sharpness.MinimumWarning("negative weight", message, weight, 0.0))
    return tuple(asdict(warning) for warning in found if warning is not None)


def bounds_of(
    subject: Subject, outcomes: Mapping[str, Outcomes], steps: Mapping[str, Tensor]
) -> tuple[dict[str, Any], tuple[Bound, ...]]:
    """The facts that the bounds rest on, and the bounds."""
    params, chosen, sigma = subject.params, subject.settings, _sigma(subject)
    flat = flatten(params).double()
    total = sum(len(domain) for domain in subject.sources)
    generator = torch.Generator().manual_seed(chosen.rng + 1)
    noise = (
        sigma * torch.randn(len(flat), generator=generator, dtype=torch.float64)
        for _ in subject.through("draw for the bounds", range(subject.effort.draws))
    )
    random = [float(_wrong(subject, step.to(flat.device)).sum()) / total for step in noise]
    near = [float(_wrong(subject, step).sum()) / total for step in (torch.zeros_like(flat), *steps.values())]
    at = Measured(
        k=len(flat),
        norm=float(flat.norm()),
        rho=chosen.rho,
        sigma=sigma,
        n=total,
        worst_error=max(near),
        random_error=float(np.mean(random)),
        draws=len(random),
        unseen={d.name: (len(d), 1.0 - float(outcomes[d.name].right.mean())) for d in subject.unseen},
    )
    about = {"parameters": at.k, "norm": at.norm, "sigma": sigma, "delta": chosen.delta, "bins": BINS}
    return {**about, "batch_size": _batch_size(subject)}, bounds(at, delta=chosen.delta)


@torch.no_grad()
def _wrong(subject: Subject, step: Tensor) -> Tensor:
    """The number of samples of each source (M,) that the weights plus ``step`` get wrong."""
    moved = _moved(subject.params, step)
    counts = [
        sum(
            float((part.outputs(moved).argmax(1) != part.labels).sum()) for part in parts if isinstance(part, ModelPart)
        )
        for parts in subject.losses.parts
    ]
    return subject.losses.ranks.total(torch.tensor(counts, dtype=torch.float64, device=step.device)).cpu()


def plain_bound(bound: Bound) -> dict[str, Any]:
    computed = {"right_side": bound.right_side, "complete": bound.complete, "vacuous": bound.vacuous}
    return {**asdict(bound), "terms": [asdict(term) for term in bound.terms], **computed}


def sampling_errors(subject: Subject, outcomes: Mapping[str, Outcomes], spectra: Mapping[str, Eigenpairs]) -> Table:
    """Of each loss that was sampled, the errors as estimates of the whole domains, which are finite."""
    if all(len(domain) == subject.populations[domain.name] for domain in subject.domains):
        return ()
    rows = []
    for losses, domains, names in subject.groups():
        for name in subject.through("sampling error", names, _costs(losses)[: len(names)]):
            vector = spectra[name].vectors[:, 0]
            shares = losses.shares if name == "pooled" else [float(domain.name == name) for domain in domains]
            errors = np.zeros(3)
            for domain, share in zip(domains, shares, strict=True):
                if share:
                    own = _errors(subject, losses, domain, outcomes[domain.name], vector)
                    errors += (share * np.array(own)) ** 2
            counted = [domain for domain, share in zip(domains, shares, strict=True) if share]
            row = {"name": name, "n": sum(len(domain) for domain in counted)}
            row["population"] = sum(subject.populations[domain.name] for domain in counted)
            rows.append(row | dict(zip(SAMPLED, np.sqrt(errors).tolist(), strict=True)))
    return tuple(rows)


SAMPLED = ("loss_error", "accuracy_error", "lambda_1_error")


def _errors(
    subject: Subject, losses: DomainLosses, domain: Domain, outcomes: Outcomes, vector: Tensor
) -> tuple[float, float, float]:
    """Standard errors of a domain's mean loss, accuracy and bend along ``vector``, with the finite domain's factor."""
    n, population = len(domain), subject.populations[domain.name]
    shrink = math.sqrt((1 - n / population) / n)
    bend = sampling_error(losses, subject.params, domain.name, vector, population=population)
    return float(outcomes.loss.std()) * shrink, float(outcomes.right.std()) * shrink, bend.standard_error


def densities_of(subject: Subject) -> Table:
    rows = []
    for losses, _, names in subject.groups():
        curvature = Curvature(losses, subject.params)
        weights = {**dict(zip(losses.names, torch.eye(losses.M), strict=True)), "pooled": losses.shares}
        for name in subject.through("density", names, _costs(losses)[: len(names)]):
            found = spectral_density(
                curvature.operator(weights[name]), vectors=4, steps=40, points=200, rng=subject.settings.rng
            )
            columns = (found.grid.tolist(), found.density.tolist(), found.standard_error.tolist())
            for x, y, e in zip(*columns, strict=True):
                rows.append({"loss": name, "eigenvalue": x, "density": y, "standard_error": e})
    return tuple(rows)


def _costs(losses: DomainLosses) -> list[int]:
    """The micro-batches of each domain, and of all."""
    each = [len(parts) for parts in losses.parts]
    return [*each, sum(each)]


def slices_of(subject: Subject, vector: Tensor) -> Table:
    """The losses along the pooled loss's sharpest direction, at distances of -1 to 1."""
    direction = eigen_direction(vector, subject.params)
    rows: list[dict[str, Any]] = [{"a": j / 10} for j in range(-10, 11)]
    for row in subject.through("point of the slice", rows):
        for losses, _, names in subject.groups():
            point = slice_1d(losses, subject.params, direction, at=[row["a"]], points_per_pass=1)
            row |= {name: float(point.column(name)) for name in names}
    return tuple(rows)


def draws_of(outcomes: Mapping[str, Outcomes], probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses and outcomes of single samples, and trace probes: what two checkpoints are paired over."""
    found = {f"trace/{name}": values for name, values in probes.items()}
    for name, each in outcomes.items():
        found |= {f"loss/{name}": each.loss, f"right/{name}": each.right}
    return found
