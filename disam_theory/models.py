"""Small models for the embedded suites, given to the command line as ``disam_theory.models:digits_mlp``."""

from __future__ import annotations

from torch import nn


def digits_mlp() -> nn.Module:
    """A multilayer perceptron 64-32-10 for 8 x 8 images: smooth (tanh), so that its Hessian exists everywhere."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
