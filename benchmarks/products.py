"""One Hessian product against one gradient, in each mode, and its peak memory. ``python benchmarks/products.py``.

Of a pass with two vectors the time is that of one of the two. ``linearize`` is ``torch.func.linearize`` of the gradient
of every micro-batch by itself, which the mode ``linearised`` is measured against. The first call of each, which builds
what is kept, is reported apart.
Times are medians over products taken in turn with gradients. Memory is the peak of the process above what it held
before, each measurement in a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.func import grad, linearize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import domains, peak_added, trained

from disam_theory.domains import Domain
from disam_theory.losses import DomainLosses, Params, model_losses, parameters_of
from disam_theory.operators import Curvature, domain_gradients, twice_differentiable

SAMPLES, CHUNK, REPEATS = 64, 32, 9
WHAT = (
    "gradient",
    "kept",
    "kept, no memory",
    "kept, no memory, quarter batches",
    "forward",
    "linearised",
    "linearised, no memory",
    "linearize",
    "kept, two vectors",
    "batched, two vectors",
    "curvlinops",
    "hessian-eigenthings",
)


def work(name: str, what: str) -> Callable[[], object]:
    """A function that makes one gradient or one product of the pooled loss."""
    data = domains(SAMPLES)
    model = trained(name, data, steps=3)
    chunk = CHUNK // 4 if what.endswith("quarter batches") else CHUNK
    losses, params = model_losses(model, data, chunk=chunk), parameters_of(model)
    if what == "gradient":
        return lambda: domain_gradients(losses, params)
    if what in PEERS:
        return PEERS[what](model, data)
    if what == "linearize":
        return linearize_each(losses, params)
    curvature = Curvature(losses, params, mode=what.split(",")[0], memory=0 if "no memory" in what else 16 * 2**30)
    operator = curvature.operator(losses.shares)
    block = torch.randn(curvature.size, vectors_of(what), generator=torch.Generator().manual_seed(0))
    return lambda: operator.matmat(block)


def vectors_of(what: str) -> int:
    """How many vectors a pass multiplies."""
    return 2 if what.endswith("two vectors") else 1


def linearize_each(losses: DomainLosses, params: Params) -> Callable[[], object]:
    """The gradient of every micro-batch linearised once, by ``torch.func.linearize``."""
    tangent = {key: torch.randn_like(p) for key, p in params.items()}
    kept: list[Callable[[Params], Params]] = []

    def product() -> list[Params]:
        with twice_differentiable():
            if not kept:
                kept.extend(linearize(grad(part), params)[1] for parts in losses.parts for part in parts)
            return [linear(tangent) for linear in kept]

    return product


def curvlinops(model: nn.Module, data: list[Domain]) -> Callable[[], object]:
    """Its Hessian operator over the same micro-batches."""
    from curvlinops import HessianLinearOperator

    batches = [batch for d in data for batch in zip(d.inputs.split(CHUNK), d.labels.split(CHUNK), strict=True)]
    parameters = list(model.parameters())
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False)
    vector = torch.randn(operator.shape[1])
    return lambda: operator @ vector


def eigenthings(model: nn.Module, data: list[Domain]) -> Callable[[], object]:
    """Its Hessian operator over batches of the same size."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    inputs, labels = torch.cat([d.inputs for d in data]), torch.cat([d.labels for d in data])
    batches = list(zip(inputs.split(CHUNK), labels.split(CHUNK), strict=True))
    operator = HessianOperator(model, batches, supervised_loss(nn.CrossEntropyLoss()))
    vector = torch.randn(operator.size)
    return lambda: operator.matvec(vector)


PEERS = {"curvlinops": curvlinops, "hessian-eigenthings": eigenthings}


def peak(name: str, what: str) -> float:
    """MiB that three calls add to the peak of a fresh process."""
    command = [sys.executable, __file__, "--peak", name, what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def seconds(function: Callable[[], object]) -> float:
    """Of one call; the peers leave it to their user to switch fused attention off."""
    start = time.perf_counter()
    with twice_differentiable():
        function()
    return time.perf_counter() - start


def main() -> None:
    """A Markdown table."""
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--peak"]:
        function = work(*sys.argv[2:4])
        with twice_differentiable():
            print(peak_added(lambda: [function() for _ in range(3)]))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {SAMPLES} samples, batches of {CHUNK}")
    print(
        "| model | what | first call, gradients | then, gradients, median | peak MiB above start |\n"
        "|---|---|---|---|---|"
    )
    for name in ("cnn", "resnet", "vit"):
        functions = {what: work(name, what) for what in WHAT}
        first = {what: seconds(function) for what, function in functions.items()}
        times: dict[str, list[float]] = {what: [] for what in WHAT}
        for _ in range(REPEATS):
            for what, function in functions.items():
                times[what].append(seconds(function))
        unit = statistics.median(times["gradient"])
        for what in WHAT:
            ratio = statistics.median(a / b for a, b in zip(times[what], times["gradient"], strict=True))
            ratio /= vectors_of(what)
            print(f"| {name} | {what} | {first[what] / unit:.1f} | {ratio:.2f} | {peak(name, what):.0f} |", flush=True)


if __name__ == "__main__":
    main()
