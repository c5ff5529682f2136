"""What the verbs of the command line do: load, measure, print, write. Each returns the exit code."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disam_theory import architectures, audit_report, backbones, checkpoints, convergence, images, progress, single_run
from disam_theory import audit as audits
from disam_theory.algorithms import Settings
from disam_theory.archives import load_data
from disam_theory.audit_measures import fitting_outputs
from disam_theory.dependence import require_dependence, require_gradients
from disam_theory.domains import SUITES, Domain, Split, Suite
from disam_theory.errors import ComputationError, DisamError, UsageError, first_line
from disam_theory.files import csv_text, write_atomically
from disam_theory.imported import Imported, read_imported
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
from disam_theory.traces import read_trace


def audit(arguments: argparse.Namespace) -> int:
    """``disam-theory audit``: see :mod:`disam_theory.audit` and, for what is written, ``audit_report``."""
    paths = dict(zip(_labels(arguments.checkpoint), arguments.checkpoint, strict=True))
    arguments.unseen = [images.domain_name(name, arguments.dataset) for name in arguments.unseen]
    with launched(arguments.device) as (ranks, device_name):
        device = _device(device_name)
        alone = {label: argparse.Namespace(**{**vars(arguments), "checkpoint": path}) for label, path in paths.items()}
        line = progress.Line()
        through = silently if ranks.rank else line.through
        models, suite = _load(alone, through)  # all of them, before any is measured
        _name_corrupt(suite.corrupt if ranks.rank == 0 else ())
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
    with _printed_anyway(texts[arguments.format]):
        if arguments.out:
            write_atomically(arguments.out / "audit.html", audit_report.as_html(found, record))
            write_atomically(arguments.out / "audit.tex", audit_report.as_latex(found, record))
            if len(found) > 1:
                lines = f"# {one_line(record)}\n{audit_report.differences_csv(found)}"
                write_atomically(arguments.out / "differences.csv", lines)
    _deliver(arguments, texts, record)


@contextlib.contextmanager
def _printed_anyway(text: str) -> Iterator[None]:
    """What was asked for is printed also where a folder cannot take it, or it would be lost."""
    try:
        yield
    except DisamError:
        progress.wipe()
        _print(text)
        raise


def _labels(paths: Sequence[Path]) -> list[str]:
    """The files' names, with their folders where names repeat."""
    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):
        labels = _short_paths([str(path) for path in paths])
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
    _deliver(arguments, {"json": document, "csv": csv_text(rows), "table": table}, record)


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
        _deliver(arguments, {"json": document, "csv": csv_text(rows), "table": table}, record)
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


def train(arguments: argparse.Namespace) -> int:
    """``disam-theory train``: one run; see :mod:`disam_theory.single_run`."""
    device = _device(arguments.device)
    settings, options = _train_settings(arguments), _train_options(arguments)
    if settings.objective == "fishr" and arguments.dropout:
        raise UsageError("fishr's gradients are those of a head without dropout before it; leave --dropout away")
    split, classes = _train_split(arguments)
    model = backbones.build(
        arguments.model,
        classes,
        image_size=_side(split.unseen.inputs.shape[1:]) if isinstance(split, Split) else arguments.image_size,
        weights=arguments.weights,
        pretrained=arguments.pretrained,
        dropout=arguments.dropout,
        rng=arguments.rng,
    )
    seen = images.evaluation_transform(arguments.image_size)
    augmented = isinstance(split, images.ImageSplit) and arguments.augment == "domainbed"
    outcome = single_run.train(
        model,
        split,
        settings,
        options,
        arguments.out,
        classes=classes,
        named=_train_names(arguments, split),
        transforms=(images.training_transform(arguments.image_size) if augmented else seen, seen),
        progress=_train_progress(settings.steps),
    )
    record = provenance(rng=arguments.rng, device=str(device), dtype="float32", corrupt=len(outcome.corrupt))
    _deliver(arguments, _train_texts(outcome, record, [domain.name for domain in split.sources]), record)
    _name_corrupt(outcome.corrupt)
    return 0


def _train_settings(arguments: argparse.Namespace) -> Settings:
    """Those given; momentum, SGD's alone, is 0.9 unless given."""
    names = [entry.name for entry in dataclasses.fields(Settings) if entry.name != "ascent_gradient"]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    given.setdefault("momentum", 0.9 if arguments.optimizer == "sgd" else 0.0)
    return Settings(**given, ascent_gradient="weights")


