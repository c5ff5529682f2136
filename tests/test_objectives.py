"""The objectives' weights: by hand, against autograd, and DomainBed's loop of GroupDRO."""

import pytest
import torch

from disam_theory.algorithms import Settings, objectives

EXACT = {"rtol": 1e-12, "atol": 1e-13}
ARMS = [
    Settings("sam"),
    Settings("sam", objective="vrex", vrex_penalty=2.0),
    Settings("disam", objective="groupdro", groupdro_eta=0.5),
    Settings("erm", objective="groupdro", groupdro_eta=0.0),
]


def start(M, arms=ARMS):
    return objectives(arms, M, dtype=torch.float64)


def batch(M, rng=0, absent=None):
    generator = torch.Generator().manual_seed(rng)
    losses = 2 * torch.rand(len(ARMS), M, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 9, (len(ARMS), M), generator=generator).double()
    if absent is not None:
        counts[:, absent] = 0
        losses[:, absent] = 0
    return losses, counts / counts.sum(1, keepdim=True), (counts > 0).double()


def test_the_weights_by_hand():
    """L = (1, 2), alpha = (3/4, 1/4): V-REx with b = 2 adds (2b/2)(-1/2, 1/2); q is proportional to exp(L/2)."""
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64).expand(4, 2)
    alpha = torch.tensor([0.75, 0.25], dtype=torch.float64).expand(4, 2)
    weights = start(2).observed(losses, torch.ones(4, 2)).weights(losses, alpha, torch.ones(4, 2).double())
    assert weights[0].tolist() == [0.75, 0.25]
    assert weights[1].tolist() == pytest.approx([-0.25, 1.25], rel=1e-12)
    raised = torch.tensor([0.5, 1.0], dtype=torch.float64).exp()
    torch.testing.assert_close(weights[2], raised / raised.sum(), **EXACT)
    assert weights[3].tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


@pytest.mark.parametrize("absent", [None, 1])
def test_vrexs_weights_are_the_gradient_of_its_objective(absent):
    losses, alpha, present = batch(4, absent=absent)
    variable = losses[1].clone().requires_grad_(True)
    here = present[1] > 0
    value = (alpha[1] * variable).sum() + 2.0 * ((variable[here] - variable[here].mean()) ** 2).mean()
    (gradient,) = torch.autograd.grad(value, variable)
    weights = start(4).weights(losses, alpha, present)
    torch.testing.assert_close(weights[1], gradient, **EXACT)
    assert torch.equal(weights[0], alpha[0])


def test_groupdro_is_domainbeds_loop_over_many_steps():
    objective, q = start(3), torch.ones(3, dtype=torch.float64)
    for rng in range(30):
        losses, alpha, present = batch(3, rng)
        for m in range(3):
            q[m] *= (0.5 * losses[2, m]).exp()
        q /= q.sum()
        objective = objective.observed(losses, present)
        torch.testing.assert_close(objective.weights(losses, alpha, present)[2], q, **EXACT)


def test_groupdro_stays_finite_where_exponentials_overflow():
    losses = torch.tensor([1e6, 1e6 + 2.0, 0.0], dtype=torch.float64).expand(4, 3)
    objective = start(3).observed(losses, torch.ones(4, 3))
    q = objective.weights(losses, losses, torch.ones(4, 3).double())[2]
    assert q.tolist() == pytest.approx([1 / (1 + torch.e), torch.e / (1 + torch.e), 0.0], rel=1e-9)


def test_an_absent_domain_keeps_its_weight_against_a_domain_of_no_loss():
    """Whatever stands in place of its loss."""
    losses, _, present = batch(3, absent=1)
    losses[:, 1], losses[:, 2] = 5.0, 0.0
    before = start(3)
    after = before.observed(losses, present)
    q, then = before.log_q.exp()[2], after.log_q.exp()[2]
    assert float(then[1] / then[2]) == pytest.approx(float(q[1] / q[2]), rel=1e-12)
    assert float(then[0] / then[2]) == pytest.approx(float((0.5 * losses[2, 0]).exp()), rel=1e-12)


def test_a_loss_that_is_not_finite_stays_in_its_own_run():
    losses, alpha, present = batch(3)
    clean = start(3).observed(losses, present).weights(losses, alpha, present)
    losses[2, 0] = torch.nan
    broken = start(3).observed(losses, present).weights(losses, alpha, present)
    assert bool(broken[2].isnan().any())
    assert torch.equal(broken[[0, 1, 3]], clean[[0, 1, 3]])


def test_one_run_of_several_is_the_run_alone():
    losses, alpha, present = batch(3)
    stacked = start(3).observed(losses, present)
    for r in range(len(ARMS)):
        one = start(3).run(r).observed(losses[r], present[r])
        assert torch.equal(one.weights(losses[r], alpha[r], present[r]), stacked.weights(losses, alpha, present)[r])


def test_runs_of_the_average_loss_have_no_objective():
    assert objectives([Settings("sam"), Settings("disam")], 3) is None
