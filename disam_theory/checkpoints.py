"""Checkpoint file -> the weights in it, the format found and what else it says -> a model with those weights.

=====================  =============================================================================================
format                 what tells it
=====================  =============================================================================================
DISAM trainer          ``model`` beside ``args``, a Namespace with a ``backbone``; the head is ``fc_class``
DomainBed              ``model_dict`` beside ``model_hparams``; names ``featurizer.*``, ``classifier.*``, ``network.*``
Lightning              ``state_dict`` beside ``pytorch-lightning_version``; a prefix such as ``model.``
timm                   ``state_dict`` (and ``state_dict_ema``) beside ``arch`` and ``version``
ImageNet example       ``state_dict`` beside ``arch`` and ``best_acc1``, of torchvision
disam_theory           ``state_dict`` beside ``settings`` and ``provenance``, or those two in safetensors' metadata
state dict             tensors by name, or those under a key of :data:`CONTAINERS`
=====================  =============================================================================================
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from disam_theory.errors import DisamError, UsageError, failure, unknown_name
from disam_theory.files import write_atomically
from disam_theory.losses import mismatch
from disam_theory.unpickling import check_tensors, load

# where training scripts put the state dict inside a checkpoint, in the order in which they are tried
CONTAINERS = ("state_dict", "model_state_dict", "model_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's prefix, torch.compile's
SCHEMA = "disam-weights/1"  # of the metadata of a file that ``disam-theory convert`` writes
# what of a file's other content is told, where it is made of numbers and strings
TOLD = (
    *("args", "arch", "epoch", "epochs", "global_step", "step", "metric", "best_acc", "best_acc1", "results"),
    *("hyper_parameters", "model_hparams", "model_input_shape", "model_num_classes", "model_num_domains"),
    *("pytorch-lightning_version", "settings", "provenance"),
)
MOST_VALUES, DEEPEST = 10_000, 6  # of what is told

State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file. ``forms`` has them under the names of the architecture, then as the file has them."""

    forms: tuple[State, ...]
    format: str
    architecture: str | None = None  # as the file says, or as ResNets' names and shapes do
    classes: int | None = None  # outputs of the head, where there is one to see
    left: tuple[str, ...] = ()  # names of tensors that are in the file and not in the first form
    told: Mapping[str, Any] = field(default_factory=dict)  # of what else is in the file: numbers and strings

    @property
    def state(self) -> State:
        """The weights under the names of the architecture."""
        return self.forms[0]


def load_state_dict(path: Path) -> State:
    """The weights in the file at ``path``; see :func:`read`."""
    return read(path).state


def read(path: Path, *, averaged: bool = False) -> Checkpoint:
    """The checkpoint at ``path``; ``averaged`` takes timm's moving average of the weights in place of the last ones.

    Raises:
        UsageError: what :func:`disam_theory.unpickling.load` refuses, and a file without weights, or with weights
            that are NaN, Inf or no ordinary tensors, which it names.
    """
    content, metadata = load(path)
    entries = _entries(content)
    if entries is None:
        raise UsageError(f"{path}: holds a {type(content).__name__}, no state dict; expected {_expected()}")
    if averaged and _entries(entries.get("state_dict_ema")) is None:
        raise UsageError(f"{path}: holds no moving average (state_dict_ema); leave --ema away")
    found = _recognised(entries, metadata, "state_dict_ema" if averaged else "state_dict")
    if not found.state:
        keys = ", ".join(str(key)[:40] for key in list(entries)[:8]) or "none"
        raise UsageError(f"{path}: holds no state dict; expected {_expected()}; its keys: {keys}")
    check_tensors(path, found.forms[-1])
    return found


def _expected() -> str:
    return f"tensors by name, or one of {', '.join(CONTAINERS)}"


def _entries(value: Any) -> dict[Any, Any] | None:
    """A plain copy of a dict, whose own methods a file may have replaced."""
    return dict(dict.items(value)) if isinstance(value, dict) else None


# --- formats ---