def _train_options(arguments: argparse.Namespace) -> single_run.Options:
    names = [entry.name for entry in dataclasses.fields(single_run.Options)]
    others = {"seed": arguments.rng, "mode": arguments.sam_mode, "train_losses": not arguments.no_train_losses}
    return single_run.Options(**{name: getattr(arguments, name) for name in names if name not in others}, **others)


def _train_split(arguments: argparse.Namespace) -> tuple[Split | images.ImageSplit, int]:
    """The data with one domain held out, and the number of classes."""
    if arguments.data in SUITES or not Path(arguments.data).is_dir():
        suite = load_data(arguments.data, rng=arguments.rng, reading=images.Reading(dataset=arguments.dataset))
        return suite.split(arguments.test_domain, validation=arguments.validation, rng=arguments.rng), suite.classes
    split = images.image_split(
        Path(arguments.data),
        arguments.test_domain,
        dataset=arguments.dataset,
        lists={"auto": None, "official": True, "random": False}[arguments.splits],
        validation=arguments.validation,
        rng=arguments.rng,
    )
    return split, split.classes


def _train_names(arguments: argparse.Namespace, split: Split | images.ImageSplit) -> dict[str, Any]:
    """What tells the run from others beside settings and options."""
    names = {
        "suite": arguments.dataset or (Path(arguments.data).name if Path(arguments.data).is_dir() else arguments.data),
        "model": arguments.model,
        "weights": sha256(arguments.weights) if arguments.weights else "pretrained" if arguments.pretrained else None,
        "dropout": arguments.dropout,
        "validation": arguments.validation,
    }
    if isinstance(split, Split) and arguments.data not in SUITES:
        names |= {"samples": _fingerprint((*split.sources, *split.validation, split.unseen))}
    if isinstance(split, images.ImageSplit):
        names |= {"augment": arguments.augment, "image_size": arguments.image_size, "files": split.fingerprint()}
    return names


