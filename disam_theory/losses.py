r"""(model, domains) -> domain losses $L_i(w)$ -> pooled loss, variance over domains, $L_{DI}$.

| letter | meaning |
|---|---|
| ``M`` | number of domains |
| ``n_i``, ``alpha_i`` | size of domain i and its share $n_i/N$ |
| ``L_i`` | mean loss on domain i |
| ``lam`` | $\lambda$ of $L_{DI}=L-\lambda\,\mathrm{Var}\{L_i\}$ |
"""

from __future__ import annotations

import copy
import fnmatch
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from disam_theory.domains import Domain
from disam_theory.errors import ComputationError, UsageError, unknown_name
from disam_theory.ranks import ALONE, Ranks

Params = dict[str, Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]  # (outputs (n, ...), labels (n,)) -> (n,)
Part = Callable[[Params], Tensor]  # a scalar function of the parameters


def pooled(losses: Tensor, shares: Tensor) -> Tensor:
    r"""$L=\sum_i\alpha_iL_i$ (Eq. 3). ``losses`` and ``shares`` are (..., M)."""
    return (shares * losses).sum(-1)


def domain_variance(losses: Tensor, present: Tensor | None = None) -> Tensor:
    r"""$\mathrm{Var}\{L_i\}=\frac1{2M^2}\sum_{i,j}(L_i-L_j)^2=\frac1M\sum_i(L_i-\bar L)^2$ (Eq. 6), unweighted.

    ``present`` (..., M) is one where a domain has samples and zero elsewhere; the variance is over domains present.
    """
    weights = torch.ones_like(losses) if present is None else present
    weights = weights / weights.sum(-1, keepdim=True)
    return weighted_variance(losses, weights)


def weighted_variance(losses: Tensor, weights: Tensor) -> Tensor:
    r"""$\sum_ip_i(L_i-\sum_jp_jL_j)^2$ for weights ``p`` (..., M) that sum to one.

    With $p_i$ the domain's share of the batch this is the variance that the official code computes.
    """
    mean = (weights * losses).sum(-1, keepdim=True)
    return (weights * (losses - mean) ** 2).sum(-1)


@dataclass(frozen=True)
class DomainLosses:
    r"""$w\mapsto(L_1(w),\dots,L_M(w))$, each $L_i$ a sum of ``parts[i]``.

    The parts of a domain are its micro-batches, each already weighted by its share $n_{chunk}/n_i$ of the domain,
    so that any cutting into chunks gives the full-data value up to round-off.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # (M,)
    parts: tuple[Collection[Part], ...]  # parts[i]: L_i(w) = sum of part(w), over all ranks
    ranks: Ranks = ALONE  # the processes among which the data are shared

    @property
    def M(self) -> int:
        """Number of domains."""
        return len(self.names)

    @property
    def shares(self) -> tuple[float, ...]:
        r"""$\alpha_i=n_i/N$ (Eq. 3)."""
        total = sum(self.sizes)
        return tuple(n / total for n in self.sizes)

    def __call__(self, params: Params) -> Tensor:
        """The M domain losses (M,) at ``params``."""
        nothing = next(iter(params.values())).new_zeros(())
        return self.ranks.total(torch.stack([sum((part(params) for part in parts), nothing) for parts in self.parts]))

    def checked(self, params: Params) -> Tensor:
        """The M domain losses without a graph; :class:`ComputationError` names a domain whose loss is not finite."""
        with torch.no_grad():
            values = self(params)
        for name, value in zip(self.names, values.tolist(), strict=True):
            if not torch.isfinite(torch.tensor(value)):
                raise ComputationError(
                    f"the loss on domain {name!r} is {value}; the weights overflow there: check the checkpoint "
                    "and how inputs are normalised, or use --dtype float64"
                )
        return values

    def index(self, name: str) -> int:
        """The position of the domain ``name``."""
        if name not in self.names:
            raise unknown_name("domain", name, self.names)
        return self.names.index(name)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample (n,), in nats."""
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    r"""$\frac12(f(x)-y)^2$ of each sample (n,), for a model with one output."""
    return 0.5 * (outputs.reshape(labels.shape) - labels) ** 2


