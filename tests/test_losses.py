"""Domain losses, the pooled loss, the variance over domains, and that measuring leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import (
    cross_entropy,
    domain_variance,
    loader_losses,
    model_losses,
    parameters_of,
    pooled,
    quadratic_losses,
    restrict,
    squared_error,
    weighted_variance,
)
from disam_theory.operators import Curvature, domain_inspired_hessian, hessian

SIZES = (2, 17, 5, 31)
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64: a few dozen roundings


def mlp(rng=0, outputs=3):
    torch.manual_seed(rng)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


@pytest.fixture
def domains(make_domain):
    return [make_domain(f"d{i}", n, rng=i) for i, n in enumerate(SIZES)]


def test_each_domain_loss_is_the_mean_over_its_samples(domains):
    model = mlp()
    losses = model_losses(model, domains)(parameters_of(model))
    for domain, value in zip(domains, losses, strict=True):
        log_p = model(domain.inputs).log_softmax(1)
        by_hand = -sum(log_p[j, domain.labels[j]] for j in range(len(domain))) / len(domain)
        torch.testing.assert_close(value, by_hand.detach(), **EXACT)


def test_the_pooled_loss_is_the_mean_over_all_samples(domains):
    """Eq. (3): with shares n_i / N, domains of unequal size give the mean over all samples together."""
    model = mlp()
    losses = model_losses(model, domains, chunk=4)
    shares = torch.tensor(losses.shares, dtype=torch.float64)
    everything = cross_entropy(model(torch.cat([d.inputs for d in domains])), torch.cat([d.labels for d in domains]))
    value = pooled(losses(parameters_of(model)), shares)
    torch.testing.assert_close(value, everything.mean().detach(), **EXACT)
    unweighted = losses(parameters_of(model)).mean()
    assert abs(float(value - unweighted)) > 1e-3  # the weights matter here
    assert losses.sizes == SIZES
    assert losses.M == 4
    assert sum(losses.shares) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 30, 31, 1024])
def test_the_chunk_size_does_not_change_the_losses(domains, chunk):
    model = mlp()
    params = parameters_of(model)
    torch.testing.assert_close(
        model_losses(model, domains, chunk=chunk)(params), model_losses(model, domains)(params), **EXACT
    )


def test_a_chunk_below_one_is_refused(domains):
    with pytest.raises(UsageError, match="chunk is 0"):
        model_losses(mlp(), domains, chunk=0)


def test_the_variance_is_the_mean_squared_difference_of_pairs():
    r"""$\frac1M\sum_i(L_i-\bar L)^2=\frac1{2M^2}\sum_{ij}(L_i-L_j)^2$ (Eq. 6)."""
    generator = torch.Generator().manual_seed(0)
    for M in (1, 2, 3, 7):
        losses = torch.randn(5, M, generator=generator, dtype=torch.float64)
        pairs = sum((losses[:, i] - losses[:, j]) ** 2 for i in range(M) for j in range(M)) / (2 * M**2)
        torch.testing.assert_close(domain_variance(losses), pairs, **EXACT)


def test_absent_domains_do_not_enter_the_variance():
    losses = torch.tensor([[1.0, 50.0, 3.0, -7.0], [2.0, 2.5, 9.0, 4.0]], dtype=torch.float64)
    present = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    expected = torch.stack([losses[0, [0, 2, 3]].var(correction=0), losses[1].var(correction=0)])
    torch.testing.assert_close(domain_variance(losses, present), expected, **EXACT)


def test_the_sample_weighted_variance_is_the_official_loop():
    """The official code goes through every *sample*'s domain label, and takes the plain variance over that list."""
    generator = torch.Generator().manual_seed(1)
    each = torch.randn(13, generator=generator, dtype=torch.float64) ** 2
    labels = torch.tensor([0, 2, 0, 0, 1, 2, 0, 2, 0, 0, 0, 2, 0])
    domain_losses = [each[labels == name].mean() for name in labels]
    mu = sum(domain_losses) / len(domain_losses)
    official = sum((value - mu) ** 2 for value in domain_losses) / len(domain_losses)
    per_domain = torch.stack([each[labels == i].mean() for i in range(3)])
    weights = torch.bincount(labels).double() / len(labels)
    torch.testing.assert_close(weighted_variance(per_domain, weights), official, **EXACT)
    assert abs(float(official - domain_variance(per_domain))) > 1e-3


def test_squared_error_is_half_the_square():
    outputs, labels = torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 3.5])
    assert squared_error(outputs, labels).tolist() == [2.0, 0.125]
    assert squared_error(outputs.flatten(), labels).tolist() == [2.0, 0.125]


def test_quadratic_losses_are_the_formula_written_out():
    generator = torch.Generator().manual_seed(2)
    minima = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    a = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    curvatures, offsets = a + a.mT, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    losses = quadratic_losses(minima, curvatures, offsets, sizes=(1, 2, 5))
    w = torch.tensor([0.3, -0.7], dtype=torch.float64)
    values = losses({"w": w})
    for i in range(3):
        x, y = (w - minima[i]).tolist()
        (p, q), (_, r) = curvatures[i].tolist()
        by_hand = 0.5 * (p * x * x + 2 * q * x * y + r * y * y) + float(offsets[i])
        assert float(values[i]) == pytest.approx(by_hand, rel=1e-13, abs=1e-13)
    assert losses.shares == (0.125, 0.25, 0.625)
    assert quadratic_losses(minima, curvatures, offsets).shares == (1 / 3, 1 / 3, 1 / 3)


