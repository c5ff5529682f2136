"""Folders of images -> files and labels by domain -> a suite in memory, or a split whose images are read when used.

Layouts: DomainBed's ``ROOT/DATASET/domain/class/*.jpg`` of the :data:`BENCHMARKS`, any ``ROOT/domain/class/*.jpg``, and
official splits, of which a line of a list is a path and a label:

* PACS: lists ``<domain>_{train,crossval,test}_kfold.txt`` that number the classes from 1; images and lists lie under
  ``raw_images/`` there.
* VLCS: ``<domain>_{train,crossval,test}.txt``, which number them from 0, or folders
  ``domain/{train,crossval,test,full}/class/*.jpg``, of which full is tested on where it is there.
* DomainNet: such lists without crossval. Validation is on the sources' test lists and the test on the unseen domain's,
  as the official code does it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from disam_theory.domains import (
    IMAGE_SUFFIXES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Domain,
    Suite,
    hold_out,
    normalised,
    read_rgb,
    sample,
)
from disam_theory.errors import UsageError, unknown_name
from disam_theory.progress import Through, silently

PARTS = ("train", "crossval", "test")  # of the official splits


@dataclass(frozen=True)
class Benchmark:
    """A DomainBed data set: its folder under ROOT, and its domains' folders by letter, DomainBed's name first."""

    folders: tuple[str, ...]
    domains: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """DomainBed's names of the domains."""
        return [names[0] for names in self.domains.values()]


BENCHMARKS = {
    "pacs": Benchmark(("PACS",), {"p": ("photo",), "a": ("art_painting",), "c": ("cartoon",), "s": ("sketch",)}),
    "vlcs": Benchmark(
        ("VLCS",),
        {"v": ("VOC2007", "PASCAL"), "l": ("LabelMe",), "c": ("Caltech101", "CALTECH"), "s": ("SUN09", "SUN")},
    ),
    "officehome": Benchmark(
        ("office_home", "OfficeHomeDataset_10072016"),
        {"p": ("Product",), "a": ("Art",), "c": ("Clipart",), "r": ("Real World",)},
    ),
    "terraincognita": Benchmark(
        ("terra_incognita",), {letter: (f"location_{letter}",) for letter in ("100", "38", "43", "46")}
    ),
    "domainnet": Benchmark(
        ("domain_net",),
        {name[0]: (name,) for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")},
    ),
}


@dataclass(frozen=True)
class ImageDomain:
    """One domain as files: ``paths`` of n images and ``labels`` (n,), class indices."""

    name: str
    paths: tuple[Path, ...]
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.paths) < 2:
            raise UsageError(f"domain {self.name!r} has {len(self.paths)} image(s); at least 2 are needed")

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: Tensor) -> ImageDomain:
        """The images at ``index`` (k,), under the same name."""
        return ImageDomain(self.name, tuple(self.paths[i] for i in index.tolist()), self.labels[index])


@dataclass(frozen=True)
class ImageSplit:
    """Leave one domain out, as :class:`~disam_theory.domains.Split` does, over ``classes`` classes."""

    sources: tuple[ImageDomain, ...]
    validation: tuple[ImageDomain, ...]
    unseen: ImageDomain
    classes: int

    def fingerprint(self) -> str:
        """A hash of who is in which part under which label: of names, not of pixels."""
        digest = hashlib.sha256()
        for domain in (*self.sources, *self.validation, self.unseen):
            digest.update(f"{domain.name}\0{len(domain)}\0".encode())
            for path, label in zip(domain.paths, domain.labels.tolist(), strict=True):
                digest.update(f"{path.parent.name}/{path.name}\0{label}\0".encode())
        return digest.hexdigest()


