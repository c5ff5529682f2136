"""Five spectra (four domains and pooled), top 5, relative residual 1e-3: ours against the peers, side by side.

``python benchmarks/spectra.py [cnn resnet vit] [--repeats 3] [--peers curvlinops hessian-eigenthings]``; prints a
Markdown table of medians and of the medians of ratios. Residuals are recomputed alike for all, in float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import scipy.sparse.linalg
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import domains, trained

from disam_theory.domains import Domain
from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import Curvature, twice_differentiable
from disam_theory.spectrum import domain_spectra

K, TOL = 5, 1e-3
SAMPLES = {"cnn": 256, "resnet": 96, "vit": 32}  # in total
Vectors = dict[str, Tensor]  # (n, K) by name of the spectrum


def groups(data: list[Domain]) -> dict[str, list[Domain]]:
    """The data of each spectrum: every domain alone, and all."""
    return {**{d.name: [d] for d in data}, "pooled": data}


def ours(model: nn.Module, data: list[Domain]) -> Vectors:
    """All spectra in lockstep."""
    curvature = Curvature(model_losses(model, data, chunk=64), parameters_of(model))
    return {name: pairs.vectors for name, pairs in domain_spectra(curvature, K, tol=TOL).items()}


def curvlinops(model: nn.Module, data: list[Domain]) -> Vectors:
    """A Hessian operator a spectrum, and SciPy's ARPACK."""
    from curvlinops import HessianLinearOperator

    found = {}
    for name, part in groups(data).items():
        batches = [(x, y) for d in part for x, y in zip(d.inputs.split(64), d.labels.split(64), strict=True)]
        parameters = [p for p in model.parameters() if p.requires_grad]
        operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False)
        _, vectors = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=K, which="LA", tol=TOL)
        found[name] = torch.from_numpy(vectors.copy()).flip(1)
    return found


def eigenthings(model: nn.Module, data: list[Domain]) -> Vectors:
    """hessian-eigenthings' own Lanczos; its batch means are weighted alike, so batches are of one size here."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    found = {}
    for name, part in groups(data).items():
        inputs, labels = torch.cat([d.inputs for d in part]), torch.cat([d.labels for d in part])
        operator = HessianOperator(model, [(inputs, labels)], supervised_loss(nn.CrossEntropyLoss()))
        result = lanczos(operator, k=K, tol=TOL, which="LA", max_iter=40, seed=0)
        vectors = result.eigenvectors
        found[name] = vectors if vectors.shape[1] == K else vectors.T
    return found


METHODS: dict[str, Callable[[nn.Module, list[Domain]], Vectors]] = {
    "ours": ours,
    "curvlinops": curvlinops,
    "hessian-eigenthings": eigenthings,
}


def largest_residual(model: nn.Module, data: list[Domain], found: Vectors) -> float:
    r"""$\max\lVert Hv-\theta v\rVert/|\theta|$ over all spectra and pairs, in float64."""
    wide = trained_copy(model)
    curvature = Curvature(model_losses(wide, [d.to(dtype=torch.float64) for d in data], chunk=64), parameters_of(wide))
    weights = {
        **dict(zip([d.name for d in data], torch.eye(len(data)), strict=True)),
        "pooled": torch.tensor(curvature.losses.shares),
    }
    worst = 0.0
    for name, vectors in found.items():
        operator = curvature.operator(weights[name])
        for vector in vectors.double().T:
            unit = vector / vector.norm()
            image = operator.matvec(unit)
            value = unit @ image
            worst = max(worst, float((image - value * unit).norm() / value.abs()))
    return worst


def trained_copy(model: nn.Module) -> nn.Module:
    """The model in float64, apart from the original."""
    import copy

    return copy.deepcopy(model).double()


def main() -> None:
    """Measure in turn, so that a slow spell of the machine meets every method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(SAMPLES), metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["curvlinops", "hessian-eigenthings"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, top {K}, "
        f"tol {TOL:g}, {arguments.repeats} repeats"
    )
    print(
        "| model | method | seconds (median) | ratio to ours, median | largest relative residual |\n"
        "|---|---|---|---|---|"
    )
    for name in arguments.models:
        data = domains(SAMPLES[name])
        model = trained(name, data)
        seconds: dict[str, list[float]] = {method: [] for method in ["ours", *arguments.peers]}
        residuals = {}
        for _ in range(arguments.repeats):
            for method in seconds:
                start = time.perf_counter()
                with twice_differentiable():  # the peers leave this to their user
                    found = METHODS[method](model, data)
                seconds[method].append(time.perf_counter() - start)
                if method not in residuals:
                    residuals[method] = largest_residual(model, data, found)
        for method, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, seconds["ours"], strict=True))
            print(
                f"| {name} | {method} | {statistics.median(times):.1f} | {ratio:.2f} | {residuals[method]:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
