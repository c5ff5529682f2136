"""The sharpness measures against closed forms of quadratic losses, brute force and hand-written loops."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from disam_theory.domains import Domain
from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import DomainLosses, cross_entropy, model_losses, parameters_of, quadratic_losses
from disam_theory.operators import domain_gradients, domain_hessian
from disam_theory.sharpness import (
    adaptive_sharpness,
    average_case_sharpness,
    fake_flat_minimum,
    flat_minimum_warnings,
    gradient_variance,
    hallucinated_minimum,
    perturbation_shares,
    sam_sharpness,
    worst_case_sharpness,
)
from disam_theory.spectrum import top_eigenpairs

SIZES = (5, 2, 9)
ALPHA = np.array(SIZES) / sum(SIZES)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def at(*values):
    return {"w": tensor(values)}


def quadratics(kind, n=6, rng=0):
    """Three quadratics and a point: (losses, params, gradients (4, n), Hessians (4, n, n)), the last pooled."""
    generator = np.random.default_rng(rng)
    a = generator.normal(size=(3, n, n))
    curvatures = {
        "convex": a @ a.transpose(0, 2, 1),
        "concave": -a @ a.transpose(0, 2, 1),
        "indefinite": a + a.transpose(0, 2, 1),
    }[kind]
    minima, w = generator.normal(size=(3, n)), generator.normal(size=n)
    losses = quadratic_losses(tensor(minima), tensor(curvatures), tensor([3.0, -1.0, 0.5]), sizes=SIZES)
    hessians = np.concatenate([curvatures, np.tensordot(ALPHA, curvatures, 1)[None]])
    gradients = np.einsum("mij,mj->mi", curvatures, w - minima)
    return losses, at(*w), np.concatenate([gradients, (ALPHA @ gradients)[None]]), hessians


def rise(gradient, hessian, step):
    """What a quadratic rises by along ``step``."""
    return gradient @ step + 0.5 * step @ hessian @ step


def largest_rise(gradient, hessian, rho):
    """The trust-region subproblem's maximum: (mu I - H) eps = g, mu >= max(lambda_max, 0), |eps| = rho or mu = 0."""
    values, vectors = np.linalg.eigh(hessian)
    along = vectors.T @ gradient

    def length(mu):
        return np.linalg.norm(along / (mu - values))

    if values[-1] < 0 and length(0.0) <= rho:
        mu = 0.0
    else:
        low = max(values[-1], 0.0)
        low += 1e-12 * (1 + abs(low))
        mu = scipy.optimize.brentq(lambda m: length(m) - rho, low, low + np.linalg.norm(gradient) / rho, xtol=1e-14)
    return rise(gradient, hessian, vectors @ (along / (mu - values)))


def function_losses(*functions, sizes=None):
    """Domain losses of one vector ``w`` written as functions of it."""
    parts = tuple((lambda params, f=f: f(params["w"]),) for f in functions)
    return DomainLosses(tuple(f"f{i}" for i in range(len(parts))), tuple(sizes or (1,) * len(parts)), parts)


def mlp(width=5, act=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), act(), nn.Linear(width, 3)).double()


@pytest.fixture
def net(make_domain):
    """A tanh network on three domains of unequal size: (model, domains, losses, params)."""
    domains = [make_domain(f"d{i}", n, rng=i) for i, n in enumerate((6, 11, 4))]
    model = mlp()
    return model, domains, model_losses(model, domains), parameters_of(model)


# --- one-step SAM ---


@pytest.mark.parametrize("kind", ["convex", "concave", "indefinite"])
def test_sam_sharpness_of_quadratics_is_the_closed_form(kind):
    losses, params, gradients, hessians = quadratics(kind)
    lengths = np.linalg.norm(gradients, axis=1)
    curvature = np.einsum("mi,mij,mj->m", gradients, hessians, gradients) / lengths**2
    found = sam_sharpness(losses, params, rho=0.3)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), 0.3 * lengths + 0.5 * 0.3**2 * curvature, rtol=1e-11)


def test_sam_sharpness_of_a_network_is_that_of_a_hand_written_step(net):
    model, domains, losses, params = net
    inputs, labels = torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains])
    expected = []
    for x, y in [*((d.inputs, d.labels) for d in domains), (inputs, labels)]:
        moved = mlp()
        before = cross_entropy(moved(x), y).mean()
        gradients = torch.autograd.grad(before, list(moved.parameters()))
        length = sum(float((g**2).sum()) for g in gradients) ** 0.5
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradients, strict=True):
                p += 0.05 * g / length
            expected.append(float(cross_entropy(moved(x), y).mean() - before))
    torch.testing.assert_close(sam_sharpness(losses, params, rho=0.05), tensor(expected), rtol=1e-10, atol=0)
    chunked = model_losses(model, domains, chunk=3)
    torch.testing.assert_close(sam_sharpness(chunked, params, rho=0.05), tensor(expected), rtol=1e-10, atol=0)