def image_split(
    root: Path,
    test_domain: str,
    *,
    dataset: str | None = None,
    lists: bool | None = None,
    validation: float = 0.2,
    rng: int = 0,
) -> ImageSplit:
    """Hold ``test_domain`` (a name, or a benchmark's letter) out of the images under ``root``.

    ``lists``: whether to take the official split lists; None takes them where they are. Otherwise a share
    ``validation`` of each source domain is drawn with seed ``rng``, as :meth:`~disam_theory.domains.Suite.split` does.

    Raises:
        UsageError: a folder, domain, class or file that is missing or empty, or labels that do not fit.
    """
    folder, domains = _domain_folders(root, dataset)
    unseen = _chosen(test_domain, domains, dataset)
    official = _official(folder, domains, dataset) if lists is not False else None
    if official:
        return official.split(list(domains), unseen)
    if lists:
        raise UsageError(f"{folder}: {NO_SPLIT}; use --splits random")
    domains = _whole(domains)
    index = _classes(domains)
    found = [_read_folder(name, path, index) for name, path in domains.items()]
    return ImageSplit(*hold_out(found, unseen, validation=validation, rng=rng), len(index))


@dataclass(frozen=True)
class Reading:
    """What of a folder is read into memory, and how."""

    image_size: int = 224  # pixels a side
    dataset: str | None = None  # one of BENCHMARKS
    part: str | None = None  # of the official lists, but of the unseen domains their test list; None: every image
    unseen: tuple[str, ...] = ()
    skip_corrupt: bool = False
    max_samples: int | None = None  # of each domain, drawn before they are read


READING = Reading()
SHOWN = 3  # of the files that cannot be read


def folder_suite(root: Path, reading: Reading = READING, *, rng: int = 0, through: Through = silently) -> Suite:
    """The images under ``root`` as DomainBed and the official code evaluate them, see :func:`evaluation_transform`.

    Labels number the union of the classes over the domains in the order of the alphabet, or as the official lists do
    where a ``part`` of them is wanted. ``through`` goes through the images.

    Raises:
        UsageError: as :func:`image_split`, or images that cannot be read, all of them counted and the first named.
    """
    folder, folders = _domain_folders(root, reading.dataset)
    if reading.part is None:
        folders = _whole(folders)
        index = _classes(folders)
        whole, classes = [_read_folder(name, path, index) for name, path in folders.items()], len(index)
    else:
        official = _official(folder, folders, reading.dataset)
        if official is None:
            raise UsageError(f"{folder}: {NO_SPLIT}; leave --part away")
        parts = {name: "test" if name in reading.unseen else reading.part for name in folders}
        whole, classes = [official.of(name, part) for name, part in parts.items()], official.classes
    return _in_memory(root.resolve().name, whole, classes, reading, rng, through)


def _in_memory(
    name: str, whole: Sequence[ImageDomain], classes: int, reading: Reading, rng: int, through: Through
) -> Suite:
    chosen = [sample(d, reading.max_samples, seed=1000 * rng + number) for number, d in enumerate(whole)]
    samples = Samples(chosen, evaluation_transform(reading.image_size))
    order = iter(through("image", range(len(samples))))
    read = [collate([samples[0, i] for i in itertools.islice(order, len(domain))]) for domain in chosen]
    corrupt = [why for *_, broken in read for why in broken]
    if corrupt and not reading.skip_corrupt:
        more = f"; and {len(corrupt) - SHOWN} more" if len(corrupt) > SHOWN else ""
        raise UsageError(
            f"{len(corrupt)} of {sum(map(len, chosen))} images cannot be read: {'; '.join(corrupt[:SHOWN])}{more}; "
            "replace them, or leave them out by --skip-corrupt"
        )
    domains = []
    for domain, part, (inputs, labels, _, broken) in zip(whole, chosen, read, strict=True):
        if len(labels) < 2:
            raise UsageError(f"domain {domain.name!r} has {len(labels)} readable image(s); at least 2 are needed")
        population = len(domain) - len(broken) if len(part) < len(domain) else None
        domains.append(Domain(domain.name, inputs, labels, drawn_from=population))
    return Suite(name, tuple(domains), classes, tuple(corrupt))


def domain_name(given: str, dataset: str | None) -> str:
    """DomainBed's name of the domain with a benchmark's letter ``given``, in either case; any other name as it is."""
    if dataset is not None and dataset not in BENCHMARKS:
        raise unknown_name("data set", dataset, BENCHMARKS)
    return BENCHMARKS[dataset].domains.get(given.lower(), (given,))[0] if dataset else given


