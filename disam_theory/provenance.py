"""What is needed to repeat a computation: version, commit, command, packages, machine."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import disam_theory


@functools.cache
def _fixed() -> dict[str, Any]:
    return {
        "disam_theory": disam_theory.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        **{name: _version(name) for name in ("torch", "numpy", "scipy")},
    }


def provenance(**more: Any) -> dict[str, Any]:
    """The environment and command of this process, with ``more`` (rng, device, dtype, a checkpoint's hash) added."""
    return {**_fixed(), "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), **more}


def one_line(record: Mapping[str, Any]) -> str:
    """A provenance as one line of JSON, for a picture's metadata or the comment that a CSV starts with."""
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": "))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package is imported from, with ``+`` where the tree has changes."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
