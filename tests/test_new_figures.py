"""Figs. 1(b), 3(c, d), 5 and 7 from a small study: their rows are what other code makes of the trace files."""

import json

import numpy as np
import pytest

from disam_theory.algorithms import Settings
from disam_theory.models import digits_mlp
from disam_theory.study import Block, Study
from figures import fig1_convergence, fig3cd_largest_rho, fig5_sensitivity, fig7_disparity
from figures.style import styled
from proofs_checks.contrasts import arms
from proofs_checks.disparity import disparity, normalised_losses

SUITE, SEEDS, STEPS = "digits-corrupted", 3, 12
RHOS, LAMS = (0.05, 0.5, 8.0), (0.3, 1.0)
ARMS = [Settings("erm", steps=STEPS)]
ARMS += [Settings(name, rho=rho, steps=STEPS) for rho in RHOS for name in ("sam", "disam")]
ARMS += [Settings("disam", rho=0.5, lam=lam, steps=STEPS) for lam in (*LAMS, -0.1)]
SPECS = (fig1_convergence.FIG1B, fig3cd_largest_rho.FIG3CD, fig5_sensitivity.FIG5, fig7_disparity.FIG7)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = Study(tmp_path_factory.mktemp("study"), [Block(SUITE, tuple(ARMS), SEEDS)], digits_mlp, evaluate_every=3)
    made.run()
    return made


@pytest.fixture(autouse=True)
def one_suite(monkeypatch):
    for module in (fig3cd_largest_rho, fig5_sensitivity):
        monkeypatch.setattr(module, "SUITES", (SUITE,))


def evaluations(study, name, **settings):
    """What the trace files of one arm say: seed -> held-out domain -> evaluations in order."""
    found = {}
    for record in study.records(SUITE, algorithm=name, **settings):
        lines = [json.loads(line) for line in record.path.read_text().splitlines()]
        of_run = [line["evaluation"] for line in lines if "evaluation" in line]
        found.setdefault(record.seed, {})[record.held_out] = of_run
    return found


def accuracy(study, field, name, **settings):
    """The last accuracy of each seed in per cent, averaged over held-out domains."""
    found = evaluations(study, name, **settings)
    return np.array([np.mean([100 * run[-1][field] for run in found[seed].values()]) for seed in range(SEEDS)])


def test_fig1b_and_fig7_are_the_claims_curves(study):
    rows = fig7_disparity.compute(study)
    assert {row["algorithm"] for row in rows} == {"erm", "sam", "disam"}
    assert [row for row in rows if row["algorithm"] != "disam"] == fig1_convergence.compute_domains(study)
    for name in ("erm", "sam", "disam"):
        mine = [row for row in rows if row["algorithm"] == name]
        runs = [run["noise"] for run in evaluations(study, **_named(name)).values()]
        domain = mine[0]["domain"]
        raw = np.array([[line["losses"][0] for line in run] for run in runs])
        first = [row for row in mine if row["domain"] == domain]
        assert [row["raw_mean"] for row in first] == pytest.approx(raw.mean(0))
        normal = (raw - raw.min(1, keepdims=True)) / raw.max(1, keepdims=True)
        assert [row["mean"] for row in first] == pytest.approx(normal.mean(0), abs=1e-12)
        # the estimand of claim fig1b, on these runs
        records = [r for r in study.records(SUITE, **arms(0.5)[name]) if r.held_out == "noise"]
        claimed = np.mean([disparity(normalised_losses)(record.trace) for record in records])
        assert np.mean([row["spread_mean"] for row in first[1:]]) == pytest.approx(claimed)


def _named(name):
    settings = {key: value for key, value in arms(0.5)[name].items() if key not in ("algorithm", "sampling")}
    return {"name": name, **settings}


def test_fig3cd_is_the_last_radius_that_costs_at_most_a_point(study):
    for row in fig3cd_largest_rho.compute(study):
        field = "unseen_accuracy" if row["criterion"] == "unseen domain" else "validation_accuracy"
        strength = {"lam": 0.1} if row["algorithm"] == "disam" else {}
        curves = np.stack([accuracy(study, field, row["algorithm"], rho=rho, **strength) for rho in RHOS], axis=1)
        floor = accuracy(study, field, "erm") - 1.0
        logs, censored = [], 0
        for curve, least in zip(curves, floor, strict=True):
            # a fine grid in place of the crossing's formula
            fine = np.linspace(np.log(RHOS[0]), np.log(RHOS[-1]), 200_001)
            works = fine[np.interp(fine, np.log(RHOS), curve) >= least]
            logs.append(works[-1] if len(works) else fine[0])
            censored += len(works) == 0 or works[-1] == fine[-1]
        assert row["mean"] == pytest.approx(np.exp(np.mean(logs)), rel=1e-4)
        assert row["censored_seeds"] == censored
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["algorithm"] == "disam" or row["ratio_mean"] == 1.0


def test_fig5_has_every_radius_and_strength_with_its_spread(study):
    rows = fig5_sensitivity.compute(study)
    assert [(r["algorithm"], r["rho"]) for r in rows if r["panel"] == "rho"] == [
        (name, rho) for rho in RHOS for name in ("sam", "disam")
    ]
    assert [row["lam"] for row in rows if row["panel"] == "lambda"] == [0.1, *LAMS]
    for row in rows:
        strength = {"lam": row["lam"]} if row["algorithm"] == "disam" else {}
        values = accuracy(study, "unseen_accuracy", row["algorithm"], rho=row["rho"], **strength)
        reference = {"name": "sam"} if row["panel"] == "rho" else {"name": "disam", "lam": 0.1}
        against = accuracy(study, "unseen_accuracy", rho=row["rho"], **reference)
        assert row["mean"] == pytest.approx(values.mean())
        assert row["spread"] == pytest.approx(np.std(values, ddof=1))
        assert row["difference_mean"] == pytest.approx((values - against).mean(), abs=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_rows_are_finite_and_drawn(spec, study):
    rows = spec.compute(study)
    assert all(np.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    with styled():
        figure = spec.draw(rows)
    assert all(axes.has_data() for axes in figure.axes)
