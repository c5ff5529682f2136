"""What the verbs of the command line do: load, measure, print, write. Each returns the exit code."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from disam_theory import audit as audits
from disam_theory.checkpoints import fill, load_model, load_state_dict
from disam_theory.domains import Suite, load_suite
from disam_theory.errors import ComputationError, UsageError
from disam_theory.files import write_atomically
from disam_theory.landscape import eigen_direction, random_direction, slice_1d, slice_2d
from disam_theory.losses import Params, model_losses, parameters_of, restrict
from disam_theory.operators import Curvature, hessian
from disam_theory.provenance import one_line, provenance, sha256
from disam_theory.ranks import Ranks, launched
from disam_theory.spectrum import bottom_eigenpairs, domain_spectra, top_eigenpairs
from disam_theory.stochastic import Density, spectral_density, trace


def audit(arguments: argparse.Namespace) -> int:
    """``disam-theory audit``: see :mod:`disam_theory.audit`."""
    _check(arguments, "k", "chunk", "image_size")
    with launched(arguments.device) as (ranks, device_name):
        device = _device(device_name)
        model, suite = _load(arguments)
        rows = audits.audit(
            model,
            suite.domains,
            k=arguments.k,
            lam=arguments.lam,
            tol=arguments.tol,
            max_products=arguments.max_products,
            chunk=arguments.chunk,
            rng=arguments.rng,
            dtype=getattr(torch, arguments.dtype),
            device=device,
            ranks=ranks,
            progress=_progress if ranks.rank == 0 else lambda products, running: None,
        )
        if ranks.rank:
            return 0  # the first process says what all have found
        record = _record(arguments, suite, device, ranks)
    texts = {
        "json": audits.as_json(rows, record) + "\n",
        "csv": audits.as_csv(rows),
        "table": audits.as_table(rows) + "\n",
    }
    _deliver(arguments, "audit", texts, record)
    _refuse_short([row.name for row in rows if not row.converged], arguments)
    return 0


def spectrum(arguments: argparse.Namespace) -> int:
    """``disam-theory spectrum``: both ends, trace and density of each domain's curvature and of the pooled one."""
    _check(arguments, "k", "chunk", "image_size", "samples")
    if arguments.density and not arguments.out:
        raise UsageError("--density writes a file; give --out DIR")
    device = _device(arguments.device)
    model, suite = _load(arguments)
    private = model.to(device, getattr(torch, arguments.dtype)).eval()
    data = [domain.to(device=device, dtype=getattr(torch, arguments.dtype)) for domain in suite.domains]
    losses, params = model_losses(private, data, chunk=arguments.chunk), parameters_of(private)
    losses.checked(params)
    if arguments.parameters:
        losses, params = restrict(losses, params, *arguments.parameters)
    curvature = Curvature(losses, params, kind=arguments.kind)
    options = {"tol": arguments.tol, "max_products": arguments.max_products, "rng": arguments.rng}
    tops = domain_spectra(curvature, min(arguments.k, curvature.size), **options, progress=_progress)
    _progress(0, 0)
    weights = {**dict(zip(losses.names, torch.eye(losses.M), strict=True)), "pooled": losses.shares}
    rows, densities, short = [], {}, []
    for name, top in tops.items():
        operator = curvature.operator(weights[name])
        bottom = bottom_eigenpairs(operator, 1, **options)
        total = trace(operator, samples=arguments.samples, rng=arguments.rng)
        row: dict[str, Any] = {"loss of": name, "trace": total.value, "trace_error": total.standard_error}
        for j in range(len(top.values)):
            row |= {f"lambda_{j + 1}": float(top.values[j])}
            row |= {f"lower_{j + 1}": float(top.lower[j]), f"upper_{j + 1}": float(top.upper[j])}
        row |= {"lambda_min": float(bottom.values[0]), "lower_min": float(bottom.lower[0])}
        rows.append(
            {**row, "upper_min": float(bottom.upper[0]), "products": top.products + bottom.products + total.products}
        )
        if arguments.density:
            densities[name] = spectral_density(operator, rng=arguments.rng)
        short += [name] * (not top.converged or not bottom.converged)
    record = _record(arguments, suite, device, Ranks())
    table = _spectrum_table(rows, min(arguments.k, curvature.size))
    document = json.dumps({"schema": "disam-spectrum/1", "provenance": record, "rows": rows}, indent=1) + "\n"
    _deliver(arguments, "spectrum", {"json": document, "csv": _csv(rows), "table": table}, record)
    if arguments.density:
        write_atomically(arguments.out / "density.csv", f"# {one_line(record)}\n{_csv(_density_rows(densities))}")
    _refuse_short(short, arguments)
    return 0


