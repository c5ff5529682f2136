"""The largest algebraic eigenpairs against dense decompositions, SciPy and curvlinops."""

import itertools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from curvlinops import HessianLinearOperator
from torch import nn

from disam_theory.domains import Domain
from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import SymmetricOperator, hessian
from disam_theory.spectrum import top_eigenpairs

EPS = torch.finfo(torch.float64).eps


def operator(matrix):
    return SymmetricOperator(len(matrix), matrix.dtype, torch.device("cpu"), lambda v: matrix @ v)


def rotated(eigenvalues, rng=0):
    """A dense symmetric matrix with these eigenvalues in a random orthonormal basis."""
    generator = torch.Generator().manual_seed(rng)
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


def symmetric(n, rng):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(rng), dtype=torch.float64)
    return (a + a.T) / 2


SPECTRA = {
    "indefinite": [-50.0, *np.linspace(-3, 3, 25).tolist(), 4.0, 5.0, 7.0],
    "negative definite": [-float(j) for j in range(1, 31)],
    "hessian-like": [40.0, 17.0, 8.0, *np.linspace(-0.3, 0.5, 57).tolist()],
    "clustered": [10.0, 10.0 - 1e-3, 10.0 - 2e-3, *np.linspace(0, 5, 20).tolist()],
    "rank three": [9.0, 4.0, 1.0] + [0.0] * 27,
    "wide": [10.0**j for j in range(-8, 5)],
}


def verify(pairs, matrix, k, tol):
    """What every answer must satisfy, recomputed from the returned vectors."""
    n, wide = len(matrix), matrix.double()
    eps = torch.finfo(matrix.dtype).eps
    scale = max(float(torch.linalg.matrix_norm(wide, 2)), 1e-300)
    vectors = pairs.vectors.double()
    assert pairs.values.shape == pairs.residuals.shape == (k,)
    assert pairs.vectors.shape == (n, k)
    assert pairs.values.dtype == pairs.residuals.dtype == torch.float64
    assert float((vectors.T @ vectors - torch.eye(k)).norm()) <= 20 * k * eps
    explicit = (wide @ vectors - vectors * pairs.values).norm(dim=0)
    assert float((explicit - pairs.residuals).abs().max()) <= 10 * n**0.5 * eps * scale
    assert pairs.values.tolist() == sorted(pairs.values.tolist(), reverse=True)
    exact = torch.linalg.eigvalsh(wide)
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):  # an eigenvalue lies within the residual
        assert float((exact - value).abs().min()) <= float(residual) + 10 * n**0.5 * eps * scale
    if pairs.converged:
        bound = (tol * pairs.values.abs()).clamp(min=200 * eps * scale)
        assert bool((pairs.residuals <= bound).all())


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_algebraic_eigenvalues_are_found(name, k):
    """Largest algebraic, not largest in magnitude; semidefinite and indefinite, of full rank and not."""
    matrix = rotated(SPECTRA[name])
    pairs = top_eigenpairs(operator(matrix), k, tol=1e-9)
    assert pairs.converged
    verify(pairs, matrix, k, 1e-9)
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    scale = float(torch.linalg.matrix_norm(matrix, 2))
    torch.testing.assert_close(pairs.values, exact, rtol=1e-9, atol=100 * EPS * scale)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 60])
@pytest.mark.parametrize("rng", range(3))
def test_random_symmetric_matrices(n, rng):
    matrix = symmetric(n, rng)
    for k in sorted({1, min(3, n), n}):
        pairs = top_eigenpairs(operator(matrix), k, tol=1e-8)
        assert pairs.converged
        verify(pairs, matrix, k, 1e-8)
        exact = torch.linalg.eigvalsh(matrix).flip(0)[:k]
        torch.testing.assert_close(pairs.values, exact, rtol=0, atol=1e-8 * float(exact.abs().max()))


def test_all_eigenpairs_rebuild_the_matrix():
    matrix = symmetric(12, 4)
    pairs = top_eigenpairs(operator(matrix), 12)
    rebuilt = pairs.vectors @ torch.diag(pairs.values) @ pairs.vectors.T
    assert float((rebuilt - matrix).norm()) <= 1e-12 * float(matrix.norm())


