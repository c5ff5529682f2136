"""Spectra of 20 checkpoints of a run, each started from the one before, against 20 cold starts.

``python benchmarks/along_training.py``; prints products, seconds and their ratios for the digits MLP and the small CNN.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import MODELS, domains

from disam_theory.domains import Domain, load_suite
from disam_theory.losses import Params, model_losses, parameters_of
from disam_theory.models import digits_mlp
from disam_theory.operators import Curvature
from disam_theory.spectrum import Eigenpairs, domain_spectra

K, TOL, CHECKPOINTS, EVERY = 3, 1e-3, 20, 5


def run(model: nn.Module, data: list[Domain]) -> list[Params]:
    """Weights of a run of SGD, every few steps after a first stretch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    inputs, labels = torch.cat([d.inputs for d in data]), torch.cat([d.labels for d in data])
    kept = []
    for step in range(20 + CHECKPOINTS * EVERY):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if step >= 20 and step % EVERY == 0:
            kept.append(parameters_of(model))
    return kept


def spectra(model: nn.Module, data: list[Domain], checkpoints: list[Params], *, warm: bool) -> tuple[int, float]:
    """Products spent and seconds."""
    start, products, last = time.perf_counter(), 0, None
    losses = model_losses(model, data, chunk=64)
    for params in checkpoints:
        found: dict[str, Eigenpairs] = domain_spectra(Curvature(losses, params), K, tol=TOL, start=last)
        products += sum(pairs.products for pairs in found.values())
        last = {name: pairs.vectors for name, pairs in found.items()} if warm else None
    return products, time.perf_counter() - start


def main() -> None:
    """A Markdown table."""
    warnings.filterwarnings("ignore")
    print(
        "| model | products cold | products warm | ratio | seconds cold | seconds warm | ratio |\n"
        "|---|---|---|---|---|---|---|"
    )
    torch.manual_seed(0)
    cases = {
        "digits MLP": (digits_mlp(), list(load_suite("digits-rotated").domains)),
        "cnn": (MODELS["cnn"](), domains(48)),
    }
    for name, (model, data) in cases.items():
        checkpoints = run(model, data)
        cold = spectra(model, data, checkpoints, warm=False)
        warm = spectra(model, data, checkpoints, warm=True)
        ratios = [f"{w / c:.2f}" for w, c in zip(warm, cold, strict=True)]
        print(
            f"| {name} | {cold[0]} | {warm[0]} | {ratios[0]} | {cold[1]:.1f} | {warm[1]:.1f} | {ratios[1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