def parameters_of(model: nn.Module) -> Params:
    """A detached copy of the model's parameters by name; raises :class:`UsageError` for NaN or Inf weights."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, value in params.items():
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise UsageError(
                f"parameter {name!r} has {bad} NaN or Inf value(s) of {value.numel()}; the checkpoint is broken"
            )
    return params


@dataclass(frozen=True, eq=False)
class ModelPart:
    """One micro-batch's share of a domain's loss as a function of the parameters; outputs and samples apart."""

    model: nn.Module  # in evaluation mode
    inputs: Tensor  # (n, ...)
    labels: Tensor  # (n,)
    criterion: Criterion
    weight: float  # the micro-batch's share of the domain
    frozen: Mapping[str, Tensor] = field(default_factory=dict)  # parameters held at these values

    def outputs(self, params: Params) -> Tensor:
        """The model's outputs (n, ...)."""
        params = {**self.frozen, **params}
        if difference := mismatch(dict(self.model.named_parameters()), params):
            raise UsageError(f"the params do not fit the model: {difference}; take them from parameters_of(model)")
        return functional_call(self.model, params, (self.inputs,))

    def of_outputs(self, outputs: Tensor) -> Tensor:
        """The part's loss as a function of the outputs, ()."""
        return self.weight * self.criterion(outputs, self.labels).mean()

    def cut(self, chunk: int) -> tuple[ModelPart, ...]:
        """Parts of at most ``chunk`` samples, whose sum this one is."""
        pieces = zip(self.inputs.split(chunk), self.labels.split(chunk), strict=True)
        whole = len(self.labels)
        return tuple(replace(self, inputs=x, labels=y, weight=self.weight * (len(y) / whole)) for x, y in pieces)

    def samples(self, params: Params) -> Tensor:
        """The loss of each sample (n,)."""
        return self.criterion(self.outputs(params), self.labels)

    def __call__(self, params: Params) -> Tensor:
        return self.of_outputs(self.outputs(params))

    def on(self, params: Params, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of another micro-batch, not weighted."""
        return replace(self, inputs=inputs, labels=labels, weight=1.0)(params)


SAME_DATA = "it must give the same data at each pass: no shuffling, no random augmentation, no one-off iterator"


@dataclass(frozen=True, eq=False)
class StreamedParts:
    """A domain's micro-batches from a loader, read anew at each pass so that the memory is that of one.

    Every pass is compared with the first by a checksum of each batch.
    """

    name: str
    model: nn.Module  # in evaluation mode
    loader: Iterable[Sequence[Tensor]]  # yields (inputs, labels, ...)
    criterion: Criterion
    device: torch.device
    size: int
    checksums: tuple[int, ...]  # of the batches
    frozen: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.checksums)

    def __contains__(self, part: object) -> bool:
        return False

    def __iter__(self) -> Iterator[Part]:
        """Raises :class:`UsageError` where a batch is not the one of the first pass."""
        number = -1
        for number, (inputs, labels, *_) in enumerate(self.loader):
            if number >= len(self) or _checksum(inputs, labels) != self.checksums[number]:
                raise UsageError(
                    f"the loader of domain {self.name!r} gave another batch {number} than before; {SAME_DATA}"
                )
            share = len(labels) / self.size
            yield ModelPart(
                self.model, inputs.to(self.device), labels.to(self.device), self.criterion, share, self.frozen
            )
        if number + 1 != len(self):
            raise UsageError(
                f"the loader of domain {self.name!r} gave {number + 1} of {len(self)} batches; {SAME_DATA}"
            )


def _checksum(inputs: Tensor, labels: Tensor) -> int:
    return zlib.crc32(labels.cpu().numpy().tobytes(), zlib.crc32(inputs.cpu().contiguous().numpy().tobytes()))


def loader_losses(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Sequence[Tensor]]],
    *,
    criterion: Criterion = cross_entropy,
    batch_statistics: bool = False,
) -> DomainLosses:
    """The losses of domains whose data come from loaders (domain name -> iterable of (inputs, labels)).

    For data that do not fit into memory: nothing but the batch at hand is held. The model is copied, in evaluation
    mode, with ``batch_statistics`` as in :func:`model_losses`. A loader that gives other data at a later pass
    is refused when it does.

    Raises:
        UsageError: a loader with fewer than two samples.
    """
    private, device = _private(model, batch_statistics), next(model.parameters()).device
    parts = []
    for name, loader in loaders.items():
        batches = [(len(labels), _checksum(inputs, labels)) for inputs, labels, *_ in loader]
        size = sum(n for n, _ in batches)
        if size < 2:
            raise UsageError(f"the loader of domain {name!r} gives {size} sample(s); at least 2 are needed")
        checksums = tuple(checksum for _, checksum in batches)
        parts.append(StreamedParts(name, private, loader, criterion, device, size, checksums))
    return DomainLosses(tuple(loaders), tuple(part.size for part in parts), tuple(parts))


def mismatch(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """How the names and shapes of ``given`` differ from the model's ``own``, in words; None where they agree."""
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    misshapen = [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    return "; ".join(f"{kind} {_some(names)}" for kind, names in kinds if names) or None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def model_losses(
    model: nn.Module,
    domains: Sequence[Domain],
    *,
    criterion: Criterion = cross_entropy,
    chunk: int = 1024,
    batch_statistics: bool = False,
    ranks: Ranks = ALONE,
) -> DomainLosses:
    r"""$L_i(w)=\frac1{n_i}\sum_{j}\ell(f_w(x_j),y_j)$ over each domain, in micro-batches of at most ``chunk`` samples.

    The model is copied and put in evaluation mode (no dropout, running statistics in batch norm), so the caller's
    model is not touched and the loss is a deterministic function of the parameters. With ``batch_statistics`` batch
    norm uses each micro-batch's own mean and variance, as in training, and tracks nothing: then ``chunk`` is part of
    the definition of the loss. With several ``ranks`` this process evaluates its share of each domain, and what is
    summed over parts is summed over the ranks too.
    """
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}; it must be at least 1 sample")
    private = _private(model, batch_statistics)
    parts = tuple(
        tuple(
            ModelPart(private, x, y, criterion, len(y) / len(domain))
            for x, y in zip(
                ranks.share(domain.inputs).split(chunk), ranks.share(domain.labels).split(chunk), strict=True
            )
            if len(y)
        )
        for domain in domains
    )
    return DomainLosses(tuple(d.name for d in domains), tuple(len(d) for d in domains), parts, ranks)


def _private(model: nn.Module, batch_statistics: bool) -> nn.Module:
    """A copy in evaluation mode; where batch norm has no running statistics it takes the batch's."""
    shared = {id(p): p for p in model.parameters()}  # never read: each part is given all of them
    private = copy.deepcopy(model, shared).eval()
    for module in private.modules() if batch_statistics else ():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.running_mean = module.running_var = None
    return private


def restrict(losses: DomainLosses, params: Params, *patterns: str) -> tuple[DomainLosses, Params]:
    """The losses as functions of the parameters whose names match (``"head.*"``, ``"layer1.*"``), and those.

    The others stay at ``params``: the Hessian of the result is a diagonal block of the whole one.
    """
    chosen = {name: p for name, p in params.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    if not chosen:
        raise unknown_name("parameter", ", ".join(patterns), params)
    frozen = {name: p.detach() for name, p in params.items() if name not in chosen}

    def of_chosen(part: Part) -> Part:
        if isinstance(part, ModelPart):
            return replace(part, frozen={**part.frozen, **frozen})
        return lambda some: part({**frozen, **some})

    parts = tuple(
        replace(parts, frozen={**parts.frozen, **frozen})
        if isinstance(parts, StreamedParts)
        else tuple(of_chosen(part) for part in parts)
        for parts in losses.parts
    )
    return replace(losses, parts=parts), chosen


def layers(params: Params) -> dict[str, list[str]]:
    """The names of the parameters of each module that has some of its own, in the model's order."""
    found: dict[str, list[str]] = {}
    for name in params:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def quadratic_losses(
    minima: Tensor, curvatures: Tensor, offsets: Tensor, *, sizes: Sequence[int] | None = None
) -> DomainLosses:
    r"""The exact family $L_i(w)=\frac12(w-m_i)^\top A_i(w-m_i)+c_i$ of one parameter vector ``{"w": (k,)}``.

    ``minima`` (M, k), symmetric ``curvatures`` (M, k, k), ``offsets`` (M,); equal sizes unless given.
    """
    if not torch.allclose(curvatures, curvatures.mT):
        raise UsageError("curvatures must be symmetric matrices; symmetrise them as (A + A^T) / 2")

    def part(m: Tensor, a: Tensor, c: Tensor) -> Part:
        return lambda params: 0.5 * (params["w"] - m) @ a @ (params["w"] - m) + c

    count = len(minima)
    parts = tuple((part(m, a, c),) for m, a, c in zip(minima, curvatures, offsets, strict=True))
    return DomainLosses(tuple(f"quadratic{i}" for i in range(count)), tuple(sizes or (1,) * count), parts)
