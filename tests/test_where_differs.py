"""The angle between the two ascent directions, the suites of the map, and what the claims say of known studies."""

import json
import math

import numpy as np
import pytest
import torch
from fabricated import FabricatedStudy, by_algorithm, loss_trace
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.claims import Verdict
from disam_theory.directions import DomainGradients, along, domain_gradients
from disam_theory.domains import UNEQUAL, load_suite
from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import model_losses, parameters_of
from disam_theory.models import digits_mlp
from disam_theory.perturbations import cosine, disam_weights, domain_inspired, flat
from disam_theory.study import Block, Study
from disam_theory.traces import Trace
from proofs_checks.contrasts import LAM, SUITES
from proofs_checks.where_differs import (
    CLOSE,
    DATA,
    LARGEST,
    MAP,
    RHO,
    STRENGTHS,
    check_where_differs,
    check_where_gains,
    map_blocks,
    measured,
    recorded_angles,
)

SEEDS, HELD_OUT, POINTS, M = 6, 3, 5, 3
SHARES = (0.30, 0.27, 0.32, 0.28, 0.33, 0.26)  # of the rarest domain, in no relation to the gaps
EXACT = {"points": 1, "largest_difference": 0.0}


def gradients(gap, share, bend=0.0, generator=None):
    """Gradients of three domains, 45 degrees apart or so, whose losses are ``gap`` apart; ``bend`` turns g's length."""
    generator = generator or np.random.default_rng(0)
    losses = 1.0 + gap * np.array([0.0, 0.5, 1.0]) * generator.uniform(0.9, 1.1, (POINTS, 1))
    alpha = np.tile([(1 - share) / 2, (1 - share) / 2, share], (POINTS, 1))
    each = np.array([1.0, 0, 0, 0]) * (1 + bend * gap) ** 2 + np.eye(3, 4, 1)
    return DomainGradients(losses, np.tile(each @ each.T, (POINTS, 1, 1)), alpha)


def fabricated_points(least=0.1, largest=1.0, bend=0.0):
    """Measured gradients on every suite of the map, whose losses are ``least`` to ``largest`` apart."""
    generator = np.random.default_rng(1)
    gaps = np.geomspace(least, largest, len(MAP))
    on = {
        suite: [[gradients(gap, share, bend, generator) for _ in range(HELD_OUT)] for _ in range(SEEDS)]
        for suite, gap, share in zip(MAP, gaps, SHARES, strict=True)
    }
    return dict.fromkeys(DATA, on)


def cosine_trace(level):
    made = loss_trace(1.0)
    return Trace(made.header, {**made.steps, "cos_sam": np.full(3, min(level, 1.0))}, made.evaluations, "finished")


def differs(cosine=0.999, points=None, recorded=EXACT, **options):
    study = FabricatedStudy(lambda s: cosine if s["lam"] == LAM else 0.5, cosine_trace, noise=1e-4, spread=0.0)
    return check_where_differs(study, points=points or fabricated_points(), recorded=recorded, **options)


def accuracies(levels, noise=0.005):
    def trace(level):
        made = loss_trace(1.0)
        return Trace(made.header, made.steps, {"unseen_accuracy": np.array([0.1, level])}, "finished")

    return FabricatedStudy(by_algorithm(levels), trace, noise=noise, spread=0.1)


def gains(levels, noise=0.005, **contrast):
    return check_where_gains(accuracies(levels, noise), **contrast)


# on the study's runs where-disam-differs is conditional and where-disam-gains undecided: these flip them
MUTATIONS = {
    "where-disam-differs": {
        "directions 18 degrees apart at the defaults": lambda: differs(cosine=0.95),
        "a default ten times as large": lambda: differs(lam=LARGEST),
        "an angle that falls as the weights change more": lambda: differs(points=fabricated_points(bend=40.0)),
        "another quantity said to control it": lambda: differs(of="imbalance of sizes"),
        "gaps so large that the first order fails": lambda: differs(points=fabricated_points(50.0, 500.0)),
        "a recorded cosine that is another": lambda: differs(recorded={"points": 1, "largest_difference": 0.01}),
        "directions equal at the defaults everywhere": differs,
    },
    "where-disam-gains": {
        "DISAM three points better": lambda: gains({"sam": 0.80, "disam": 0.83, "reversed": 0.8}),
        "DISAM three points worse": lambda: gains({"sam": 0.80, "disam": 0.77, "reversed": 0.8}),
        "practically equal": lambda: gains(dict.fromkeys(("sam", "disam", "reversed"), 0.8), noise=1e-4),
    },
}
VERDICTS = {
    "directions 18 degrees apart at the defaults": Verdict.REFUTED,
    "a default ten times as large": Verdict.REFUTED,
    "an angle that falls as the weights change more": Verdict.REFUTED,
    "another quantity said to control it": Verdict.REFUTED,
    "gaps so large that the first order fails": Verdict.REFUTED,
    "a recorded cosine that is another": Verdict.REFUTED,
    "directions equal at the defaults everywhere": Verdict.SUPPORTED,
    "DISAM three points better": Verdict.SUPPORTED,
    "DISAM three points worse": Verdict.REFUTED,
    "practically equal": Verdict.REFUTED,
}


