"""What the paper says about its weights, Algorithm 1 and Table 4: witnesses recomputed, and mutated statements."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from disam_theory.errors import ComputationError
from disam_theory.losses import domain_variance
from disam_theory.perturbations import disam_weights
from proofs_checks import weights
from proofs_checks.algorithm1 import (
    ALGORITHM_CASES,
    TABLE4,
    TABLE4_REPAIRED,
    Domains,
    Rules,
    algorithm1,
    ascent_cost,
    check_alg1,
    check_complexity,
    check_table4,
    disam_objective,
    fish_printed,
    fishr_cited,
    fishr_printed,
    vrex,
    without_hat,
)
from proofs_checks.method import eq5_left, eq8_weight
from proofs_checks.weights import (
    DATA_SETS,
    AscentCase,
    DataSet,
    Pool,
    arrow_printed,
    arrow_repaired,
    check_eq1,
    check_eq2,
    check_eq4,
    check_eq4_bias,
    check_eq5_arrow,
    check_eq5_denominator,
    check_eq7,
    check_eq8_ascent,
    check_eq8_ascent_condition,
    check_eq8_minibatch,
    check_eq8_sign,
    minibatch_bias,
    sign_bound,
    sign_threshold,
)

F = Fraction
QUADRATICS = ((F(1), F(3), F(4)), (F(1), F(-2), F(1)))


def pairwise_objective(losses, shares, params):
    """The variance over all pairs, as the paper's listing computes it."""
    pairs = (losses[:, None] - losses[None, :]) ** 2
    return (shares * losses).sum() - 0.1 * pairs.mean() / 2


def gradient_objective(losses, shares, params):
    """A penalty on the domains' gradients, which needs a pass through the model for each domain."""
    gradients = [torch.autograd.grad(loss, params, create_graph=True) for loss in losses]
    return (shares * losses).sum() + 0.1 * sum((g**2).sum() for gradient in gradients for g in gradient)