def test_a_zero_gradient_gives_a_zero_step_to_that_loss_alone():
    minima = tensor([[0.0, 0.0], [1.0, 0.0]])
    losses = quadratic_losses(minima, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), tensor([1.0, 1.0]))
    for measure in (sam_sharpness, adaptive_sharpness):
        assert measure(losses, at(1.0, 0.0), rho=0.1).tolist()[1] == 0.0
        assert measure(losses, at(1.0, 0.0), rho=0.1)[0] > 0
    assert sam_sharpness(losses, at(0.5, 0.0), rho=0.1).tolist() == pytest.approx([0.055, 0.055, 0.0])


def test_float32_parameters_give_the_float64_value_to_float32_accuracy(net):
    model, domains, losses, params = net
    single = model_losses(model.float(), [d.to(dtype=torch.float32) for d in domains])
    found = sam_sharpness(single, parameters_of(model), rho=0.5)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, sam_sharpness(losses, params, rho=0.5), rtol=1e-5, atol=1e-6)


# --- worst case in the ball ---


@pytest.mark.parametrize("rho", [0.1, 2.0])
@pytest.mark.parametrize("kind", ["convex", "concave", "indefinite"])
def test_worst_case_of_quadratics_reaches_the_trust_region_maximum(kind, rho):
    losses, params, gradients, hessians = quadratics(kind)
    exact = np.array([largest_rise(g, h, rho) for g, h in zip(gradients, hessians, strict=True)])
    found = worst_case_sharpness(losses, params, rho=rho, steps=100, restarts=3, rng=0)
    # a concave quadratic's maximum inside the ball is approached at a rate set by its condition number, over 100 here
    np.testing.assert_allclose(found.lower.numpy(), exact, rtol=2e-3 if kind == "concave" else 1e-10)
    assert bool((found.lower.numpy() <= exact * (1 + 1e-10)).all())
    assert bool((found.upper.numpy() >= exact).all())
    top = np.linalg.eigvalsh(hessians)[:, -1]
    formula = rho * np.linalg.norm(gradients, axis=1) + 0.5 * rho**2 * np.maximum(top, 0.0)
    np.testing.assert_allclose(found.upper.numpy(), formula, rtol=2e-4)
    assert found.converged == (True,) * 4


def test_a_maximum_inside_the_ball_is_found():
    """A concave quadratic whose maximum is nearer than rho: the rise is g^T A^-1 g / 2, whatever rho."""
    losses = quadratic_losses(tensor([[0.3, -0.2]]), tensor([[[-2.0, 0.0], [0.0, -1.0]]]), tensor([0.0]))
    found = worst_case_sharpness(losses, at(0.0, 0.0), rho=5.0, steps=100, restarts=0, rng=0)
    assert found.lower.tolist() == pytest.approx([0.09 + 0.02] * 2, rel=1e-8)


def test_worst_case_of_a_wavy_function_against_a_grid():
    waves = [lambda w: torch.sin(3 * w[0]) + torch.cos(2 * w[1]) * w[0], lambda w: torch.sin(w[0] * w[1]) - w[1] ** 3]
    losses = function_losses(*waves, sizes=(1, 3))
    w, rho = tensor([0.4, -0.3]), 1.0
    radii, angles = torch.meshgrid(torch.linspace(0, 1, 300), torch.linspace(0, 2 * math.pi, 700), indexing="ij")
    grid = w[:, None] + rho * torch.stack([radii * angles.cos(), radii * angles.sin()]).double().flatten(1)
    on_grid = torch.stack([wave(grid) - wave(w) for wave in waves])
    exact = torch.stack([*on_grid, 0.25 * on_grid[0] + 0.75 * on_grid[1]]).max(1).values
    found = worst_case_sharpness(losses, {"w": w}, rho=rho, steps=40, restarts=5, rng=1)
    torch.testing.assert_close(found.lower, exact, rtol=1e-3, atol=0)
    assert bool((found.lower >= exact - 1e-9).all())