def test_curvatures_that_are_not_symmetric_are_refused():
    with pytest.raises(UsageError, match="symmetric"):
        quadratic_losses(torch.zeros(1, 2), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), torch.zeros(1))


def test_measuring_leaves_the_model_as_it_was(make_domain):
    """Mode, gradients, parameters, buffers and the random state are the same bits after losses and products."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model(torch.randn(8, 4, dtype=torch.float64)).sum().backward()  # gradients and moved running statistics
    model[2].eval()  # an uneven pattern of modes
    before = copy.deepcopy(model)
    modes = [m.training for m in model.modules()]
    grads = [p.grad.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    domains = [make_domain("a", 9), make_domain("b", 4)]
    losses, params = model_losses(model, domains), parameters_of(model)
    first = losses(params)
    for operator in (hessian(losses, params, weights=[0.3, 0.7]), domain_inspired_hessian(losses, params, 0.1)):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    losses.checked(params)
    assert torch.equal(losses(params), first)  # deterministic: no dropout
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, now), then in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then), name


def test_losses_are_those_of_evaluation_mode(make_domain):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model(torch.randn(8, 4, dtype=torch.float64))
    domain = make_domain("a", 9)
    value = model_losses(model, [domain])(parameters_of(model))[0]
    model.eval()
    torch.testing.assert_close(value, cross_entropy(model(domain.inputs), domain.labels).mean().detach(), **EXACT)


def test_parameters_are_an_independent_copy():
    model = mlp()
    params = parameters_of(model)
    params["0.weight"].zero_()
    assert float(model[0].weight.detach().abs().sum()) > 0
    assert not any(p.requires_grad for p in params.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 3] = value
    with pytest.raises(UsageError, match=r"'2\.weight' has 1 NaN or Inf value\(s\) of 18"):
        parameters_of(model)


def test_a_loss_that_is_not_finite_names_its_domain(make_domain):
    good, bad = make_domain("good", 5), make_domain("far", 6)
    bad = type(bad)("far", bad.inputs * 1e300, bad.labels)
    model = nn.Linear(4, 3).double()
    losses = model_losses(model, [good, bad])
    with pytest.raises(ComputationError, match="'far'"):
        losses.checked({name: 1e10 * p for name, p in parameters_of(model).items()})


def test_an_unknown_domain_suggests_the_nearest(domains):
    losses = model_losses(mlp(), domains)
    assert losses.index("d2") == 2
    with pytest.raises(UsageError, match="unknown domain 'd22': did you mean 'd2'"):
        losses.index("d22")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "missing 0.bias"),
        ({"extra": torch.zeros(2)}, "unexpected extra"),
        ({"0.weight": torch.zeros(3, 4)}, r"misshapen 0.weight is \(3, 4\), the model has \(6, 4\)"),
    ],
)
def test_params_that_do_not_fit_are_refused_by_name(domains, change, message):
    model = mlp()
    params = {name: value for name, value in {**parameters_of(model), **change}.items() if value is not None}
    losses = model_losses(model, domains)
    with pytest.raises(UsageError, match=message):
        losses(params)
    operator = hessian(losses, params, weights=losses.shares)
    with pytest.raises(UsageError, match=message):
        operator.matvec(torch.zeros(operator.size, dtype=torch.float64))


def batches_of(domain, size):
    return list(zip(domain.inputs.split(size), domain.labels.split(size), strict=True))


def test_losses_from_loaders_equal_those_from_memory(domains):
    model = mlp()
    params = parameters_of(model)
    whole = model_losses(model, domains)
    streamed = loader_losses(model, {d.name: batches_of(d, 4) for d in domains})
    assert (streamed.names, streamed.sizes) == (whole.names, whole.sizes)
    torch.testing.assert_close(streamed(params), whole(params), **EXACT)
    vector = torch.randn(sum(p.numel() for p in params.values()), dtype=torch.float64)
    for losses in (streamed, whole):
        curvature = Curvature(losses, params)
        first = curvature.operator(losses.shares).matvec(vector)
        torch.testing.assert_close(
            first, hessian(whole, params, weights=whole.shares).matvec(vector), rtol=1e-10, atol=1e-12
        )
        assert bool(curvature._kept) == (losses is whole)  # what is streamed is not held
    head, chosen = restrict(streamed, params, "2.*")
    block = hessian(head, chosen, weights=head.shares).dense()
    torch.testing.assert_close(
        block, hessian(whole, params, weights=whole.shares).dense()[30:, 30:], rtol=1e-9, atol=1e-12
    )


class Shuffled:
    """Gives its samples in another order at each pass."""

    def __init__(self, domain):
        self.domain, self.generator = domain, torch.Generator().manual_seed(0)

    def __iter__(self):
        order = torch.randperm(len(self.domain), generator=self.generator)
        return iter(batches_of(self.domain.take(order), 4))


def test_a_loader_that_changes_its_data_is_refused(domains):
    model = mlp()
    losses = loader_losses(model, {"even": batches_of(domains[1], 4), "odd": Shuffled(domains[3])})
    with pytest.raises(UsageError, match="the loader of domain 'odd' gave another batch 0 than before"):
        losses(parameters_of(model))
    once = loader_losses(model, {"once": iter(batches_of(domains[1], 4))})
    with pytest.raises(UsageError, match="gave 0 of 5 batches"):
        once(parameters_of(model))
    with pytest.raises(UsageError, match=r"gives 0 sample\(s\)"):
        loader_losses(model, {"empty": []})