MUTATIONS = {
    "eq1": {
        "the loss falls": lambda: check_eq1(None, difference=lambda perturbed, plain: plain - perturbed),
        "half of the loss at w": lambda: check_eq1(None, difference=lambda perturbed, plain: perturbed - plain / 2),
    },
    "eq2": {
        "squared shares": lambda: check_eq2(None, bound=lambda share, s, number: share**2 * s),
        "half of the domains' sharpness": lambda: check_eq2(None, bound=lambda share, s, number: share * s / 2),
    },
    "eq4": {
        "domains weighted alike": lambda: check_eq4(None, summand=lambda size, loss, everything: loss / 2),
        "sums in place of means": lambda: check_eq4(None, summand=lambda size, loss, everything: size * loss),
    },
    "eq4-bias": {
        "towards the smallest gradient": lambda: check_eq4_bias(None, ranking=lambda share, norm, p: 1 / norm),
        "towards the largest projection": lambda: check_eq4_bias(None, ranking=lambda share, norm, p: p),
    },
    "eq5-denominator": {
        "without the denominator": lambda: check_eq5_denominator(None, weight=lambda a, c, b, s: a + b * c),
        "C subtracted": lambda: check_eq5_denominator(None, weight=lambda a, c, b, s: eq5_left(a, -c, b, s)),
        "distances in the denominator": lambda: check_eq5_denominator(
            None, weight=lambda a, c, b, s: (a + b * c) / (1 + b**2 * s**2)
        ),
    },
    "eq5-arrow": {
        "where all minima are equal": lambda: check_eq5_arrow(None, equal_minima=True),
        "with the minima kept": lambda: check_eq5_arrow(None, replaced=arrow_repaired),
    },
    "eq5-arrow-repaired": {
        "the minima dropped": lambda: check_eq5_arrow(None, replaced=arrow_printed),
        "the minima with the other sign": lambda: check_eq5_arrow(
            None, replaced=lambda loss, star, mean, mean_star: mean - loss - star + mean_star
        ),
        "their mean dropped": lambda: check_eq5_arrow(
            None, replaced=lambda loss, star, mean, mean_star: mean - loss + star
        ),
    },
    "eq7": {
        "without the hat": lambda: check_eq7(None, objective=without_hat),
        "variance added": lambda: check_eq7(None, objective=lambda p, held, live, lam: p + lam * held),
        "Eq. 8 without its factor 2": lambda: check_eq7(
            None, weight=lambda a, x, mean, lam, n: eq8_weight(a, x, mean, lam / 2, n)
        ),
    },
    "eq8-sign": {
        "a bound twice as large": lambda: check_eq8_sign(None, bound=lambda a, b, n: 2 * sign_bound(a, b, n)),
        "a bound half as large": lambda: check_eq8_sign(None, bound=lambda a, b, n: sign_bound(a, b, n) / 2),
        "SAM's weights": lambda: check_eq8_sign(None, weight=lambda a, x, mean, lam, n: a),
    },
    "eq8-ascent": {
        "half of lambda": lambda: check_eq8_ascent(None, case=AscentCase(lam=F(1, 20))),
        "a witness with a negative weight": lambda: check_eq8_ascent(None, case=AscentCase(lam=F(1, 2))),
        "a witness with a loss below 0": lambda: check_eq8_ascent(
            None, case=AscentCase(losses=(QUADRATICS[0], (F(1), F(-5, 2), F(1))))
        ),
    },
    "eq8-ascent-condition": {
        "without lambda": lambda: check_eq8_ascent_condition(None, excess=lambda pp, pq, lam: pp - pq),
        "the other sign": lambda: check_eq8_ascent_condition(None, excess=lambda pp, pq, lam: pp + lam * pq),
    },
    "eq8-minibatch": {
        "less its bias": lambda: check_eq8_minibatch(None, bias=minibatch_bias),
        "whole domains as batches": lambda: check_eq8_minibatch(None, whole_domains=True),
    },
    "eq8-minibatch-bias": {
        "no bias": lambda: check_eq8_minibatch(None),
        "1/M in place of (M-1)/M^2": lambda: check_eq8_minibatch(None, bias=lambda n, s: s / n),
        "of the other sign": lambda: check_eq8_minibatch(None, bias=lambda n, s: -minibatch_bias(n, s)),
    },
    "alg1": {
        "empty domains left out, no step at 0, the last iterate": lambda: check_alg1(
            None, rules=Rules(True, True, True)
        ),
        "full batches, no zero gradient, the last iterate": lambda: check_alg1(
            None, rules=Rules(return_last=True), cases={"one iteration": ALGORITHM_CASES["one iteration"]}
        ),
    },
    "complexity": {
        "a variance over all pairs": lambda: check_complexity(None, objective=pairwise_objective),
        "a penalty on the domains' gradients": lambda: check_complexity(None, objective=gradient_objective),
    },
    "table4": {
        "Fishr as cited": lambda: check_table4(None, rows=TABLE4_REPAIRED),
        "Fishr summed over the domains": lambda: check_table4(
            None, rows={**TABLE4, "Fishr": lambda d: len(d.losses) * fishr_cited(d)}
        ),
    },
    "table4-repaired": {
        "Fishr with a minus": lambda: check_table4(None, rows={**TABLE4, "Fishr": lambda d: -fishr_cited(d)}),
        "Fishr of mean gradients": lambda: check_table4(None, rows={**TABLE4, "Fishr": lambda d: -fishr_printed(d)}),
        "Fish with a plus": lambda: check_table4(None, rows={**TABLE4_REPAIRED, "Fish": lambda d: -fish_printed(d)}),
        "V-REx with a minus": lambda: check_table4(None, rows={**TABLE4_REPAIRED, "V-REx": lambda d: -vrex(d)}),
    },
}


def test_the_maximum_over_the_ball_is_that_of_a_fine_grid():
    for pool in itertools.islice(weights._pools(), 20):
        for loss in pool.samples:
            grid = [pool.w + pool.rho * F(k, 400) for k in range(-400, 401)]
            values = [float(loss[0] * u**2 + loss[1] * u + loss[2]) for u in grid]
            curvature = float(abs(loss[0]) * (pool.rho / 400) ** 2)
            assert max(values) <= float(pool.maximum(loss)) + 1e-12
            assert float(pool.maximum(loss)) <= max(values) + curvature + 1e-12


def test_opposed_domains_are_sharp_and_their_pool_is_flat():
    pool = Pool((((F(0), F(1), F(1)),), ((F(0), F(-1), F(1)),)), F(0), F(1, 2))
    assert [pool.maximum(loss) for loss in pool.samples] == [F(3, 2), F(3, 2)]
    assert pool.maximum(weights._mean(pool.samples)) == 1


