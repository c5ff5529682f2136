"""What the verbs that take a checkpoint do: load, measure, print, write. Each returns the exit code."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disam_theory import architectures, audit_report, checkpoints, images, progress
from disam_theory import audit as audits
from disam_theory.archives import load_data
from disam_theory.audit_measures import fitting_outputs
from disam_theory.delivery import deliver, device_of, name_corrupt, printed_anyway, put, short_paths
from disam_theory.dependence import require_dependence, require_gradients
from disam_theory.domains import Domain, Suite, fingerprint
from disam_theory.errors import ComputationError, UsageError
from disam_theory.files import csv_text, write_atomically
from disam_theory.landscape import eigen_direction, random_direction, slice_1d, slice_2d
from disam_theory.losses import DomainLosses, Params, layers, model_losses, parameters_of, restrict
from disam_theory.memory import MicroBatch
from disam_theory.operators import Curvature, fitting_chunk, hessian
from disam_theory.progress import Through, silently
from disam_theory.provenance import one_line, provenance, sha256
from disam_theory.ranks import Ranks, launched
from disam_theory.resume import Kept
from disam_theory.spectrum import Eigenpairs, bottom_eigenpairs, domain_spectra, top_eigenpairs
from disam_theory.stochastic import Density, Estimate, spectral_density, trace


def audit(arguments: argparse.Namespace) -> int:
    """``disam-theory audit``: see :mod:`disam_theory.audit` and, for what is written, ``audit_report``."""
    paths = dict(zip(_labels(arguments.checkpoint), arguments.checkpoint, strict=True))
    arguments.unseen = [images.domain_name(name, arguments.dataset) for name in arguments.unseen]
    with launched(arguments.device) as (ranks, device_name):
        device = device_of(device_name)
        alone = {label: argparse.Namespace(**{**vars(arguments), "checkpoint": path}) for label, path in paths.items()}
        line = progress.Line()
        through = silently if ranks.rank else line.through
        models, suite = _load(alone, through)  # all of them, before any is measured
        name_corrupt(suite.corrupt if ranks.rank == 0 else ())
        record = _record(next(iter(alone.values())), suite, device, ranks)
        record |= {"checkpoint": [str(path) for path in paths.values()]}
        record |= {"checkpoint_sha256": [sha256(path) for path in paths.values()]}
        with _kept(arguments, record, suite, ranks) as kept:
            found = _audits(models, suite, kept, arguments, device, ranks, line)
            record |= {"chunk": [each.about["chunk"] for each in found.values()]}
            if ranks.rank:
                return 0  # the first process says what all have found
            _deliver_audits(found, arguments, record)
    short = [(label, row.name) for label, each in found.items() for row in each.rows if not row.converged]
    _refuse_short([name if len(found) == 1 else f"{name} ({label})" for label, name in short], arguments)
    return 0


def _deliver_audits(found: Mapping[str, audits.Audit], arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Every format that is asked for; the page and LaTeX go to the folder only."""
    as_text = {"json": audit_report.as_json(found, record), "csv": audit_report.as_csv(found)}
    texts = {**as_text, "table": audit_report.as_table(found)}
    with printed_anyway(texts[arguments.format]):
        if arguments.out:
            write_atomically(arguments.out / "audit.html", audit_report.as_html(found, record))
            write_atomically(arguments.out / "audit.tex", audit_report.as_latex(found, record))
            if len(found) > 1:
                lines = f"# {one_line(record)}\n{audit_report.differences_csv(found)}"
                write_atomically(arguments.out / "differences.csv", lines)
    deliver(arguments, texts, record)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The files' names, with their folders where names repeat."""
    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):
        labels = short_paths([str(path) for path in paths])
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"{label} is given twice; name each checkpoint once")
    return labels


