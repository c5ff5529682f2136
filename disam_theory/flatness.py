r"""(kept weights of runs on one split, its unseen domain) -> gradient variance and sharpness there, exactly, in stacks.

For networks all of whose parameters are those of linear layers, where a sample's gradient in a layer is the outer
product of its error $\delta$ and its input $a$: its norm is $\lVert\delta\rVert\lVert a\rVert$ and no gradient of a
single sample is ever formed (Goodfellow 2015). :mod:`disam_theory.sharpness` estimates the same for any network.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from disam_theory.domains import Domain
from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import Params
from disam_theory.perturbations import ascent_step, dot
from disam_theory.study import Block, Study

BATCH = 32  # of the gradient variance: the paper's batch
RADIUS = 0.05  # of the sharpness, for all algorithms: the paper's default rho


@dataclass(frozen=True)
class Flatness:
    """Of R runs on one domain."""

    gradient_variance: Tensor  # (R,)
    sharpness: Tensor  # (R,)


@dataclass(frozen=True)
class Kept:
    """Of one arm's runs on the unseen domain, at the steps whose weights were kept."""

    steps: tuple[int, ...]
    gradient_variance: np.ndarray  # (S, H, steps)
    sharpness: np.ndarray  # (S, H, steps)


def flatness(model: nn.Module, params: Params, domain: Domain, *, batch_size: int, rho: float) -> Flatness:
    r"""$\mathrm{Var}\{\nabla L(w;B)\}$ and the one-step sharpness of ``domain``'s loss at stacked weights (R, ...).

    The variance $\mathbb E\lVert g_B-\mathbb Eg_B\rVert^2$ is over the subsets $B$ of ``batch_size`` of the n samples;
    :func:`disam_theory.sharpness.gradient_variance` estimates it from some of them.
    It is $(\frac1b-\frac1n)\frac1{n-1}\sum_j\lVert g_j-\bar g\rVert^2$ (Cochran 1977, Sec. 2.6):
    b scales all alike. The sharpness is $L(w+\rho\,g/\lVert g\rVert)-L(w)$ (Foret et al. 2021), as
    :func:`disam_theory.sharpness.sam_sharpness`.

    Raises:
        UsageError: a parameter that is not a linear layer's, or more samples in a batch than there are.
        ComputationError: a value is not finite.
    """
    n = len(domain)
    if not 1 <= batch_size <= n:
        raise UsageError(f"batch_size is {batch_size} and domain {domain.name!r} has {n} samples")
    squares, mean = vmap(lambda w: _gradients(model, w, domain))(params)
    spread = (squares - n * dot(mean, mean, 1)) / (n - 1)
    step = ascent_step(mean, torch.full_like(squares, rho))
    loss = vmap(lambda w: nn.functional.cross_entropy(functional_call(model, w, (domain.inputs,)), domain.labels))
    rise = loss({name: p + step[name] for name, p in params.items()}) - loss(params)
    found = Flatness((1 / batch_size - 1 / n) * spread, rise)
    if not bool(torch.isfinite(found.gradient_variance + found.sharpness).all()):
        raise ComputationError(f"a gradient on domain {domain.name!r} is NaN or Inf; check the weights")
    return found


def _gradients(model: nn.Module, params: Params, domain: Domain) -> tuple[Tensor, Params]:
    r"""$\sum_j\lVert g_j\rVert^2$ over the samples' gradients, and their mean, at one run's weights."""
    layers = _linear_layers(model)
    n = len(domain)
    errors = {name: next(iter(params.values())).new_zeros(n, layer.out_features) for name, layer in layers.items()}

    def total(added: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        given: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, layer in layers.items():

                def add(_: nn.Module, inputs: Any, output: Tensor, name: str = name) -> Tensor:
                    given[name] = inputs[0]
                    return output + added[name]

                hooks.enter_context(layer.register_forward_hook(add))
            outputs = functional_call(model, params, (domain.inputs,))
        return nn.functional.cross_entropy(outputs, domain.labels, reduction="sum"), given

    deltas, given = grad(total, has_aux=True)(errors)
    squares = torch.zeros_like(next(iter(deltas.values()))[0, 0])
    mean: Params = {}
    for name, layer in layers.items():
        delta, inputs = deltas[name], given[name]
        length = inputs.square().sum(-1) + (0.0 if layer.bias is None else 1.0)
        squares = squares + (delta.square().sum(-1) * length).sum()
        mean[f"{name}.weight"] = delta.mT @ inputs / n
        if layer.bias is not None:
            mean[f"{name}.bias"] = delta.mean(0)
    return squares, {name: mean[name] for name in params}


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    theirs = {f"{name}.{kind}" for name, layer in layers.items() for kind, _ in layer.named_parameters()}
    if others := {name for name, _ in model.named_parameters()} - theirs:
        raise UsageError(
            f"parameter {min(others)!r} is not of a linear layer; use disam_theory.sharpness for this model"
        )
    return layers


@lru_cache(maxsize=8)  # a claim and a figure ask for the same
def kept_flatness(study: Study, suite: str) -> dict[str, Kept]:
    """Of each minibatch arm of ``suite`` whose weights the study kept, by :attr:`Settings.name`; in float64.

    Raises:
        ComputationError: no weights were kept.
    """
    blocks = [b for b in study.blocks if b.suite == suite and b.snapshot_seeds and b.arms[0].sampling == "pooled"]
    if not blocks:
        raise ComputationError(
            f"the study keeps no weights of minibatch runs on {suite!r}; give a block snapshot_steps"
        )
    return {name: kept for block in blocks for name, kept in _kept(study, block).items()}


def _kept(study: Study, block: Block) -> dict[str, Kept]:
    """Of each arm of one block."""
    model = study.model().double()
    records = [record for arm in block.arms for record in study.records(block.suite, **asdict(arm))]
    runs = {(r.settings.name, r.seed, r.held_out): r for r in records if r.seed < block.snapshot_seeds}
    names, seeds, domains = (list(dict.fromkeys(keys)) for keys in zip(*runs, strict=True))
    shape = (len(names), len(block.snapshot_steps))
    values = np.empty((2, len(seeds), len(domains), *shape))
    for i, seed in enumerate(seeds):
        for k, domain in enumerate(domains):
            alike = [runs[name, seed, domain] for name in names]
            kept = [record.weights(step) for record in alike for step in block.snapshot_steps]
            stacked = {name: torch.stack([w[name].double() for w in kept]) for name in kept[0]}
            unseen = study.split(alike[0]).unseen.to(dtype=torch.float64)
            found = flatness(model, stacked, unseen, batch_size=BATCH, rho=RADIUS)
            values[:, i, k] = torch.stack([found.gradient_variance, found.sharpness]).reshape(2, *shape).numpy()
    return {name: Kept(block.snapshot_steps, *values[:, :, :, a]) for a, name in enumerate(names)}