def test_two_smaller_gradients_turn_the_ascent_against_the_largest():
    vectors = torch.tensor([[0.0, -6.0], [3.0, 4.0], [4.0, 3.0]])
    cosines = torch.nn.functional.cosine_similarity(vectors.mean(0, keepdim=True), vectors)
    assert cosines[0] < 0 < cosines[1:].min()
    two = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    unequal = torch.tensor([[0.25, 0.75]]) @ two
    assert torch.nn.functional.cosine_similarity(unequal, two).argmax() == 1


def test_the_less_converged_domain_takes_all_beyond_the_pole():
    raw = [F(1, 2) + F(1, 2) * c for c in (-1, -2)]
    assert [x / sum(raw) for x in raw] == [0, 1]
    witness = check_eq5_denominator(None).data["witness"]
    assert witness["weights"] == ["0", "1"]
    assert witness["first_weight_at_beta_1/3"] == "undefined"


def test_the_converged_domain_loses_weight_in_the_library_too():
    lam, alpha = torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    beta = disam_weights(torch.tensor([1.0, 0.5], dtype=torch.float64), alpha, lam, torch.ones(2).double())
    assert beta.tolist() == pytest.approx([19 / 40, 21 / 40], abs=1e-15)
    assert check_eq5_arrow(None).data["converged_and_weighted_down"]["beta"] == ["19/40", "21/40"]


def test_automatic_differentiation_with_a_detached_point_gives_both_gradients_of_eq7():
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    epsilon = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    lam, alpha = 0.7, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def losses(u):
        return torch.stack([u**2 + 2, (u - 3) ** 2, u.exp()])

    objective = (alpha * losses(w + epsilon)).sum() - lam * domain_variance(losses(w.detach() + epsilon))
    in_w, in_epsilon = torch.autograd.grad(objective, [w, epsilon])
    values, slopes = losses(w.detach()), torch.tensor([0.6, -5.4, math.exp(0.3)], dtype=torch.float64)
    beta = alpha - 2 * lam / 3 * (values - values.mean())
    assert in_w.item() == pytest.approx((alpha * slopes).sum().item(), rel=1e-13)
    assert in_epsilon.item() == pytest.approx((beta * slopes).sum().item(), rel=1e-13)


def test_the_table_of_signs_by_plain_floats():
    tables = check_eq8_sign(None).data["data_sets"]
    assert set(tables) == set(DATA_SETS)
    for name, data_set in DATA_SETS.items():
        number, ceiling = data_set.domains - 1, math.log(data_set.classes)
        smallest = {"balanced": 1 / number}
        if data_set.per_domain:
            left = [[n for j, n in enumerate(data_set.per_domain) if j != i] for i in range(data_set.domains)]
            smallest["pooled"] = min(min(rest) / sum(rest) for rest in left)
        for shares, alpha in smallest.items():
            largest = alpha * number**2 / (2 * (number - 1) * ceiling)
            row = tables[name][shares]
            assert float(row["largest_lambda"]) == pytest.approx(largest, rel=1e-4)
            for entry in row["by_lambda"]:
                lam = float(F(entry["lambda"]))
                worst = alpha - 2 * lam / number * (ceiling - ceiling / number)
                assert entry["non_negative"] == (worst >= 0)
                assert float(F(entry["gap_in_nats"])) == pytest.approx(alpha * number / (2 * lam))


def test_images_that_do_not_sum_to_the_papers_total_are_an_error():
    with pytest.raises(ComputationError, match="do not sum"):
        weights._sign_table(DataSet(7, 4, 9991, (2048, 2344, 1670, 3930)), sign_threshold, sign_bound)


def test_the_ascent_step_goes_down_on_the_witness():
    def pooled(w):
        return ((w**2 + 3 * w + 4) + (w - 1) ** 2) / 2

    w = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    losses = torch.stack([w**2 + 3 * w + 4, (w - 1) ** 2])
    (g,) = torch.autograd.grad(losses.mean() - 0.1 * domain_variance(losses), [w])
    assert g.item() == pytest.approx(-0.25)
    assert pooled(F(-1, 20)) == F(991, 400) < pooled(0)


