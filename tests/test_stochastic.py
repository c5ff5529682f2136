"""Traces, densities, angles and sampling errors against known spectra."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import nn

from disam_theory import spectrum, stochastic
from disam_theory.domains import load_suite
from disam_theory.errors import UsageError
from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import SymmetricOperator, domain_hessian
from disam_theory.spectrum import top_eigenpairs
from disam_theory.stochastic import overlap, principal_angles, sampling_error, spectral_density, trace


def matrix_with(values, rng=0, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues in a random basis, and its operator."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(rng)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = ((basis * values) @ basis.T).to(dtype)
    return matrix, SymmetricOperator(len(values), dtype, torch.device("cpu"), lambda v: matrix @ v)


DECAY = [10.0 * 0.8**j for j in range(60)] + [-1.0, -0.5] + [0.01] * 38


@pytest.fixture(params=["XTrace", "Hutch++"])
def method(request, monkeypatch):
    """Both methods of the trace: matrices that fit, and matrices that do not."""
    if request.param == "Hutch++":
        monkeypatch.setattr(stochastic, "MATRICES", 2**60)
    return request.param


@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_trace_lies_within_its_standard_errors(power, method):
    truth = sum(v**power for v in DECAY)
    scores = []
    for rng in range(60):
        _, operator = matrix_with(DECAY, rng=rng)
        estimate = trace(operator, samples=12, power=power, rng=rng)
        assert estimate.products == 24 * power
        scores.append((estimate.value - truth) / estimate.standard_error)
    scores = np.array(scores)
    assert (abs(scores) < 4).mean() > 0.9
    assert abs(np.median(scores)) < 1


SPECTRA = {
    "decaying": DECAY,
    "slowly decaying": [1 / j for j in range(1, 101)],
    "flat": np.linspace(0.9, 1.1, 100),
    "outliers": [*np.linspace(5, 50, 9), *np.linspace(-0.1, 0.3, 91)],
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_the_traces_standard_error_is_the_size_of_its_errors(values, method):
    made = [trace(matrix_with(values, rng=rng)[1], samples=12, rng=rng) for rng in range(200)]
    errors = [estimate.value - sum(values) for estimate in made]
    ratio = np.linalg.norm(errors) / np.linalg.norm([estimate.standard_error for estimate in made])
    assert 0.6 < ratio < 1.15


def test_the_trace_is_unbiased(method):
    _, operator = matrix_with(np.linspace(-1, 3, 30))
    values = np.array([trace(operator, samples=6, rng=rng).value for rng in range(400)])
    assert abs(values.mean() - 30.0) < 4 * values.std() / 20


def test_the_trace_beats_plain_hutchinson_on_a_decaying_spectrum(method):
    errors, plain = [], []
    for rng in range(30):
        matrix, operator = matrix_with(DECAY, rng=rng)
        errors.append(trace(operator, samples=12, rng=rng).value - sum(DECAY))
        probes = torch.randn(100, 24, generator=torch.Generator().manual_seed(rng), dtype=torch.float64)
        plain.append(float((probes * (matrix @ probes)).sum(0).mean()) - sum(DECAY))
    assert np.std(errors) < 0.5 * np.std(plain)


@pytest.mark.parametrize("rows", [0, 2, 100])
def test_the_trace_of_a_large_matrix_holds_as_many_vectors_as_fit(monkeypatch, rows):
    """Each product is of one vector, and what is captured falls with the room, not what is estimated."""
    matrix, _ = matrix_with(DECAY)
    monkeypatch.setattr(spectrum, "BASIS_BYTES", rows * 100 * 8)
    monkeypatch.setattr(stochastic, "MATRICES", 2**60)
    widths, ranks, left = [], set(), stochastic._left

    def product(vector):
        widths.append(vector.ndim)
        return matrix @ vector

    def watched(vector, basis):
        ranks.add(len(basis))
        return left(vector, basis)

    monkeypatch.setattr(stochastic, "_left", watched)
    estimate = trace(SymmetricOperator(100, torch.float64, torch.device("cpu"), product), samples=12)
    assert widths == [1] * 24
    assert ranks == {min(8, max(1, rows))}
    assert abs(estimate.value - sum(DECAY)) < 4 * estimate.standard_error


@pytest.mark.parametrize(
    "values", [[0.0] * 30, [3.0] + [0.0] * 29, [3.0, -2.0, 1.0] + [0.0] * 27, [2.0], [1.0, -4.0]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_low_rank_and_a_small_matrix_have_their_exact_trace(values, dtype, method):
    _, operator = matrix_with(values, dtype=dtype)
    estimate = trace(operator, samples=8)
    round_off = 1e-4 if dtype is torch.float32 else 1e-12
    assert estimate.value == pytest.approx(sum(values), abs=round_off)
    assert estimate.standard_error <= (round_off if method == "Hutch++" else 0.0)


def test_the_density_integrates_to_one_and_has_the_spectrums_moments():
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 190), np.linspace(8, 20, 10)])
    _, operator = matrix_with(values)
    density = spectral_density(operator, vectors=30, steps=60)
    grid, curve = density.grid.numpy(), density.density.numpy()
    assert np.trapezoid(curve, grid) == pytest.approx(1.0, abs=1e-3)
    assert density.products == 30 * 60
    mean = np.trapezoid(curve * grid, grid)
    spread = float((density.weights * density.nodes).sum(1).std()) / math.sqrt(30)
    assert abs(mean - values.mean()) < 4 * spread
    exact = np.exp(-0.5 * ((grid[:, None] - values) / density.width) ** 2).mean(1) / (
        density.width * math.sqrt(2 * math.pi)
    )
    outside = abs(curve - exact) > 4 * density.standard_error.numpy() + 0.02 * exact.max()
    assert outside.mean() < 0.05


def test_the_density_without_bases_is_the_same(monkeypatch):
    """Lanczos' recurrence loses orthogonality here: converged eigenvalues come again, and share one weight."""
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 380), np.linspace(8, 20, 20)])
    _, operator = matrix_with(values, dtype=torch.float32)
    kept = spectral_density(operator, vectors=6, steps=80)
    monkeypatch.setattr(spectrum, "BASIS_BYTES", 6 * 80 * 400 * 4 - 1)
    bare = spectral_density(operator, vectors=6, steps=80, width=kept.width)
    assert (bare.nodes[:, -25:].diff(dim=1) < 1e-4).any()  # a ghost
    assert not (kept.nodes[:, -25:].diff(dim=1) < 1e-4).any()
    assert bare.products == kept.products
    torch.testing.assert_close(bare.weights.sum(1), torch.ones(6, dtype=torch.float64))
    curve = np.interp(kept.grid, bare.grid, bare.density)
    assert np.trapezoid(abs(curve - kept.density.numpy()), kept.grid) < 0.3 * np.trapezoid(
        kept.standard_error.numpy(), kept.grid
    )
    for power in (1, 2):
        moments = [(each.weights * each.nodes**power).sum(1) for each in (kept, bare)]
        torch.testing.assert_close(moments[1], moments[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [[0.0] * 20, [3.0] * 20])
def test_the_recurrence_ends_where_nothing_is_left(monkeypatch, values):
    monkeypatch.setattr(spectrum, "BASIS_BYTES", 0)
    _, operator = matrix_with(values)
    density = spectral_density(operator, vectors=3, steps=10)
    assert float(density.grid[density.density.argmax()]) == pytest.approx(values[0], rel=1e-6, abs=1e-9)


def test_the_density_of_all_lanczos_steps_is_an_exact_quadrature():
    values = torch.linspace(-2, 5, 12, dtype=torch.float64)
    matrix, operator = matrix_with(values)
    density = spectral_density(operator, vectors=2, steps=12)
    first = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    first = first / first.norm()
    for power in (1, 2, 7):
        moment = (density.weights[0] * density.nodes[0] ** power).sum()
        assert float(moment) == pytest.approx(float(first @ torch.linalg.matrix_power(matrix, power) @ first), rel=1e-9)


def test_the_density_of_one_repeated_eigenvalue_is_one_peak():
    _, operator = matrix_with([3.0] * 20)
    density = spectral_density(operator, vectors=3, steps=10)
    peak = density.grid[density.density.argmax()]
    assert float(peak) == pytest.approx(3.0, rel=1e-6)
    assert bool(torch.isfinite(density.density).all())


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.3, 1.0, math.pi / 2])
def test_angles_between_planes_are_exact_also_when_tiny(angle):
    basis = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    first = basis[:, :2]
    tilted = torch.stack([basis[:, 0], math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 2]], dim=1)
    found = principal_angles(first, tilted)
    assert found.tolist() == pytest.approx([0.0, angle], rel=1e-6, abs=1e-14)
    np.testing.assert_allclose(found, subspace_angles(first.numpy(), tilted.numpy())[::-1], atol=1e-12)
    assert overlap(first, tilted) == pytest.approx((1 + math.cos(angle) ** 2) / 2)


