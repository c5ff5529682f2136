"""What the verbs of the command line share: where they compute, what they print and which files they leave."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from disam_theory import progress
from disam_theory.errors import ComputationError, DisamError, UsageError, first_line
from disam_theory.files import write_atomically
from disam_theory.provenance import one_line


def deliver(arguments: argparse.Namespace, texts: Mapping[str, str], record: dict[str, Any]) -> None:
    """Write ``VERB.json`` and ``VERB.csv`` where asked for, and print what was asked for."""
    name = arguments.verb
    progress.wipe()
    with printed_anyway(texts[arguments.format]):
        if arguments.out:
            write_atomically(arguments.out / f"{name}.json", texts["json"])
            write_atomically(arguments.out / f"{name}.csv", f"# {one_line(record)}\n{texts['csv']}")
    put(texts[arguments.format])


@contextlib.contextmanager
def printed_anyway(text: str) -> Iterator[None]:
    """What was asked for is printed also where a folder cannot take it, or it would be lost."""
    try:
        yield
    except DisamError:
        progress.wipe()
        put(text)
        raise


def put(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with Path(os.devnull).open("wb") as nowhere:  # what is left in the buffer would fail again at the end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise ComputationError(f"standard output: cannot be written ({error.strerror})") from error


def device_of(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not available here ({first_line(error)}); use cpu") from error
    return device


def name_corrupt(corrupt: Sequence[str]) -> None:
    """All the images that were left out."""
    if corrupt:
        progress.say(f"{len(corrupt)} left out: {'; '.join(corrupt)}")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def short_paths(paths: Iterable[str]) -> list[str]:
    """The paths without the folders that all share, but with one folder at least."""
    names = [Path(path).absolute() for path in paths]
    shared = Path(os.path.commonpath([name.parent.parent for name in names]))
    return [str(name.relative_to(shared)) for name in names]
