"""CORAL's and Fishr's statistics and penalties: by hand, absent domains, the moving average, wrong models and loops."""

import math

import pytest
import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.errors import UsageError
from disam_theory.matching import MATCHED, Matching, Statistics, coral_statistics, fishr_statistics
from disam_theory.optim import SharpnessAware, by_domain
from disam_theory.training import Run, train

EXACT = {"rtol": 1e-12, "atol": 1e-13}
ONE = torch.tensor(1.0, dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def batch(sizes, rng=0, d=4, C=3):
    """Features, outputs, labels and domains; the outputs are not of these features, as nothing asks them to be."""
    generator = torch.Generator().manual_seed(rng)
    n = sum(sizes)
    features, outputs = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (d, C))
    labels = torch.randint(0, C, (n,), generator=generator)
    return features, outputs, labels, torch.cat([torch.full((k,), i) for i, k in enumerate(sizes)])


def statistics(objective, features, outputs, labels, domains, M):
    if objective == "coral":
        return coral_statistics(features, domains, M)
    return fishr_statistics(features, outputs, labels, domains, M)


def test_corals_penalty_by_hand():
    """Features (0, 0), (2, 0) and (1, 1), (1, 3): means (1, 0) and (1, 2), covariances diag(2, 0) and diag(0, 2).

    Mean squares of the differences (0, -2) and diag(2, -2): 2 and 2.
    """
    features = number([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [1.0, 3.0]])
    found = Matching("coral", number(0.5)).penalty(coral_statistics(features, torch.tensor([0, 0, 1, 1]), 2))
    assert float(found) == pytest.approx(0.5 * 4.0, rel=1e-12)


def test_fishrs_penalty_by_hand():
    """Two classes, outputs of zero: the error is (-1/2, 1/2) or its negative, times (z, 1).

    Domain 0, z = 1 with labels 0 and 1: gradients +-(1/2)(1, 1) in each class, variances 1/4. Domain 1, z = 2 with one
    label: variance 0. The mean is 1/8 everywhere, and so the penalty 1/64.
    """
    features, outputs = number([[1.0], [1.0], [2.0], [2.0]]), torch.zeros(4, 2, dtype=torch.float64)
    given = fishr_statistics(features, outputs, torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 1]), 2)
    torch.testing.assert_close(given.values, number([[0.25] * 4, [0.0] * 4]) / 2, **EXACT)
    assert float(Matching("fishr", ONE).penalty(given)) == pytest.approx(1 / 64, rel=1e-12)
    without = fishr_statistics(features, outputs, torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 1]), 2, bias=False)
    assert without.values.shape == (2, 2)
    assert float(Matching("fishr", ONE).penalty(without)) == pytest.approx(1 / 64, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_fishrs_variance_is_that_of_the_heads_gradient_of_each_sample(bias):
    features, _, labels, domains = batch((5, 3))
    head = nn.Linear(4, 3, bias=bias).double()
    outputs = head(features)
    each = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.parameters()), retain_graph=True)])
        for loss in nn.functional.cross_entropy(outputs, labels, reduction="none")
    ]
    found = fishr_statistics(features, outputs, labels, domains, 2, bias=bias).values
    for i in range(2):
        own = torch.stack([g for g, d in zip(each, domains.tolist(), strict=True) if d == i])
        variance = own.var(0, unbiased=False) / math.sqrt(own.shape[1])
        torch.testing.assert_close(found[i].sort().values, variance.sort().values, **EXACT)