@pytest.mark.parametrize("what", VERDICTS)
def test_verdicts_on_studies_whose_truth_is_known(what):
    evidence = next(wrong[what]() for wrong in MUTATIONS.values() if what in wrong)
    assert evidence.verdict is VERDICTS[what], evidence.reason
    json.dumps(evidence.data, allow_nan=False)


def test_cases_that_disagree_are_conditional_and_noise_is_undecided():
    study = FabricatedStudy(lambda s: 0.95 if s["rho"] == RHO else 0.999, cosine_trace, noise=1e-4, spread=0.0)
    assert check_where_differs(study, points=fabricated_points(), recorded=EXACT).verdict is Verdict.CONDITIONAL
    assert gains({"sam": 0.8, "disam": 0.81}, noise=0.04).verdict is Verdict.UNDECIDED


def test_estimates_are_the_true_ones():
    data = differs().data
    assert list(data["equal_at_defaults"]["means"].values()) == pytest.approx([0.999] * 7, abs=1e-4)
    found = fabricated_points()["all data"][MAP[-1]][0][0]
    row = data["in_training"][-2]
    assert (row["suite"], row["lambda"]) == (MAP[-1], LAM)
    assert row["along SAM, all data"]["estimate"] == pytest.approx(np.degrees(found.angle(LAM).mean()), rel=0.05)
    assert row["along DISAM"]["estimate"] == pytest.approx(math.degrees(math.acos(0.999)), rel=0.05)
    gained = gains({"sam": 0.80, "disam": 0.83, "reversed": 0.8}, noise=1e-6).data["cases"][0]
    assert gained["estimate"] == pytest.approx(3.0, rel=0.1)


# --- the angle, by autograd and by hand ---


@pytest.fixture(scope="module")
def split():
    return load_suite(MAP[-1], rng=3).split("noise0", rng=3)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return [parameters_of(digits_mlp().double()) for _ in range(2)]


@pytest.mark.parametrize("lam", [-1.0, 0.0, 0.1, 1.0, 30.0])
def test_the_angle_is_autograds(split, weights, lam):
    found = domain_gradients(digits_mlp(), weights, split.sources)
    sources = [domain.to(dtype=torch.float64) for domain in split.sources]
    losses_of = model_losses(digits_mlp().double(), sources, chunk=97)
    alpha = torch.tensor(losses_of.shares, dtype=torch.float64)
    for k, params in enumerate(weights):
        free = {name: p.clone().requires_grad_(True) for name, p in params.items()}
        losses, strength = losses_of(free), torch.tensor(lam, dtype=torch.float64)
        inspired = domain_inspired(losses, alpha, strength, torch.ones(3, dtype=torch.float64))
        both = [
            flat(dict(zip(free, torch.autograd.grad(value, list(free.values()), retain_graph=True), strict=True)))
            for value in ((alpha * losses).sum(), inspired)
        ]
        assert math.cos(found.angle(lam)[k]) == pytest.approx(float(cosine(*both)), abs=1e-12)
        beta = disam_weights(losses.detach(), alpha, strength, torch.ones(3, dtype=torch.float64))
        assert 1 - found.weight_change(lam)[k] == pytest.approx((beta / alpha).numpy(), abs=1e-12)


def test_sine_and_first_order_are_the_formulas(split, weights):
    found = domain_gradients(digits_mlp(), weights, split.sources)
    each = np.stack([np.linalg.cholesky(gram) for gram in found.gram])  # vectors with these inner products
    for k in range(len(weights)):
        g = found.alpha[k] @ each[k]
        v = 2 / 3 * (found.losses[k] - found.losses[k].mean()) @ each[k]
        across = v - (v @ g) / (g @ g) * g
        for lam in (0.1, 1.0):
            sine = lam * np.linalg.norm(across) / np.linalg.norm(g - lam * v)
            assert np.sin(found.angle(lam)[k]) == pytest.approx(sine, rel=1e-9)
            assert found.first_order_angle(lam)[k] == pytest.approx(lam * np.linalg.norm(across) / np.linalg.norm(g))
    errors = [abs(found.first_order_angle(lam) / found.angle(lam) - 1).max() for lam in (1e-2, 1e-3)]
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)  # the next order is lambda squared