def _recognised(entries: dict[Any, Any], metadata: Mapping[str, str], key: str) -> Checkpoint:
    if (ours := _entries(_parsed(metadata).get(SCHEMA))) is not None:
        told = _told(ours)
        kind = f"disam_theory, converted from {told.get('format')}"
        return _plain(kind, _tensors(entries), _text(told.get("architecture")), told)
    told = _told(entries) | _told(_parsed(metadata))
    settings = _entries(entries.get("settings")) or _entries(_parsed(metadata).get("settings"))
    weights = _tensors(_entries(entries.get(key)) or {})
    if settings:
        return _plain("disam_theory", weights or _tensors(entries), _text(settings.get("model")), told)
    arguments = entries.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else _entries(arguments) or {}
    if "model_hparams" in entries and _entries(entries.get("model_dict")):
        return _domainbed(_tensors(entries["model_dict"]), told)
    if _text(arguments.get("backbone")) and _entries(entries.get("model")):
        return _disam(_tensors(entries["model"]), arguments["backbone"], told)
    if "pytorch-lightning_version" in entries:
        return _plain("Lightning", weights, None, told)
    name = _text(entries.get("arch"))
    if name and weights and "best_acc1" in entries:
        return _plain("ImageNet example", weights, f"torchvision:{name}", told)
    if name and weights and "version" in entries:  # without args it is the name of a class
        return _plain("timm", weights, f"timm:{name.partition('.')[0]}" if arguments else None, told)
    return _plain("state dict", _searched(entries), None, told)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _parsed(metadata: Mapping[str, str]) -> dict[Any, Any]:
    """A safetensors file's metadata, those that are JSON read as such."""
    parsed: dict[Any, Any] = {}
    for name, text in metadata.items():
        try:
            parsed[name] = json.loads(text)
        except (ValueError, RecursionError):
            parsed[name] = text
    return parsed


def _searched(entries: dict[Any, Any]) -> State:
    """The tensors at the top or, where a key of :data:`CONTAINERS` leads on, below; not for ever, as files may loop."""
    for _ in range(DEEPEST):
        below = next((found for key in CONTAINERS if (found := _entries(entries.get(key)))), None)
        if below is None:
            return _tensors(entries)
        entries = below
    return {}


def _tensors(entries: Any) -> State:
    """The tensors by name, without the attributes that a file may have put on them."""
    values = _entries(entries) or {}
    return {str(name): Tensor.detach(value) for name, value in values.items() if isinstance(value, Tensor)}


def _plain(kind: str, state: State, architecture: str | None, told: Mapping[str, Any]) -> Checkpoint:
    unwrapped, left = _unwrapped(state), tuple[str, ...]()
    if kind == "Lightning":  # the network is an attribute of the LightningModule
        prefix = _shared_prefix(unwrapped) or _resnet_prefix(unwrapped)
        left = tuple(name for name in unwrapped if not name.startswith(prefix))
        unwrapped = _unwrapped(below(unwrapped, prefix))
    return Checkpoint(
        _different(unwrapped, state),
        kind,
        architecture or infer_resnet(unwrapped),
        _head_outputs(unwrapped),
        left,
        told,
    )


def _resnet_prefix(state: State) -> str:
    """Of the one part that is a ResNet, beside others such as a loss with weights; empty without one or with two."""
    firsts = dict.fromkeys(f"{name.partition('.')[0]}." for name in state)
    found = [first for first in firsts if infer_resnet(_unwrapped(below(state, first)))]
    return found[0] if len(found) == 1 else ""


def _disam(state: State, backbone: str, told: Mapping[str, Any]) -> Checkpoint:
    """The official trainer's ResNet; its dropout before the head has no weights and is off in evaluation."""
    head = {"fc_class.weight": "fc.weight", "fc_class.bias": "fc.bias"}
    renamed = {head.get(name, name): value for name, value in _unwrapped(state).items()}
    architecture = infer_resnet(renamed) or f"torchvision:{backbone}"
    return Checkpoint(_different(renamed, state), "DISAM trainer", architecture, _head_outputs(renamed), told=told)


def _domainbed(state: State, told: Mapping[str, Any]) -> Checkpoint:
    """An algorithm's featurizer and classifier; ERM and its kin have both a second time, as ``network.0`` and ``.1``.

    Left out are parts that do not make the prediction, such as a discriminator.
    """
    pair = {name: value for name, value in state.items() if name.startswith(("featurizer.", "classifier."))}
    again = below(state, "network.")
    body = below(pair, "featurizer.network.")
    head = below(pair, "classifier.")
    joined = body | {f"fc.{name}": value for name, value in head.items()}
    forms = _different(*([joined] if body and head else []), *([pair] if pair else []), again, state)
    left = tuple(name for name in state if name not in pair and not name.startswith("network."))
    classes = told.get("model_num_classes")
    return Checkpoint(
        forms,
        "DomainBed",
        infer_resnet(joined),
        classes if isinstance(classes, int) else _head_outputs(forms[0]),
        left if pair else (),
        told,
    )


def _different(*forms: State) -> tuple[State, ...]:
    """The forms that hold something, each set of names once."""
    kept: list[State] = []
    for form in forms:
        if form and all(form.keys() != other.keys() for other in kept):
            kept.append(form)
    return tuple(kept) or ({},)


