"""Every figure from a small study: its rows are the traces' numbers, its files are whole and repeatable."""

import csv
import json

import numpy as np
import pytest
import torch

from disam_theory.algorithms import Settings
from disam_theory.domains import load_suite
from disam_theory.losses import cross_entropy
from disam_theory.models import digits_mlp
from disam_theory.study import Block, Study
from figures import FIGURES, fig1_convergence, fig3_training_loss
from figures.style import save
from proofs_checks import contrasts

SUITES = ("digits-rotated", "digits-corrupted")
DRAWN = {module.__name__: module.SUITES for module in (fig1_convergence, fig3_training_loss)}
RECORD = {"commit": "abc", "command": "paper_repro.py"}
ARMS = [Settings("erm", steps=10), *(Settings("sam", rho=rho, steps=10) for rho in (0.05, 0.5))]
ARMS += [Settings("disam", rho=0.5, steps=10)]
FULL = [Settings(name, sampling="full", schedule="inverse-sqrt", steps=10) for name in ("sam", "disam")]


ELSEWHERE = {  # tested with studies of their own
    *("fig3cd", "fig4", "fig5", "fig6ab", "fig6c", "fig7", "gains"),
    *("directions", "variances", "turning", "where_differs"),
}


@pytest.fixture(autouse=True)
def two_suites(monkeypatch):
    for module in (fig1_convergence, fig3_training_loss):
        monkeypatch.setattr(module, "SUITES", SUITES)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    blocks = [Block(suite, tuple(ARMS), 2, snapshot_steps=(0, 10), snapshot_seeds=2) for suite in SUITES]
    blocks.append(Block(SUITES[0], tuple(FULL), 1))
    made = Study(tmp_path_factory.mktemp("study"), blocks, digits_mlp, evaluate_every=5)
    made.run()
    return made


def test_a_claims_figure_leaves_no_suite_of_the_claim_out():
    assert set(DRAWN.values()) == {contrasts.SUITES}


@pytest.mark.parametrize("spec", [spec for spec in FIGURES if spec.id not in ELSEWHERE], ids=lambda spec: spec.id)
def test_a_figure_has_rows_and_four_whole_files(spec, study, tmp_path):
    rows = spec.compute(study)
    assert all(np.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    svg = save(spec, rows, tmp_path, RECORD)
    assert svg.count("<svg") == 1
    assert (tmp_path / f"{spec.id}.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / f"{spec.id}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / f"{spec.id}.csv").open() as file:
        assert json.loads(file.readline().removeprefix("# ")) == RECORD
        read = list(csv.DictReader(file))
    drawn = next(name for name in ("mean", "loss", "theorem1_left") if name in rows[0])
    assert [float(line[drawn]) for line in read] == [row[drawn] for row in rows]
    assert save(spec, rows, tmp_path / "again", RECORD) == svg


def rows_of(name, study):
    return next(spec for spec in FIGURES if spec.id == name).compute(study)


def test_fig1a_is_the_mean_unseen_accuracy(study):
    for row in rows_of("fig1a", study):
        chosen = {"algorithm": row["algorithm"]} | ({"rho": row["rho"]} if row["algorithm"] == "sam" else {})
        accuracies = [
            r.trace.evaluations["unseen_accuracy"][-1] for r in study.records(row["suite"], sampling="pooled", **chosen)
        ]
        assert row["mean"] == pytest.approx(100 * np.mean(accuracies))
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["seeds"] == 2


def test_fig3_loss_is_the_mean_over_all_source_samples(study):
    row = next(r for r in rows_of("fig3ab", study) if r["algorithm"] == "disam" and r["step"] == 0)
    values = []
    for record in study.records(row["suite"], sampling="pooled", algorithm="disam"):
        torch.manual_seed(record.seed)
        model, split = digits_mlp(), study.split(record)
        inputs = torch.cat([d.inputs for d in split.sources])
        labels = torch.cat([d.labels for d in split.sources])
        values.append(float(cross_entropy(model(inputs), labels).detach().mean()))
    assert row["mean"] == pytest.approx(np.mean(values), rel=1e-5)
    assert row["difference_mean"] == 0.0


def test_lambda_max_at_the_start_is_that_of_the_fresh_network(study):
    rows = [r for r in rows_of("lambda_max", study) if r["step"] == 0 and r["loss"] == "noise (unseen)"]
    assert {row["algorithm"] for row in rows} == {"erm", "sam", "disam"}
    assert len({row["mean"] for row in rows}) == 1  # all arms start from the same weights
    tops = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = digits_mlp().double()
        domain = load_suite("digits-corrupted", rng=seed)["noise"].to(dtype=torch.float64)
        tops.append(_power_iteration(model, domain))
    assert rows[0]["mean"] == pytest.approx(np.mean(tops), rel=2e-3)


def _power_iteration(model, domain):
    """The top eigenvalue by double backward; the Hessian is shifted so that it is the largest in magnitude."""
    params = [*model.parameters()]
    loss = cross_entropy(model(domain.inputs), domain.labels).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    vector, shift = torch.ones_like(gradient) / len(gradient) ** 0.5, 1.0
    for _ in range(300):
        product = torch.cat([p.flatten() for p in torch.autograd.grad(gradient @ vector, params, retain_graph=True)])
        value, vector = float(vector @ product), (product + shift * vector).detach()
        vector = vector / vector.norm()
    return value


def test_the_centre_of_the_landscape_is_the_runs_own_loss(study):
    rows = [row for row in rows_of("landscape", study) if row["a"] == row["b"] == 0.0]
    record = next(
        r for r in study.records("digits-corrupted", algorithm="disam") if r.held_out == "noise" and r.seed == 0
    )
    model = digits_mlp()
    model.load_state_dict(record.weights(10))
    assert [row["domain"] for row in rows] == [d.name for d in study.split(record).sources]
    for row, domain in zip(rows, study.split(record).sources, strict=True):
        assert row["loss"] == pytest.approx(float(cross_entropy(model(domain.inputs), domain.labels).mean()), rel=1e-5)
