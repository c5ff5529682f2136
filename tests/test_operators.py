"""Hessian products of each domain, of any weighting and of L_DI, against dense double backward and closed forms."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from curvlinops import HessianLinearOperator
from torch import nn
from torch.func import functional_call

from disam_theory.domains import Domain
from disam_theory.errors import UsageError
from disam_theory.losses import (
    cross_entropy,
    domain_variance,
    model_losses,
    parameters_of,
    pooled,
    quadratic_losses,
    squared_error,
)
from disam_theory.operators import (
    domain_gradients,
    domain_hessian,
    domain_inspired_hessian,
    flatten,
    hessian,
    unflatten,
    weights_at,
)
from disam_theory.perturbations import disam_weights

SIZES = (3, 14, 8)


def close(actual, expected, tol=1e-10):
    """Equal to ``tol`` relative to the matrix's norm."""
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tol * float(expected.norm())


def double_backward(function, params, block=None):
    """The Hessian of a scalar function of params times ``block`` (n, k), by reverse over reverse on one flat vector.

    Without ``block`` the dense matrix. Random vectors tell two linear maps apart with probability one.
    """
    flat = flatten(params).requires_grad_(True)
    block = torch.eye(len(flat), dtype=flat.dtype) if block is None else block
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (first,) = torch.autograd.grad(function(unflatten(flat, params)), flat, create_graph=True)
        columns = [torch.autograd.grad(first @ v, flat, retain_graph=True)[0] for v in block.T]
    return torch.stack(columns, dim=1)


def probes(params, k=3):
    """Random vectors (n, k), the same at each call."""
    n = sum(p.numel() for p in params.values())
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def direct_losses(model, domains, criterion=cross_entropy):
    """The domain losses written out without the library: (params) -> (M,)."""

    def losses(params):
        values = [criterion(functional_call(model, params, (d.inputs,)), d.labels).mean() for d in domains]
        return torch.stack(values)

    return losses


# --- architectures: (factory, shape of one input); each in evaluation mode ---


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def layer_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 3)
    )


def group_norm():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))


def batch_norm():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 3))
    model(3 + 2 * torch.randn(20, 4))  # moves the running statistics away from (0, 1)
    return model


class Tied(nn.Module):
    """One matrix used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, activation="gelu")
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


class Unused(nn.Module):
    """A parameter that the output does not depend on: its rows of the Hessian are zero."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(2, 1)

    def forward(self, x):
        return torch.tanh(self.used(x))


ARCHITECTURES = {
    "mlp": (mlp, (4,)),
    "layer-norm": (layer_norm, (4,)),
    "conv": (conv, (2, 4, 4)),
    "group-norm": (group_norm, (2, 4, 4)),
    "batch-norm": (batch_norm, (4,)),
    "tied": (Tied, (4,)),
    "transformer": (Encoder, (3, 4)),
    "attention": (Attention, (3, 4)),
    "unused-parameter": (Unused, (4,)),
}


@pytest.fixture
def build(make_domain):
    def make(name, dtype=torch.float64):
        factory, shape = ARCHITECTURES[name]
        torch.manual_seed(0)
        model = factory().to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():  # away from the special points at which norms start (ones and zeros)
                p.add_(0.3 * torch.randn_like(p))
        domains = [make_domain(f"d{i}", n, shape, rng=i).to(dtype=dtype) for i, n in enumerate(SIZES)]
        return model, domains

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_equal_double_backward(build, name):
    """Each domain, the pooled loss, and any weights; in micro-batches of three."""
    model, domains = build(name)
    losses, params = model_losses(model, domains, chunk=3), parameters_of(model)
    direct, block = direct_losses(model, domains), probes(params)
    expected = [double_backward(lambda p, i=i: direct(p)[i], params, block) for i in range(3)]
    for i, domain in enumerate(domains):
        close(domain_hessian(losses, params, domain.name).matmat(block), expected[i])
    shares = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    everything = double_backward(lambda p: pooled(direct(p), shares), params, block)
    close(hessian(losses, params, weights=losses.shares).matmat(block), everything)
    weights = [0.7, -0.4, 0.0]
    weighted = sum(w * h for w, h in zip(weights, expected, strict=True))
    close(hessian(losses, params, weights=weights).matmat(block), weighted)


