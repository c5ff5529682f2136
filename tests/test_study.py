"""A small study on disk: made once, gone on with after an interruption, read in pairs."""

import json

import numpy as np
import pytest
import torch

from disam_theory.algorithms import Settings
from disam_theory.errors import ComputationError
from disam_theory.models import digits_mlp
from disam_theory.study import Block, Study

ARMS = (Settings("sam", steps=12, batch_size=16), Settings("disam", steps=12, batch_size=16))
FULL = (Settings("sam", steps=3, sampling="full"),)


def small(folder, *, arms=ARMS, seeds=2, **more):
    return Study(folder, [Block("digits-rotated", arms, seeds, **more)], digits_mlp, evaluate_every=5)


def contents(folder):
    lines = {}
    for path in sorted(folder.rglob("*.jsonl")):
        header, *rest = path.read_text().splitlines()
        lines[str(path.relative_to(folder))] = [json.loads(header)["settings"], *rest]
    return lines


def test_every_held_out_domain_and_seed_has_a_finished_trace(tmp_path):
    study = small(tmp_path)
    study.run()
    records = study.records("digits-rotated")
    assert len(records) == 2 * 2 * 4
    assert {record.trace.end for record in records} == {"finished"}
    for record in records:
        assert record.held_out not in record.trace.domains
        assert record.trace.header["sizes"] == [len(d) for d in study.split(record).sources]
        assert record.trace.evaluations["step"].tolist() == [0, 5, 10, 12]


def test_an_interrupted_study_goes_on_and_ends_as_an_uninterrupted_one(tmp_path):
    small(tmp_path / "whole").run()

    class Stop(Exception):
        pass

    def interrupt(what, done, total):
        if done == 7:
            raise Stop

    broken = small(tmp_path / "broken")
    broken.progress = interrupt
    with pytest.raises(Stop):
        broken.run()
    small(tmp_path / "broken").run()
    for path in list((tmp_path / "broken").rglob("*.jsonl"))[::3]:
        path.write_bytes(path.read_bytes()[:-30])  # as a kill leaves it
    small(tmp_path / "broken").run()
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_finished_runs_are_not_repeated_and_changed_settings_are(tmp_path):
    small(tmp_path).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    small(tmp_path).run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == before
    changed = (ARMS[0], Settings("disam", steps=13, batch_size=16))
    for arm in changed:
        small(tmp_path, arms=(arm,)).run()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert {path for path in before if after[path] != before[path]} == {p for p in before if "disam" in str(p)}


def test_weights_are_kept_where_asked_and_are_the_runs_own(tmp_path):
    study = small(tmp_path, arms=FULL, seeds=2, snapshot_steps=(0, 3), snapshot_seeds=1)
    study.run()
    for record in study.records("digits-rotated"):
        assert record.weights_path(3).exists() == (record.seed == 0)
        if record.seed == 0:
            torch.manual_seed(record.seed)
            fresh = digits_mlp().state_dict()
            assert all(torch.equal(fresh[name], value) for name, value in record.weights(0).items())
            digits_mlp().load_state_dict(record.weights(3))
    study.records("digits-rotated")[0].weights_path(3).unlink()
    study.run()
    assert study.records("digits-rotated")[0].weights_path(3).exists()


def test_measure_pairs_by_seed_and_held_out_domain(tmp_path):
    study = small(tmp_path)
    study.run()
    for algorithm in ("sam", "disam"):
        records = study.records("digits-rotated", algorithm=algorithm)
        table = study.measure(records, lambda trace: trace.evaluations["unseen_loss"][-1])
        assert table.shape == (2, 4)
        held_out = sorted({record.held_out for record in records})
        for record in records:
            at = table[record.seed, held_out.index(record.held_out)]
            assert at == record.trace.evaluations["unseen_loss"][-1]
    # the same seed starts both arms from the same weights on the same data
    first = [study.measure(study.records("digits-rotated", algorithm=a), _first_loss) for a in ("sam", "disam")]
    assert np.array_equal(*first)


def _first_loss(trace):
    return trace.evaluations["losses"][0].sum()


def test_an_arm_the_study_lacks_and_a_diverged_run_are_said(tmp_path):
    study = small(tmp_path, arms=(Settings("sam", steps=4, batch_size=16, lr=1e38),), seeds=1)
    study.run()
    with pytest.raises(ComputationError, match="no runs"):
        study.records("digits-rotated", algorithm="erm")
    with pytest.raises(ComputationError, match="diverged"):
        study.measure(study.records("digits-rotated"), _first_loss)
