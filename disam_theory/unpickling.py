"""File of weights, by anybody -> its content, or one line that says why not. Nothing in the file is ever run.

Read are safetensors, and what ``torch.save`` wrote: that with ``weights_only=True``, which builds tensors and plain
containers, and :data:`ALLOWED` beside them, whose stand-ins make strings and numbers. The formats are told apart by
their content, not by the file's name.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import safetensors
import torch

from disam_theory.errors import UsageError, first_line

NO_CHECKPOINT = "refused: not a checkpoint of tensors and plain containers that torch.save wrote, or cut short"
REMEDY = "if its source is to be trusted, load it there and save the state dict alone: torch.save(state_dict, FILE)"
FOREIGN = (  # how files begin that people take for checkpoints, and what to do
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file; fetch it with git lfs pull"),
    (b"<!DOCTYPE", "a web page, as a failed download leaves it; download the file again"),
    (b"<html", "a web page, as a failed download leaves it; download the file again"),
    (b"\x89HDF", "HDF5, as Keras and h5py write; save the weights with torch.save or safetensors"),
    (b"GGUF", "GGUF, quantised for inference; give the weights that it was made from"),
    (b"\x93NUMPY", "a NumPy array; save the weights by name with torch.save or safetensors"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)
INSIDE_ZIP = (  # a name in a zip archive that no file of torch.save has, and what the archive is
    (r"(^|/)code/|(^|/)constants\.pkl$", "a TorchScript archive, which is code; save model.state_dict() instead"),
    (r"\.npy$", "a NumPy archive; save the weights by name with torch.save or safetensors"),
    (r"\.weights\.h5$", "a Keras archive; save the weights with torch.save or safetensors"),
)


class _NumberType:
    """Stands for ``numpy.dtype`` while unpickling."""

    def __init__(self, code: str, *flags: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _number(kind: _NumberType, data: bytes) -> Any:
    """Stands for NumPy's ``scalar``: the bytes as a Python number."""
    if not re.fullmatch(r"b1|[fiu][1248]", kind.code) or kind.order not in "<>|=":
        raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({kind.code!r})")
    (value,) = np.frombuffer(data, kind.order + kind.code)
    return value.item()


def _path_text(*parts: str) -> str:
    return str(PurePosixPath(*parts))


# what the official trainer, DomainBed, Lightning and timm put beside the weights
ALLOWED: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": _NumberType,
    "numpy.core.multiarray.scalar": _number,  # NumPy 1
    "numpy._core.multiarray.scalar": _number,  # NumPy 2
    "pathlib.PosixPath": _path_text,
    "pathlib.WindowsPath": _path_text,
    "pathlib._local.PosixPath": _path_text,  # Python 3.13
}


# of what torch itself allows: enough to tell what a pickle holds besides
HARMLESS = re.compile(
    r"torch\.(\w+|_utils\._rebuild\w+|_tensor\._rebuild\w+|nn\.parameter\.Parameter)|collections\.\w+"
)


def load(path: Path) -> tuple[Any, dict[str, str]]:
    """The content of the file at ``path`` and, of a safetensors file, the metadata.

    Raises:
        UsageError: the file is missing, is no checkpoint, is cut short, claims to unpack to far more than it holds,
            or needs anything built but tensors, plain containers and :data:`ALLOWED`, which it names.
    """
    try:
        if not path.exists():
            raise UsageError(f"{path}: no such file")
        if not path.is_file():
            raise UsageError(f"{path}: cannot be read (it is a folder or a device); give the file of weights")
        with path.open("rb") as file:
            head = file.read(512)
            if not head:
                raise UsageError(f"{path}: refused: the file is empty")
            for magic, kind in FOREIGN:
                if head.lower().startswith(magic.lower()):
                    raise UsageError(f"{path}: refused: this is {kind}")
            if _is_safetensors(path, head):
                return _load_safetensors(path)
            _check_archive(path)
            _check_fillers(path, file)
            return _load_pickle(path), {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error


def allowance(path: Path) -> int:
    """The bytes that the content of a file may have: files hold weights as they are, and some name them twice."""
    return max(16 * path.stat().st_size, 2**28)


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By name, or where a length of at most the format's 100 MB is followed by a JSON object."""
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 10**8)


