"""What the verbs of the command line do: load, measure, print, write. Each returns the exit code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disam_theory import audit as audits
from disam_theory import convergence
from disam_theory.checkpoints import fill, load_model, load_state_dict
from disam_theory.domains import Suite, load_suite
from disam_theory.errors import ComputationError, UsageError
from disam_theory.files import csv_text, write_atomically
from disam_theory.landscape import eigen_direction, random_direction, slice_1d, slice_2d
from disam_theory.losses import DomainLosses, Params, layers, model_losses, parameters_of, restrict
from disam_theory.operators import Curvature, hessian
from disam_theory.provenance import one_line, provenance, sha256
from disam_theory.ranks import Ranks, launched
from disam_theory.resume import Kept
from disam_theory.spectrum import Eigenpairs, InterruptedSpectra, bottom_eigenpairs, domain_spectra, top_eigenpairs
from disam_theory.stochastic import Density, Estimate, spectral_density, trace
from disam_theory.traces import read_trace


def audit(arguments: argparse.Namespace) -> int:
    """``disam-theory audit``: see :mod:`disam_theory.audit`."""
    _check(arguments, "k", "chunk", "image_size")
    with launched(arguments.device) as (ranks, device_name):
        device = _device(device_name)
        model, suite = _load(arguments)
        record = _record(arguments, suite, device, ranks)
        with _kept(arguments, record, ranks) as kept:
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
                start=kept.vectors,
                progress=_progress if ranks.rank == 0 else lambda products, running, error: None,
            )
    if ranks.rank:
        return 0  # the first process says what all have found
    texts = {
        "json": audits.as_json(rows, record) + "\n",
        "csv": audits.as_csv(rows),
        "table": audits.as_table(rows) + "\n",
    }
    _deliver(arguments, texts, record)
    _refuse_short([row.name for row in rows if not row.converged], arguments)
    return 0


def spectrum(arguments: argparse.Namespace) -> int:
    """``disam-theory spectrum``: both ends, trace and density of each domain's curvature and of the pooled one."""
    _check(arguments, "k", "chunk", "image_size", "samples")
    if arguments.density and not arguments.out:
        raise UsageError("--density writes a file; give --out DIR")
    suite, device, losses, params = _losses(arguments)
    if arguments.parameters:
        losses, params = restrict(losses, params, *arguments.parameters)
    groups = layers(params) if arguments.per_layer else {"": list(params)}
    record = _record(arguments, suite, device, Ranks())
    rows, densities = [], []
    with _kept(arguments, record, Ranks()) as kept:
        for layer, names in groups.items():
            of_layer = Curvature(*restrict(losses, params, *names), kind=arguments.kind)
            label = {"layer": layer} if arguments.per_layer else {}
            for row, density in _spectra(of_layer, f"{layer}/", kept, arguments):
                rows.append({**label, **row})
                densities += [{**label, **line} for line in density]
    table = _spectrum_table(rows, arguments.k)
    document = json.dumps({"schema": "disam-spectrum/1", "provenance": record, "rows": rows}, indent=1) + "\n"
    _deliver(arguments, {"json": document, "csv": csv_text(rows), "table": table}, record)
    if arguments.density:
        write_atomically(arguments.out / "density.csv", f"# {one_line(record)}\n{csv_text(densities)}")
    _refuse_short([row["loss of"] for row in rows if not row["converged"]], arguments)
    return 0


