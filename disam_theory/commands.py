"""What the verbs of the command line do: load, measure, print, write. Each returns the exit code."""

from __future__ import annotations

import argparse
import dataclasses
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

from disam_theory import architectures, audit_report, backbones, checkpoints, convergence, images, single_run
from disam_theory import audit as audits
from disam_theory.algorithms import Settings
from disam_theory.archives import load_data
from disam_theory.domains import SUITES, Split, Suite, load_suite
from disam_theory.errors import ComputationError, UsageError
from disam_theory.files import csv_text, write_atomically
from disam_theory.imported import Imported, read_imported
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
    """``disam-theory audit``: see :mod:`disam_theory.audit` and, for what is written, ``audit_report``."""
    _check(arguments, "k", "chunk", "image_size")
    paths = dict(zip(_labels(arguments.checkpoint), arguments.checkpoint, strict=True))
    with launched(arguments.device) as (ranks, device_name):
        device = _device(device_name)
        alone = {label: argparse.Namespace(**{**vars(arguments), "checkpoint": path}) for label, path in paths.items()}
        models = {label: _load(each) for label, each in alone.items()}  # all of them, before any is measured
        suite = next(iter(models.values()))[1]
        record = _record(next(iter(alone.values())), suite, device, ranks)
        record |= {"checkpoint": [str(path) for path in paths.values()]}
        record |= {"checkpoint_sha256": [sha256(path) for path in paths.values()]}
        with _kept(arguments, record, ranks) as kept:
            found = {
                label: _audited(label, model, suite, kept, arguments, device, ranks)
                for label, (model, _) in models.items()
            }
            if ranks.rank:
                return 0  # the first process says what all have found
            _deliver_audits(found, arguments, record)
    short = [(label, row.name) for label, each in found.items() for row in each.rows if not row.converged]
    _refuse_short([name if len(found) == 1 else f"{name} ({label})" for label, name in short], arguments)
    return 0


def _deliver_audits(found: Mapping[str, audits.Audit], arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Every format that is asked for; the page and LaTeX go to the folder only."""
    if arguments.out:
        write_atomically(arguments.out / "audit.html", audit_report.as_html(found, record))
        write_atomically(arguments.out / "audit.tex", audit_report.as_latex(found, record))
        if len(found) > 1:
            lines = f"# {one_line(record)}\n{audit_report.differences_csv(found)}"
            write_atomically(arguments.out / "differences.csv", lines)
    as_text = {"json": audit_report.as_json(found, record), "csv": audit_report.as_csv(found)}
    _deliver(arguments, {**as_text, "table": audit_report.as_table(found)}, record)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The files' names, with their folders where names repeat."""
    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):
        labels = _short_paths([str(path) for path in paths])
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"{label} is given twice; name each checkpoint once")
    return labels


def _audited(
    label: str,
    model: nn.Module,
    suite: Suite,
    kept: Kept,
    arguments: argparse.Namespace,
    device: torch.device,
    ranks: Ranks,
) -> audits.Audit:
    """One checkpoint's audit: as it was kept, or gone on with, or from the start."""
    prefix = f"{label}/"
    mine = {name.removeprefix(prefix): v for name, v in kept.vectors.items() if name.startswith(prefix)}
    if label in kept.rows:
        return audits.Audit.from_plain(kept.rows[label], mine)
    names = [entry.name for entry in dataclasses.fields(audits.Settings)]
    chosen = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    try:
        found = audits.audit(
            model,
            suite.domains,
            audits.Settings(**chosen),
            unseen=arguments.unseen,
            dtype=getattr(torch, arguments.dtype),
            device=device,
            ranks=ranks,
            start=mine,
            progress=_progress if ranks.rank == 0 else lambda products, running, error: None,
            stage=lambda what: _say(f"{label}: {what}") if ranks.rank == 0 else None,
        )
    except InterruptedSpectra as stop:
        raise InterruptedSpectra({prefix + name: vectors for name, vectors in stop.vectors.items()}) from stop
    kept.rows[label] = found.to_plain()
    kept.vectors |= {prefix + name: values for name, values in found.draws.items()}
    return found


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


def train(arguments: argparse.Namespace) -> int:
    """``disam-theory train``: one run; see :mod:`disam_theory.single_run`."""
    _check(arguments, "image_size")
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
    record = provenance(rng=arguments.rng, device=str(device), dtype="float32")
    _deliver(arguments, _train_texts(outcome, record, [domain.name for domain in split.sources]), record)
    if outcome.corrupt:
        print(f"disam-theory: {len(outcome.corrupt)} left out: {'; '.join(outcome.corrupt)}", file=sys.stderr)
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
    if arguments.data in SUITES and not arguments.dataset:
        suite = load_suite(arguments.data, rng=arguments.rng)
        return suite.split(arguments.test_domain, validation=arguments.validation, rng=arguments.rng), suite.classes
    if not Path(arguments.data).is_dir():
        load_suite(arguments.data)  # which says what is wrong with the name
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
    if isinstance(split, images.ImageSplit):
        names |= {"augment": arguments.augment, "image_size": arguments.image_size, "files": split.fingerprint()}
    return names


def _train_progress(steps: int) -> single_run.Progress:
    """A passing line with the pooled batch loss and the time left, by the steps made so far in this process."""
    begun: list[tuple[float, int]] = []

    def show(done: int, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        begun.append((now, done)) if not begun else None
        (since, first) = begun[0]
        left = (now - since) / (done - first) * (steps - done) if done > first else math.nan
        losses = [loss for loss in row["losses"] if math.isfinite(loss)]
        remaining = (
            "" if math.isnan(left) else f", {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left"
        )
        _say(f"step {done} of {steps}, mean loss of the domains {sum(losses) / len(losses):.3f}{remaining}")

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
    if out.suffix != ".safetensors":
        raise UsageError(f"--out is {out}; its name must end in .safetensors")
    if out.exists() and source.exists() and out.samefile(source):
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


def _directions(arguments: argparse.Namespace, losses: Any, params: Params) -> list[Params]:
    if arguments.direction == "filter":
        return [random_direction(params, rng=arguments.rng + j) for j in range(arguments.dimensions)]
    pairs = top_eigenpairs(hessian(losses, params, weights=losses.shares), arguments.dimensions, rng=arguments.rng)
    return [eigen_direction(vector, params) for vector in pairs.vectors.T]


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, Suite]:
    checkpoint = checkpoints.read(arguments.checkpoint)
    # also for the record and for what is kept, where the file says it and the user does not
    arguments.model = architectures.resolve(checkpoint, arguments.model, str(arguments.checkpoint))
    suite = load_data(arguments.data, rng=arguments.rng, image_size=arguments.image_size)
    size = _side(suite.domains[0].inputs.shape[1:])
    source = str(arguments.checkpoint)
    return architectures.model_of(checkpoint, arguments.model, suite.classes, source, image_size=size), suite


def _side(shape: Sequence[int]) -> int | None:
    """Pixels a side of inputs of this shape where they are images."""
    return shape[-1] if len(shape) == 3 else None


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
