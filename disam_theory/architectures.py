"""(checkpoint, architecture as named by the user or the file, number of classes) -> the model with its weights.

An architecture is named as in :mod:`disam_theory.backbones`. What a file says of it is used where that builds a model
of torchvision, of timm or of :mod:`disam_theory.models`; anything else would import and run what a file names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from disam_theory import backbones
from disam_theory.checkpoints import Checkpoint, State, below, fill
from disam_theory.errors import UsageError

TRUSTED = ("torchvision:", "timm:", "disam_theory.models:")


def resolve(checkpoint: Checkpoint, spec: str | None, source: str) -> str:
    """``spec`` where the user gave it, else what the file says.

    Raises:
        UsageError: neither says it, or the file names code that is not of :data:`TRUSTED`.
    """
    named = checkpoint.architecture
    if spec is not None:
        return spec
    if named is None:
        raise UsageError(
            f"{source} ({checkpoint.format}) does not say its architecture; give --model torchvision:NAME, timm:NAME "
            "or PKG.MOD:CALLABLE"
        )
    if not named.startswith(TRUSTED):
        raise UsageError(
            f"{source} says its architecture is {named}, which would run code; give --model {named} if it is to"
        )
    return named


def model_of(
    checkpoint: Checkpoint, spec: str | None, classes: int | None, source: str, *, image_size: int | None = None
) -> nn.Module:
    """The model :func:`resolve` names, for ``classes`` classes, or as many as the checkpoint's head has.

    ``image_size``: pixels a side of the images, for models that are made for one size.

    Raises:
        UsageError: the architecture is not known, or the weights do not fit it: what is missing, unexpected, misshapen.
    """
    architecture = resolve(checkpoint, spec, source)
    outputs = checkpoint.classes
    library = architecture.partition(":")[0] in backbones.LIBRARIES
    if library and outputs and classes and outputs != classes:
        raise UsageError(
            f"{source}: its head has {outputs} classes and the data have {classes}; give the data of the same classes "
            "in the same order"
        )
    if library and not (outputs or classes):
        raise UsageError(
            f"{source}: no head to see the number of classes from; its last matrix has no bias of its length"
        )
    model = backbones.build(architecture, classes or outputs or 0, image_size=image_size)
    try:
        return fitted(model, checkpoint, source)
    except UsageError as error:
        if checkpoint.architecture not in (None, architecture):
            raise UsageError(f"{source} is of {checkpoint.architecture}, not of {architecture}: {error}") from error
        if library and (size := backbones.fixed_size(model)):
            raise UsageError(f"{error}, or images of the size it was trained on: these have {size} pixels") from error
        raise


def fitted(model: nn.Module, checkpoint: Checkpoint, source: str) -> nn.Module:
    """``checkpoint`` in ``model``: in the first of its forms that fits, below a prefix, or with its head renamed.

    Raises:
        UsageError: none fits; the message is of the form that differs in the fewest names.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    candidates = [
        _with_counts(_with_head(candidate, own), own)
        for form in checkpoint.forms
        for candidate in (form, *_prefixed(form, own, source))
    ]
    best = min(candidates, key=lambda state: _distance(state, own))  # the first of the best
    return fill(model, best, source)


def _distance(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    shared = own.keys() & state.keys()
    return len(own.keys() ^ state.keys()) + sum(own[name].shape != state[name].shape for name in shared)


def _prefixed(form: State, own: Mapping[str, Tensor], source: str) -> Iterator[State]:
    """What lies below a prefix of ``form`` under all the model's names."""
    first = f".{next(iter(own), '')}"
    prefixes = [name.removesuffix(first[1:]) for name in form if name.endswith(first)]
    whole = [prefix for prefix in prefixes if all(prefix + name in form for name in own)]
    if len(whole) > 1:
        raise UsageError(
            f"{source} holds the model {len(whole)} times, below {', '.join(whole)}; keep the one that is meant"
        )
    yield from (below(form, prefix) for prefix in whole)


def _with_head(state: State, own: Mapping[str, Tensor]) -> State:
    """With one layer renamed where the model's names lack just that one: ``fc_class``, ``fc.1``, ``classifier``."""
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    theirs = {name.rpartition(".")[2]: name for name in extra}
    ours = {name.rpartition(".")[2]: name for name in missing if not name.endswith("num_batches_tracked")}
    one_layer = (
        len({name.rpartition(".")[0] for name in extra}) == len({n.rpartition(".")[0] for n in ours.values()}) == 1
    )
    if not one_layer or theirs.keys() != ours.keys() or "weight" not in ours:
        return state
    renamed = {theirs[part]: ours[part] for part in ours}
    return {renamed.get(name, name): value for name, value in state.items()}


def _with_counts(state: State, own: Mapping[str, Tensor]) -> State:
    """Files from before batch norm counted its batches lack that count, which nothing here uses."""
    counts = {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    return {**state, **counts}
