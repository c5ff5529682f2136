"""The trace file: complete, readable after a kill, its recorded quantities recomputed from the weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import domain_variance, model_losses
from disam_theory.operators import domain_gradients
from disam_theory.traces import EVALUATION_FIELDS, STEP_FIELDS, TraceWriter, finished, read_trace
from disam_theory.training import Run, train

STEPS = 6
SETTINGS = Settings("disam", rho=0.2, lam=0.4, lr=0.3, schedule="inverse-sqrt", steps=STEPS, sampling="full")


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def recorded(make_split, tmp_path):
    """A full-batch DISAM run: its trace, its split, and its weights at every step."""
    split = make_split()
    path = tmp_path / "t.jsonl"
    writer = TraceWriter(path, {"domains": [d.name for d in split.sources], "settings": {"a": 1}, "provenance": {}})
    (result,) = train(
        mlp,
        [Run(SETTINGS, split, 1)],
        writers=[writer],
        evaluate_every=2,
        snapshot_steps=range(STEPS + 1),
        dtype=torch.float64,
    )
    return path, split, result.snapshots


def test_every_recorded_quantity_recomputed_from_the_weights(recorded):
    path, split, snapshots = recorded
    trace = read_trace(path)
    assert set(trace.steps) == set(STEP_FIELDS)
    losses = model_losses(mlp().double(), split.sources)
    alpha = torch.tensor(losses.shares, dtype=torch.float64)
    last = None
    for t in range(STEPS):
        params = snapshots[t]
        at = losses(params)
        # beta by differentiating L_DI with respect to the losses, not by Eq. 8
        free = at.clone().requires_grad_(True)
        beta = torch.autograd.grad((alpha * free).sum() - 0.4 * domain_variance(free), free)[0]
        gradients = domain_gradients(losses, params)
        inspired = beta @ gradients
        epsilon = 0.2 * inspired / inspired.norm()
        moved = torch.nn.utils.parameters_to_vector(list(params.values())) + epsilon
        pieces = moved.split([p.numel() for p in params.values()])
        ascent = {name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        up = alpha @ domain_gradients(losses, ascent)
        expected = {
            "step": t,
            "lr": 0.3 / np.sqrt(t + 1),
            "losses": at.numpy(),
            "losses_ascent": losses(ascent).numpy(),
            "beta": beta.numpy(),
            "grad_norm": float((alpha @ gradients).norm()),
            "grad_norm_di": float(inspired.norm()),
            "grad_norm_ascent": float(up.norm()),
            "cos_sam": float(torch.cosine_similarity(alpha @ gradients, inspired, dim=0)),
        }
        if last is not None:
            cosine = float(epsilon @ last[0]) / 0.2**2
            expected |= {
                "cos_phi": cosine,
                "phi": np.arccos(cosine),
                "cross_term": float(last[1] @ (epsilon - last[0])),
            }
        for name, value in expected.items():
            # nine digits are kept; arccos near 0 loses half of them
            tolerance = 1e-4 if name == "phi" else 1e-7
            np.testing.assert_allclose(trace.steps[name][t], value, rtol=tolerance, atol=1e-8, err_msg=f"{name} at {t}")
        last = epsilon, up
    assert np.isnan(trace.steps["phi"][0])


def test_evaluations_are_at_the_weights_of_their_step(recorded):
    path, split, snapshots = recorded
    trace = read_trace(path)
    assert trace.evaluations["step"].tolist() == [0, 2, 4, 6]
    assert set(trace.evaluations) == {"step", *EVALUATION_FIELDS}
    model = mlp().double()
    for row, t in enumerate((0, 2, 4, 6)):
        model.load_state_dict(snapshots[t])
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(model(d.inputs), d.labels) for d in split.sources]
            correct = torch.cat([model(d.inputs).argmax(1) == d.labels for d in split.validation])
            unseen = model(split.unseen.inputs)
        np.testing.assert_allclose(trace.evaluations["losses"][row], torch.stack(losses), rtol=1e-8)
        assert trace.evaluations["validation_accuracy"][row] == pytest.approx(float(correct.double().mean()))
        accuracy = float((unseen.argmax(1) == split.unseen.labels).double().mean())
        assert trace.evaluations["unseen_accuracy"][row] == pytest.approx(accuracy)
        loss = float(nn.functional.cross_entropy(unseen, split.unseen.labels))
        assert trace.evaluations["unseen_loss"][row] == pytest.approx(loss)


def test_a_trace_cut_anywhere_reads_up_to_there(recorded):
    path, *_ = recorded
    whole = path.read_bytes()
    ends = np.cumsum([len(line) + 1 for line in whole.splitlines()])
    for cut in range(int(ends[0]), len(whole), 37):
        path.write_bytes(whole[:cut])
        complete = int((ends <= cut + 1).sum())  # a line is whole also without its line end
        trace = read_trace(path)
        assert len(trace.steps["lr"]) == min(complete - 1, STEPS)
        assert (trace.end is None) == (complete < len(ends))
        assert not finished(path, {"settings": {"a": 1}}) or complete == len(ends)
    path.write_bytes(whole)
    assert finished(path, {"settings": {"a": 1}})
    assert not finished(path, {"settings": {"a": 2}})


def test_what_is_flushed_survives_a_kill(tmp_path):
    writer = TraceWriter(tmp_path / "t.jsonl", {"domains": ["a"], "settings": {}})
    row = dict.fromkeys(STEP_FIELDS, 0.5)
    for _ in range(3):
        writer.append(row)
    writer.flush()
    trace = read_trace(tmp_path / "t.jsonl")  # the writer is still open, as a killed process leaves it
    assert len(trace.steps["lr"]) == 3
    assert trace.end is None


def test_every_line_is_strict_json(recorded):
    constants = []
    lines = recorded[0].read_text().splitlines()
    assert all(isinstance(json.loads(line, parse_constant=constants.append), dict) for line in lines)
    assert lines
    assert not constants  # NaN and Infinity are not JSON


@pytest.mark.parametrize("content", [b"", b"not json", b'{"schema": "other/1"}\n', b"\xff\xfe\x00"])
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.jsonl"):
        read_trace(path)


def test_a_missing_trace_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.jsonl: cannot be read"):
        read_trace(tmp_path / "absent.jsonl")


def test_a_full_disk_is_one_line_and_keeps_what_was_written():
    with pytest.raises(ComputationError, match="/dev/full: the trace cannot be written"):
        TraceWriter(Path("/dev/full"), {"domains": [], "settings": {}})
