"""The smartwatch recordings that ship in seglearn -> windows of fixed length, with exercise, person and recording.

Ten people did seven shoulder exercises with either arm, about twenty repetitions each: 140 recordings by the
accelerometer and the gyroscope of a watch at 50 Hz (Burns et al. 2018, arXiv 1802.01489).

NumPy can read the file only by unpickling it, which runs what a file says. Here the pickle is taken apart by
:mod:`pickletools`, which builds and calls nothing: the arrays' numbers lie in it as strings. They are found by their
place, which is sure as only the one known file is read, by its SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import pickletools
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from disam_theory.errors import UsageError

SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
EXERCISES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")  # the class of each label, as the file names them
RECORDINGS = 140
WINDOW, BLOCK = 100, 5  # samples: windows of 2 s, averaged over blocks of 0.1 s
UNITS = np.array([0.5, 0.5, 0.5, 1.5, 1.5, 1.5])  # acceleration in 0.5 g, angular velocity in 1.5 rad/s


@functools.cache
def windows() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (n, 120), and of each its label, its person (1 to 10) and its recording (0 to 139), (n,) each.

    A recording is cut into windows that do not overlap; a rest shorter than a window is left out. A window is six
    channels of 20 means, in fixed units near the channels' spread: no statistic of the data, so none of a held-out
    person's, goes into it.

    Raises:
        UsageError: seglearn is not installed, or has another file.
    """
    series, labels, people = recordings(_path())
    cut = [_cut(one) for one in series]
    which = np.repeat(np.arange(len(cut)), [len(one) for one in cut])
    return np.concatenate(cut), labels[which], people[which], which


def _cut(series: np.ndarray) -> np.ndarray:
    """(T, 6) -> (T // 100, 120)."""
    count = len(series) // WINDOW
    blocks = (series[: count * WINDOW] / UNITS).reshape(count, WINDOW // BLOCK, BLOCK, -1)
    return blocks.mean(2).transpose(0, 2, 1).reshape(count, -1)


def recordings(path: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The 140 series (T, 6) of the file, their labels and their people."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); reinstall seglearn") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UsageError(f"{path}: not the file of seglearn 1.2.5, and no other is read; install seglearn==1.2.5")
    pickled = content[10 + int.from_bytes(content[8:10], "little") :]  # behind NumPy's header
    strings = [text for _, text, _ in pickletools.genops(pickled) if isinstance(text, str)]
    numbers = [text.encode("latin1") for text in strings if len(text) >= 8 * RECORDINGS]  # the others are names
    *series, labels, people, _side = numbers
    columns = [np.frombuffer(one, "<f8").reshape(6, -1) for one in series]  # in Fortran's order: a channel a row
    return [c.T for c in columns], np.frombuffer(labels, "<i8"), np.frombuffer(people, "<i8")


def _path() -> Path:
    """Where seglearn has its file; the package is not imported."""
    try:
        installed = distribution("seglearn")
    except PackageNotFoundError as error:
        raise UsageError("the suite watch-subjects needs seglearn: pip install 'disam_theory[watch]'") from error
    return Path(str(installed.locate_file("seglearn/data/watch_dataset.npy")))
