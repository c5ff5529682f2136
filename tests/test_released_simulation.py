"""The runs behind the claims on the released code: their controls, and what is reported of them, by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from disam_theory.errors import ComputationError
from disam_theory.models import digits_mlp
from disam_theory.statistics import paired_interval
from disam_theory.training import Run, train
from proofs_checks import released_simulation
from proofs_checks.released_simulation import (
    ACCURACY,
    COSINE,
    DISTANCE,
    LOSS,
    PAPER,
    ROUND_OFF,
    RUNNING,
    SEEDS,
    SUITES,
    Simulation,
    cut,
    defaults_training,
    distance,
    mode_training,
    passes_training,
    quality,
    split_of,
    variance_training,
)


def row_of(simulation, quantity, **case):
    """The one line on a quantity in a case."""
    (row,) = [row for row in simulation.rows if {**row, **case, "quantity": quantity} == row]
    return row


def weights(seed=0):
    """Weights of the embedded study's network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: p.detach().double() for name, p in digits_mlp().named_parameters()}


def test_the_seeds_hold_out_every_domain_and_their_sizes_differ_until_cut():
    for suite, number in zip(SUITES, (4, 5), strict=True):
        splits = [split_of(suite, seed) for seed in range(SEEDS)]
        assert len({split.unseen.name for split in splits}) == number
        assert all(len({len(d) for d in split.sources}) > 1 for split in splits)
        assert all(len({len(d) for d in cut(split).sources}) == 1 for split in splits)
        assert splits[0].unseen.inputs.dtype is torch.float64


def test_distance_by_hand():
    """From 0 to (0, 4) and to (3, 0), in two tensors: 5 apart, of 4."""
    first, second, start = (
        {"a": torch.tensor([a]), "b": torch.tensor([[b]])} for a, b in ((3.0, 0.0), (0.0, 4.0), (0.0, 0.0))
    )
    assert distance(first, second, start) == 1.25


def test_quality_by_hand():
    """The mean over all training samples, and the unseen accuracy, of a model left in training mode."""
    split = split_of(SUITES[0], 1)
    model = nn.Sequential(nn.Dropout(0.5), digits_mlp()).double()
    inputs, labels = (torch.cat([getattr(d, name) for d in split.sources]) for name in ("inputs", "labels"))
    loss, accuracy = quality(model, split)
    with torch.no_grad():
        assert loss == pytest.approx(float(nn.functional.cross_entropy(model[1](inputs), labels)), rel=1e-12)
        hits = (model[1](split.unseen.inputs).argmax(1) == split.unseen.labels).sum()
    assert accuracy == pytest.approx(100 * int(hits) / len(split.unseen))
    assert model.training


def test_weightings_move_the_weights_and_agree_on_equal_counts():
    simulation = variance_training()
    assert simulation.differs
    assert len(simulation.rows) == len(SUITES) * 2 * 4
    assert simulation.data["control"]["largest_distance_with_equal_counts"] <= ROUND_OFF
    equal = variance_training(balanced=True)
    assert not equal.differs
    assert equal.least <= ROUND_OFF
    assert all(row["estimate"] == pytest.approx(1.0) for row in equal.rows if row["quantity"] == COSINE)


def test_a_row_again_from_runs_of_its_own():
    """The runs one seed at a time, their distance and accuracies computed apart."""
    apart, accuracies = [], []
    for seed in range(SEEDS):
        split, ends = split_of(SUITES[1], seed), []
        for variance in ("samples", "domains"):
            settings = replace(PAPER, rho=0.5, variance=variance)
            (result,) = train(digits_mlp, [Run(settings, split, seed)], dtype=torch.float64, snapshot_steps=[0])
            ends.append(torch.nn.utils.parameters_to_vector(result.params.values()))
            model = digits_mlp().double()
            model.load_state_dict(result.params)
            accuracies.append(float((model(split.unseen.inputs).argmax(1) == split.unseen.labels).double().mean()))
        start = torch.nn.utils.parameters_to_vector(result.snapshots[0].values())
        apart.append(float((ends[0] - ends[1]).norm() / (ends[1] - start).norm()))
    gains = 100 * (np.array(accuracies[::2]) - np.array(accuracies[1::2]))
    for quantity, values in ((DISTANCE, np.array(apart)), (ACCURACY, gains)):
        row, interval = row_of(variance_training(), quantity, suite=SUITES[1], rho=0.5), paired_interval(values)
        assert row["estimate"] == pytest.approx(interval.estimate, rel=1e-6, abs=1e-9)
        assert row["high"] == pytest.approx(interval.high, rel=1e-6, abs=1e-9)