def test_restarts_leave_a_stationary_point_that_the_gradient_cannot():
    """At a minimum the first start is w itself; from the sphere the rise is rho^2 lambda_max / 2, also the estimate."""
    losses = quadratic_losses(tensor([[1.0, 2.0]]), tensor([[[4.0, 0.0], [0.0, 1.0]]]), tensor([7.0]))
    stuck = worst_case_sharpness(losses, at(1.0, 2.0), rho=0.5, steps=30, restarts=0, rng=0)
    free = worst_case_sharpness(losses, at(1.0, 2.0), rho=0.5, steps=30, restarts=1, rng=0)
    assert stuck.lower.tolist() == [0.0, 0.0]
    assert free.lower.tolist() == pytest.approx([0.5] * 2, rel=1e-9)
    assert stuck.upper.tolist() == pytest.approx([0.5] * 2, rel=1e-9)


def test_more_restarts_and_steps_never_lower_the_bound(net):
    *_, losses, params = net
    sam = sam_sharpness(losses, params, rho=0.5)
    few = worst_case_sharpness(losses, params, rho=0.5, steps=1, restarts=0, rng=3).lower
    more = worst_case_sharpness(losses, params, rho=0.5, steps=15, restarts=0, rng=3).lower
    most = worst_case_sharpness(losses, params, rho=0.5, steps=15, restarts=2, rng=3).lower
    assert bool((sam <= few).all() and (few <= more).all() and (more <= most).all())
    assert bool((more > sam).all())


def test_worst_case_never_falls_below_zero():
    """Near a sharp maximum every point that one trial reaches is lower, and no perturbation is the best one."""
    hill = tensor([[[-1e6, -3e5], [-3e5, -1e6]]])
    losses = quadratic_losses(tensor([[1e-9, 0.0]]), hill, tensor([0.0]))
    found = worst_case_sharpness(losses, at(0.0, 0.0), rho=1.0, steps=1, restarts=2, rng=0)
    assert float(sam_sharpness(losses, at(0.0, 0.0), rho=1.0)[0]) < -1e5
    assert found.lower.tolist() == [0.0, 0.0]


def test_the_upper_estimate_leaves_out_the_third_and_higher_orders():
    """At the minimum of w^4 gradient and curvature are zero, and so is the estimate; the maximum is rho^4."""
    found = worst_case_sharpness(function_losses(lambda w: (w**4).sum()), at(0.0), rho=0.5, steps=5, restarts=1, rng=0)
    assert found.upper.tolist() == [0.0, 0.0]
    assert found.lower.tolist() == pytest.approx([0.5**4] * 2)


# --- average case ---


def test_average_case_of_quadratics_is_half_the_trace():
    losses, params, _, hessians = quadratics("indefinite")
    sigma, samples = 0.7, 400
    found = average_case_sharpness(losses, params, sigma=sigma, samples=samples, rng=0)
    exact = 0.5 * sigma**2 * np.trace(hessians, axis1=1, axis2=2)
    error = sigma**2 * np.linalg.norm(hessians, axis=(1, 2)) / math.sqrt(2 * samples)
    np.testing.assert_allclose(found.standard_error.numpy(), error, rtol=0.25)
    assert bool((np.abs(found.mean.numpy() - exact) < 4 * error).all())
    np.testing.assert_allclose(found.mean.numpy()[-1], ALPHA @ found.mean.numpy()[:-1], rtol=1e-12)


def test_average_case_of_an_isotropic_quadratic_has_the_chi_squared_mean_and_error():
    """With H = I the pair mean is |eps|^2 / 2 exactly: recomputed from the same draws."""
    losses = quadratic_losses(tensor([[1.0, 2.0, 3.0]]), torch.eye(3, dtype=torch.float64)[None], tensor([0.0]))
    found = average_case_sharpness(losses, at(0.0, 0.0, 0.0), sigma=0.2, samples=9, rng=4)
    generator = torch.Generator().manual_seed(4)
    draws = torch.stack([torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(9)])
    halves = 0.5 * 0.04 * (draws**2).sum(1)
    assert float(found.mean[0]) == pytest.approx(float(halves.mean()), rel=1e-12)
    assert float(found.standard_error[0]) == pytest.approx(float(halves.std()) / 3, rel=1e-10)


def test_antithetic_pairs_cancel_a_linear_and_a_cubic_loss():
    losses = function_losses(lambda w: 3 * w[0] - w[1], lambda w: w[0] ** 3 + w[1] ** 3)
    found = average_case_sharpness(losses, at(0.0, 0.0), sigma=1.0, samples=5, rng=0)
    torch.testing.assert_close(found.mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)
    assert float(found.standard_error.max()) < 1e-14


def test_the_standard_error_of_the_average_is_that_of_repeated_runs(net):
    *_, losses, params = net
    runs = [average_case_sharpness(losses, params, sigma=0.3, samples=20, rng=rng) for rng in range(60)]
    spread = torch.stack([run.mean for run in runs]).std(0)
    reported = torch.stack([run.standard_error for run in runs]).square().mean(0).sqrt()
    assert bool(((reported / spread > 0.7) & (reported / spread < 1.4)).all())


