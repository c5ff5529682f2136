"""One checkpoint, every tool: the top eigenvalues and the trace of the same Hessian.

``python benchmarks/oracles.py``; a Markdown table for the digits MLP (tanh, 20 epochs of Adam) on the pooled rotated
digits. The exact row is ``numpy.linalg.eigvalsh`` of the dense float64 Hessian by double backward, restricted to
the head, which is small enough; PyHessian, curvlinops and hessian-eigenthings see the head as a model of its own.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disam_theory.domains import Domain, load_suite
from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import hessian
from disam_theory.spectrum import top_eigenpairs
from disam_theory.stochastic import trace

K, TOL = 3, 1e-3


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained head of 10 classes on 20 tanh features: 210 parameters."""
    torch.manual_seed(0)
    suite = load_suite("digits-rotated")
    inputs, labels = (torch.cat([getattr(d, which) for d in suite.domains]) for which in ("inputs", "labels"))
    model = nn.Sequential(nn.Linear(inputs.shape[1], 20), nn.Tanh(), nn.Linear(20, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model[2], model[:2](inputs).detach(), labels


def exact(head: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[np.ndarray, float]:
    """Top eigenvalues and trace of the dense Hessian."""
    parameters = [p.detach().double().requires_grad_(True) for p in head.parameters()]
    loss = nn.functional.cross_entropy(nn.functional.linear(inputs.double(), *parameters), labels)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    dense = torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows]).numpy()
    return np.linalg.eigvalsh(dense)[::-1][:K], float(np.trace(dense))


def ours(head: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[np.ndarray, float]:
    """By this package."""
    losses = model_losses(head, [Domain("all", inputs, labels)], chunk=500)
    operator = hessian(losses, parameters_of(head), weights=[1.0])
    return top_eigenpairs(operator, K, tol=TOL).values.numpy(), trace(operator).value


def curvlinops(head: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[np.ndarray, float]:
    """SciPy's ARPACK on its operator, and its XTrace."""
    from curvlinops import HessianLinearOperator, xtrace

    batches = list(zip(inputs.split(500), labels.split(500), strict=True))
    operator = HessianLinearOperator(
        head, nn.CrossEntropyLoss(), list(head.parameters()), batches, check_deterministic=False
    )
    values = scipy.sparse.linalg.eigsh(operator.to_scipy(), k=K, which="LA", tol=TOL, return_eigenvectors=False)
    return np.sort(values)[::-1], float(xtrace(operator, 40))


def eigenthings(head: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[np.ndarray, float]:
    """Its Lanczos of a given number of steps, beyond 50 without reorthogonalisation unless asked for, and with ghosts.

    The whole set is one batch, as it weights batches alike.
    """
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(head, [(inputs, labels)], supervised_loss(nn.CrossEntropyLoss()))
    values = lanczos(operator, k=K, tol=TOL, which="LA", max_iter=50, seed=0).eigenvalues
    return np.sort(np.asarray(values))[::-1], float("nan")


def pyhessian(head: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[np.ndarray, float]:
    """Its power iteration with deflation, and its Hutchinson trace."""
    from pyhessian import hessian as peer

    found = peer(head, nn.CrossEntropyLoss(), data=(inputs, labels), cuda=False)
    return np.array(found.eigenvalues(top_n=K, tol=TOL)[0]), float(np.mean(found.trace()))


def main() -> None:
    """A Markdown table."""
    warnings.filterwarnings("ignore")
    head, inputs, labels = problem()
    print("| tool | " + " | ".join(f"lambda_{j + 1}" for j in range(K)) + " | trace | worst relative error |")
    print("|---" * (K + 3) + "|")
    truth = exact(head, inputs, labels)[0]
    for tool in (exact, ours, curvlinops, eigenthings, pyhessian):
        values, found = tool(head, inputs, labels)
        worst = np.max(np.abs(values - truth) / truth)
        print(f"| {tool.__name__} | " + " | ".join(f"{v:.6f}" for v in values) + f" | {found:.4f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