def inspired(direct, lam):
    shares = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    return lambda p: pooled(direct(p), shares) - lam * domain_variance(direct(p))


@pytest.mark.parametrize("lam", [0.5, 2.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_hessian_of_l_di_equals_double_backward(build, name, lam):
    """The weighted Hessian alone is not enough: the covariance of the gradients enters too."""
    model, domains = build(name)
    losses, params = model_losses(model, domains, chunk=5), parameters_of(model)
    block = probes(params)
    expected = double_backward(inspired(direct_losses(model, domains), lam), params, block)
    close(domain_inspired_hessian(losses, params, lam).matmat(block), expected)
    weighted = hessian(losses, params, weights=weights_at(losses, params, lam)).matmat(block)
    assert float((weighted - expected).norm()) > 1e-3 * float(expected.norm())


def test_the_dense_matrix_equals_dense_double_backward(build):
    model, domains = build("mlp")
    losses, params = model_losses(model, domains), parameters_of(model)
    direct = direct_losses(model, domains)
    flat = flatten(params)
    for i, domain in enumerate(domains):
        dense = torch.autograd.functional.hessian(lambda v, i=i: direct(unflatten(v, params))[i], flat)
        close(domain_hessian(losses, params, domain.name).dense(), dense)
    dense = torch.autograd.functional.hessian(lambda v: inspired(direct, 0.5)(unflatten(v, params)), flat)
    close(domain_inspired_hessian(losses, params, 0.5).dense(), dense)


@pytest.mark.parametrize("lam", [0.1, 0.3])
def test_a_lambda_that_float32_cannot_hold_keeps_float64_accuracy(build, lam):
    model, domains = build("mlp")
    losses, params = model_losses(model, domains), parameters_of(model)
    values = direct_losses(model, domains)(params)
    shares = torch.tensor(losses.shares, dtype=torch.float64)
    exact = disam_weights(values, shares, torch.tensor(lam, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(weights_at(losses, params, lam), exact, rtol=1e-13, atol=1e-13)
    expected = double_backward(inspired(direct_losses(model, domains), lam), params, probes(params))
    close(domain_inspired_hessian(losses, params, lam).matmat(probes(params)), expected, tol=1e-12)


def test_lambda_zero_gives_the_pooled_hessian(build):
    model, domains = build("mlp")
    losses, params = model_losses(model, domains), parameters_of(model)
    close(
        domain_inspired_hessian(losses, params, 0.0).dense(),
        hessian(losses, params, weights=losses.shares).dense(),
        1e-14,
    )


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_products_equal_those_of_curvlinops(build, name):
    """Another library, same model and data: each domain, and the pooled data as one."""
    model, domains = build(name)
    losses, params = model_losses(model, domains, chunk=4), parameters_of(model)
    vectors = probes(params)
    everything = Domain("all", torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains]))
    cases = [(everything, hessian(losses, params, weights=losses.shares))]
    cases += [(domain, domain_hessian(losses, params, domain.name)) for domain in domains]
    for domain, ours in cases:
        theirs = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [(domain.inputs, domain.labels)]
        )
        close(ours.matmat(vectors), theirs @ vectors, 1e-12)


def test_the_gradients_of_the_domains_equal_backward(build):
    for name in ARCHITECTURES:
        model, domains = build(name)
        rows = domain_gradients(model_losses(model, domains, chunk=4), parameters_of(model))
        for row, domain in zip(rows, domains, strict=True):
            model.zero_grad(set_to_none=False)
            cross_entropy(model(domain.inputs), domain.labels).mean().backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            close(row, torch.cat([g.flatten() for g in grads]), 1e-12)


# --- closed forms ---


def test_quadratics_have_the_hessians_they_are_made_of():
    generator = torch.Generator().manual_seed(0)
    minima = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    a = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    curvatures, offsets = a + a.mT, torch.randn(3, generator=generator, dtype=torch.float64)
    losses = quadratic_losses(minima, curvatures, offsets, sizes=SIZES)
    params = {"w": torch.randn(5, generator=generator, dtype=torch.float64)}
    for i in range(3):
        close(domain_hessian(losses, params, f"quadratic{i}").dense(), curvatures[i], 1e-14)
    alpha = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    close(hessian(losses, params, weights=losses.shares).dense(), torch.einsum("i,ijk", alpha, curvatures), 1e-14)
    # L_DI: beta by Eq. (8) and the covariance of g_i = A_i (w - m_i), with a lambda that every dtype holds exactly
    lam, values = 0.25, losses(params)
    beta = alpha - (2 * lam / 3) * (values - values.mean())
    gradients = torch.einsum("ijk,ik->ij", curvatures, params["w"] - minima)
    covariance = torch.cov(gradients.T, correction=0)
    expected = torch.einsum("i,ijk", beta, curvatures) - 2 * lam * covariance
    close(domain_inspired_hessian(losses, params, lam).dense(), expected, 1e-13)


def test_linear_regression_has_the_gram_matrix(make_domain):
    domains = []
    for i, n in enumerate(SIZES):
        base = make_domain(f"d{i}", n, rng=i)
        domains.append(Domain(base.name, base.inputs, base.inputs.sum(1) ** 2))
    model = nn.Linear(4, 1, bias=False).double()
    losses, params = model_losses(model, domains, criterion=squared_error, chunk=3), parameters_of(model)
    for domain in domains:
        gram = domain.inputs.T @ domain.inputs / len(domain)
        close(domain_hessian(losses, params, domain.name).dense(), gram, 1e-13)


def test_softmax_regression_has_its_closed_form(make_domain):
    r"""$\nabla^2L_i=\frac1{n_i}\sum_j(\mathrm{diag}\,p_j-p_jp_j^\top)\otimes x_jx_j^\top$."""
    domains = [make_domain(f"d{i}", n, rng=i) for i, n in enumerate(SIZES)]
    torch.manual_seed(1)
    model = nn.Linear(4, 3, bias=False).double()
    losses, params = model_losses(model, domains, chunk=5), parameters_of(model)
    for domain in domains:
        expected = torch.zeros(12, 12, dtype=torch.float64)
        for x, p in zip(domain.inputs, model(domain.inputs).detach().softmax(1), strict=True):
            expected += torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x, x)) / len(domain)
        close(domain_hessian(losses, params, domain.name).dense(), expected, 1e-13)


