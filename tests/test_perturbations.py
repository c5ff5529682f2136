"""The weights of Eq. (8) and the ascent step."""

import pytest
import torch

from disam_theory.perturbations import (
    VARIANCES,
    ascent_step,
    cosine,
    disam_weights,
    domain_inspired,
    dot,
    gradual_passes,
    norm,
)

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def batch(M, rng, absent=()):
    """Losses, batch shares, lambda and presence for three runs at once."""
    generator = torch.Generator().manual_seed(rng)
    losses = 2 * torch.rand(3, M, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 20, (3, M), generator=generator).double()
    for domain in absent:
        counts[:, domain] = 0
    present = (counts > 0).double()
    lam = torch.tensor([0.0, 0.1, 3.0], dtype=torch.float64)
    return losses, counts / counts.sum(1, keepdim=True), lam, present


CASES = [(2, ()), (3, ()), (5, ()), (3, (1,)), (5, (0, 4)), (2, (0,)), (1, ())]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("M", "absent"), CASES)
def test_the_weights_are_the_gradient_of_l_di_in_the_losses(M, absent, variance):
    """Eq. (8) equals what autograd gives for the domain-inspired loss, where domains are absent too."""
    for rng in range(5):
        losses, alpha, lam, present = batch(M, rng, absent)
        variable = losses.clone().requires_grad_(True)
        value = domain_inspired(variable, alpha, lam, present, variance=variance)
        (gradient,) = torch.autograd.grad(value.sum(), variable)
        beta = disam_weights(losses, alpha, lam, present, variance=variance)
        torch.testing.assert_close(beta, gradient, **EXACT)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("M", "absent"), CASES)
def test_the_weights_sum_to_one_and_vanish_for_absent_domains(M, absent, variance):
    losses, alpha, lam, present = batch(M, 7, absent)
    beta = disam_weights(losses, alpha, lam, present, variance=variance)
    torch.testing.assert_close(beta.sum(1), torch.ones(3, dtype=torch.float64), **EXACT)
    assert bool((beta[present == 0] == 0).all())
    assert torch.equal(beta[0], alpha[0])  # lambda = 0 gives SAM


def test_the_weights_written_out_for_two_domains():
    """alpha = (3/4, 1/4), L = (1, 2), lambda = 1/2: beta = alpha -+ (1/2)(1/2), by hand; samples: p = alpha."""
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    alpha = torch.tensor([0.75, 0.25], dtype=torch.float64)
    lam, present = torch.tensor(0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert disam_weights(losses, alpha, lam, present).tolist() == [1.0, 0.0]
    by_samples = disam_weights(losses, alpha, lam, present, variance="samples")
    assert by_samples.tolist() == [0.75 + 0.75 * 0.25, 0.25 - 0.25 * 0.75]


def test_a_weight_is_negative_exactly_beyond_the_threshold():
    r"""$\beta_i<0$ exactly where $L_i-\bar L>\alpha_iM/2\lambda$; both signs occur among the cases."""
    signs = set()
    for rng in range(40):
        losses, alpha, lam, present = batch(4, rng)
        losses, lam = losses[1:], lam[1:]
        beta = disam_weights(losses, alpha[1:], lam, present[1:])
        beyond = losses - losses.mean(1, keepdim=True) > alpha[1:] * 4 / (2 * lam[:, None])
        assert torch.equal(beta < 0, beyond)
        signs |= set((beta < 0).flatten().tolist())
    assert signs == {True, False}


def test_the_two_variances_agree_where_the_shares_are_equal():
    losses, _, lam, present = batch(4, 3)
    alpha = torch.full((3, 4), 0.25, dtype=torch.float64)
    by_domain, by_sample = (disam_weights(losses, alpha, lam, present, variance=v) for v in VARIANCES)
    torch.testing.assert_close(by_domain, by_sample, **EXACT)


def tree(rng, runs=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rng)
    front = () if runs is None else (runs,)
    shapes = {"a": (3, 2), "b": (), "c": (4,)}
    return {name: torch.randn((*front, *shape), generator=generator, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e12])
def test_the_ascent_step_has_length_rho_along_the_gradient(dtype, size):
    gradient = {name: size * g for name, g in tree(0, dtype=dtype).items()}
    rho = torch.tensor(0.05, dtype=torch.float64)
    step = ascent_step(gradient, rho)
    eps = torch.finfo(dtype).eps
    assert float(norm(step)) == pytest.approx(0.05, rel=10 * eps)
    assert float(dot(step, gradient)) == pytest.approx(0.05 * float(norm(gradient)), rel=10 * eps)
    assert all(step[name].dtype == dtype for name in step)


def test_a_zero_gradient_gives_a_zero_step_also_among_others():
    gradient = tree(1, runs=3)
    for g in gradient.values():
        g[1] = 0
    step = ascent_step(gradient, torch.tensor([0.1, 0.1, 0.2], dtype=torch.float64))
    assert norm(step, 1).tolist() == pytest.approx([0.1, 0.0, 0.2], rel=1e-14)
    assert all(bool((s[1] == 0).all()) for s in step.values())


def test_rho_zero_gives_a_zero_step():
    step = ascent_step(tree(1), torch.tensor(0.0, dtype=torch.float64))
    assert all(bool((s == 0).all()) for s in step.values())


def test_a_stacked_step_equals_the_steps_one_by_one():
    gradient, rho = tree(2, runs=4), torch.tensor([0.0, 0.05, 0.5, 7.0], dtype=torch.float64)
    together = ascent_step(gradient, rho)
    for r in range(4):
        alone = ascent_step({name: g[r] for name, g in gradient.items()}, rho[r])
        for name in gradient:
            torch.testing.assert_close(together[name][r], alone[name], rtol=1e-14, atol=0)


def test_the_smallest_float32_gradient_still_gives_a_step_of_length_rho():
    step = ascent_step({"w": torch.tensor([1e-41, 0.0])}, torch.tensor(0.05, dtype=torch.float64))
    assert step["w"].tolist() == pytest.approx([0.05, 0.0])


def test_dot_and_norm_accumulate_in_float64():
    """2^24 + 1 terms: a sum of float32 ones would stick at 2^24."""
    ones = {"w": torch.ones(4097, dtype=torch.float32), "v": torch.tensor(4096.0)}
    assert float(dot(ones, ones)) == 4097 + 4096.0**2
    assert float(norm(ones)) == pytest.approx((4097 + 4096.0**2) ** 0.5, rel=1e-15)
    assert norm(ones).dtype == torch.float64


def test_the_cosine_is_one_where_the_vectors_are_equal_and_nan_where_one_is_zero():
    for rng in range(50):
        vector = torch.randn(7, generator=torch.Generator().manual_seed(rng), dtype=torch.float64)
        assert float(cosine(vector, vector)) == 1.0
        assert float(cosine(vector, -2 * vector)) == pytest.approx(-1.0, rel=1e-15)
    assert bool(cosine(vector, 0 * vector).isnan())
    assert float(cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]))) == pytest.approx(24 / 25)


def test_dgsams_passes_are_each_domain_present_once_and_the_first_again():
    order = torch.tensor([[2, 0, 1], [2, 0, 1], [2, 0, 1], [1, 2, 0]])
    present = torch.tensor([[1.0, 1, 1], [1, 1, 0], [0, 1, 0], [1, 0, 1]])
    expected = [[2, 0, 1, 2], [0, 1, 0, -1], [1, 1, -1, -1], [2, 0, 2, -1]]
    assert gradual_passes(order, present).tolist() == expected
    assert [gradual_passes(o, p).tolist() for o, p in zip(order, present, strict=True)] == expected
