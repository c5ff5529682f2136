"""What ``--data`` names -> a suite of domains: a NumPy archive, a callable, a folder of images, an embedded suite.

An ``.npz`` archive has either the arrays ``inputs``, ``labels`` and ``domains`` (n each; ``domains`` are names or
numbers), or for each domain ``NAME/inputs`` and ``NAME/labels``; ``classes``, a number, is optional in both. A
callable takes no arguments and returns a :class:`~disam_theory.domains.Suite`, domains, or a mapping from a domain's
name to its (inputs, labels), as arrays or tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disam_theory.checkpoints import imported
from disam_theory.domains import SUITES, Domain, Suite, load_suite
from disam_theory.errors import DisamError, UsageError, failure
from disam_theory.images import READING, Reading, folder_suite
from disam_theory.progress import Through, silently

LAYOUT = "arrays inputs, labels and domains, or NAME/inputs and NAME/labels for each domain"


def load_data(name: str, *, rng: int = 0, reading: Reading = READING, through: Through = silently) -> Suite:
    """The suite that ``name`` names: embedded, a ``.npz`` file, a folder of images, or ``PKG.MOD:CALLABLE``.

    ``rng``: seed of an embedded suite, and of what is drawn from a folder; ``reading`` and ``through`` are of folders
    alone, see :func:`~disam_theory.images.folder_suite`.

    Raises:
        UsageError: there is no such thing (the nearest name is suggested), or it cannot be read.
    """
    path = Path(name)
    if name not in SUITES and path.is_dir():
        return folder_suite(path, reading, rng=rng, through=through)
    for option in ("dataset", "part"):
        if getattr(reading, option) is not None:
            raise UsageError(f"--{option} is for a folder of images, and {name} is none; leave it away")
    if name.endswith(".npz"):
        return numpy_archive(path)
    if re.fullmatch(r"[\w.]+:\w+", name) and not path.exists():
        return called(name)
    if name not in SUITES and ("/" in name or path.exists()):
        raise UsageError(f"{name}: no such folder; give a folder in the layout ROOT/domain/class/image.jpg")
    return load_suite(name, rng=rng)


def numpy_archive(path: Path) -> Suite:
    """The domains in the ``.npz`` file at ``path``; nothing in it is unpickled.

    Raises:
        UsageError: the file is missing, is no such archive, holds objects, or arrays that do not go together.
    """
    arrays = _arrays(path)
    classes = arrays.pop("classes", None)
    if {"inputs", "labels", "domains"} <= arrays.keys():
        pairs = _by_domain(path, arrays["inputs"], arrays["labels"], arrays["domains"])
    else:
        names = list(dict.fromkeys(name.rpartition("/")[0] for name in arrays))
        halves = {f"{name}/{part}" for name in names for part in ("inputs", "labels")}
        if halves != arrays.keys() or not names or "" in names:
            raise UsageError(f"{path}: expected {LAYOUT}; it has {', '.join(sorted(arrays)[:8]) or 'none'}")
        pairs = {name: (arrays[f"{name}/inputs"], arrays[f"{name}/labels"]) for name in names}
    return _suite(str(path), path.stem, pairs, _count(path, classes))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except ValueError as error:  # objects in it, or no archive at all
        said = (
            "it holds Python objects, which would run code" if "Object arrays" in str(error) else "cut short or not one"
        )
        raise UsageError(f"{path}: refused as a NumPy archive: {said}; expected {LAYOUT}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # whatever a garbled archive leads to
        raise UsageError(f"{path}: refused as a NumPy archive: cut short or not one; expected {LAYOUT}") from error


def _by_domain(
    path: Path, inputs: np.ndarray, labels: np.ndarray, domains: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if domains.ndim != 1 or not len(inputs.reshape(-1)) or not len(domains) == len(inputs) == len(labels):
        raise UsageError(
            f"{path}: inputs {inputs.shape}, labels {labels.shape} and domains {domains.shape} must have a row a sample"
        )
    return {str(name): (inputs[domains == name], labels[domains == name]) for name in np.unique(domains)}


def _count(path: Path, classes: np.ndarray | None) -> int | None:
    if classes is None:
        return None
    if classes.size != 1 or classes.dtype.kind not in "iu" or int(classes.reshape(())) < 1:
        raise UsageError(f"{path}: classes is {classes!r}; it must be one whole number above 0")
    return int(classes.reshape(()))


def called(spec: str) -> Suite:
    """The domains that ``PKG.MOD:CALLABLE`` returns.

    Raises:
        UsageError: no such callable, or it returns something else.
    """
    try:
        returned = imported(spec, "data", "mydata:domains")()
    except DisamError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"data {spec!r}: calling it without arguments failed ({failure(error)})") from error
    if isinstance(returned, Suite):
        return returned
    if isinstance(returned, (list, tuple)) and returned and all(isinstance(domain, Domain) for domain in returned):
        returned = {domain.name: (domain.inputs, domain.labels) for domain in returned}
    if not isinstance(returned, Mapping) or not returned or not all(_is_pair(pair) for pair in returned.values()):
        raise UsageError(
            f"data {spec!r} returned {type(returned).__name__}; expected a Suite, domains, or a mapping from a "
            "domain's name to (inputs, labels)"
        )
    return _suite(f"data {spec!r}", spec, {str(name): tuple(pair) for name, pair in returned.items()}, None)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def _suite(source: str, name: str, pairs: Mapping[str, tuple[Any, Any]], classes: int | None) -> Suite:
    """Inputs become float32 unless they are floating point already, and labels whole numbers from 0."""
    domains = tuple(
        Domain(domain, _inputs(source, domain, inputs), _labels(source, domain, labels))
        for domain, (inputs, labels) in pairs.items()
    )
    if classes is None:  # then no range is known that labels could be outside of but below
        for domain in domains:
            if (lowest := int(domain.labels.min())) < 0:
                raise UsageError(
                    f"{source}: domain {domain.name!r} has label {lowest}; labels must be whole numbers from 0 on"
                )
        classes = 1 + max(int(domain.labels.max()) for domain in domains)
    return Suite(name, domains, classes)


def _inputs(source: str, domain: str, values: Any) -> torch.Tensor:
    tensor = _tensor(source, domain, "inputs", values)
    return tensor if tensor.is_floating_point() else tensor.float()


def _labels(source: str, domain: str, values: Any) -> torch.Tensor:
    tensor = _tensor(source, domain, "labels", values)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise UsageError(
            f"{source}: labels of domain {domain!r} are {tensor.dtype} of shape {tuple(tensor.shape)}; give one whole "
            "number a sample, from 0"
        )
    return tensor.long()


def _tensor(source: str, domain: str, part: str, values: Any) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(np.asarray(values) if not isinstance(values, torch.Tensor) else values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{source}: {part} of domain {domain!r} are not an array of numbers ({error})") from error
    if tensor.ndim < 1 or tensor.is_complex():
        raise UsageError(f"{source}: {part} of domain {domain!r} are {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor
