r"""(model, domains) -> one row a domain, and for the pooled, weighted and domain-inspired loss: how sharp, how sure.

For each domain $D_i$: size, loss, accuracy, $\lVert\nabla L_i\rVert$ and the top eigenvalues of $\nabla^2L_i$. Then the
same for the pooled loss $\sum_i\alpha_iL_i$, for $\sum_i\beta_iL_i$ with the weights of Eq. (8) held fixed, and for
$L_{DI}=L-\lambda\,\mathrm{Var}\{L_i\}$ itself.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from disam_theory.domains import Domain
from disam_theory.errors import UsageError
from disam_theory.files import csv_text
from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import Curvature, domain_gradients, weights_at
from disam_theory.ranks import ALONE, Ranks
from disam_theory.spectrum import Eigenpairs, Progress, domain_spectra

SCHEMA = "disam-audit/1"


@dataclass(frozen=True)
class Row:
    """One loss of the audit. ``accuracy`` is None where it has no meaning; ``residuals`` belong to ``eigenvalues``."""

    name: str
    n: int
    share: float
    beta: float | None
    loss: float
    accuracy: float | None
    grad_norm: float
    eigenvalues: tuple[float, ...]  # (k,), largest first
    residuals: tuple[float, ...]  # (k,)
    lower: tuple[float, ...]  # (k,) certified interval of each eigenvalue, see Eigenpairs
    upper: tuple[float, ...]  # (k,)
    converged: bool
    products: int


def audit(
    model: nn.Module,
    domains: Sequence[Domain],
    *,
    k: int = 3,
    lam: float = 0.1,
    tol: float = 1e-3,
    max_products: int = 300,
    chunk: int = 1024,
    rng: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    start: Mapping[str, torch.Tensor] | None = None,
    progress: Progress = lambda products, running, error: None,
) -> list[Row]:
    """The audit's rows: each domain, then ``pooled``, ``beta-weighted`` and ``L_DI``, of a copy in evaluation mode.

    ``start`` and ``progress`` are :func:`~disam_theory.spectrum.domain_spectra`'s.

    Raises:
        UsageError: NaN or Inf weights, or outputs that do not fit the labels.
        ComputationError: a domain's loss or a Hessian product is not finite.
    """
    if not (lam >= 0 and math.isfinite(lam)):
        raise UsageError(f"lambda is {lam}; it must be finite and at least 0, such as 0.1")
    private = copy.deepcopy(model).to(device, dtype).eval()
    data = [domain.to(device=device, dtype=dtype) for domain in domains]
    params = parameters_of(private)
    correct = [_correct(private, domain, chunk) for domain in data]
    losses = model_losses(private, data, chunk=chunk, ranks=ranks)
    values = losses.checked(params).double()
    gradients = domain_gradients(losses, params).double()
    alpha = torch.tensor(losses.shares, dtype=torch.float64, device=values.device)
    beta = weights_at(losses, params, lam).double()
    curvature = Curvature(losses, params)
    spectra = domain_spectra(
        curvature,
        min(k, curvature.size),
        lam=lam,
        tol=tol,
        max_products=max_products,
        rng=rng,
        start=start,
        progress=progress,
    )
    total = sum(losses.sizes)
    inspired = float(alpha @ values - lam * values.var(correction=0))
    weights = {**dict(zip(losses.names, torch.eye(losses.M).to(alpha), strict=True)), "pooled": alpha}
    weights |= {"beta-weighted": beta, "L_DI": beta}
    known: dict[str, dict[str, Any]] = {
        d.name: {"n": len(d), "beta": float(beta[i]), "accuracy": correct[i] / len(d)} for i, d in enumerate(data)
    }
    known |= {"pooled": {"accuracy": sum(correct) / total}, "L_DI": {"loss": inspired}}
    return [
        _row(name, total, weights[name], values, gradients, pairs, known.get(name, {}))
        for name, pairs in spectra.items()
    ]


def _row(
    name: str,
    total: int,
    weights: torch.Tensor,
    values: torch.Tensor,
    gradients: torch.Tensor,
    pairs: Eigenpairs,
    known: dict[str, Any],
) -> Row:
    """The row of one loss, a weighting of the domains, from the domains' losses and gradients; ``known`` overrides."""
    fields = {
        "n": total,
        "beta": None,
        "loss": float(weights @ values),
        "accuracy": None,
        "grad_norm": float((weights @ gradients).norm()),
        **known,
    }
    return Row(
        name=name,
        share=fields["n"] / total,
        **fields,
        eigenvalues=tuple(pairs.values.tolist()),
        residuals=tuple(pairs.residuals.tolist()),
        lower=tuple(pairs.lower.tolist()),
        upper=tuple(pairs.upper.tolist()),
        converged=pairs.converged,
        products=pairs.products,
    )


@torch.no_grad()
def _correct(model: nn.Module, domain: Domain, chunk: int) -> int:
    """The number of samples classified rightly; also where a model that does not fit the data is found out."""
    correct = 0
    try:
        for inputs, labels in zip(domain.inputs.split(chunk), domain.labels.split(chunk), strict=True):
            outputs = model(inputs)
            if outputs.ndim != 2 or int(labels.max()) >= outputs.shape[1]:
                raise UsageError(
                    f"the model's outputs have shape {tuple(outputs.shape)}, and domain {domain.name!r} has label "
                    f"{int(labels.max())}; it must give one score for each of the classes"
                )
            correct += int((outputs.argmax(1) == labels).sum())
    except RuntimeError as error:
        shape = tuple(domain.inputs.shape[1:])
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"the model cannot take inputs of shape {shape} of domain {domain.name!r}: {reason}"
        ) from error
    return correct


def as_json(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    """The rows as JSON, schema ``disam-audit/1``."""
    return json.dumps({"schema": SCHEMA, "provenance": provenance, "rows": [asdict(row) for row in rows]}, indent=1)


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, one eigenvalue and its residual to a pair of columns."""
    return csv_text([_flat(row) for row in rows])


def _flat(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    columns = {"lambda": "eigenvalues", "residual": "residuals", "lower": "lower", "upper": "upper"}
    lists = {short: fields.pop(name) for short, name in columns.items()}
    for j in range(len(row.eigenvalues)):
        fields |= {f"{short}_{j + 1}": values[j] for short, values in lists.items()}
    return fields


def as_table(rows: Sequence[Row]) -> str:
    """The rows as an aligned text table; eigenvalues as ``value ± residual``, with ``!`` where not converged."""
    k = len(rows[0].eigenvalues)
    head = ["loss of", "n", "loss", "acc %", "|grad|", "beta", *(f"lambda_{j}" for j in range(1, k + 1)), ""]
    body = [
        [
            row.name,
            str(row.n),
            f"{row.loss:.4g}",
            "" if row.accuracy is None else f"{100 * row.accuracy:.1f}",
            f"{row.grad_norm:.3g}",
            "" if row.beta is None else f"{row.beta:.3g}",
            *(f"{v:.4g} ± {r:.1g}" for v, r in zip(row.eigenvalues, row.residuals, strict=True)),
            "" if row.converged else "! not converged",
        ]
        for row in rows
    ]
    return aligned(body, head)


def aligned(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Rows under a head as text, the first column to the left and the others to the right."""
    widths = [max(len(line[c]) for line in [head, *rows]) for c in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if c else cell.ljust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0].rstrip()), *lines[1:]])
