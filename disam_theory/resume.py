"""What an interrupted command has found, kept beside its results for the same command to go on from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from disam_theory.errors import DisamError, UsageError
from disam_theory.files import require_writable, write_atomically
from disam_theory.spectrum import InterruptedSpectra, StarvedSpectra


class Interrupted(DisamError):
    """The user stopped the command."""

    exit_code = 130


class Kept:
    """``FOLDER/.NAME.partial``, a safetensors file: finished ``rows`` by name and ``vectors`` (n, j) by name.

    A context: written when it is left by an error or by Ctrl-C, removed when it is left in peace. A file whose ``key``
    differs belongs to another command and is not used. Without a folder nothing is kept; of several processes one
    ``writes``.
    """

    def __init__(self, folder: Path | None, name: str, key: Any, *, writes: bool = True) -> None:
        self._path = folder / f".{name}.partial" if folder else None
        self._writes = writes
        self._key = json.dumps(key, sort_keys=True, default=str)
        self.rows: dict[str, Any] = {}
        self.vectors: dict[str, Tensor] = {}
        if self._path and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") == self._key:
                    self.rows = json.loads(metadata["rows"])
                    self.vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            raise UsageError(f"{path}: cannot be gone on from ({error}); remove it to start anew") from error

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The vectors whose names begin with ``prefix``, by the rest of the name."""
        return {name.removeprefix(prefix): v for name, v in self.vectors.items() if name.startswith(prefix)}

    @contextlib.contextmanager
    def going_on(self, prefix: str) -> Iterator[dict[str, Tensor]]:
        """The vectors kept under ``prefix``, to start a search from; the vectors of one that ends early are kept."""
        try:
            yield self.under(prefix)
        except (InterruptedSpectra, StarvedSpectra) as stop:
            self.vectors |= {prefix + name: vectors.cpu() for name, vectors in stop.vectors.items()}
            raise

    def __enter__(self) -> Kept:
        if self._path and self._writes:
            require_writable(self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path and self._writes and error is None:
            self._path.unlink(missing_ok=True)
        elif self._path and self._writes and (self.rows or self.vectors):
            tensors = {name: vectors.contiguous().cpu() for name, vectors in self.vectors.items()}
            metadata = {"key": self._key, "rows": json.dumps(self.rows)}
            write_atomically(self._path, safetensors.torch.save(tensors, metadata))
        if isinstance(error, KeyboardInterrupt):
            advice = (
                "the same command goes on from what is done" if self._path else "give --out DIR to keep what is done"
            )
            raise Interrupted(f"interrupted; {advice}") from error
