"""The verb ``train``: (options) -> one run, see :mod:`disam_theory.single_run`, and what it printed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disam_theory import audit as audits
from disam_theory import backbones, images, progress, single_run
from disam_theory.algorithms import Settings
from disam_theory.archives import load_data
from disam_theory.delivery import deliver, device_of, name_corrupt, number
from disam_theory.domains import SUITES, Split, fingerprint
from disam_theory.errors import UsageError
from disam_theory.files import csv_text
from disam_theory.provenance import provenance, sha256


def train(arguments: argparse.Namespace) -> int:
    """``disam-theory train``: one run; see :mod:`disam_theory.single_run`."""
    device = device_of(arguments.device)
    settings, options = _settings(arguments), _options(arguments)
    if settings.objective == "fishr" and arguments.dropout:
        raise UsageError("fishr's gradients are those of a head without dropout before it; leave --dropout away")
    split, classes = _split(arguments)
    model = backbones.build(
        arguments.model,
        classes,
        image_size=images.side_of(split.unseen.inputs.shape[1:]) if isinstance(split, Split) else arguments.image_size,
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
        named=_names(arguments, split),
        transforms=(images.training_transform(arguments.image_size) if augmented else seen, seen),
        progress=_progress(settings.steps),
    )
    record = provenance(rng=arguments.rng, device=str(device), dtype="float32", corrupt=len(outcome.corrupt))
    deliver(arguments, _texts(outcome, record, [domain.name for domain in split.sources]), record)
    name_corrupt(outcome.corrupt)
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """Those given; momentum, SGD's alone, is 0.9 unless given."""
    names = [entry.name for entry in dataclasses.fields(Settings) if entry.name != "ascent_gradient"]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    given.setdefault("momentum", 0.9 if arguments.optimizer == "sgd" else 0.0)
    return Settings(**given, ascent_gradient="weights")


def _options(arguments: argparse.Namespace) -> single_run.Options:
    names = [entry.name for entry in dataclasses.fields(single_run.Options)]
    others = {"seed": arguments.rng, "mode": arguments.sam_mode, "train_losses": not arguments.no_train_losses}
    return single_run.Options(**{name: getattr(arguments, name) for name in names if name not in others}, **others)


def _split(arguments: argparse.Namespace) -> tuple[Split | images.ImageSplit, int]:
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


def _names(arguments: argparse.Namespace, split: Split | images.ImageSplit) -> dict[str, Any]:
    """What tells the run from others beside settings and options."""
    names = {
        "suite": arguments.dataset or (Path(arguments.data).name if Path(arguments.data).is_dir() else arguments.data),
        "model": arguments.model,
        "weights": sha256(arguments.weights) if arguments.weights else "pretrained" if arguments.pretrained else None,
        "dropout": arguments.dropout,
        "validation": arguments.validation,
    }
    if isinstance(split, Split) and arguments.data not in SUITES:
        names |= {"samples": fingerprint((*split.sources, *split.validation, split.unseen))}
    if isinstance(split, images.ImageSplit):
        names |= {"augment": arguments.augment, "image_size": arguments.image_size, "files": split.fingerprint()}
    return names


def _progress(steps: int) -> single_run.Progress:
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


def _texts(outcome: single_run.Outcome, record: dict[str, Any], sources: Sequence[str]) -> dict[str, str]:
    """The evaluations as a table, CSV and JSON; the best by validation is what a user would deploy."""
    rows = []
    for found in outcome.evaluations:
        losses = {f"loss {name}": value for name, value in zip(sources, found["losses"], strict=True)}
        rows.append(
            {"step": found["step"], **losses, **{k: v for k, v in found.items() if k not in ("step", "losses")}}
        )
    table = audits.aligned(
        [[number(v) if k != "step" else str(v) for k, v in row.items()] for row in rows], list(rows[0])
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