# --- adaptive ---


def test_element_wise_adaptive_sharpness_is_the_closed_form():
    losses, params, gradients, hessians = quadratics("indefinite")
    w = params["w"].numpy()
    steps = [0.4 * w**2 * g / np.linalg.norm(w * g) for g in gradients]
    expected = [rise(g, h, step) for g, h, step in zip(gradients, hessians, steps, strict=True)]
    np.testing.assert_allclose(adaptive_sharpness(losses, params, rho=0.4).numpy(), expected, rtol=1e-11)


def test_filter_wise_adaptive_sharpness_scales_rows_by_their_length(make_domain):
    domain = make_domain(n=7, shape=(2, 5, 5))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double()
    losses, params = model_losses(model, [domain]), parameters_of(model)
    before = cross_entropy(model(domain.inputs), domain.labels).mean()
    before.backward()
    scales = []
    for p in model.parameters():
        scale = p.detach().abs()
        if p.ndim > 1:
            for j in range(len(p)):
                scale[j] = float((p.detach()[j] ** 2).sum() ** 0.5)
        scales.append(scale)
    length = sum(float(((s * p.grad) ** 2).sum()) for s, p in zip(scales, model.parameters(), strict=True)) ** 0.5
    with torch.no_grad():
        for s, p in zip(scales, model.parameters(), strict=True):
            p += 0.3 * s**2 * p.grad / length
        expected = float(cross_entropy(model(domain.inputs), domain.labels).mean() - before)
    found = adaptive_sharpness(losses, params, rho=0.3, normalisation="filter")
    assert found.tolist() == pytest.approx([expected] * 2, rel=1e-10)
    assert float(adaptive_sharpness(losses, params, rho=0.3)[0]) != pytest.approx(expected, rel=1e-3)


def relu_nets(make_domain, factors):
    """The losses of a two-layer ReLU net, its weights, and weights of the same function with neurons rescaled."""
    domains = [make_domain(f"d{i}", n, rng=i) for i, n in enumerate((6, 9))]
    model = mlp(act=nn.ReLU)
    params, factors = parameters_of(model), tensor(factors)
    scaled = {
        "0.weight": factors[:, None] * params["0.weight"],
        "0.bias": factors * params["0.bias"],
        "2.weight": params["2.weight"] / factors,
        "2.bias": params["2.bias"],
    }
    losses = model_losses(model, domains)
    torch.testing.assert_close(losses(scaled), losses(params), rtol=1e-12, atol=0)  # the function is the same
    return losses, params, scaled


@pytest.mark.parametrize(
    ("factors", "invariant"),
    [([7.0] * 5, ("element", "filter")), ([0.01, 0.3, 1.0, 5.0, 40.0], ("element",))],
    ids=["layer by c and 1/c", "neuron by neuron"],
)
def test_adaptive_sharpness_is_invariant_under_rescalings_of_a_relu_net_and_sam_sharpness_is_not(
    make_domain, factors, invariant
):
    losses, params, scaled = relu_nets(make_domain, factors)
    for normalisation in ("element", "filter"):
        here, there = (adaptive_sharpness(losses, p, rho=0.5, normalisation=normalisation) for p in (params, scaled))
        assert torch.allclose(here, there, rtol=1e-9, atol=0) == (normalisation in invariant)
    here, there = (sam_sharpness(losses, p, rho=0.05) for p in (params, scaled))
    assert bool(((there / here - 1).abs() > 0.2).all())


# --- variance of minibatch gradients ---


def sample_gradients(model, domain, params):
    """The gradient of each sample's loss, (n, parameters)."""
    alone = [Domain("one", domain.inputs[[j, j]], domain.labels[[j, j]]) for j in range(len(domain))]
    return domain_gradients(model_losses(model, alone), params)