# --- properties ---


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_the_chunk_size_does_not_change_the_product(build, chunk):
    model, domains = build("mlp")
    params = parameters_of(model)
    vector = torch.randn(43, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, cut = model_losses(model, domains), model_losses(model, domains, chunk=chunk)
    close(
        hessian(cut, params, weights=[0.2, 0.5, -1.0]).matvec(vector),
        hessian(whole, params, weights=[0.2, 0.5, -1.0]).matvec(vector),
        1e-13,
    )
    close(
        domain_inspired_hessian(cut, params, 0.5).matvec(vector),
        domain_inspired_hessian(whole, params, 0.5).matvec(vector),
        1e-13,
    )


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_float32_products_have_float32_accuracy(build, name):
    wide, domains = build(name)
    narrow, domains32 = build(name, torch.float32)
    narrow.load_state_dict({key: value.float() for key, value in wide.state_dict().items()})
    wide.load_state_dict({key: value.double() for key, value in narrow.state_dict().items()})
    domains = [d.to(dtype=torch.float64) for d in domains32]
    block = probes(parameters_of(wide))
    wide_losses, narrow_losses = model_losses(wide, domains), model_losses(narrow, domains32)
    single = hessian(narrow_losses, parameters_of(narrow), weights=[0.2, 0.3, 0.5])
    assert single.dtype == torch.float32
    product = single.matmat(block.float())
    assert product.dtype == torch.float32
    tol = 100 * torch.finfo(torch.float32).eps
    exact = hessian(wide_losses, parameters_of(wide), weights=[0.2, 0.3, 0.5]).matmat(block.float().double())
    close(product.double(), exact, tol)
    exact = domain_inspired_hessian(wide_losses, parameters_of(wide), 0.5).matmat(block.float().double())
    single = domain_inspired_hessian(narrow_losses, parameters_of(narrow), 0.5).matmat(block.float())
    close(single.double(), exact, tol)


def test_our_product_is_right_through_layer_norm_where_torch_func_hessian_is_not(build):
    """Documents torch 2.13: ``torch.func.hessian`` (``jvp`` of ``jacrev``) is silently wrong through LayerNorm."""
    model, domains = build("layer-norm")
    params = parameters_of(model)

    def loss(p):
        return direct_losses(model, domains[:1])(p)[0]

    right = double_backward(loss, params)
    close(domain_hessian(model_losses(model, domains), params, "d0").dense(), right)
    theirs = torch.func.hessian(lambda v: loss(unflatten(v, params)))(flatten(params))
    error = float((theirs - right).norm()) / float(right.norm())
    if not torch.__version__.startswith("2.13.") and error < 1e-10:
        pytest.skip(f"torch {torch.__version__} computes torch.func.hessian through LayerNorm correctly")
    assert error > 1e-6


@pytest.mark.parametrize("name", ["transformer", "attention"])
def test_the_settings_of_attention_are_restored(build, name):
    model, domains = build(name)
    operator = hessian(model_losses(model, domains), parameters_of(model), weights=[1.0, 0.0, 0.0])

    def state():
        cuda = torch.backends.cuda
        return (
            torch.backends.mha.get_fastpath_enabled(),
            cuda.flash_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
        )

    before = state()
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert state() == before


def test_a_domain_of_weight_zero_is_not_evaluated():
    losses = quadratic_losses(torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2), torch.zeros(2))

    def explode(params):
        raise AssertionError("evaluated")

    guarded = type(losses)(losses.names, losses.sizes, (losses.parts[0], (explode,)))
    product = hessian(guarded, {"w": torch.ones(2)}, weights=[2.0, 0.0]).matvec(torch.tensor([1.0, 3.0]))
    assert product.tolist() == [2.0, 6.0]