def _spectra(
    curvature: Curvature, prefix: str, kept: Kept, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The row and the density of each domain, then of the pooled data; ``prefix`` tells what is kept apart."""
    losses = curvature.losses
    options = {"tol": arguments.tol, "max_products": arguments.max_products, "rng": arguments.rng}
    weights = {**dict(zip(losses.names, torch.eye(losses.M), strict=True)), "pooled": losses.shares}
    if any(prefix + name not in kept.rows for name in weights):
        tops = _resumed(curvature, prefix, kept, arguments, options)
    for name, row in weights.items():
        if prefix + name not in kept.rows:
            operator = curvature.operator(row)
            bottom = bottom_eigenpairs(operator, 1, **options)
            total = trace(operator, samples=arguments.samples, rng=arguments.rng)
            density = spectral_density(operator, rng=arguments.rng) if arguments.density else None
            kept.rows[prefix + name] = (_row(name, tops[name], bottom, total), _density_rows(name, density))
        yield kept.rows[prefix + name]


def _resumed(
    curvature: Curvature, prefix: str, kept: Kept, arguments: argparse.Namespace, options: Mapping[str, Any]
) -> dict[str, Eigenpairs]:
    """The top eigenpairs, started from the vectors that were kept."""
    start = {name.removeprefix(prefix): v for name, v in kept.vectors.items() if name.startswith(prefix)}
    try:
        tops = domain_spectra(curvature, min(arguments.k, curvature.size), start=start, progress=_progress, **options)
    except InterruptedSpectra as stop:
        raise InterruptedSpectra({prefix + name: vectors for name, vectors in stop.vectors.items()}) from stop
    kept.vectors |= {prefix + name: pairs.vectors for name, pairs in tops.items()}
    return tops


def _row(name: str, top: Eigenpairs, bottom: Eigenpairs, total: Estimate) -> dict[str, Any]:
    row: dict[str, Any] = {"loss of": name, "trace": total.value, "trace_error": total.standard_error}
    for pairs, ends in ((top, range(1, len(top.values) + 1)), (bottom, ("min",))):
        for j, end in enumerate(ends):
            row |= {f"lambda_{end}": float(pairs.values[j]), f"residual_{end}": float(pairs.residuals[j])}
            row |= {f"lower_{end}": float(pairs.lower[j]), f"upper_{end}": float(pairs.upper[j])}
    return {
        **row,
        "converged": top.converged and bottom.converged,
        "products": top.products + bottom.products + total.products,
    }


def landscape(arguments: argparse.Namespace) -> int:
    """``disam-theory landscape``: the domains' losses on a line or a plane through the checkpoint."""
    _check(arguments, "chunk", "image_size", "points")
    if not 0 < arguments.span < float("inf"):
        raise UsageError(f"span is {arguments.span}; it must be finite and above 0")
    suite, device, losses, params = _losses(arguments)
    directions = _directions(arguments, losses, params)
    at = torch.linspace(-arguments.span, arguments.span, arguments.points, dtype=torch.float64)
    record = _record(arguments, suite, device, Ranks())
    with _kept(arguments, record, Ranks()) as kept:
        lines = at.tolist() if arguments.dimensions == 2 else [0.0]
        for j, b in enumerate(lines):
            if str(j) not in kept.rows:
                kept.rows[str(j)] = _line(losses, params, directions, at, b)
            _say(f"line {j + 1} of {len(lines)}")
        rows = [row for j in range(len(lines)) for row in kept.rows[str(j)]]
    document = json.dumps({"schema": "disam-landscape/1", "provenance": record, "rows": rows}) + "\n"
    table = audits.aligned([[_short(value) for value in row.values()] for row in rows], list(rows[0])) + "\n"
    _deliver(arguments, {"json": document, "csv": csv_text(rows), "table": table}, record)
    return 0


def _line(
    losses: DomainLosses, params: Params, directions: list[Params], at: torch.Tensor, b: float
) -> list[dict[str, float]]:
    """The losses at the points of a line, on a plane the line at height ``b`` of the second direction."""
    columns = (*losses.names, "pooled")
    if len(directions) == 1:
        line = slice_1d(losses, params, directions[0], at=at)
        return [{"a": a, **{n: float(line.column(n)[i]) for n in columns}} for i, a in enumerate(at.tolist())]
    plane = slice_2d(losses, params, (directions[0], directions[1]), x=at, y=torch.tensor([b], dtype=at.dtype))
    return [{"a": a, "b": b, **{n: float(plane.column(n)[0, i]) for n in columns}} for i, a in enumerate(at.tolist())]


def rate(arguments: argparse.Namespace) -> int:
    """``disam-theory rate``: how far the convergence theory holds along recorded traces, and how fast they converge."""
    all_found = {str(path): _convergence(path, arguments) for path in arguments.traces}
    record = provenance(traces={path: sha256(Path(path)) for path in all_found}, **_constants(arguments))
    rows = [{"trace": path, **convergence.row(found)} for path, found in all_found.items()]
    needs = {name: inequality.columns for name, inequality in convergence.INEQUALITIES.items()} | convergence.MEASURES
    document = {"schema": "disam-rate/1", "provenance": record, "columns_needed": needs, "rows": rows}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    _deliver(arguments, {"json": text, "csv": csv_text(rows), "table": _rate_table(all_found)}, record)
    if arguments.out:
        series = {path: convergence.points(found) for path, found in all_found.items()}
        lines = [{"trace": path, **line} for path, rows in series.items() for line in rows]
        write_atomically(arguments.out / "series.csv", f"# {one_line(record)}\n{csv_text(lines)}")
        _rate_pictures(series, arguments.out, record)
    return 0


def _convergence(path: Path, arguments: argparse.Namespace) -> convergence.Convergence:
    try:
        recorded = read_trace(path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: a line of it is not as a trace has it ({said}); record it anew") from error
    try:
        return convergence.analyse(recorded, **_constants(arguments))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _constants(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("smoothness", "gradient_bound", "minimum")}


def _rate_pictures(series: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, record: Mapping[str, Any]) -> None:
    """``rate.pdf`` and ``rate.png``, a column a trace; matplotlib is no dependency of this package."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("disam-theory: no picture, as matplotlib is not installed; series.csv has its numbers", file=sys.stderr)
        return
    figure = Figure(figsize=(1.0 + 2.6 * len(series), 5.0), layout="constrained")
    titles = (name.replace("/", "/\n") for name in _short_paths(series))
    convergence.draw(figure, dict(zip(titles, series.values(), strict=True)))
    undated = {"pdf": {"Subject": one_line(record), "CreationDate": None}, "png": {"Description": one_line(record)}}
    for kind, metadata in undated.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=200)
        write_atomically(folder / f"rate.{kind}", buffer.getvalue())


def _directions(arguments: argparse.Namespace, losses: Any, params: Params) -> list[Params]:
    if arguments.direction == "filter":
        return [random_direction(params, rng=arguments.rng + j) for j in range(arguments.dimensions)]
    pairs = top_eigenpairs(hessian(losses, params, weights=losses.shares), arguments.dimensions, rng=arguments.rng)
    return [eigen_direction(vector, params) for vector in pairs.vectors.T]


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, Suite]:
    state = load_state_dict(arguments.checkpoint)
    model = fill(load_model(arguments.model), state, str(arguments.checkpoint))
    return model, load_suite(arguments.data, rng=arguments.rng, image_size=arguments.image_size)


def _losses(arguments: argparse.Namespace) -> tuple[Suite, torch.device, DomainLosses, Params]:
    device, dtype = _device(arguments.device), getattr(torch, arguments.dtype)
    model, suite = _load(arguments)
    private = model.to(device, dtype).eval()
    data = [domain.to(device=device, dtype=dtype) for domain in suite.domains]
    losses, params = model_losses(private, data, chunk=arguments.chunk), parameters_of(private)
    losses.checked(params)
    return suite, device, losses, params


def _kept(arguments: argparse.Namespace, record: Mapping[str, Any], ranks: Ranks) -> Kept:
    """What an interrupted run of the same command has left; of several processes the first one writes it."""
    chosen = {name: value for name, value in vars(arguments).items() if name not in ("out", "format", "device")}
    key = {**chosen, "checkpoint_sha256": record["checkpoint_sha256"], "version": record["disam_theory"]}
    return Kept(arguments.out, arguments.verb, key, writes=ranks.rank == 0)


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


def _deliver(arguments: argparse.Namespace, texts: Mapping[str, str], record: dict[str, Any]) -> None:
    """Write ``VERB.json`` and ``VERB.csv`` where asked for, and print what was asked for."""
    name = arguments.verb
    _say("")
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


def _progress(products: int, running: int, error: float) -> None:
    _say(f"{products} products; {running} spectra running, relative residual {error:.1e}")


def _say(what: str) -> None:
    """Show a passing line on a terminal; an empty one wipes it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _density_rows(name: str, density: Density | None) -> list[dict[str, Any]]:
    if density is None:
        return []
    columns = (density.grid, density.density, density.standard_error)
    return [
        {"loss of": name, "eigenvalue": x, "density": y, "standard_error": e}
        for x, y, e in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _spectrum_table(rows: Sequence[Mapping[str, Any]], k: int) -> str:
    ends = [*range(1, k + 1), "min"]
    labels = [name for name in ("layer", "loss of") if name in rows[0]]
    lines = [
        [
            *(row[label] for label in labels),
            f"{row['trace']:.4g} ± {row['trace_error']:.1g}",
            *(_interval(row, j) if f"lambda_{j}" in row else "" for j in ends),
            "" if row["converged"] else "! not converged",
        ]
        for row in rows
    ]
    return audits.aligned(lines, [*labels, "trace", *(f"lambda_{j}" for j in ends), ""]) + "\n"


RATE_LEGEND = """\
(17), (18) and Thm 1 are as the paper prints them, with Gamma = L; one step, sum and average are of the corrected
theorem. A number after the colon is the first step (from 0), or number T of steps, at which the left side exceeds the
right. L >= is an estimate, a lower bound: what holds with it holds with the true L. cross/main is the median of the
dropped cross term over eta |grad L(w_asc)|^2; a rate is a in |grad L|^2 ~ T^-a with its 95 % interval. A dash is what
cannot be had from the trace."""


def _rate_table(all_found: Mapping[str, convergence.Convergence]) -> str:
    """A line a trace; below it what the words mean, and for what cannot be had or does not hold, why."""
    lines, notes = [], dict[str, list[str]]()
    for name, found in zip(_short_paths(all_found), all_found.values(), strict=True):
        values = convergence.row(found)
        sign = ">= " if found.smoothness_is == "estimated" and values["smoothness"] is not None else ""
        numbers = [_number(values[key]) for key in ("smoothness", "gamma_max", "cross_over_main_median", "beta_min")]
        verdicts = [_verdict(finding) for finding in found.findings.values()]
        lines.append(
            [name, str(found.steps), sign + numbers[0], *verdicts, *numbers[1:], *map(_fitted, found.rates.values())]
        )
        for note in _rate_notes(found):
            notes.setdefault(note, []).append(name)
    titles = [inequality.title for inequality in convergence.INEQUALITIES.values()]
    head = ["trace", "steps", "L", *titles, "max Gamma", "cross/main", "min beta", "rate at w", "rate at w_asc"]
    below = [
        f"- {note}" + ("" if len(names) == len(all_found) else f" [{', '.join(names)}]")
        for note, names in notes.items()
    ]
    return "\n".join([audits.aligned(lines, head), "", RATE_LEGEND, *below]) + "\n"


def _rate_notes(found: convergence.Convergence) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for name, finding in found.findings.items():
        if finding.verdict != convergence.HOLDS:
            said = f"{finding.verdict}: {finding.why}"
            by_reason.setdefault(said, []).append(convergence.INEQUALITIES[name].title)
    yield from (f"{', '.join(titles)} {said}" for said, titles in by_reason.items())
    if found.step_sizes_above:
        yield f"eta > 1/L at {found.step_sizes_above} steps: there the corrected theorem bounds no gradient at w_asc"
    for where, rate in found.rates.items():
        if rate.why:
            yield f"rate at {where.removeprefix('at_').replace('ascent', 'w_asc')} {convergence.ABSENT}: {rate.why}"


def _verdict(finding: convergence.Finding) -> str:
    if finding.verdict == convergence.ABSENT:
        return "-"
    return finding.verdict if finding.first is None else f"{finding.verdict}: {finding.first}"


def _fitted(rate: convergence.Rate) -> str:
    return "-" if rate.why else f"{rate.exponent:.2f} [{rate.low:.2f}, {rate.high:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _short_paths(paths: Iterable[str]) -> list[str]:
    """The paths without the folders that all share, but with one folder at least."""
    names = [Path(path).absolute() for path in paths]
    shared = Path(os.path.commonpath([name.parent.parent for name in names]))
    return [str(name.relative_to(shared)) for name in names]


def _interval(row: Mapping[str, Any], end: int | str) -> str:
    return f"{row[f'lambda_{end}']:.5g} [{row[f'lower_{end}']:.5g}, {row[f'upper_{end}']:.5g}]"


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