def test_opposite_directions_are_pi_apart():
    # one gradient for all domains, and v so long that it turns g round
    found = DomainGradients(np.array([[1.0, 0.0]]), np.ones((1, 2, 2)) * [[1.0, 2.0], [2.0, 4.0]], np.full((1, 2), 0.5))
    assert found.angle(10.0) == pytest.approx(0.0)  # v = (1 - 2) / 2 points down g already
    assert found.angle(-10.0) == pytest.approx(math.pi)


def test_a_batch_has_its_own_shares_and_may_lack_a_domain(split, weights):
    whole = sum(len(domain) for domain in split.sources)
    every = domain_gradients(digits_mlp(), weights, split.sources, batch_size=whole)
    data = domain_gradients(digits_mlp(), weights, split.sources)
    for field in ("losses", "gram", "alpha"):
        assert getattr(every, field) == pytest.approx(getattr(data, field), rel=1e-9)
    few = domain_gradients(digits_mlp(), weights * 20, split.sources, batch_size=4, rng=1)
    assert few.alpha.sum(1) == pytest.approx(np.ones(40))
    assert set(np.unique(few.alpha * 4)) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    absent = few.alpha == 0
    assert absent.any()
    assert np.isnan(few.weight_change(1.0)[absent]).all()
    assert (few.variance_weights()[absent] == 0).all()
    assert few.variance_weights().sum(1) == pytest.approx(np.zeros(40), abs=1e-12)
    again = domain_gradients(digits_mlp(), weights * 20, split.sources, batch_size=4, rng=1)
    assert np.array_equal(few.gram, again.gram)


def test_misuse_is_refused(split, weights):
    with pytest.raises(UsageError, match="no weights"):
        domain_gradients(digits_mlp(), [], split.sources)
    with pytest.raises(UsageError, match="batch size is 100000"):
        domain_gradients(digits_mlp(), weights, split.sources, batch_size=100000)


# --- suites and runs ---


@pytest.mark.parametrize("ratio", UNEQUAL)
def test_sizes_are_in_the_ratio_and_the_rarer_are_the_noisier(ratio):
    suite = load_suite(f"digits-unequal-{ratio}", rng=1)
    sizes = np.array([len(domain) for domain in suite.domains])
    assert sizes.sum() == 1797
    assert sizes[0] / sizes[-1] == pytest.approx(ratio, rel=0.06)
    assert sizes[:-1] / sizes[1:] == pytest.approx(ratio ** (1 / 3), rel=0.06)
    spreads = [float(domain.inputs.std()) for domain in suite.domains]
    assert spreads == sorted(spreads)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The map's runs for two seeds, short, with full-batch runs that keep weights."""
    full = Settings("disam", rho=0.05, lr=0.5, schedule="inverse-sqrt", sampling="full", steps=4, lam=LAM)
    blocks = [*map_blocks(seeds=2, steps=10), Block(SUITES[0], (full,), 2, (0, 3), snapshot_seeds=1)]
    made = Study(tmp_path_factory.mktemp("study"), blocks, lambda: nn.Linear(64, 10))
    made.run()
    return made


def test_the_maps_runs_have_all_that_the_claims_ask(study):
    points = measured(study)
    assert set(points) == set(DATA)
    for suite in MAP:
        on_all, on_batches = (points[data][suite] for data in DATA)
        assert [len(held) for held in on_all] == [4, 4] == [len(held) for held in on_batches]
        assert on_all[0][0].losses.shape == (11, 3)
        assert np.allclose(on_all[0][0].alpha, on_all[0][0].alpha[0])
        assert not np.allclose(on_batches[0][0].alpha, on_batches[0][0].alpha[0])
    gained = check_where_gains(study)
    assert [row["arm"] for row in gained.data["controls"]] == ["disam", "reversed", "weaker"]
    assert len(gained.data["elsewhere"]) == 2 * len(MAP)
    assert set(STRENGTHS) >= {LAM, LARGEST}


def test_what_full_batch_runs_recorded_is_the_angle_from_the_gram_matrix(study):
    found = recorded_angles(study)
    assert found["points"] == 2 * 4
    assert found["largest_difference"] < 1e-5 < CLOSE
    with pytest.raises(ComputationError, match="no full-batch run"):
        recorded_angles(FabricatedStudy(lambda s: 1.0, loss_trace, full_batch_suites=()))


def test_without_kept_weights_there_is_no_map(study):
    records = study.records(MAP[0], algorithm="disam", lam=LAM)
    with pytest.raises(ComputationError, match="no weights were kept on 'digits-unequal-1'"):
        along(study, records)
