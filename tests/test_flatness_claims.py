"""Gradient variance and sharpness on the unseen domain against other ways to compute them, and Fig. 6(a, b)'s claim."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from fabricated import FabricatedStudy, by_algorithm, loss_trace
from torch import nn

from disam_theory import flatness as measures
from disam_theory.algorithms import Settings
from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError, UsageError
from disam_theory.flatness import BATCH, RADIUS, Kept, flatness, kept_flatness
from disam_theory.losses import model_losses
from disam_theory.models import digits_mlp
from disam_theory.sharpness import gradient_variance, sam_sharpness
from disam_theory.study import Block, Study
from figures.fig6ab_unseen_flatness import FIG6AB as FIGURE
from figures.style import styled
from proofs_checks import flatness as claim
from proofs_checks.contrasts import RHOS, arms
from proofs_checks.flatness import check_fig6ab


def fabricated(variance, sharpness=None, noise=0.01):
    """What the arms' weights would give at these levels, by algorithm; seeds and held-out domains shared."""

    def found(study, suite):
        generator = np.random.default_rng(len(suite))
        shared, kept = np.exp(0.3 * generator.normal(size=(6, 3, 1))), {}
        for rho in RHOS:
            for name in ("erm", "sam", "disam", "reversed", "weaker"):
                own = [
                    levels.get(name, 1.0) * shared * np.exp(noise * generator.normal(size=(6, 3, 4)))
                    for levels in (variance, sharpness or {})
                ]
                kept[Settings(**arms(rho)[name]).name] = Kept((0, 10, 20, 30), *own)
        return kept

    return found


def check(variance, sharpness=None, noise=0.01, **contrast):
    study = FabricatedStudy(by_algorithm({}), loss_trace)
    with mock.patch.object(claim, "kept_flatness", fabricated(variance, sharpness, noise)):
        return check_fig6ab(study, **contrast)


# on the study's runs fig6ab is refuted: these flip it
MUTATIONS = {
    "fig6ab": {
        "on weights where DISAM is a fifth flatter": lambda: check({"disam": 0.8}),
        "SAM and DISAM exchanged, where SAM is flatter": lambda: check({"sam": 0.8}, first="sam", second="disam"),
        "noise larger than any difference": lambda: check({}, noise=2.0),
    }
}


def test_much_flatter_is_supported_and_equal_or_sharper_refuted():
    assert check({"disam": 0.8}).verdict is Verdict.SUPPORTED
    assert check({}).verdict is Verdict.REFUTED  # practically equal
    assert check({"disam": 1.2}).verdict is Verdict.REFUTED
    assert check({"disam": 0.8}, noise=2.0).verdict is Verdict.UNDECIDED


def test_the_gradient_variance_decides_and_sharpness_stands_beside():
    evidence = check({"disam": 0.8, "sam": 0.5, "erm": 1.0}, {"disam": 0.5}, noise=1e-9)
    assert evidence.verdict is Verdict.REFUTED
    assert [case["estimate"] for case in evidence.data["cases"]] == pytest.approx([60.0] * 6, abs=1e-5)
    assert evidence.data["sharpness"]["verdict"] == "supported"
    sam = [r for r in evidence.data["against_erm"] if r["first"] == "sam" and r["measure"] == "gradient variance"]
    assert [row["estimate"] for row in sam] == pytest.approx([-50.0] * 6, abs=1e-5)