def _domain_folders(root: Path, dataset: str | None) -> tuple[Path, dict[str, Path]]:
    """Where the domains are, and their folders by name."""
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give one in the layout ROOT/domain/class/image.jpg")
    if dataset is None:
        folder = _inner(root)
        with_images = [path for path in _folders(folder, "domain") if not any(path.glob("*_kfold.txt"))]
        return folder, {path.name: path for path in with_images}
    if dataset not in BENCHMARKS:
        raise unknown_name("data set", dataset, BENCHMARKS)
    benchmark = BENCHMARKS[dataset]
    wanted = {_plain(name) for name in (dataset, *benchmark.folders)}
    within = [path for path in _folders(root, "domain") if _plain(path.name) in wanted]
    folder = _inner(within[0] if within else root)
    there = {_plain(path.name): path for path in _folders(folder, "domain")}
    domains = {}
    for names in benchmark.domains.values():
        path = next((there[_plain(name)] for name in names if _plain(name) in there), None)
        if path is None:
            found = ", ".join(path.name for path in there.values())
            raise UsageError(f"{folder}: no folder {names[0]!r}, a domain of {dataset}; there: {found}")
        domains[names[0]] = path
    return folder, domains


def _inner(folder: Path) -> Path:
    return folder / "raw_images" if (folder / "raw_images").is_dir() else folder


def _plain(name: str) -> str:
    """Without case, spaces, hyphens and underscores: ``Real World``, ``Real_World`` and ``RealWorld`` are one."""
    return re.sub(r"[\s_-]", "", name).lower()


def _folders(root: Path, kind: str) -> list[Path]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UsageError(f"{root}: no {kind} folders; the layout is ROOT/domain/class/image.jpg")
    return folders


def _chosen(test_domain: str, domains: Mapping[str, Path], dataset: str | None) -> str:
    """The domain's name, by its letter, its name or its folder's."""
    letters = BENCHMARKS[dataset].domains if dataset else {}
    if test_domain.lower() in letters:
        return letters[test_domain.lower()][0]
    for name, path in domains.items():
        if _plain(test_domain) in (_plain(name), _plain(path.name)):
            return name
    raise unknown_name(f"domain of {dataset or 'the folder'}:", test_domain, [*domains, *letters])


def _classes(domains: Mapping[str, Path]) -> dict[str, int]:
    """Class folder -> label: the union over the domains, in the order of the alphabet."""
    names = sorted({path.name for folder in domains.values() for path in _folders(folder, "class")})
    return {name: label for label, name in enumerate(names)}


