"""The two-line recorder: the study's own rows from anybody's loop, and a model that it leaves alone."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.errors import UsageError
from disam_theory.recorder import Recorder
from disam_theory.traces import STEP_FIELDS, TraceWriter, read_trace
from disam_theory.training import Run, train


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def pooled(split):
    inputs = torch.cat([d.inputs for d in split.sources]).float()
    labels = torch.cat([d.labels for d in split.sources])
    return inputs, labels, torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])


def test_it_writes_what_the_study_writes(make_split, tmp_path):
    split = make_split()
    names = [d.name for d in split.sources]
    writer = TraceWriter(tmp_path / "study.jsonl", {"domains": names, "settings": {}})
    settings = Settings("disam", rho=0.1, lam=0.3, lr=0.2, steps=5, sampling="full")
    (result,) = train(mlp, [Run(settings, split, 0)], writers=[writer], snapshot_steps=range(5))
    model = mlp()
    with Recorder(tmp_path / "own.jsonl", model, domains=names, rho=0.1, lam=0.3) as recorder:
        for t in range(5):
            model.load_state_dict(result.snapshots[t])
            recorder.step(*pooled(split), lr=0.2)
    study, own = read_trace(tmp_path / "study.jsonl"), read_trace(tmp_path / "own.jsonl")
    assert own.end == "finished"
    assert own.domains == names
    for field in STEP_FIELDS:
        tolerance = 1e-2 if field in {"phi", "cross_term"} else 1e-4  # float32: differences of close vectors
        np.testing.assert_allclose(own.steps[field], study.steps[field], rtol=tolerance, atol=1e-6, err_msg=field)


def awkward():
    """Dropout and batch norm: a step in training mode would draw random numbers and move running statistics."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_the_loop_goes_on_as_if_it_were_not_there(make_split, tmp_path):
    data = pooled(make_split())

    def loop(record):
        torch.manual_seed(0)
        model = awkward().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        recorder = Recorder(tmp_path / "t.jsonl", model, domains="abc") if record else None
        for _ in range(4):
            if recorder is not None:
                before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
                recorder.step(*data, lr=0.1)
                after = model.state_dict(), torch.get_rng_state()
                assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
                assert torch.equal(before[1], after[1])
                assert model.training
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0]), data[1]).backward()
            optimizer.step()
        return model.state_dict()

    alone, recorded = loop(False), loop(True)
    assert all(torch.equal(alone[name], recorded[name]) for name in alone)


def test_it_works_inside_no_grad_and_keeps_gradients(make_split, tmp_path):
    model = mlp()
    data = pooled(make_split())
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    before = model[0].weight.grad.clone()
    recorder = Recorder(tmp_path / "t.jsonl", model, domains="abc")
    with torch.no_grad():
        recorder.step(*data, lr=0.1)
    assert torch.equal(model[0].weight.grad, before)
    recorder.close()
    assert read_trace(tmp_path / "t.jsonl").steps["grad_norm"][0] > 0


def test_an_exception_leaves_an_interrupted_trace_with_its_steps(make_split, tmp_path):
    def stopped_loop():
        with Recorder(tmp_path / "t.jsonl", mlp(), domains="abc") as recorder:
            for _ in range(3):
                recorder.step(*pooled(make_split()), lr=0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_loop()
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.end is None
    assert len(trace.steps["lr"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rho": 0.0}, "rho is 0"), ({"rho": math.nan}, "rho is nan"), ({"lam": -1.0}, "lambda is -1")],
)
def test_impossible_values_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        Recorder(tmp_path / "t.jsonl", mlp(), domains="abc", **options)


@pytest.mark.parametrize("ids", [[0, 1, 3], [-1, 0, 1]])
def test_domain_numbers_out_of_range_are_refused(tmp_path, ids):
    recorder = Recorder(tmp_path / "t.jsonl", mlp(), domains="abc")
    with pytest.raises(UsageError, match=r"0\.\.2"):
        recorder.step(torch.randn(3, 4), torch.zeros(3, dtype=torch.long), torch.tensor(ids), lr=0.1)
