"""(model, one sample) -> whether its outputs depend on its parameters in a way that autograd sees."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from disam_theory.errors import UsageError, failure
from disam_theory.losses import Params
from disam_theory.memory import out_of_memory

SHOWN = 3  # names of parameters in a message


@torch.enable_grad()  # also where the caller needs no gradients
def require_dependence(model: nn.Module, inputs: Tensor) -> None:
    """Raise :class:`UsageError` where no parameter has a part in the outputs: every curvature would be found zero."""
    leaves = {name: p.detach().requires_grad_(True) for name, p in model.named_parameters()}
    if leaves and not functional_call(model, leaves, (inputs,)).requires_grad:
        raise UsageError(
            "the model's outputs do not depend on its parameters for autograd; take torch.no_grad(), "
            "torch.inference_mode() and detach() out of its forward"
        )


@torch.enable_grad()
def require_gradients(model: nn.Module, inputs: Tensor, patterns: Sequence[str] = ("*",)) -> None:
    """Raise :class:`UsageError` where parameters act on the outputs unseen by autograd: their curvature would be zero.

    So they do in a part of the model that runs under ``torch.no_grad()``. A parameter that the outputs do not depend on
    is no mistake: noise of a tenth of its size changes nothing. A parameter that autograd sees in one place and not in
    another is not found, nor any where the outputs are not the same twice. ``patterns`` say which are asked about.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}
    asked = [name for name in params if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name in asked:
        params[name].requires_grad_()
    seen = _gradients(functional_call(model, params, (inputs,)), [params[name] for name in asked])
    apart = [name for name, gradient in zip(asked, seen, strict=True) if gradient is None]
    hidden = list(itertools.islice(_acting(model, inputs, params, apart), SHOWN + 1))
    if hidden:
        more = " and others" if len(hidden) > SHOWN else ""
        raise UsageError(
            f"the model's outputs depend on {', '.join(hidden[:SHOWN])}{more}, which autograd does not see, so their "
            "curvature would be found zero; take torch.no_grad() and detach() out of its forward, or make them buffers "
            "to leave them out"
        )


def _gradients(outputs: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of the outputs' sum; None for what autograd does not connect with them."""
    if not outputs.requires_grad:
        return [None] * len(leaves)
    try:
        return torch.autograd.grad(outputs.sum(), leaves, allow_unused=True)
    except Exception as error:  # torch's, or whatever the backward of an operation of the model's own raises
        if out_of_memory(error):
            raise
        raise UsageError(f"the model's outputs cannot be differentiated: {failure(error)}") from error


@torch.no_grad()
def _acting(model: nn.Module, inputs: Tensor, params: Params, names: Sequence[str]) -> Iterator[str]:
    """Those of ``names`` whose parameter changes the outputs; all are tried together first."""
    if not names:
        return
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name in names:
        size = 0.1 * (float(params[name].abs().max()) or 1.0)
        moved[name] = params[name] + size * torch.randn(params[name].shape, generator=generator).to(params[name])

    def outputs(changed: Sequence[str]) -> Tensor:
        return functional_call(model, {**params, **{name: moved[name] for name in changed}}, (inputs,))

    rest = outputs(())
    round_off = 100 * torch.finfo(rest.dtype).eps * rest.abs().max()

    def same(changed: Sequence[str]) -> bool:
        return bool(((outputs(changed) - rest).abs() <= round_off).all())

    if same(()) and not same(names):
        yield from (name for name in names if not same([name]))