def _read_folder(name: str, folder: Path, index: Mapping[str, int]) -> ImageDomain:
    paths: list[Path] = []
    for of_class in _folders(folder, "class"):
        inside = sorted(path for path in of_class.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise UsageError(f"{of_class}: no images ({', '.join(IMAGE_SUFFIXES)}); fill or remove the class")
        paths += inside
    labels = torch.tensor([index[path.parent.name] for path in paths])
    return ImageDomain(name, tuple(paths), labels)


# --- official splits ---


NO_SPLIT = (
    "no official split lists (DOMAIN_train_kfold.txt, DOMAIN_train.txt), nor folders DOMAIN/train, crossval, test"
)
LIST = re.compile(rf"(.+)_({'|'.join(PARTS)})(_kfold)?\.txt")


@dataclass(frozen=True)
class _Official:
    """The images of a domain's part in an official split; ``first`` is the first class's label in its lists."""

    folder: Path
    first: int
    images: Mapping[tuple[str, str], ImageDomain]
    classes: int

    def of(self, name: str, part: str) -> ImageDomain:
        """DomainNet has no crossval lists, and the official code validates on the sources' test lists there."""
        if part == "crossval" and not self.first and all(kind != part for _, kind in self.images):
            part = "test"
        if (name, part) not in self.images:
            wanted = f"{name}_{part}{'_kfold' if self.first else ''}.txt"
            raise UsageError(
                f"{self.folder}: {wanted} is missing beside the other split lists; add it, or do without them: train "
                "with --splits random, measure without --part"
            )
        return self.images[name, part]

    def split(self, names: Sequence[str], unseen: str) -> ImageSplit:
        """``unseen`` held out of the domains ``names``."""
        sources = [name for name in names if name != unseen]
        train, crossval = (tuple(self.of(name, part) for name in sources) for part in ("train", "crossval"))
        return ImageSplit(train, crossval, self.of(unseen, "test"), self.classes)


def _official(folder: Path, domains: Mapping[str, Path], dataset: str | None) -> _Official | None:
    """From the lists in the folder or in one of its folders, PACS' kind if there is one, or from folders of parts."""
    names = {_plain(alias): name for name, path in domains.items() for alias in (name, path.name)}
    if dataset:
        names |= {_plain(alias): own[0] for own in BENCHMARKS[dataset].domains.values() for alias in own}
    kinds: dict[str | None, dict[tuple[str, str], Path]] = {"_kfold": {}, None: {}}
    for path in (*sorted(folder.glob("*.txt")), *sorted(folder.glob("*/*.txt"))):
        if (match := LIST.fullmatch(path.name)) and _plain(match[1]) in names:
            kinds[match[3]].setdefault((names[_plain(match[1])], match[2]), path)
    first = 1 if kinds["_kfold"] else 0
    if not (files := kinds["_kfold" if first else None]):
        return _from_parts(folder, _part_folders(domains))
    classes: dict[int, str] = {}
    images = {(name, part): _read_list(folder, name, path, first, classes) for (name, part), path in files.items()}
    labels = sorted(classes)
    if labels != list(range(len(labels))) or len(set(classes.values())) < len(labels):
        said = ", ".join(f"{label + first} {classes[label]}" for label in labels)
        raise UsageError(
            f"{folder}: the split lists' labels are not {first}, {first + 1}, ... with a class each: {said}"
        )
    return _Official(folder, first, images, len(labels))


def _part_folders(domains: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """Each domain's folders by part, where all of them are parts and none is a class; else nothing."""
    folders = {name: {p.name.lower(): p for p in path.iterdir() if p.is_dir()} for name, path in domains.items()}
    apart = all(set(PARTS) <= of_domain.keys() <= {*PARTS, "full"} for of_domain in folders.values())
    return folders if apart else {}


def _from_parts(folder: Path, parts: Mapping[str, Mapping[str, Path]]) -> _Official | None:
    if not parts:
        return None
    index = _classes({str(path): path for of_domain in parts.values() for path in of_domain.values()})
    images = {
        (name, part): _read_folder(name, of_domain.get("full", path) if part == "test" else path, index)
        for name, of_domain in parts.items()
        for part, path in of_domain.items()
        if part in PARTS
    }
    return _Official(folder, 0, images, len(index))


def _whole(domains: Mapping[str, Path]) -> dict[str, Path]:
    """Where each domain's classes are: beside its parts, where it has such folders."""
    parts = _part_folders(domains)
    for name, of_domain in parts.items():
        if "full" not in of_domain:
            raise UsageError(
                f"{domains[name]}: parted by folders, without one of all, full; train with --splits official, measure "
                "with --part"
            )
    return {name: of_domain["full"] for name, of_domain in parts.items()} or dict(domains)


def _read_list(folder: Path, name: str, source: Path, first: int, classes: dict[int, str]) -> ImageDomain:
    """The images of one list; ``classes`` collects which folder each label stands for."""
    paths, labels = [], []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        given, _, label = line.strip().rpartition(" ")
        if not given or not label.isdecimal() or int(label) < first:
            raise UsageError(f"{where}: {line!r} is not a path and a label from {first} on")
        path = folder / given
        if not path.is_file():
            raise UsageError(f"{where}: names {given}, and there is no such file in {folder}; or use --splits random")
        paths.append(path)
        labels.append(int(label) - first)
        known = classes.setdefault(labels[-1], path.parent.name)
        if known != path.parent.name:
            raise UsageError(f"{where}: label {label} is given to {path.parent.name!r} here and to {known!r} before")
    return ImageDomain(name, tuple(paths), torch.tensor(labels))


# --- samples and their order ---

Sample = tuple[Tensor, int, int]  # input, label, number of the domain
Transform = Callable[[Any], Tensor]  # PIL image -> (3, h, w)
SAMPLES = 1  # the stream of the augmentation's seeds


def evaluation_transform(size: int) -> Transform:
    """As DomainBed evaluates: ``size`` pixels square, bilinear, normalised by ImageNet's mean and deviation."""
    return functools.partial(normalised, size=size)


def training_transform(size: int) -> Transform:
    """DomainBed's augmentation: a random resized crop of 70-100 %, flip, colour jitter 0.3, grey in one of ten."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build that does not fit torch
        raise UsageError(
            f"the augmentation needs torchvision ({error}): pip install 'disam_theory[images]', or --augment none"
        ) from error
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def derived_seed(*key: int) -> int:
    """A seed of 63 bits for each ``key``: streams of different keys are independent."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Samples(Dataset):
    """(epoch, index) -> the sample ``index`` of the domains laid end to end, as that epoch's augmentation shows it.

    What is random in ``transform`` depends on (seed, epoch, index) alone: not on the order of reading, nor on the
    number of workers. A file that cannot be read gives the error's text in place of a sample.
    """

    def __init__(self, domains: Sequence[Domain | ImageDomain], transform: Transform, seed: int = 0) -> None:
        self.domains, self._transform, self._seed = tuple(domains), transform, seed
        self.starts = np.cumsum([0, *(len(domain) for domain in domains)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, at: tuple[int, int]) -> Sample | str:
        epoch, index = at
        d = int(np.searchsorted(self.starts, index, side="right")) - 1
        domain, i = self.domains[d], index - int(self.starts[d])
        if isinstance(domain, Domain):
            return domain.inputs[i], int(domain.labels[i]), d
        try:
            image = read_rgb(domain.paths[i])
        except UsageError as error:
            return str(error)
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(derived_seed(SAMPLES, self._seed, epoch, index))
        try:
            return self._transform(image), int(domain.labels[i]), d
        finally:
            torch.default_generator.set_state(before)


Batch = tuple[Tensor, Tensor, Tensor, list[str]]  # inputs (B, ...), labels (B,), domains (B,), unreadable files


def collate(samples: Sequence[Sample | str]) -> Batch:
    """A batch of the samples that could be read, and what is wrong with the others."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    inputs = torch.stack([sample[0] for sample in good]) if good else torch.empty(0)
    labels, domains = (torch.tensor([sample[k] for sample in good], dtype=torch.int64) for k in (1, 2))
    return inputs, labels, domains, [sample for sample in samples if isinstance(sample, str)]


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """The samples, as (epoch, index), of the steps ``start`` to ``steps`` - 1: epochs of permutations cut into batches.

    ``stratified`` takes ``batch_size`` from each domain's own permutations. An order depends on (seed, epoch) alone, so
    that a run goes on at any step without what was drawn before.
    """

    def __init__(
        self, sizes: Sequence[int], *, batch_size: int, steps: int, stratified: bool, seed: int, start: int = 0
    ) -> None:
        self._groups = list(sizes) if stratified else [sum(sizes)]
        self._batch, self._steps, self._start, self._seed = batch_size, steps, start, seed
        self._permutation = functools.lru_cache(2 * len(self._groups))(self._drawn)

    def __len__(self) -> int:
        return self._steps - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.at(step) for step in range(self._start, self._steps))

    def at(self, step: int) -> list[tuple[int, int]]:
        """The batch of ``step``."""
        batch, first = [], 0
        for group, size in enumerate(self._groups):
            for place in range(step * self._batch, (step + 1) * self._batch):
                epoch, within = divmod(place, size)
                batch.append((epoch, first + int(self._permutation(epoch, group)[within])))
            first += size
        return batch

    def _drawn(self, epoch: int, group: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch, group]).permutation(self._groups[group])


def side_of(shape: Sequence[int]) -> int | None:
    """Pixels a side of inputs of this shape where they are images."""
    return shape[-1] if len(shape) == 3 else None