def test_a_control_with_unequal_counts_is_an_error(monkeypatch):
    monkeypatch.setattr(released_simulation, "cut", lambda split: split)
    with pytest.raises(ComputationError, match="equal counts"):
        variance_training.__wrapped__()


def test_the_cosine_from_each_domains_gradient():
    """Both directions put together from the domains' gradients and Eq. (8), in NumPy."""
    split, rng = split_of(SUITES[1], 0), (0, 20)
    found = released_simulation._cosine(weights(), split, ("samples", "domains"), balanced=False, rng=rng)
    inputs, labels, domains = released_simulation._pool(split)
    index = torch.from_numpy(np.random.default_rng(rng).permutation(len(labels))[:32])
    model = digits_mlp().double()
    model.load_state_dict(weights())
    losses, gradients, shares = [], [], []
    for domain in domains[index].unique():
        members = index[domains[index] == domain]
        loss = nn.functional.cross_entropy(model(inputs[members]), labels[members])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(float(loss))
        gradients.append(torch.cat([g.flatten() for g in gradient]).numpy())
        shares.append(len(members) / 32)
    alpha, losses = np.array(shares), np.array(losses)
    directions = []
    for p in (alpha, np.full_like(alpha, 1 / len(alpha))):
        directions.append((alpha - 0.2 * p * (losses - p @ losses)) @ np.array(gradients))
    a, b = directions
    assert found == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert found < 1 - 1e-9


def test_evaluation_mode_leaves_the_running_statistics():
    simulation = mode_training()
    assert simulation.differs
    moved = simulation.data["running_statistics_move_at_most"]
    assert moved["eval"] == 0.0 < moved["train"]
    assert row_of(simulation, RUNNING)["low"] > 0
    assert row_of(simulation, DISTANCE)["low"] > 0
    assert {row["quantity"] for row in simulation.data["for_comparison"]} == {DISTANCE, RUNNING, LOSS, ACCURACY}


def test_fine_tuning_is_repeatable_and_dropout_tells_the_modes_apart():
    split, ends = split_of(SUITES[0], 0), []
    for mode in ("train", "train", "eval"):
        model = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        released_simulation._fine_tune(model, split, 3, "sam", mode, steps=4)
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_control_that_tells_the_modes_apart_is_an_error():
    with pytest.raises(ComputationError, match="same steps"):
        mode_training(control=released_simulation.normalised)


def test_the_two_passes_move_what_they_should():
    """Batch norm's running statistics are of no influence on a step in training mode; dropout's masks are."""
    simulation = passes_training()
    masks, both, dropout = dict.fromkeys(row["runs"] for row in simulation.rows)
    assert row_of(simulation, DISTANCE, runs=masks)["low"] > 0.1
    assert row_of(simulation, DISTANCE, runs=dropout)["low"] > 0.1
    assert row_of(simulation, DISTANCE, runs=both)["high"] == 0.0 < row_of(simulation, RUNNING, runs=both)["low"]
    for runs in (masks, both, dropout):
        loss = row_of(simulation, LOSS, runs=runs)
        assert loss["low"] < loss["estimate"] < loss["high"]
    with pytest.raises(ComputationError, match="should be the same"):
        passes_training(control=released_simulation.normalised)


def test_the_released_defaults_end_where_erm_does():
    erm = replace(PAPER, algorithm="erm")
    simulation = defaults_training(replace(erm, rho=0.01), erm, PAPER)
    assert simulation.data["ends_where_erm_does"] == {"released_defaults": True, "readme_command": True, "paper": False}
    assert simulation.differs
    same = defaults_training(replace(erm, rho=0.01), erm, erm)
    assert same.least == 0.0
    assert not same.differs


def test_what_is_told_from_zero_and_where_intervals_end():
    rows = released_simulation._rows({}, {COSINE: [1.0, 0.9], ACCURACY: [1.0, 1.2, 1.1]})
    assert rows[0]["high"] == 1.0
    assert rows[1]["low"] == pytest.approx(1.1 - 4.302652729911275 * 0.1 / np.sqrt(3))
    unclear = released_simulation._rows({}, {ACCURACY: [1.0, -1.2]})
    summary = Simulation("", 1.0, rows + unclear, {}).summary
    assert summary.endswith("on the training loss in 0 of 0 cases, on the unseen accuracy in 1 of 2 cases")