def test_the_product_is_symmetric_and_linear(build):
    model, domains = build("conv")
    operator = domain_inspired_hessian(model_losses(model, domains), parameters_of(model), 0.5)
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, operator.size, generator=generator, dtype=torch.float64)
    scale = float(operator.matvec(u).norm() * v.norm())
    assert abs(float(u @ operator.matvec(v) - v @ operator.matvec(u))) <= 1e-13 * scale
    close(operator.matvec(2 * u - 3 * v), 2 * operator.matvec(u) - 3 * operator.matvec(v), 1e-12)
    close(operator.matmat(torch.stack([u, v], 1))[:, 1], operator.matvec(v), 1e-14)


def test_the_scipy_view_gives_the_eigenvalues_of_the_dense_matrix(build):
    model, domains = build("mlp")
    operator = hessian(model_losses(model, domains), parameters_of(model), weights=[0.2, 0.3, 0.5])
    view = operator.to_scipy()
    dense = operator.dense().numpy()
    assert view.shape == dense.shape
    assert view.dtype == np.float64
    np.testing.assert_allclose(view @ np.eye(operator.size), dense, atol=1e-13)
    top = scipy.sparse.linalg.eigsh(view, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(top), np.linalg.eigvalsh(dense)[-3:], rtol=1e-10)


def test_the_scipy_view_keeps_float32(build):
    model, domains = build("mlp", torch.float32)
    view = hessian(model_losses(model, domains), parameters_of(model), weights=[0.2, 0.3, 0.5]).to_scipy()
    assert view.dtype == np.float32
    assert (view @ np.ones(view.shape[0], dtype=np.float32)).dtype == np.float32


def test_a_models_own_parameters_give_a_scipy_view(build):
    model, domains = build("mlp")
    view = hessian(model_losses(model, domains), dict(model.named_parameters()), weights=[0.2, 0.3, 0.5]).to_scipy()
    assert math.isfinite((view @ np.ones(view.shape[0])).sum())


def test_flatten_and_unflatten_are_inverse():
    params = {"a": torch.randn(2, 3), "b": torch.tensor(1.5), "c": torch.randn(4)}
    back = unflatten(flatten(params), params)
    assert list(back) == ["a", "b", "c"]
    assert all(torch.equal(back[name], params[name]) for name in params)
    with pytest.raises(UsageError, match=r"shape \(12,\); the parameters need \(11,\)"):
        unflatten(torch.zeros(12), params)


def test_one_weight_a_domain_is_needed(build):
    model, domains = build("mlp")
    losses = model_losses(model, domains)
    with pytest.raises(UsageError, match="2 weights for 3 domains"):
        hessian(losses, parameters_of(model), weights=[0.5, 0.5])
    with pytest.raises(UsageError, match="did you mean 'd1'"):
        domain_hessian(losses, parameters_of(model), "d11")