def union_of(domains):
    return Domain("union", torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradient_variance_is_that_of_all_batches_that_can_be_drawn(net, size):
    """The mean of |g_B - E g_B|^2 over every subset of the domain (and of the union), enumerated."""
    model, domains, _, params = net
    found = gradient_variance(model, domains, params, batch_size=size, batches=600, rng=0)
    for domain, mean, error in zip([*domains, union_of(domains)], found.mean, found.standard_error, strict=True):
        each = sample_gradients(model, domain, params)
        batches = torch.stack([each[list(b)].mean(0) for b in itertools.combinations(range(len(domain)), size)])
        exact = float((batches - batches.mean(0)).square().sum(1).mean())
        assert abs(float(mean) - exact) < 4 * float(error)
        assert float(error) < 0.1 * exact


def test_gradient_variance_does_not_depend_on_the_micro_batches(net):
    model, domains, _, params = net
    options = {"batch_size": 3, "batches": 5, "rng": 0}
    whole, cut = (gradient_variance(model, domains, params, chunk=chunk, **options) for chunk in (1024, 2))
    torch.testing.assert_close(cut.mean, whole.mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(cut.standard_error, whole.standard_error, rtol=1e-10, atol=0)


def test_gradient_variance_of_the_drawn_batches_is_the_sample_variance(net):
    """The draws of the first domain repeated by hand: torch's unbiased variance, summed over the parameters."""
    model, domains, _, params = net
    found = gradient_variance(model, domains, params, batch_size=2, batches=4, rng=5)
    generator = torch.Generator().manual_seed(5)
    each = sample_gradients(model, domains[0], params)
    drawn = torch.stack([each[torch.randperm(6, generator=generator)[:2]].mean(0) for _ in range(4)])
    assert float(found.mean[0]) == pytest.approx(float(drawn.var(0).sum()), rel=1e-10)
    left_out = torch.stack([drawn[[b != k for b in range(4)]].var(0).sum() for k in range(4)])
    jackknife = float((0.75 * (left_out - left_out.mean()).square().sum()).sqrt())
    assert float(found.standard_error[0]) == pytest.approx(jackknife, rel=1e-8)


def test_a_batch_of_the_whole_domain_has_no_variance(make_domain):
    domains, model = [make_domain("a", 6), make_domain("b", 6, rng=1)], mlp()
    found = gradient_variance(model, domains, parameters_of(model), batch_size=6, batches=5, rng=0)
    assert float(found.mean[:2].max()) < 1e-28
    assert float(found.mean[2]) > 1e-4  # half of the union still varies


def test_gradient_variance_is_unbiased_and_its_error_is_that_of_repeated_runs(make_domain):
    model, domain = mlp(width=2), make_domain(n=5)
    params = parameters_of(model)
    each = sample_gradients(model, domain, params)
    exact = float((each - each.mean(0)).square().sum(1).mean())
    runs = [gradient_variance(model, [domain], params, batch_size=1, batches=8, rng=rng) for rng in range(120)]
    means = torch.stack([run.mean[0] for run in runs])
    assert abs(float(means.mean()) - exact) < 3 * float(means.std()) / math.sqrt(len(runs))
    reported = float(torch.stack([run.standard_error[0] for run in runs]).square().mean().sqrt())
    assert 0.8 < reported / float(means.std()) < 1.7  # the jackknife errs upwards


# --- shares of the pooled ascent step ---


@pytest.mark.parametrize("lam", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["convex", "indefinite"])
def test_perturbation_shares_of_quadratics_are_the_closed_forms(kind, lam):
    losses, params, gradients, hessians = quadratics(kind)
    values = losses(params).numpy()
    beta = ALPHA - 2 * lam / 3 * (values - values.mean())
    direction = beta @ gradients[:-1]
    step = 0.2 * direction / np.linalg.norm(direction)
    found = perturbation_shares(losses, params, rho=0.2, lam=lam)
    np.testing.assert_allclose(found.beta.numpy(), beta, rtol=1e-12)
    np.testing.assert_allclose(found.first_order.numpy(), gradients @ step, rtol=1e-10, atol=1e-12)
    rises = [rise(g, h, step) for g, h in zip(gradients, hessians, strict=True)]
    np.testing.assert_allclose(found.rise.numpy(), rises, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.cosine.numpy(), gradients @ step / (0.2 * np.linalg.norm(gradients, axis=1)))
    assert float(found.beta @ found.first_order[:-1]) == pytest.approx(0.2 * np.linalg.norm(direction), rel=1e-12)


def test_sam_moves_the_pooled_loss_along_its_own_gradient(net):
    *_, losses, params = net
    found = perturbation_shares(losses, params, rho=0.05, lam=0.0)
    assert float(found.cosine[-1]) == pytest.approx(1.0, rel=1e-12)
    assert float(found.rise[-1]) == pytest.approx(float(sam_sharpness(losses, params, rho=0.05)[-1]), rel=1e-10)
    torch.testing.assert_close(found.beta, tensor(losses.shares), rtol=1e-12, atol=0)


def test_at_a_stationary_point_nothing_is_felt():
    losses = quadratic_losses(tensor([[1.0], [1.0]]), tensor([[[2.0]], [[3.0]]]), tensor([0.0, 5.0]))
    found = perturbation_shares(losses, at(1.0), rho=0.2, lam=0.1)
    for values in (found.first_order, found.rise, found.cosine):
        assert values.tolist() == [0.0, 0.0, 0.0]


# --- warnings ---

OPPOSED = tensor([[[10.0, 0.0], [0.0, -9.0]], [[-9.0, 0.0], [0.0, 10.0]]])  # pooled: 0.5 I


def test_opposite_curvatures_that_pool_to_a_flat_bowl_are_a_fake_flat_minimum():
    losses = quadratic_losses(torch.zeros(2, 2, dtype=torch.float64), OPPOSED, tensor([0.0, 0.0]))
    found = fake_flat_minimum(losses, at(0.01, 0.01))
    assert found is not None
    assert found.name == "fake flat minimum"
    assert (found.value, found.threshold) == pytest.approx((10.0, 2.5))
    assert re.fullmatch(
        r"domain 'quadratic[01]' has lambda_max 10, more than 5 times the pooled loss's 0.5, "
        "and two domain gradients have cosine -0.994",
        found.message,
    )
    assert fake_flat_minimum(losses, at(0.01, 0.01), factor=19.9) is not None
    assert fake_flat_minimum(losses, at(0.01, 0.01), factor=20.1) is None


def test_domains_that_pull_apart_at_the_pooled_minimum_are_a_fake_flat_minimum():
    """At w = 0 the pooled gradient is zero and the domains' are opposite: A_1 m_1 = -A_2 m_2."""
    minima = tensor([[0.1, 0.0], [0.1 * 10 / 9, 0.0]])
    losses = quadratic_losses(minima, OPPOSED, tensor([0.0, 0.0]))
    assert float(domain_gradients(losses, at(0.0, 0.0)).mean(0).norm()) < 1e-15
    assert fake_flat_minimum(losses, at(0.0, 0.0)).value == pytest.approx(10.0)


def test_a_pooled_maximum_beside_a_sharp_domain_is_a_fake_flat_minimum_at_any_factor():
    curvatures = tensor([[[1.0]], [[-3.0]]])
    losses = quadratic_losses(tensor([[0.0], [0.0]]), curvatures, tensor([0.0, 0.0]))
    found = fake_flat_minimum(losses, at(0.5), factor=1000.0)
    assert (found.value, found.threshold) == (pytest.approx(1.0), 0.0)
    assert found.message.startswith("domain 'quadratic0' has lambda_max 1, and the pooled loss has -1, and two")


def test_a_sharp_domain_among_agreeing_gradients_is_no_fake_flat_minimum():
    losses = quadratic_losses(torch.zeros(2, 2, dtype=torch.float64), OPPOSED, tensor([0.0, 0.0]))
    # w = (m, m) + (a, b) with both gradients along (1, 1): the minima are moved to make them agree
    minima = tensor([[-0.1, 1 / 9], [1 / 9, -0.1]])
    agreeing = quadratic_losses(minima, OPPOSED, tensor([0.0, 0.0]))
    torch.testing.assert_close(domain_gradients(agreeing, at(0.0, 0.0)), torch.ones(2, 2, dtype=torch.float64))
    assert fake_flat_minimum(agreeing, at(0.0, 0.0)) is None
    assert fake_flat_minimum(losses, at(0.0, 0.0)) is None  # gradients of zero disagree with none


def test_equal_curvatures_and_linear_losses_are_no_fake_flat_minimum():
    same = tensor([[[2.0, 0.0], [0.0, 1.0]]] * 2)
    losses = quadratic_losses(tensor([[1.0, 0.0], [-1.0, 0.0]]), same, tensor([0.0, 0.0]))
    assert fake_flat_minimum(losses, at(0.0, 0.0)) is None  # the gradients are opposite; no domain is sharper
    linear = function_losses(lambda w: 3 * w[0] + 0 * w[1], lambda w: w[1] - 2 * w[0])
    assert fake_flat_minimum(linear, at(0.3, 0.2)) is None


def test_an_eigenvalue_of_zero_up_to_round_off_is_not_sharp():
    """Opposite gradients and semidefinite maxima: computed as 1e-16 or so, lambda_max = 0 exceeds no threshold of 0."""
    positive = 0
    for rng in range(5):
        generator = np.random.default_rng(rng)
        bases = np.stack([np.linalg.qr(generator.normal(size=(8, 8)))[0] for _ in range(2)])
        curvatures = -np.einsum("mij,j,mkj->mik", bases, np.arange(8.0), bases)
        losses = quadratic_losses(tensor([[1.0] * 8, [-1.0] * 8]), tensor(curvatures), torch.zeros(2))
        params = at(*[0.0] * 8)
        tops = [float(top_eigenpairs(domain_hessian(losses, params, name)).values[0]) for name in losses.names]
        positive += max(tops) > 0
        assert fake_flat_minimum(losses, params) is None
    assert positive > 0


def test_an_ascent_point_on_a_maximum_is_a_hallucinated_minimum():
    """L = -w^2/2 from w = -rho: the step ends on the maximum, where the descent gradient is zero."""
    losses = quadratic_losses(tensor([[0.0]]), tensor([[[-1.0]]]), tensor([0.0]))
    found = hallucinated_minimum(losses, at(-0.5), rho=0.46)
    assert found is not None
    assert (found.value, found.threshold) == (pytest.approx(0.04), pytest.approx(0.05))
    assert found.message == (
        "the pooled gradient's length falls from 0.5 at the weights to 0.04 at the ascent point "
        "(rho 0.46, lambda 0), below 0.1 times the first"
    )
    assert hallucinated_minimum(losses, at(-0.5), rho=0.44) is None
    assert hallucinated_minimum(losses, at(-0.5), rho=0.44, fraction=0.13) is not None
    assert hallucinated_minimum(losses, at(0.0), rho=0.5) is None  # stationary: nothing is hallucinated


@pytest.mark.parametrize("rho", [0.01, 0.5, 5.0])
def test_a_convex_loss_has_no_hallucinated_minimum_of_sam(rho):
    losses, params, *_ = quadratics("convex")
    assert hallucinated_minimum(losses, params, rho=rho) is None


def test_disam_hallucinates_where_its_ascent_step_descends():
    """Beyond the threshold the high loss has a negative weight: the step from w = 1 ends on the minimum of L at 0."""
    losses = quadratic_losses(tensor([[0.0], [0.0]]), tensor([[[1.0]], [[3.0]]]), tensor([0.0, 0.0]))
    params = at(1.0)
    assert float(perturbation_shares(losses, params, rho=1.0, lam=4.0).first_order[-1]) < 0
    assert hallucinated_minimum(losses, params, rho=1.0, lam=4.0).value == pytest.approx(0.0, abs=1e-12)
    assert hallucinated_minimum(losses, params, rho=1.0) is None


def test_the_warnings_come_together_in_order_or_not_at_all():
    """Pooled to 0.5 I SAM's step meets no stationary point; pooled to -0.5 I it ends near the maximum."""
    bowl = quadratic_losses(torch.zeros(2, 2, dtype=torch.float64), OPPOSED, tensor([0.0, 0.0]))
    assert [w.name for w in flat_minimum_warnings(bowl, at(2.0, 1.0), rho=0.5)] == ["fake flat minimum"]
    hill = quadratic_losses(torch.zeros(2, 2, dtype=torch.float64), OPPOSED - torch.eye(2), tensor([0.0, 0.0]))
    both = flat_minimum_warnings(hill, at(0.3, -0.4), rho=0.46)
    assert [w.name for w in both] == ["fake flat minimum", "hallucinated minimum"]
    assert [w.name for w in flat_minimum_warnings(hill, at(0.3, -0.4), rho=0.46, fraction=0.07)] == [both[0].name]
    single = quadratic_losses(tensor([[0.0, 0.0]]), OPPOSED[:1], tensor([0.0]))
    assert flat_minimum_warnings(single, at(2.0, 1.0), rho=0.5) == ()


# --- what all have in common ---

RANDOM = {
    "worst case": lambda losses, params, rng: (
        worst_case_sharpness(losses, params, rho=0.5, steps=2, restarts=2, rng=rng).lower
    ),
    "average case": lambda losses, params, rng: (
        average_case_sharpness(losses, params, sigma=0.5, samples=3, rng=rng).mean
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_determines_the_answer_and_the_global_generator_is_left_alone(name):
    symmetric = tensor(np.random.default_rng(0).normal(size=(2, 4, 4)))
    losses = quadratic_losses(torch.zeros(2, 4), symmetric + symmetric.mT, torch.zeros(2))
    params = at(0.0, 0.0, 0.0, 0.0)  # a zero gradient: the random starts alone rise
    state = torch.random.get_rng_state()
    assert torch.equal(RANDOM[name](losses, params, 1), RANDOM[name](losses, params, 1))
    assert not torch.equal(RANDOM[name](losses, params, 1), RANDOM[name](losses, params, 2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_parameters_that_require_gradients_are_left_as_they_are(net):
    model, domains, losses, params = net
    live = dict(model.named_parameters())
    torch.testing.assert_close(sam_sharpness(losses, live, rho=0.1), sam_sharpness(losses, params, rho=0.1))
    for normalisation in ("element", "filter"):
        found = adaptive_sharpness(losses, live, rho=0.1, normalisation=normalisation)
        assert not found.requires_grad
    worst_case_sharpness(losses, live, rho=0.1, steps=1, restarts=1, rng=0)
    average_case_sharpness(losses, live, sigma=0.1, samples=2, rng=0)
    gradient_variance(model, domains, live, batch_size=1, batches=3, rng=0)
    assert not perturbation_shares(losses, live, rho=0.1, lam=0.1).first_order.requires_grad
    flat_minimum_warnings(losses, live, rho=0.1, lam=0.1)
    assert all(p.grad is None and torch.equal(p, params[name]) for name, p in live.items())


def refused(message, function, *arguments, **options):
    with pytest.raises(UsageError) as caught:
        function(*arguments, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_a_radius_that_is_not_positive_is_refused_with_its_value(value):
    losses, params, *_ = quadratics("convex")
    message = f"rho is {value}; it must be finite and above 0"
    refused(message, sam_sharpness, losses, params, rho=value)
    refused(message, adaptive_sharpness, losses, params, rho=value)
    refused(message, worst_case_sharpness, losses, params, rho=value, steps=1, restarts=0, rng=0)
    refused(message, perturbation_shares, losses, params, rho=value, lam=0.0)
    refused(message, hallucinated_minimum, losses, params, rho=value)
    message = f"sigma is {value}; it must be finite and above 0"
    refused(message, average_case_sharpness, losses, params, sigma=value, samples=2, rng=0)
    refused(f"factor is {value}; it must be finite and above 0", fake_flat_minimum, losses, params, factor=value)
    message = f"fraction is {value}; it must be finite and above 0"
    refused(message, hallucinated_minimum, losses, params, rho=1.0, fraction=value)


@pytest.mark.parametrize("lam", [-0.1, math.nan, math.inf])
def test_a_lambda_that_is_negative_or_not_finite_is_refused(lam):
    losses, params, *_ = quadratics("convex")
    message = f"lambda is {lam}; it must be finite and at least 0, such as 0.1"
    refused(message, perturbation_shares, losses, params, rho=0.1, lam=lam)
    refused(message, hallucinated_minimum, losses, params, rho=0.1, lam=lam)


def test_counts_that_are_too_small_are_refused(net):
    model, domains, losses, params = net
    worst = {"rho": 0.1, "rng": 0}
    refused("steps is 0; it must be at least 1", worst_case_sharpness, losses, params, steps=0, restarts=1, **worst)
    message = "restarts is -1; it must be at least 0"
    refused(message, worst_case_sharpness, losses, params, steps=1, restarts=-1, **worst)
    message = "samples is 1; it must be at least 2"
    refused(message, average_case_sharpness, losses, params, sigma=0.1, samples=1, rng=0)
    message = "batches is 2; it must be at least 3"
    refused(message, gradient_variance, model, domains, params, batch_size=1, batches=2, rng=0)
    message = "batch_size is 0; it must be at least 1"
    refused(message, gradient_variance, model, domains, params, batch_size=0, batches=3, rng=0)
    message = "batch_size is 5 and domain 'd2' has 4 samples; use at most 4"
    refused(message, gradient_variance, model, domains, params, batch_size=5, batches=3, rng=0)


def test_an_unknown_normalisation_is_refused_with_the_nearest():
    losses, params, *_ = quadratics("convex")
    with pytest.raises(UsageError, match="unknown normalisation 'elements': did you mean 'element'"):
        adaptive_sharpness(losses, params, rho=0.1, normalisation="elements")


def test_a_loss_that_overflows_at_the_moved_weights_is_named():
    losses = function_losses(lambda w: w[0] ** 2, lambda w: torch.exp(w[0]))
    message = r"the loss on domain 'f1' is inf at a distance of 1e\+03 from the weights; use a smaller rho or sigma"
    with pytest.raises(ComputationError, match=message):
        sam_sharpness(losses, at(1.0), rho=1000.0)
    with pytest.raises(ComputationError, match="use a smaller rho or sigma"):
        average_case_sharpness(losses, at(1.0), sigma=1000.0, samples=3, rng=0)


def test_a_gradient_that_is_not_finite_is_named():
    losses = function_losses(lambda w: w[0] ** 2, lambda w: torch.sqrt(w[0]))
    with pytest.raises(ComputationError, match="the gradient on domain 'f1' is NaN or Inf"):
        sam_sharpness(losses, at(0.0), rho=0.1)