def _audits(
    models: Mapping[str, nn.Module],
    suite: Suite,
    kept: Kept,
    arguments: argparse.Namespace,
    device: torch.device,
    ranks: Ranks,
    line: progress.Line,
) -> dict[str, audits.Audit]:
    """Each checkpoint's audit: as it was kept, or gone on with, or from the start."""
    names = [entry.name for entry in dataclasses.fields(audits.Settings)]
    settings = audits.Settings(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
    todo = [label for label in models if label not in kept.rows]
    parts, micro_batch = progress.Parts(len(todo)), _micro_batch(arguments.chunk, suite, ranks)
    spoken: dict[str, Any] = {"progress": lambda what: _eigenvalues(line, what, arguments), "through": line.through}

    def place(label: str, number: int) -> str:
        return f"{label} ({number} of {len(todo)}{parts}): " if len(todo) > 1 else f"{label}: "

    def audited(label: str, chunk: int) -> audits.Audit:
        with kept.going_on(f"{label}/") as start:
            return audits.audit(
                models[label],
                suite.domains,
                dataclasses.replace(settings, chunk=chunk),
                unseen=arguments.unseen,
                dtype=getattr(torch, arguments.dtype),
                device=device,
                ranks=ranks,
                start=start,
                **({} if ranks.rank else spoken),
            )

    for number, label in enumerate(todo, 1):
        line.heading = functools.partial(place, label, number)
        found = micro_batch.run(functools.partial(audited, label))
        kept.rows[label] = found.to_plain()
        kept.vectors |= {f"{label}/{name}": values for name, values in found.draws.items()}
        parts.finished()
    return {label: audits.Audit.from_plain(kept.rows[label], kept.under(f"{label}/")) for label in models}


def spectrum(arguments: argparse.Namespace) -> int:
    """``disam-theory spectrum``: both ends, trace and density of each domain's curvature and of the pooled one."""
    model, suite, data, device = _subject(arguments)
    require_gradients(model, data[0].inputs[:1], arguments.parameters or ["*"])
    record = _record(arguments, suite, device, Ranks())
    chunk = fitting_chunk(model, data, arguments.chunk)
    micro_batch = _micro_batch(chunk, suite, Ranks())
    with _kept(arguments, record, suite, Ranks()) as kept:
        found = micro_batch.run(lambda chunk: _all_spectra(*_losses(model, data, chunk), kept, arguments))
        record |= {"chunk": micro_batch.chunk}
        _deliver_spectra(found, arguments, record)
    _refuse_short([row["loss of"] for row, _ in found if not row["converged"]], arguments)
    return 0


Spectrum = tuple[dict[str, Any], list[dict[str, Any]]]  # the row of a loss, and its density


def _deliver_spectra(found: Sequence[Spectrum], arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    rows = [row for row, _ in found]
    table = _spectrum_table(rows, arguments.k)
    document = json.dumps({"schema": "disam-spectrum/1", "provenance": record, "rows": rows}, indent=1) + "\n"
    if arguments.density:
        lines = [line for _, density in found for line in density]
        write_atomically(arguments.out / "density.csv", f"# {one_line(record)}\n{csv_text(lines)}")
    deliver(arguments, {"json": document, "csv": csv_text(rows), "table": table}, record)


def _all_spectra(losses: DomainLosses, params: Params, kept: Kept, arguments: argparse.Namespace) -> list[Spectrum]:
    """Of each layer, or of all that was chosen: the spectra of each domain and of the pooled data."""
    if arguments.parameters:
        losses, params = restrict(losses, params, *arguments.parameters)
    groups = layers(params) if arguments.per_layer else {"": list(params)}
    line, parts = progress.Line(), progress.Parts(len(groups))
    found = []
    for number, (layer, names) in enumerate(groups.items(), 1):
        curvature = Curvature(*restrict(losses, params, *names), kind=arguments.kind)
        label = f"layer {layer} ({number} of {len(groups)}{parts}): " if arguments.per_layer else ""
        named = {"layer": layer} if arguments.per_layer else {}
        for row, density in _spectra(curvature, f"{layer}/", kept, arguments, line, label):
            found.append(({**named, **row}, [{**named, **point} for point in density]))
        parts.finished()
    return found


def _spectra(
    curvature: Curvature, prefix: str, kept: Kept, arguments: argparse.Namespace, line: progress.Line, label: str
) -> Iterator[Spectrum]:
    """The row and the density of each domain, then of the pooled data; ``prefix`` tells what is kept apart."""
    losses = curvature.losses
    options = {"tol": arguments.tol, "max_products": arguments.max_products, "rng": arguments.rng}
    weights = {**dict(zip(losses.names, torch.eye(losses.M), strict=True)), "pooled": losses.shares}
    todo = [name for name in weights if prefix + name not in kept.rows]
    k = min(arguments.k, curvature.size)
    if todo:
        with kept.going_on(prefix) as start:
            shown = _eigenvalues(line, f"{label}eigenvalues", arguments)
            tops = domain_spectra(curvature, k, start=start, progress=shown, **options)
        kept.vectors |= {prefix + name: pairs.vectors for name, pairs in tops.items()}
    parts = progress.Parts(len(todo))
    for name, row in weights.items():
        if name in todo:
            line.show(f"{label}other end and trace of {name}{parts}")
            operator = curvature.operator(row)
            bottom = bottom_eigenpairs(operator, 1, **options)
            total = trace(operator, samples=arguments.samples, rng=arguments.rng)
            density = spectral_density(operator, rng=arguments.rng) if arguments.density else None
            kept.rows[prefix + name] = (_row(name, tops[name], bottom, total), _density_rows(name, density))
            parts.finished()
        yield kept.rows[prefix + name]


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
    model, suite, data, device = _subject(arguments)
    if arguments.direction == "eigen":
        require_gradients(model, data[0].inputs[:1])
    record = _record(arguments, suite, device, Ranks())
    chunk = fitting_chunk(model, data, arguments.chunk)
    micro_batch = _micro_batch(chunk, suite, Ranks())
    with _kept(arguments, record, suite, Ranks()) as kept:
        rows = micro_batch.run(lambda chunk: _lines(*_losses(model, data, chunk), kept, arguments))
        record |= {"chunk": micro_batch.chunk}
        document = json.dumps({"schema": "disam-landscape/1", "provenance": record, "rows": rows}) + "\n"
        table = audits.aligned([[_short(value) for value in row.values()] for row in rows], list(rows[0])) + "\n"
        deliver(arguments, {"json": document, "csv": csv_text(rows), "table": table}, record)
    return 0


def _lines(losses: DomainLosses, params: Params, kept: Kept, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The losses at all points, those of a line that was kept as they were."""
    at = torch.linspace(-arguments.span, arguments.span, arguments.points, dtype=torch.float64)
    heights = at.tolist() if arguments.dimensions == 2 else [0.0]
    directions = _directions(arguments, losses, params, kept)
    todo = [j for j in range(len(heights)) if str(j) not in kept.rows]
    line, parts = progress.Line(), progress.Parts(len(todo))
    for j in todo:
        line.show(f"line {j + 1} of {len(heights)}{parts}")
        kept.rows[str(j)] = _line(losses, params, directions, at, heights[j])
        parts.finished()
    return [row for j in range(len(heights)) for row in kept.rows[str(j)]]


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


def convert(arguments: argparse.Namespace) -> int:
    """``disam-theory convert``: the weights of a checkpoint as safetensors, with where they come from."""
    source, out = arguments.checkpoint, arguments.out
    with contextlib.suppress(OSError):  # what cannot be looked at is told where it is read or written
        if out.samefile(source):
            raise UsageError(f"--out is the checkpoint {source} itself; give another name")
    checkpoint = checkpoints.read(source, averaged=arguments.ema)
    state, architecture = checkpoint.state, arguments.model or checkpoint.architecture
    if arguments.model:  # the names become the model's
        state = architectures.model_of(checkpoint, architecture, None, str(source)).state_dict()
    about = {
        "format": checkpoint.format,
        "architecture": architecture,
        "classes": checkpoint.classes,
        "source": source.name,
        "source_sha256": sha256(source),
        "left": list(checkpoint.left),
        "said": dict(checkpoint.told),
        "provenance": provenance(),
    }
    checkpoints.write(out, state, {name: value for name, value in about.items() if value is not None})
    shown = {name: about[name] for name in ("format", "architecture", "classes", "source_sha256")}
    shown |= {"tensors": len(state), "numbers": sum(value.numel() for value in state.values())}
    shown |= {"left out": ", ".join(checkpoint.left) or "nothing", "written": out, "sha256": sha256(out)}
    put("".join(f"{name:<14}{'not said' if value is None else value}\n" for name, value in shown.items()))
    return 0


def _directions(arguments: argparse.Namespace, losses: DomainLosses, params: Params, kept: Kept) -> list[Params]:
    if arguments.direction == "filter":
        return [random_direction(params, rng=arguments.rng + j) for j in range(arguments.dimensions)]
    if "directions" not in kept.vectors:
        pooled = hessian(losses, params, weights=losses.shares)
        kept.vectors["directions"] = top_eigenpairs(pooled, arguments.dimensions, rng=arguments.rng).vectors
    return [eigen_direction(vector, params) for vector in kept.vectors["directions"].T]


def _load(alone: Mapping[str, argparse.Namespace], through: Through) -> tuple[dict[str, nn.Module], Suite]:
    """The model of each checkpoint, and the data, which are read once; all arguments but the checkpoint are alike."""
    read = {label: checkpoints.read(each.checkpoint) for label, each in alone.items()}
    for label, each in alone.items():
        # also for the record and for what is kept, where the file says it and the user does not
        each.model = architectures.resolve(read[label], each.model, str(each.checkpoint))
    first = next(iter(alone.values()))
    names = [entry.name for entry in dataclasses.fields(images.Reading)]
    given = {name: getattr(first, name) for name in names if hasattr(first, name)}
    reading = images.Reading(**given | {"unseen": tuple(given.get("unseen", ()))})
    suite = load_data(first.data, rng=first.rng, reading=reading, through=through)
    size = images.side_of(suite.domains[0].inputs.shape[1:])
    models = {
        label: architectures.model_of(read[label], each.model, suite.classes, str(each.checkpoint), image_size=size)
        for label, each in alone.items()
    }
    return models, suite


def _subject(arguments: argparse.Namespace) -> tuple[nn.Module, Suite, list[Domain], torch.device]:
    """The model and the domains, both in the type and on the device that were asked for."""
    device, dtype = device_of(arguments.device), getattr(torch, arguments.dtype)
    models, suite = _load({"": arguments}, progress.Line().through)
    name_corrupt(suite.corrupt)
    data = [domain.to(device=device, dtype=dtype) for domain in suite.domains]
    model = models[""].to(device, dtype).eval()
    for domain in data:
        _require_fit(model, domain)
    return model, suite, data, device


@torch.no_grad()
def _require_fit(model: nn.Module, domain: Domain) -> None:
    """Find a model that does not fit the data out by one sample, that of the highest label."""
    at = int(domain.labels.argmax())
    sample = domain.inputs[at : at + 1], domain.labels[at : at + 1]
    MicroBatch(1, 1, lambda before, after: None).run(lambda _: fitting_outputs(model, domain.name, *sample))
    require_dependence(model, sample[0])


def _losses(model: nn.Module, data: Sequence[Domain], chunk: int) -> tuple[DomainLosses, Params]:
    losses, params = model_losses(model, data, chunk=chunk), parameters_of(model)
    losses.checked(params)
    return losses, params


def _micro_batch(chunk: int, suite: Suite, ranks: Ranks) -> MicroBatch:
    """Processes that share the data would have to halve together, so that they do not."""

    def halved(before: int, after: int) -> None:
        said = f"micro-batches of {before} samples do not fit into the memory"
        if ranks.world > 1:
            raise ComputationError(f"{said} of process {ranks.rank}; give a smaller --chunk")
        progress.say(f"{said}; going on with {after}")

    return MicroBatch(chunk, max(map(len, suite.domains)), halved)


def _kept(arguments: argparse.Namespace, record: Mapping[str, Any], suite: Suite, ranks: Ranks) -> Kept:
    """What an interrupted run of the same command on the same data has left; of several processes the first writes."""
    chosen = {name: value for name, value in vars(arguments).items() if name not in ("out", "format", "device")}
    key = {**chosen, "checkpoint_sha256": record["checkpoint_sha256"], "version": record["disam_theory"]}
    if arguments.out:  # else nothing is kept, and hashing a gigabyte takes about a second
        key |= {"samples": fingerprint(suite.domains), "drawn_from": [domain.drawn_from for domain in suite.domains]}
    return Kept(arguments.out, arguments.verb, key, writes=ranks.rank == 0)


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
        corrupt=len(suite.corrupt),
    )


def _refuse_short(names: Sequence[str], arguments: argparse.Namespace) -> None:
    if names:
        raise ComputationError(
            f"eigenvalues of {', '.join(names)} did not converge in {arguments.max_products} products each; "
            "raise --max-products or --tol"
        )


def _eigenvalues(line: progress.Line, what: str, arguments: argparse.Namespace) -> progress.Spectra:
    return progress.Spectra(line, f"{what}: ", arguments.tol, arguments.max_products)


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


def _interval(row: Mapping[str, Any], end: int | str) -> str:
    return f"{row[f'lambda_{end}']:.5g} [{row[f'lower_{end}']:.5g}, {row[f'upper_{end}']:.5g}]"


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
