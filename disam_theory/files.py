"""Rows as CSV text; writing files whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disam_theory.errors import ComputationError, UsageError


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under a line of column names, in the order in which the names first occur; what a row lacks is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def require_writable(folder: Path) -> None:
    """Make ``folder``, and see that a file can be made in it: before the work, not after it.

    Raises:
        UsageError: a file is in its place.
        ComputationError: it cannot.
    """
    make_folder(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, where they are not there yet.

    Raises:
        UsageError: a file is in the place of one of them.
        ComputationError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        raise UsageError(f"{folder}: cannot be written, as {file} is no folder; give a folder") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path`` and rename, so that a reader sees the old file or the new one, never half.

    Raises:
        UsageError: a file is in the folder's place.
        ComputationError: the disk is full, or the folder cannot be written; what was there before stays.
    """
    data = content.encode() if isinstance(content, str) else content
    make_folder(path.parent)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ComputationError:
    return ComputationError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder")
