"""Checkpoint file -> state dict -> a model with those weights. Only tensors and plain containers are unpickled."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disam_theory.errors import UsageError, unknown_name
from disam_theory.losses import mismatch

# where training scripts put the state dict inside a checkpoint, in the order in which they are tried
CONTAINERS = ("state_dict", "model_state_dict", "model_dict", "model")
NO_CHECKPOINT = "refused: not a checkpoint of tensors and plain containers that torch.save wrote, or cut short"


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in the file at ``path``, loaded with ``weights_only=True``.

    A plain state dict, or one under a key of :data:`CONTAINERS`; a ``module.`` prefix of DataParallel is removed.

    Raises:
        UsageError: the file is missing, is no checkpoint, needs to unpickle anything but tensors and plain
            containers, or holds no tensors.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of other pickle protocols: they load or are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(f"{path}: refused, as it holds {named[1]}: building that would run code") from error
        raise UsageError(f"{path}: {NO_CHECKPOINT}") from error
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a garbled file makes the unpickler raise whatever its bytes lead to
        raise UsageError(f"{path}: {NO_CHECKPOINT}") from error
    state = _state_in(content)
    if not state:
        raise UsageError(f"{path}: holds no state dict; expected tensors by name, or one of {', '.join(CONTAINERS)}")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _state_in(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for key in CONTAINERS:
        if isinstance(content.get(key), Mapping):
            return _state_in(content[key])
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def load_model(spec: str) -> nn.Module:
    """The module that ``PKG.MOD:CALLABLE`` returns when called without arguments; the current folder can hold it."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"model {spec!r} is not of the form PKG.MOD:CALLABLE, such as disam_theory.models:digits_mlp")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"model {spec!r}: cannot import {module_name!r} ({error})") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise unknown_name(f"callable in {module_name!r}:", attribute, names)
    try:
        model = factory()
    except TypeError as error:
        raise UsageError(f"model {spec!r}: calling it without arguments failed ({error})") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Load ``state`` into ``model``, every name and shape matching; returns the model.

    Raises:
        UsageError: names or shapes differ; the message lists which.
    """
    if difference := mismatch(model.state_dict(), state):
        raise UsageError(f"{source} does not fit the model: {difference}; give the architecture it was saved from")
    model.load_state_dict(dict(state))
    return model