def _load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # beside the format's own errors, element types that torch does not have
        raise UsageError(f"{path}: refused: not a safetensors file, or cut short ({first_line(error)})") from error


def _check_archive(path: Path) -> None:
    """Refuse zip archives that are something else, or that claim to unpack to far more than they hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError:
        raise
    except Exception:  # no zip archive; torch.load says whether it is another format of its own
        return
    for pattern, kind in INSIDE_ZIP:
        if any(re.search(pattern, entry.filename) for entry in entries):
            raise UsageError(f"{path}: refused: this is {kind}")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > allowance(path):
        raise UsageError(
            f"{path}: refused: {path.stat().st_size} bytes that claim to unpack to {claimed}; no checkpoint does"
        )


def _check_fillers(path: Path, file: BinaryIO) -> None:
    """Refuse calls of ``bytearray``, which torch allows and which fill as much memory as a few bytes tell them to."""
    calls = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")
    if any(calls.search(content) for content in _pickles(file)):
        raise UsageError(f"{path}: refused, as it holds builtins.bytearray, which no weights need; {REMEDY}")


def _pickles(file: BinaryIO) -> list[bytes | mmap.mmap]:
    """What may hold pickled instructions: the pickles in a zip archive, or the whole file, which is not read here."""
    try:
        with zipfile.ZipFile(file) as archive:
            return [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith(".pkl")]
    except OSError:
        raise
    except Exception:  # no zip archive, or a garbled one
        return [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)]


def _load_pickle(path: Path) -> Any:
    allowed: list[Any] = [(stand_in, name) for name, stand_in in ALLOWED.items()]
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # where a file is cut short, torch looks for its end before its beginning
            raise UsageError(f"{path}: {NO_CHECKPOINT}") from error
        raise
    except Exception as error:  # a garbled file makes the unpickler raise whatever its bytes lead to
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if name := named[1] if named else _first_global(path):
            raise UsageError(f"{path}: refused, as it holds {name}: building that would run code; {REMEDY}") from error
        raise UsageError(f"{path}: {NO_CHECKPOINT}") from error


def _first_global(path: Path) -> str | None:
    """The first name outside torch that a pickle refers to, of a protocol that torch does not read."""
    with path.open("rb") as file:
        content: list[Any] = _pickles(file)[:1]
    strings: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(content[0]):
            if isinstance(argument, str):
                strings.append(argument)
            name = {"GLOBAL": strings[-1:], "STACK_GLOBAL": strings[-2:]}.get(operation.name, [])
            full = ".".join(name).replace(" ", ".")
            if full and not HARMLESS.fullmatch(full) and full not in ALLOWED:
                return full
    except Exception:  # whatever garbled bytes lead to; then there is no name to tell
        return None
    return None


def check_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`UsageError` for tensors that no model can be filled with, by name."""
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > allowance(path):
        raise UsageError(
            f"{path}: refused: {path.stat().st_size} bytes whose tensors claim {claimed}; no checkpoint's do"
        )
    for name, value in state.items():
        if unfit := _unfit(value):
            raise UsageError(f"{path}: {name!r} is {unfit}; save it as an ordinary tensor of numbers")
    if broken := {name: count for name, value in state.items() if (count := _not_finite(value))}:
        shown = ", ".join(f"{name!r} has {count} NaN or Inf" for name, count in list(broken.items())[:3])
        more = f" and {len(broken) - 3} tensors more" if len(broken) > 3 else ""
        raise UsageError(f"{path}: {shown}{more}; the training diverged, so take an earlier checkpoint")


def _unfit(value: torch.Tensor) -> str | None:
    if value.is_meta:
        return "a tensor without data (on the device meta)"
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.is_quantized or value.is_complex():
        return f"a tensor of {value.dtype}"
    return None


def _not_finite(value: torch.Tensor) -> int:
    if not value.is_floating_point():
        return 0
    wide = value if value.element_size() > 1 else value.float()  # isfinite knows no numbers of 8 bits
    return int((~torch.isfinite(wide)).sum())