@pytest.mark.parametrize("multiple", [0.0, 3.5, -2.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 1), (7, 3), (7, 7)])
def test_multiples_of_the_identity_and_the_zero_matrix(multiple, n, k):
    matrix = multiple * torch.eye(n, dtype=torch.float64)
    pairs = top_eigenpairs(operator(matrix), k)
    assert pairs.converged
    verify(pairs, matrix, k, 1e-4)
    torch.testing.assert_close(pairs.values, torch.full((k,), multiple, dtype=torch.float64), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("k", [2, 3])
def test_an_exactly_multiple_leading_eigenvalue_counts_as_often_as_it_occurs(k):
    matrix = torch.diag(torch.tensor([5.0, 5.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -9.0], dtype=torch.float64))
    pairs = top_eigenpairs(operator(matrix), k)
    torch.testing.assert_close(pairs.values, torch.full((k,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("k", [3, 5])
def test_zero_counts_as_often_as_it_occurs_above_a_negative_eigenvalue(k):
    """Rank two with eigenvalues 5 and -8: the k largest are 5 and zeros, and -8 is the smallest of all."""
    matrix = rotated([5.0, -8.0] + [0.0] * 20)
    pairs = top_eigenpairs(operator(matrix), k)
    expected = torch.tensor([5.0] + [0.0] * (k - 1), dtype=torch.float64)
    torch.testing.assert_close(pairs.values, expected, rtol=1e-12, atol=1e-12)


def test_a_looser_tolerance_still_bounds_the_error():
    r"""$|\theta-\lambda|\le\lVert Hv-\theta v\rVert\le$ tol $|\theta|$."""
    matrix = rotated(SPECTRA["hessian-like"], rng=3)
    for tol in (1e-1, 1e-3, 1e-6):
        pairs = top_eigenpairs(operator(matrix), 3, tol=tol)
        assert pairs.converged
        exact = torch.linalg.eigvalsh(matrix).flip(0)[:3]
        assert bool(((pairs.values - exact).abs() <= tol * exact.abs()).all())
    few, many = (top_eigenpairs(operator(matrix), 3, tol=tol).products for tol in (1e-1, 1e-10))
    assert few < many


def test_a_budget_too_small_is_flagged_and_kept():
    matrix = rotated(np.linspace(0.0, 1.0, 200).tolist())
    calls = itertools.count()
    counted = SymmetricOperator(200, matrix.dtype, torch.device("cpu"), lambda v: (next(calls), matrix @ v)[1])
    pairs = top_eigenpairs(counted, 2, tol=1e-8, max_products=12)
    assert not pairs.converged
    assert pairs.products == next(calls) == 12
    verify(pairs, matrix, 2, 1e-8)
    assert float(pairs.residuals.max()) > 1e-3


def test_products_count_every_call():
    matrix, calls = symmetric(20, 0), itertools.count()
    counted = SymmetricOperator(20, matrix.dtype, torch.device("cpu"), lambda v: (next(calls), matrix @ v)[1])
    assert top_eigenpairs(counted, 2).products == next(calls)


@pytest.mark.parametrize("name", SPECTRA)
def test_float32_answers_have_float32_accuracy(name):
    """The round-off of a float32 product is about eps times the norm, whatever the eigenvalue."""
    matrix = rotated(SPECTRA[name]).float()
    pairs = top_eigenpairs(operator(matrix), 3)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.converged
    verify(pairs, matrix, 3, 1e-4)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:3]
    scale = float(exact.abs().max().clamp(min=float(torch.linalg.matrix_norm(matrix, 2))))
    torch.testing.assert_close(pairs.values, exact, rtol=1e-4, atol=100 * torch.finfo(torch.float32).eps * scale)


def test_the_seed_determines_the_answer_and_the_global_generator_is_left_alone():
    matrix = symmetric(40, 1)
    state = torch.random.get_rng_state()
    first, again = (top_eigenpairs(operator(matrix), 3, rng=5) for _ in range(2))
    other = top_eigenpairs(operator(matrix), 3, rng=6)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(first.vectors, other.vectors, rtol=0, atol=1e-2)  # signs agree too


def test_a_rescaled_matrix_gives_rescaled_eigenvalues():
    matrix = rotated(SPECTRA["indefinite"])
    base = top_eigenpairs(operator(matrix), 2, tol=1e-8)
    for factor in (1e-20, 1e20):
        scaled = top_eigenpairs(operator(factor * matrix), 2, tol=1e-8)
        assert scaled.converged
        torch.testing.assert_close(scaled.values / factor, base.values, rtol=1e-8, atol=0)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_a_count_out_of_range_is_refused(k):
    with pytest.raises(UsageError, match=f"k is {k}; ask for 1 to 5"):
        top_eigenpairs(operator(torch.eye(5)), k)


def test_a_budget_below_the_count_is_refused():
    with pytest.raises(UsageError, match="max_products is 3; 4 eigenpairs need at least 4"):
        top_eigenpairs(operator(torch.eye(5)), 4, max_products=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 4])
def test_a_product_that_is_not_finite_is_an_error(value, at):
    matrix, calls = symmetric(30, 2), itertools.count()

    def matvec(v):
        return torch.full_like(v, value) if next(calls) == at else matrix @ v

    with pytest.raises(ComputationError, match="NaN or Inf"):
        top_eigenpairs(SymmetricOperator(30, torch.float64, torch.device("cpu"), matvec), 2, tol=1e-10)


def test_a_real_network_agrees_with_dense_scipy_and_curvlinops(make_domain):
    """Sharpness of a small network by four ways: dense, ARPACK on ours, ARPACK on curvlinops', and Lanczos here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    domains = [make_domain(f"d{i}", n, rng=i) for i, n in enumerate((30, 11))]
    losses = model_losses(model, domains, chunk=7)
    ours = hessian(losses, parameters_of(model), weights=losses.shares)
    pairs = top_eigenpairs(ours, 4, tol=1e-9)
    assert pairs.converged
    dense = ours.dense()
    verify(pairs, (dense + dense.T) / 2, 4, 1e-9)
    exact = np.linalg.eigvalsh(dense.numpy())
    assert exact[0] < -1e-3  # indefinite, so that algebraic and magnitude are different questions
    everything = Domain("all", torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains]))
    theirs = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(everything.inputs, everything.labels)]
    )
    for view in (ours.to_scipy(), theirs.to_scipy()):
        top = scipy.sparse.linalg.eigsh(view, k=4, which="LA", return_eigenvectors=False)
        np.testing.assert_allclose(pairs.values.numpy(), np.sort(top)[::-1], rtol=1e-9)
    np.testing.assert_allclose(pairs.values.numpy(), exact[::-1][:4], rtol=1e-9)