def landscape(arguments: argparse.Namespace) -> int:
    """``disam-theory landscape``: the domains' losses on a line or a plane through the checkpoint."""
    _check(arguments, "chunk", "image_size", "points")
    if not 0 < arguments.span < float("inf"):
        raise UsageError(f"span is {arguments.span}; it must be finite and above 0")
    device = _device(arguments.device)
    model, suite = _load(arguments)
    private = model.to(device, getattr(torch, arguments.dtype)).eval()
    data = [domain.to(device=device, dtype=getattr(torch, arguments.dtype)) for domain in suite.domains]
    losses, params = model_losses(private, data, chunk=arguments.chunk), parameters_of(private)
    losses.checked(params)
    directions = _directions(arguments, losses, params)
    at = torch.linspace(-arguments.span, arguments.span, arguments.points, dtype=torch.float64)
    columns = (*losses.names, "pooled")
    if arguments.dimensions == 1:
        line = slice_1d(losses, params, directions[0], at=at)
        rows = [
            {"a": float(a), **{name: float(line.column(name)[i]) for name in columns}}
            for i, a in enumerate(at.tolist())
        ]
    else:
        plane = slice_2d(losses, params, (directions[0], directions[1]), x=at, y=at)
        rows = [
            {"a": a, "b": b, **{name: float(plane.column(name)[j, i]) for name in columns}}
            for j, b in enumerate(at.tolist())
            for i, a in enumerate(at.tolist())
        ]
    record = _record(arguments, suite, device, Ranks())
    document = json.dumps({"schema": "disam-landscape/1", "provenance": record, "rows": rows}) + "\n"
    table = audits.aligned([[_short(value) for value in row.values()] for row in rows], list(rows[0])) + "\n"
    _deliver(arguments, "landscape", {"json": document, "csv": _csv(rows), "table": table}, record)
    return 0


def _directions(arguments: argparse.Namespace, losses: Any, params: Params) -> list[Params]:
    if arguments.direction == "filter":
        return [random_direction(params, rng=arguments.rng + j) for j in range(arguments.dimensions)]
    pairs = top_eigenpairs(hessian(losses, params, weights=losses.shares), arguments.dimensions, rng=arguments.rng)
    return [eigen_direction(vector, params) for vector in pairs.vectors.T]


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, Suite]:
    state = load_state_dict(arguments.checkpoint)
    model = fill(load_model(arguments.model), state, str(arguments.checkpoint))
    return model, load_suite(arguments.data, rng=arguments.rng, image_size=arguments.image_size)


def _check(arguments: argparse.Namespace, *counts: str) -> None:
    for name in counts:
        if getattr(arguments, name) < 1:
            option = "-k" if name == "k" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is {getattr(arguments, name)}; it must be at least 1")
    if not getattr(arguments, "tol", 1.0) > 0:
        raise UsageError(f"--tol is {arguments.tol}; it must be above 0")


def _record(arguments: argparse.Namespace, suite: Suite, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    return provenance(
        checkpoint=str(arguments.checkpoint),
        checkpoint_sha256=sha256(arguments.checkpoint),
        data=suite.name,
        model=arguments.model,
        rng=arguments.rng,
        dtype=arguments.dtype,
        device=str(device),
        processes=ranks.world,
    )


def _deliver(arguments: argparse.Namespace, name: str, texts: Mapping[str, str], record: dict[str, Any]) -> None:
    """Write ``NAME.json`` and ``NAME.csv`` where asked for, and print what was asked for."""
    _progress(0, 0)
    if arguments.out:
        write_atomically(arguments.out / f"{name}.json", texts["json"])
        write_atomically(arguments.out / f"{name}.csv", f"# {one_line(record)}\n{texts['csv']}")
    print(texts[arguments.format], end="")


def _refuse_short(names: Sequence[str], arguments: argparse.Namespace) -> None:
    if names:
        raise ComputationError(
            f"eigenvalues of {', '.join(names)} did not converge in {arguments.max_products} products; "
            "raise --max-products or --tol"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not available here ({str(error).splitlines()[0]}); use cpu") from error
    return device


def _progress(products: int, running: int) -> None:
    if sys.stderr.isatty():
        shown = f"{products} products, {running} spectra running" if running else ""
        print(f"\r\033[K{shown}", end="", file=sys.stderr, flush=True)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _density_rows(densities: Mapping[str, Density]) -> list[dict[str, Any]]:
    return [
        {"loss of": name, "eigenvalue": float(x), "density": float(y), "standard_error": float(e)}
        for name, density in densities.items()
        for x, y, e in zip(density.grid, density.density, density.standard_error, strict=True)
    ]


def _spectrum_table(rows: Sequence[Mapping[str, Any]], k: int) -> str:
    head = ["loss of", "trace", *(f"lambda_{j + 1}" for j in range(k)), "lambda_min"]
    lines = []
    for row in rows:
        ends = [*range(1, k + 1), "min"]
        intervals = [f"{row[f'lambda_{j}']:.5g} [{row[f'lower_{j}']:.5g}, {row[f'upper_{j}']:.5g}]" for j in ends]
        lines.append([row["loss of"], f"{row['trace']:.4g} ± {row['trace_error']:.1g}", *intervals])
    return audits.aligned(lines, head) + "\n"


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