@pytest.fixture
def stacked(make_domain):
    """A model with and without biases, stacked weights of three runs, and a domain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()
    params = {
        name: torch.stack([p.detach() + 0.5 * torch.randn_like(p) for _ in range(3)])
        for name, p in model.named_parameters()
    }
    return model, params, make_domain("unseen", 12)


def test_the_variance_is_that_over_all_batches(stacked):
    """Against the sampled estimate, and exactly against all batches of two."""
    model, params, domain = stacked
    exact = flatness(model, params, domain, batch_size=2, rho=0.1).gradient_variance
    for r in range(3):
        own = {name: p[r] for name, p in params.items()}
        gradients = []
        for pair in torch.combinations(torch.arange(12)):
            at = {name: p.clone().requires_grad_() for name, p in own.items()}
            parts = torch.autograd.grad(model_losses(model, [domain.take(pair)])(at)[0], list(at.values()))
            gradients.append(torch.cat([g.flatten() for g in parts]))
        of_batches = torch.stack(gradients)
        by_hand = (of_batches - of_batches.mean(0)).square().sum(1).mean()
        assert exact[r].item() == pytest.approx(by_hand.item(), rel=1e-10)
        sampled = gradient_variance(model, [domain], own, batch_size=2, batches=200, rng=0)
        assert abs(sampled.mean[0] - exact[r]) < 4 * sampled.standard_error[0]


def test_the_sharpness_is_sams(stacked):
    model, params, domain = stacked
    found = flatness(model, params, domain, batch_size=2, rho=0.1).sharpness
    for r in range(3):
        own = {name: p[r] for name, p in params.items()}
        assert found[r].item() == pytest.approx(
            sam_sharpness(model_losses(model, [domain]), own, rho=0.1)[0].item(), rel=1e-9
        )


def test_what_cannot_be_measured_is_refused(stacked):
    model, params, domain = stacked
    with pytest.raises(UsageError, match="batch_size is 13"):
        flatness(model, params, domain, batch_size=13, rho=0.1)
    normed = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    with pytest.raises(UsageError, match="not of a linear layer"):
        flatness(normed, {n: p.detach()[None] for n, p in normed.named_parameters()}, domain, batch_size=2, rho=0.1)
    params["0.weight"][0, 0, 0] = float("nan")
    with pytest.raises(ComputationError, match="NaN"):
        flatness(model, params, domain, batch_size=2, rho=0.1)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two seeds that keeps weights at three steps."""
    few = {"steps": 4, "batch_size": 16, "momentum": 0.9}
    made = [Settings("erm", **few)] + [Settings(name, rho=rho, **few) for rho in RHOS for name in ("sam", "disam")]
    block = Block("digits-rotated", tuple(made), 2, snapshot_steps=(0, 2, 4), snapshot_seeds=2)
    made_study = Study(tmp_path_factory.mktemp("study"), [block], digits_mlp)
    made_study.run()
    return made_study


def test_kept_weights_are_measured_where_they_belong(study):
    kept = kept_flatness(study, "digits-rotated")
    name = Settings("sam", rho=0.5).name
    assert kept[name].gradient_variance.shape == (2, 4, 3)
    record = study.records("digits-rotated", algorithm="sam", rho=0.5)[5]
    domains = [domain.name for domain in study.suite("digits-rotated", 0).domains]
    params = {key: p.double()[None] for key, p in record.weights(4).items()}
    unseen = study.split(record).unseen.to(dtype=torch.float64)
    alone = flatness(study.model().double(), params, unseen, batch_size=BATCH, rho=RADIUS)
    at = (record.seed, domains.index(record.held_out), 2)
    assert kept[name].gradient_variance[at] == pytest.approx(alone.gradient_variance.item(), rel=1e-9)
    assert kept[name].sharpness[at] == pytest.approx(alone.sharpness.item(), rel=1e-9)
    start = [arm.gradient_variance[..., 0] for arm in kept.values()]
    assert all(np.array_equal(values, start[0]) for values in start)  # every arm starts from the same weights
    with pytest.raises(ComputationError, match="keeps no weights"):
        kept_flatness(study, "digits-corrupted")


def test_the_figure_shows_the_measures(study):
    rows = FIGURE.compute(study)
    assert len(rows) == 2 * 3 * 2 * 3  # radii, algorithms, measures, steps
    assert {row["difference_mean"] for row in rows if row["algorithm"] == "sam"} == {0.0}
    with styled():
        axes = FIGURE.draw(rows).axes
        assert len(axes) == 3
        assert not any(ax.get_legend() for ax in axes)  # it would lie over curves


def test_layers_are_found_by_name():
    model = SimpleNamespace(named_modules=digits_mlp().named_modules, named_parameters=digits_mlp().named_parameters)
    assert list(measures._linear_layers(model)) == ["0", "2"]