def _fingerprint(domains: Iterable[Domain]) -> str:
    """A hash of all the samples, of which domain they are in and of the order."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(f"{domain.name}\0{tuple(domain.inputs.shape)}\0".encode())
        for values in (domain.inputs, domain.labels):
            digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)  # no copy
    return digest.hexdigest()


def _train_progress(steps: int) -> single_run.Progress:
    """A passing line with the pooled batch loss and the time left, by the steps made so far in this process."""
    line = progress.Line()
    begun: list[tuple[float, int]] = []

    def show(done: int, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        begun.append((now, done)) if not begun else None
        (since, first) = begun[0]
        left = (now - since) / (done - first) * (steps - done) if done > first else math.nan
        losses = [loss for loss in row["losses"] if math.isfinite(loss)]
        remaining = "" if math.isnan(left) else f", {progress.duration(left)} left"
        line.show(f"step {done} of {steps}, mean loss of the domains {sum(losses) / len(losses):.3f}{remaining}")

    return show


def _train_texts(outcome: single_run.Outcome, record: dict[str, Any], sources: Sequence[str]) -> dict[str, str]:
    """The evaluations as a table, CSV and JSON; the best by validation is what a user would deploy."""
    rows = []
    for found in outcome.evaluations:
        losses = {f"loss {name}": value for name, value in zip(sources, found["losses"], strict=True)}
        rows.append(
            {"step": found["step"], **losses, **{k: v for k, v in found.items() if k not in ("step", "losses")}}
        )
    table = audits.aligned(
        [[_number(v) if k != "step" else str(v) for k, v in row.items()] for row in rows], list(rows[0])
    )
    best = outcome.best
    said = (
        f"best by validation: step {best['step']}, accuracy {best['validation_accuracy']:.4f} there "
        f"and {best['unseen_accuracy']:.4f} on the unseen domain (best.safetensors)"
    )
    document = {"schema": "disam-train/1", "provenance": record, "evaluations": rows, "best": best}
    return {
        "json": json.dumps(document | {"corrupt": outcome.corrupt}, indent=1) + "\n",
        "csv": csv_text(rows),
        "table": f"{table}\n{said}\n",
    }


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
    for name, value in shown.items():
        print(f"{name:<14}{'not said' if value is None else value}")
    return 0


def rate(arguments: argparse.Namespace) -> int:
    """``disam-theory rate``: how far the convergence theory holds along recorded traces, and how fast they converge."""
    logs = {str(path): read_imported(path) for path in arguments.traces}
    all_found = {path: _convergence(Path(path), log, arguments) for path, log in logs.items()}
    record = provenance(traces={path: sha256(Path(path)) for path in all_found}, **_constants(arguments))
    sources = {path: log.source if log else "trace" for path, log in logs.items()}
    rows = [{"trace": path, "source": sources[path], **convergence.row(found)} for path, found in all_found.items()]
    notes = {path: log.notes for path, log in logs.items() if log}
    needs = {name: inequality.columns for name, inequality in convergence.INEQUALITIES.items()} | convergence.MEASURES
    document = {"schema": "disam-rate/1", "provenance": record, "columns_needed": needs, "notes": notes, "rows": rows}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    _deliver(arguments, {"json": text, "csv": csv_text(rows), "table": _rate_table(all_found, logs)}, record)
    if arguments.out:
        series = {path: convergence.points(found) for path, found in all_found.items()}
        lines = [{"trace": path, **line} for path, rows in series.items() for line in rows]
        write_atomically(arguments.out / "series.csv", f"# {one_line(record)}\n{csv_text(lines)}")
        panels = _panels(series) if notes else convergence.PANELS
        units = [found.rows.unit for found in all_found.values()]
        _rate_pictures(series, arguments.out, record, panels=panels, units=units)
    return 0


def _convergence(path: Path, log: Imported | None, arguments: argparse.Namespace) -> convergence.Convergence:
    """What the trace, or the log that other code wrote, says with the constants that are given."""
    rows = convergence.Rows.counted(log.unit, log.at) if log else None
    try:
        recorded = log.trace() if log else read_trace(path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: a line of it is not as a trace has it ({said}); record it anew") from error
    try:
        return convergence.analyse(recorded, rows=rows, **_constants(arguments))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _constants(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("smoothness", "gradient_bound", "minimum")}


def _panels(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Sequence[Sequence[str]]:
    """Those in which something can be drawn, of logs, most of which have the loss alone."""
    held = {name for rows in series.values() for row in rows for name, value in row.items() if value is not None}
    panels = (*convergence.PANELS, convergence.LOSS_PANEL)
    return [panel for panel in panels if held & set(panel)] or [convergence.LOSS_PANEL]


def _rate_pictures(
    series: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, record: Mapping[str, Any], **layout: Any
) -> None:
    """``rate.pdf`` and ``rate.png``, a column a trace; matplotlib is no dependency of this package."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("disam-theory: no picture, as matplotlib is not installed; series.csv has its numbers", file=sys.stderr)
        return
    figure = Figure(figsize=(1.0 + 2.6 * len(series), 1.0 + 2.0 * len(layout["panels"])), layout="constrained")
    titles = (name.replace("/", "/\n") for name in _short_paths(series))
    convergence.draw(figure, dict(zip(titles, series.values(), strict=True)), **layout)
    undated = {"pdf": {"Subject": one_line(record), "CreationDate": None}, "png": {"Description": one_line(record)}}
    for kind, metadata in undated.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=200)
        write_atomically(folder / f"rate.{kind}", buffer.getvalue())


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
    size = _side(suite.domains[0].inputs.shape[1:])
    models = {
        label: architectures.model_of(read[label], each.model, suite.classes, str(each.checkpoint), image_size=size)
        for label, each in alone.items()
    }
    return models, suite


def _side(shape: Sequence[int]) -> int | None:
    """Pixels a side of inputs of this shape where they are images."""
    return shape[-1] if len(shape) == 3 else None


def _name_corrupt(corrupt: Sequence[str]) -> None:
    """All the images that were left out."""
    if corrupt:
        progress.say(f"{len(corrupt)} left out: {'; '.join(corrupt)}")


def _subject(arguments: argparse.Namespace) -> tuple[nn.Module, Suite, list[Domain], torch.device]:
    """The model and the domains, both in the type and on the device that were asked for."""
    device, dtype = _device(arguments.device), getattr(torch, arguments.dtype)
    models, suite = _load({"": arguments}, progress.Line().through)
    _name_corrupt(suite.corrupt)
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
        key |= {"samples": _fingerprint(suite.domains), "drawn_from": [domain.drawn_from for domain in suite.domains]}
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


