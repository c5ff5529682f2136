"""A model's name and the number of classes -> the module, with a head of that size and the weights asked for.

``torchvision:resnet50`` and ``timm:vit_tiny_patch16_224`` are the libraries' own, whose head is replaced;
``PKG.MOD:CALLABLE`` is anybody's, called with ``num_classes`` where it takes that, else without arguments.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from disam_theory.checkpoints import fill, load_model, load_state_dict
from disam_theory.errors import UsageError, first_line, unknown_name
from disam_theory.matching import last_linear

LIBRARIES = ("torchvision", "timm")


class Head(nn.Linear):
    """A linear layer with dropout before it; its weights are named as a plain one's, so that state dicts fit both."""

    def __init__(self, features: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__(features, classes)
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        """(..., features) -> (..., classes)."""
        return super().forward(nn.functional.dropout(input, self.dropout, self.training))


def build(
    spec: str,
    classes: int,
    *,
    image_size: int | None = None,
    weights: Path | None = None,
    pretrained: bool = False,
    dropout: float = 0.0,
    rng: int = 0,
) -> nn.Module:
    """The model ``spec`` for ``classes`` classes, its random weights drawn with seed ``rng``.

    ``image_size``: pixels a side of the images, for the libraries' models that are made for one size, as ViTs are.
    ``weights``: a state dict; a head of another size in it is left out. ``pretrained``: the library's own weights,
    which it fetches or has. ``dropout``: before the head.

    Raises:
        UsageError: an unknown model or library, weights that do not fit, or no head that could be replaced.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is {dropout}; it must be at least 0 and below 1")
    if weights and pretrained:
        raise UsageError("--weights and --pretrained both name the weights to start from; give one")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng)
        library, _, name = spec.partition(":")
        if library in LIBRARIES and name:
            model = _from_library(library, name, pretrained, image_size)
            _replace_head(model, classes, dropout, spec)
        elif pretrained:
            raise UsageError(f"--pretrained is for models of {' and '.join(LIBRARIES)}, not {spec!r}; give --weights")
        else:
            model = load_model(spec, classes)
            if dropout:
                _replace_head(model, classes, dropout, spec)
    return _filled(model, load_state_dict(weights), str(weights)) if weights else model


def fixed_size(model: nn.Module) -> int | None:
    """Pixels a side of the images that a model of the libraries is made for; None where it takes any."""
    config = getattr(model, "pretrained_cfg", {})  # timm's
    if config.get("fixed_input_size"):
        made_for = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
        return int(made_for[0])
    return getattr(model, "image_size", None)  # torchvision's ViTs


def _from_library(library: str, name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    try:
        module = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build of torchvision that does not fit torch
        raise UsageError(
            f"models of {library} need it, and importing it failed ({error}): pip install 'disam_theory[images]'"
        ) from error
    known = module.list_models()
    if name not in known:
        raise _unknown_model(library, name, known)
    make = module.create_model if library == "timm" else module.get_model
    weights = {"pretrained": pretrained} if library == "timm" else {"weights": "DEFAULT" if pretrained else None}
    try:
        model = make(name, **weights)
    except (OSError, RuntimeError) as error:  # no network, no such file, a download that is not what it should be
        raise UsageError(
            f"{library}:{name}: its weights cannot be had ({first_line(error)}); give --weights FILE"
        ) from error
    own = fixed_size(model)
    if own is None or image_size in (None, own):
        return model
    try:
        return make(name, **weights, **{"img_size" if library == "timm" else "image_size": image_size})
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # weights, patches or windows do not fit
        raise UsageError(
            f"{library}:{name} is for images of {own} pixels, and cannot be made for {image_size} "
            f"({first_line(error)}); give --image-size {own}"
        ) from error


def _unknown_model(library: str, name: str, known: list[str]) -> UsageError:
    """With the nearest names only: the libraries know hundreds."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return unknown_name(f"model of {library}:", name, near or known[:10])


def _replace_head(model: nn.Module, classes: int, dropout: float, spec: str) -> None:
    """Put a :class:`Head` where the last linear layer is; the weights of one of the right size stay."""
    old = last_linear(model)
    if old is None:
        raise UsageError(
            f"model {spec!r} has no linear layer to put a head of {classes} classes and dropout in place of"
        )
    head = Head(old.in_features, classes, dropout)
    if old.out_features == classes:
        head.weight, head.bias = old.weight, old.bias
    parent, _, attribute = next(name for name, layer in model.named_modules() if layer is old).rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)


def _filled(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """``state`` in the model; the last layer stays as it is where the state's is of another size (1,000 classes, say).

    Files from before batch norm counted its batches lack that count, which nothing here uses.
    """
    own = model.state_dict()
    last = last_linear(model)
    head = [name for name, layer in model.named_modules() if layer is last]
    left = {f"{name}.{part}" for name in head for part in ("weight", "bias")}
    left = left if any(name in state and state[name].shape != own[name].shape for name in left & own.keys()) else set()
    left |= {name for name in own if name.endswith("num_batches_tracked") and name not in state}
    return fill(model, {**state, **{name: own[name] for name in left if name in own}}, source)
