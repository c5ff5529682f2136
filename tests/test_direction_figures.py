"""Figures of the two directions: their numbers by hand, and that they can be drawn."""

import csv
import math

import numpy as np
import pytest
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.convergence import analyse
from disam_theory.directions import along
from disam_theory.errors import ComputationError
from disam_theory.study import Block, Study
from disam_theory.traces import Trace
from figures.directions import DIRECTIONS, STRENGTHS, VARIANCES, negative_share, variances
from figures.directions import SUITES as DRAWN
from figures.fig3_training_loss import RHO
from figures.style import save
from figures.turning import TURNING
from figures.where_differs import LAMBDAS, TRAINED, WHERE_DIFFERS
from proofs_checks.where_differs import map_blocks

SPECS = (DIRECTIONS, VARIANCES, TURNING, WHERE_DIFFERS)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two seeds and few steps of all that the figures ask for."""
    common = {"rho": RHO, "lr": 0.1, "momentum": 0.9, "steps": 12, "batch_size": 96}
    arms = (Settings("sam", **common), *(Settings("disam", lam=lam, **common) for lam in STRENGTHS))
    theorem = {"rho": 0.05, "lr": 0.5, "schedule": "inverse-sqrt", "sampling": "full", "steps": 8}
    full = (Settings("sam", **theorem), Settings("disam", lam=0.1, **theorem))
    blocks = [Block(suite, arms, 2, record_every=2) for suite in DRAWN]
    blocks += [Block(DRAWN[0], full, 2), *map_blocks(seeds=2, steps=10)]
    made = Study(tmp_path_factory.mktemp("study"), blocks, lambda: nn.Linear(64, 10))
    made.run()
    return made


@pytest.fixture(scope="module")
def rows(study):
    return {spec.id: spec.compute(study) for spec in SPECS}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_figures_are_drawn_and_written_with_their_data(spec, rows, tmp_path):
    svg = save(spec, rows[spec.id], tmp_path, {"made": "by a test"})
    assert svg.startswith("<?xml")
    lines = (tmp_path / f"{spec.id}.csv").read_text().splitlines()[1:]
    assert len(list(csv.DictReader(lines))) == len(rows[spec.id])
    assert spec.where in ("not in the paper", "Theorem 1")


def test_shares_and_variances_are_of_the_domains_in_the_batch():
    nan = math.nan
    steps = {
        "losses": np.array([[1.0, 3.0, nan], [2.0, 2.0, 5.0]]),
        "beta": np.array([[-0.1, 1.1, 0.0], [-0.2, -0.3, 1.5]]),
    }
    trace = Trace({}, steps, {}, "finished")
    assert negative_share(trace).tolist() == [0.5, 2 / 3]
    assert variances(trace, "losses").tolist() == [1.0, 2.0]  # Eq. (6), of two and of three domains


def test_curves_are_means_over_runs(study, rows):
    suite, lam, step = DRAWN[1], STRENGTHS[-1], 4
    row = next(r for r in rows["directions"] if (r["suite"], r["lam"], r["step"]) == (suite, lam, step))
    traces = [r.trace for r in study.records(suite, algorithm="disam", lam=lam)]
    at = traces[0].steps["step"].tolist().index(step)
    assert row["cosine_mean"] == pytest.approx(np.mean([t.steps["cos_sam"][at] for t in traces]))
    assert row["negative_mean"] == pytest.approx(100 * np.mean([(t.steps["beta"][at] < 0).mean() for t in traces]))


def test_the_difference_of_variances_is_paired_and_relative(study, rows):
    suite, step = DRAWN[0], 4
    sam, disam = (
        np.log([np.var(r.trace.steps["losses_ascent"][2]) for r in study.records(suite, sampling="pooled", **arm)])
        for arm in ({"algorithm": "sam"}, {"algorithm": "disam", "lam": 0.1})
    )
    found = [r for r in rows["variances"] if (r["suite"], r["at"], r["step"]) == (suite, "losses_ascent", step)]
    by = {row["algorithm"]: row for row in found}
    assert by["sam"]["difference_mean"] == by["sam"]["difference_high"] == 0
    assert by["disam"]["difference_mean"] == pytest.approx(100 * (np.exp(np.mean(disam - sam)) - 1))
    assert by["disam"]["mean"] == pytest.approx(np.exp(disam.mean()))


def test_the_proofs_quantities_are_those_of_every_full_batch_run(study, rows):
    runs = [analyse(r.trace).series for r in study.records(DRAWN[0], algorithm="disam", sampling="full")]
    mine = [r for r in rows["turning"] if r["algorithm"] == "disam"]
    found = {(r["quantity"], r["T"]): r for r in mine}
    assert {r["runs"] for r in mine} == {8}
    assert max(T for quantity, T in found if quantity == "gamma") == 7  # of the last step there is no next
    for T in (1, 7):
        at = [{name: values[T - 1] for name, values in run.items()} for run in runs]
        median = {name: np.median([run[name] for run in at]) for name in at[0]}
        assert found["gamma", T]["median"] == pytest.approx(median["gamma"])
        assert found["phi", T]["median"] == pytest.approx(math.degrees(median["turning_left"]))
        cross = np.array([run["cross_over_main"] for run in at])
        assert found["cross", T]["median"] == pytest.approx(np.median(np.abs(cross)))
        assert found["cross", T]["negative"] == (cross < 0).mean()
        for name, sides in {"theorem1": "theorem1", "corrected": "corrected_average"}.items():
            ratio = np.median([run[f"{sides}_left"] / run[f"{sides}_right"] for run in at])
            assert found[name, T]["median"] == pytest.approx(ratio)
            assert found[name, T]["low"] <= ratio <= found[name, T]["high"]


def test_without_full_batch_runs_the_figure_says_so(tmp_path):
    with pytest.raises(ComputationError, match="no full-batch runs"):
        TURNING.compute(Study(tmp_path, map_blocks(seeds=2, steps=10), lambda: nn.Linear(64, 10)))


def test_the_map_has_every_ratio_and_lambda(study, rows):
    found = {(row["ratio"], row["lam"]): row for row in rows["where_differs"]}
    assert len(found) == 6 * len(LAMBDAS)
    for ratio in (1, 40):
        angles = [found[ratio, lam]["angle_mean"] for lam in LAMBDAS]
        assert angles == sorted(angles)
        assert [("gain_mean" in found[ratio, lam]) for lam in LAMBDAS] == [lam in TRAINED for lam in LAMBDAS]
    points = along(study, study.records("digits-unequal-8", algorithm="sam"))
    expected = np.mean([np.degrees(at.angle(0.2)) for held in points for at in held])
    assert found[8, 0.2]["all_data_mean"] == pytest.approx(expected)
    disam, sam = (
        np.mean([100 * r.trace.evaluations["unseen_accuracy"][-1] for r in study.records("digits-unequal-8", **arm)])
        for arm in ({"algorithm": "disam", "lam": 1.0}, {"algorithm": "sam"})
    )
    assert found[8, 1.0]["gain_mean"] == pytest.approx(disam - sam)