def _deliver(arguments: argparse.Namespace, texts: Mapping[str, str], record: dict[str, Any]) -> None:
    """Write ``VERB.json`` and ``VERB.csv`` where asked for, and print what was asked for."""
    name = arguments.verb
    progress.wipe()
    with _printed_anyway(texts[arguments.format]):
        if arguments.out:
            write_atomically(arguments.out / f"{name}.json", texts["json"])
            write_atomically(arguments.out / f"{name}.csv", f"# {one_line(record)}\n{texts['csv']}")
    _print(texts[arguments.format])


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with Path(os.devnull).open("wb") as nowhere:  # what is left in the buffer would fail again at the end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise ComputationError(f"standard output: cannot be written ({error.strerror})") from error


def _refuse_short(names: Sequence[str], arguments: argparse.Namespace) -> None:
    if names:
        raise ComputationError(
            f"eigenvalues of {', '.join(names)} did not converge in {arguments.max_products} products each; "
            "raise --max-products or --tol"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not available here ({first_line(error)}); use cpu") from error
    return device


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


RATE_LEGEND = """\
(17), (18) and Thm 1 are as the paper prints them, with Gamma = L; one step, sum and average are of the corrected
theorem. A number after the colon is the first step (from 0), or number T of steps, at which the left side exceeds the
right. L >= is an estimate, a lower bound: what holds with it holds with the true L. cross/main is the median of the
dropped cross term over eta |grad L(w_asc)|^2; a rate is a in |grad L|^2 ~ T^-a, or in L - L_min ~ T^-a, with its 95 %
interval. A dash is what cannot be had from the trace."""


QUANTITIES = {  # what the table calls those of convergence.QUANTITIES
    "training_loss": "L_p",
    "gradient_at_w": "|grad L(w)|",
    "gradient_at_ascent_and_G": "|grad L(w_asc)| and so G",
    "eta": "eta",
    "Gamma": "Gamma",
    "beta": "beta",
}


def _rate_table(all_found: Mapping[str, convergence.Convergence], logs: Mapping[str, Imported | None]) -> str:
    """A line a trace; below it what the words mean, and for what cannot be had or does not hold, why."""
    lines, notes = [], dict[str, list[str]]()
    for name, (path, found) in zip(_short_paths(all_found), all_found.items(), strict=True):
        values = convergence.row(found)
        sign = ">= " if found.smoothness_is == "estimated" and values["smoothness"] is not None else ""
        numbers = [_number(values[key]) for key in ("smoothness", "gamma_max", "cross_over_main_median", "beta_min")]
        verdicts = [_verdict(finding) for finding in found.findings.values()]
        lines.append(
            [name, _length(found), sign + numbers[0], *verdicts, *numbers[1:], *map(_fitted, found.rates.values())]
        )
        for note in (*_log_notes(found, logs[path]), *_rate_notes(found)):
            notes.setdefault(note, []).append(name)
    titles = [inequality.title for inequality in convergence.INEQUALITIES.values()]
    head = [
        "trace",
        "steps",
        "L",
        *titles,
        "max Gamma",
        "cross/main",
        "min beta",
        "rate at w",
        "rate at w_asc",
        "rate of L",
    ]
    below = [
        f"- {note}" + ("" if len(names) == len(all_found) else f" [{', '.join(names)}]")
        for note, names in notes.items()
    ]
    return "\n".join([audits.aligned(lines, head), "", RATE_LEGEND, *below]) + "\n"


def _length(found: convergence.Convergence) -> str:
    """The number of steps; of a log's rows also what they reach to."""
    unit, end = found.rows.unit, int(found.rows.ends[-1])
    return str(found.steps) if unit == "step" and end == found.steps else f"{found.steps} to {unit} {end}"


def _log_notes(found: convergence.Convergence, log: Imported | None) -> Iterator[str]:
    """What of the theorem's quantities a log that other code wrote holds, and how to read it."""
    if log:
        names = {held: [QUANTITIES[q] for q, has in found.held.items() if has == held] for held in (True, False)}
        yield f"{log.source} give of the theorem's quantities: {', '.join(names[True])}"
        yield f"{log.source} do not give: {', '.join(names[False])}; nor L, rho and L_min"
        yield f"{log.source}: no inequality can be evaluated, and the rate of L tests none; Theorem 1 bounds gradients"
        yield from log.notes


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
            named = {"at_w": "at w", "at_ascent": "at w_asc", "loss": "of L"}[where]
            yield f"rate {named} {convergence.ABSENT}: {rate.why}"


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