def _unwrapped(state: State) -> State:
    while prefix := next((p for p in WRAPPERS if state and all(name.startswith(p) for name in state)), None):
        state = below(state, prefix)
    return state


def _shared_prefix(state: State) -> str:
    firsts = {name.partition(".")[0] for name in state if "." in name}
    return f"{firsts.pop()}." if len(firsts) == 1 and all("." in name for name in state) else ""


def below(state: State, prefix: str) -> State:
    """What has ``prefix`` in its name, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _head_outputs(state: State) -> int | None:
    """The number of rows of the last matrix with a bias of that length: of the head, where there is one."""
    for name, value in reversed(state.items()):
        if value.ndim == 2 and name.endswith("weight"):
            bias = state.get(f"{name.removesuffix('weight')}bias")
            return len(value) if bias is not None and bias.shape == value.shape[:1] else None
    return None


RESNETS: dict[tuple[tuple[int, ...], bool], str] = {  # blocks a stage, whether they are bottlenecks -> name
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def infer_resnet(state: Mapping[str, Tensor]) -> str | None:
    """``torchvision:resnetN`` where names and shapes are those of He et al. 2016, else None: no other net has them."""
    blocks = tuple(sum(f"layer{stage}.{j}.bn1.weight" in state for j in range(64)) for stage in range(1, 5))
    deep = "layer1.0.conv3.weight" in state
    inner = state.get("layer1.0.conv2.weight")  # wider in WideResNet, of groups in ResNeXt
    if inner is None or tuple(inner.shape) != (64, 64, 3, 3) or "fc.weight" not in state:
        return None
    stem = state.get("conv1.weight")  # timm's variants have another
    name = RESNETS.get((blocks, deep)) if stem is not None and tuple(stem.shape) == (64, 3, 7, 7) else None
    return f"torchvision:{name}" if name else None


def _told(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """Numbers and strings of what the file says about its weights, no more than :data:`MOST_VALUES`."""
    budget = [MOST_VALUES]
    known = {
        name: _jsonable(entries[name], budget, DEEPEST) for name in (*TOLD, "architecture", "format") if name in entries
    }
    return {name: value for name, value in known.items() if value is not None}


def _jsonable(value: Any, budget: list[int], depth: int) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value[:1000].encode(errors="replace").decode()
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if (entries := _entries(value)) is not None:
        pairs = list(entries.items())[: budget[0] + 1]
        return {str(key)[:200]: _jsonable(item, budget, depth - 1) for key, item in pairs}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, budget, depth - 1) for item in value[: budget[0] + 1]]
    return None


# --- models ---


def load_model(spec: str, classes: int | None = None) -> nn.Module:
    """The module that ``PKG.MOD:CALLABLE`` returns when called without arguments; the current folder can hold it.

    Where ``classes`` is given, a callable that takes ``num_classes`` gets it.
    """
    factory = imported(spec, "model", "disam_theory.models:digits_mlp")
    try:
        model = factory(num_classes=classes) if classes and _takes(factory, "num_classes") else factory()
    except DisamError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"model {spec!r}: calling it failed ({failure(error)})") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def imported(spec: str, kind: str, example: str) -> Callable[..., Any]:
    """The callable that ``PKG.MOD:CALLABLE`` names; ``kind`` of thing and ``example`` are for the messages.

    Raises:
        UsageError: not of that form, a module that cannot be imported, or no such callable in it.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{kind} {spec!r} is not of the form PKG.MOD:CALLABLE, such as {example}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"{kind} {spec!r}: cannot import {module_name!r} ({error})") from error
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"{kind} {spec!r}: cannot import {module_name!r} ({failure(error)})") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise unknown_name(f"callable in {module_name!r}:", attribute, names)
    return found


def _takes(factory: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(factory).parameters
    except ValueError:  # a callable written in C may have no signature
        return False


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Load ``state`` into ``model``, every name and shape matching; returns the model.

    Raises:
        UsageError: names or shapes differ; the message lists which.
    """
    if difference := mismatch(model.state_dict(), state):
        raise UsageError(f"{source} does not fit the model: {difference}; give the architecture it was saved from")
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:  # values that cannot be copied into the model's
        raise UsageError(f"{source} does not fit the model: {' '.join(str(error).split())}") from error
    return model


def write(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write ``state`` as safetensors, with ``about`` as JSON in its metadata under :data:`SCHEMA`.

    Under this one name, as safetensors writes several in an order that changes.
    """
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    write_atomically(path, safetensors.torch.save(tensors, {SCHEMA: json.dumps(about)}))