@pytest.mark.parametrize("objective", MATCHED)
def test_domains_that_do_not_count_are_as_if_they_did_not_exist(objective):
    """One that is absent, and for CORAL one of a single sample, which has no covariance."""
    features, outputs, labels, domains = batch((5, 1, 4) if objective == "coral" else (5, 4))
    renamed = domains if objective == "coral" else domains * 2
    given = statistics(objective, features, outputs, labels, renamed, 4)
    assert given.present.tolist() == [1.0, 0.0, 1.0, 0.0]
    kept = (domains != 1) if objective == "coral" else domains >= 0
    fewer = statistics(objective, features[kept], outputs[kept], labels[kept], renamed[kept] // 2, 2)
    matching = Matching(objective, ONE)
    assert float(matching.penalty(given)) == pytest.approx(float(matching.penalty(fewer)), rel=1e-12)


@pytest.mark.parametrize("objective", MATCHED)
@pytest.mark.parametrize("sizes", [(6,), (0, 6), (1, 1)])
def test_fewer_than_two_domains_have_no_penalty_and_no_gradient(objective, sizes):
    features, outputs, labels, domains = batch(sizes)
    if objective == "fishr" and sizes == (1, 1):
        labels, outputs = labels * 0, outputs * 0  # of one sample the variance is zero, as of the other
    features.requires_grad_(True)
    value = Matching(objective, ONE).penalty(statistics(objective, features, outputs, labels, domains, len(sizes)))
    assert float(value) == pytest.approx(0.0, abs=1e-30)  # Fishr's variance of one sample is a difference of squares
    (gradient,) = torch.autograd.grad(value, features)
    assert float(gradient.abs().max()) == pytest.approx(0.0, abs=1e-15)


def test_fishrs_moving_average_over_three_steps():
    """Domain 1 is absent from the second batch: v, then as it was, then w + 0.95 v."""
    matching = Matching("fishr", ONE)
    v, w = number([[1.0], [2.0]]), number([[3.0], [5.0]])
    both, first = torch.ones(2, dtype=torch.float64), number([1.0, 0.0])
    assert float(matching.penalty(Statistics(v, both))) == pytest.approx(0.25)
    matching = matching.observed(Statistics(v, both))
    matching = matching.observed(Statistics(v, first))
    assert matching.moving.flatten().tolist() == pytest.approx([1.95, 2.0])
    found = matching.penalty(Statistics(w, both))
    assert float(found) == pytest.approx(((3 + 0.95 * 1.95) - (5 + 0.95 * 2.0)) ** 2 / 4, rel=1e-12)


def test_the_average_keeps_no_graph_and_coral_no_state():
    features, outputs, labels, domains = batch((5, 4))
    features.requires_grad_(True)
    fishr = Matching("fishr", ONE).observed(fishr_statistics(features, outputs, labels, domains, 2))
    assert not fishr.moving.requires_grad
    coral = Matching("coral", ONE)
    assert coral.observed(coral_statistics(features, domains, 2)) is coral


@pytest.mark.parametrize("objective", MATCHED)
@pytest.mark.parametrize(("B", "d", "C"), [(38, 6, 3), (18, 48, 3), (96, 32, 10)])
def test_a_run_of_several_is_the_run_alone_bit_for_bit(objective, B, d, C):
    generator = torch.Generator().manual_seed(2)
    features, outputs = (torch.randn(5, B, k, generator=generator) for k in (d, C))
    labels, domains = (torch.randint(0, k, (5, B), generator=generator) for k in (C, 3))

    def gradient(rows):
        free = features[rows].clone().requires_grad_(True)
        given = statistics(objective, free, outputs[rows], labels[rows], domains[rows], 3)
        value = Matching(objective, torch.ones(len(free))).penalty(given)
        return value.detach(), torch.autograd.grad(value.sum(), free)[0]

    values, gradients = gradient(slice(None))
    for r in range(5):
        value, own = gradient(slice(r, r + 1))
        assert torch.equal(values[r], value[0])
        assert torch.equal(gradients[r], own[0])


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softplus()),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten()),
    ],
)
def test_a_model_that_does_not_end_in_a_linear_layer_is_refused(model, make_split):
    with pytest.raises(UsageError, match=r"ends in (its last )?nn\.Linear"):
        train(model, [Run(Settings("sam", objective="coral", steps=1), make_split(), 0)])


def test_a_loop_without_statistics_is_refused():
    model = nn.Linear(4, 3)
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, objective="coral", lr=0.1)
    inputs, labels, domains = torch.randn(6, 4), torch.zeros(6, dtype=torch.long), torch.tensor([0, 0, 0, 1, 1, 1])
    closure = lambda: by_domain(  # noqa: E731
        nn.functional.cross_entropy(model(inputs), labels, reduction="none"), domains, 2
    )
    before = model.weight.clone()
    with pytest.raises(UsageError, match=r"\(losses, shares, coral_statistics"):
        optimizer.step(closure)
    assert torch.equal(model.weight, before)
