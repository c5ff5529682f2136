"""Small models for the embedded suites, given to the command line as ``disam_theory.models:digits_mlp``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


def digits_mlp() -> nn.Module:
    """A multilayer perceptron 64-32-10 for 8 x 8 images: smooth (tanh), so that its Hessian exists everywhere."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def watch_mlp() -> nn.Module:
    """A multilayer perceptron 120-32-7 for the suite watch-subjects: smooth (tanh), as :func:`digits_mlp` is."""
    return nn.Sequential(nn.Linear(120, 32), nn.Tanh(), nn.Linear(32, 7))


class CosineAdapter(nn.Module):
    r"""(image's feature $x$, classes' embeddings $e_c$ of norm one) -> logits $s\cos(x+A(x),e_c)$.

    $A$ is a bottleneck with tanh. Input (..., 1 + C, features), as :func:`pairs` makes it, so that one adapter scores
    any set of classes, those that it was tuned on and others. A residual adapter as in Gao et al. 2021 (CLIP-Adapter);
    it begins with $A=0$, where the logits are those of the frozen features.
    """

    def __init__(self, features: int = 64, bottleneck: int = 16, scale: float = 10.0) -> None:
        super().__init__()
        self.down = nn.Linear(features, bottleneck)
        self.up = nn.Linear(bottleneck, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scale = scale

    def forward(self, pair: Tensor) -> Tensor:
        """Logits (..., C)."""
        x, classes = pair[..., 0, :], pair[..., 1:, :]
        adapted = normalize(x + self.up(torch.tanh(self.down(x))), dim=-1)
        return self.scale * (classes * adapted.unsqueeze(-2)).sum(-1)


def pairs(features: Tensor, classes: Tensor) -> Tensor:
    """Each of ``features`` (n, D) with the same ``classes`` (C, D): (n, 1 + C, D)."""
    return torch.cat([features.unsqueeze(1), classes.expand(len(features), -1, -1)], dim=1)