@pytest.mark.parametrize(
    ("case", "failed"),
    [
        (AscentCase(lam=F(1, 2)), "all weights positive"),
        (AscentCase(losses=(QUADRATICS[0], (F(1), F(-5, 2), F(1)))), "losses non-negative"),
        (AscentCase(lam=F(0)), "lambda and rho positive"),
    ],
)
def test_a_witness_outside_the_assumptions_refutes_nothing(case, failed):
    assert failed in check_eq8_ascent(None, case=case).reason


def test_the_condition_is_met_and_broken_on_the_instances():
    assert check_eq8_ascent_condition(None).data["instances_on_both_sides"] is True


def test_the_bias_of_two_coins_by_hand():
    """One sample of {0, 1} from each of two domains: Var is 0, and 1/4 with probability 1/2."""
    estimates = [F((a - b) ** 2, 4) for a in (0, 1) for b in (0, 1)]
    assert sum(estimates) / 4 == F(1, 8) == minibatch_bias(2, F(1, 4) + F(1, 4))


def test_algorithm_1_by_hand():
    batch = (((F(1), F(-2), F(1)),), ((F(1), F(2), F(2)),))  # (w-1)^2 and (w+1)^2+1 at w=3: losses 4, 17
    returned, iterates = algorithm1([batch, batch], F(3))
    # beta = 1/2 + 13/16, 1/2 - 13/16; gradients 4, 8: the direction is +1; then L' = 2u at u = 3 + 1/20
    assert iterates[1] == 3 - F(1, 10) * F(61, 10) == returned
    assert algorithm1([batch, batch], F(3), Rules(return_last=True))[0] == iterates[2]


@pytest.mark.parametrize("rule", ["leave_out_empty", "stay_where_flat", "return_last"])
def test_one_repair_alone_does_not_mend_algorithm_1(rule):
    everything = Rules(True, True, True)
    assert check_alg1(None, rules=replace(everything, **{rule: False})).data["undefined_or_lost"]


def test_the_vanishing_ascent_gradient_is_not_a_stationary_point():
    batch, start = ALGORITHM_CASES["a loss with a slope, whose ascent gradient vanishes"]
    slopes = [2 * a * start + b for ((a, b, _),) in batch]
    assert sum(slopes) / 2 == 1
    beta = [eq8_weight(F(1, 2), x, 3, F(1, 8), 2) for x in (5, 1)]
    assert min(beta) > 0
    assert sum(b * s for b, s in zip(beta, slopes, strict=True)) == 0


def test_the_counter_sees_a_second_pass_through_the_model():
    size = {"width": 16, "depth": 2, "domains": 3, "batch": 12}
    plain, disam = ascent_cost(None, **size), ascent_cost(disam_objective, **size)
    # forward: three products; backward: one for each matrix and one for each input but the first
    shapes = [(16, 4), (16, 16), (3, 16)]
    assert plain["matrix_flops"] == sum(2 * 12 * a * b * n for (a, b), n in zip(shapes, (2, 3, 3), strict=True))
    assert disam["matrix_flops"] == plain["matrix_flops"]
    assert ascent_cost(gradient_objective, **size)["matrix_flops"] > 2 * plain["matrix_flops"]


def test_regularisers_by_hand():
    domains = Domains((F(1), F(3)), (((F(1),), (F(3),)), ((F(-1),), (F(-1),))))
    assert vrex(domains) == 1
    assert fish_printed(domains) == 4  # gradients 2 and -1, and two ordered pairs
    assert fishr_printed(domains) == -F(9, 4)
    assert fishr_cited(domains) == 1  # variances 2 and 0


def test_the_printed_fishr_row_prefers_gradients_that_differ():
    witness = check_table4(None).data["fishr_witnesses"]
    assert witness["row"] == ["0", "-1/4", "-1"]
    # by pairs: (1/M) sum |g_i - gbar|^2 = (1/2M^2) sum_ij |g_i - g_j|^2
    for w, row in zip(map(F, witness["w"]), map(F, witness["row"]), strict=True):
        assert -row == sum((a - b) ** 2 for a in (w, -w) for b in (w, -w)) / 8
    assert witness["gradients_1_and_-1_against_0_and_0"] == {"row": "0", "cited": "1"}