def test_the_sampling_error_covers_the_whole_domains_curvature():
    """Along a fixed direction, subsets of a domain miss the whole by about their standard error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    domain = load_suite("digits-rotated").domains[0].to(dtype=torch.float64)
    params = parameters_of(model)
    whole = model_losses(model, [domain])
    pair = top_eigenpairs(domain_hessian(whole, params, domain.name), tol=1e-8)
    exact = sampling_error(whole, params, domain.name, pair.vectors[:, 0], population=len(domain))
    assert exact.value == pytest.approx(float(pair.values[0]), rel=1e-6)
    assert exact.standard_error == 0.0
    scores = []
    for rng in range(80):
        index = torch.randperm(len(domain), generator=torch.Generator().manual_seed(rng))[:100]
        part = model_losses(model, [domain.take(index)])
        estimate = sampling_error(part, params, domain.name, pair.vectors[:, 0], population=len(domain))
        scores.append((estimate.value - exact.value) / estimate.standard_error)
    assert 0.75 < np.std(scores) < 1.3
    assert abs(np.mean(scores)) < 0.4


def test_impossible_requests_are_refused():
    _, operator = matrix_with([1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="samples is 1"):
        trace(operator, samples=1)
    with pytest.raises(UsageError, match="vectors is 1"):
        spectral_density(operator, vectors=1)
    model = nn.Linear(64, 10)
    domain = load_suite("digits-rotated").domains[3]
    losses = model_losses(model, [domain])
    with pytest.raises(UsageError, match="population is 5"):
        sampling_error(losses, parameters_of(model), domain.name, torch.ones(650), population=5)
