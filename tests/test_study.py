"""A small study on disk: made once, gone on with after an interruption, read in pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from disam_theory import runs
from disam_theory import study as study_module
from disam_theory.algorithms import Settings
from disam_theory.convergence import analyse
from disam_theory.errors import ComputationError, UsageError
from disam_theory.models import digits_mlp
from disam_theory.runs import _RunWriter
from disam_theory.study import Block, Study
from disam_theory.sweep import Place
from disam_theory.traces import STEP_FIELDS, read_trace

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
        if done == 7 * 16:  # steps of the 16 runs together
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


def test_a_thinned_trace_holds_the_same_at_every_kth_step(tmp_path):
    whole, thin = small(tmp_path / "whole"), small(tmp_path / "thin", record_every=4)
    whole.run()
    thin.run()
    for a, b in zip(whole.records("digits-rotated"), thin.records("digits-rotated"), strict=True):
        kept = b.trace.steps["step"].astype(int).tolist()
        assert kept == [0, 4, 5, 8, 10]  # every fourth, and those that are evaluated
        for field, column in a.trace.steps.items():
            np.testing.assert_array_equal(column[kept], b.trace.steps[field])
        for field, column in a.trace.evaluations.items():
            np.testing.assert_array_equal(column, b.trace.evaluations[field])
        assert b.trace.header["settings"]["record_every"] == 4
        assert "record_every" not in a.trace.header["settings"]  # so that traces made before stay valid
    with pytest.raises(UsageError, match=r"holds steps 0, 4, 5, \.\.\. only; record every step"):
        analyse(b.trace)


def test_traces_of_other_steps_kept_are_made_anew(tmp_path):
    small(tmp_path).run()
    assert not small(tmp_path).jobs()
    assert len(small(tmp_path, record_every=2).jobs()[0].records) == 16


@pytest.mark.parametrize(
    "blocks",
    [
        [Block("digits-rotated", ARMS, 1), Block("digits-rotated", ARMS[:1], 2)],
        [Block("digits-rotated", ARMS, 1), Block("digits-rotated", (Settings("sam", steps=40),), 1)],
        [Block("digits-rotated", ARMS, 1), Block("digits-rotated", ARMS[1:], 1, record_every=5)],
        [Block("digits-rotated", (*ARMS, Settings("sam", lr=0.2)), 1)],
    ],
    ids=["seeds", "steps", "record_every", "one block"],
)
def test_arms_whose_traces_would_overwrite_each_other_are_refused(blocks, tmp_path):
    with pytest.raises(UsageError, match=r"two arms on 'digits-rotated' have the name '\w+-rho0\.05"):
        Study(tmp_path, blocks, digits_mlp)


def test_blocks_may_share_a_suite_or_an_arm(tmp_path):
    blocks = [Block("digits-rotated", ARMS, 1), Block("digits-rotated", FULL, 1), Block("digits-corrupted", ARMS, 1)]
    study = Study(tmp_path, blocks, digits_mlp)
    assert len(study.records("digits-rotated", algorithm="sam")) == 8
    assert len(study.records("digits-rotated", algorithm="sam", sampling="full")) == 4
    with pytest.raises(UsageError, match=r"8 runs of sam-rho0\.05-full, sam-rho0\.05-pooled do not fill 1 seeds x 4"):
        study.measure(study.records("digits-rotated", algorithm="sam"), _first_loss)


def test_record_every_below_one_is_refused():
    with pytest.raises(UsageError, match="record_every is 0"):
        Block("digits-rotated", ARMS, 1, record_every=0)


def test_a_run_that_is_cut_off_leaves_what_it_has_and_an_older_trace_stays(tmp_path):
    small(tmp_path).run()
    before = contents(tmp_path)

    def interrupt(what, done, total):
        if done == 7 * 16:
            raise KeyboardInterrupt

    changed = small(tmp_path, arms=tuple(replace(arm, steps=20) for arm in ARMS))
    changed.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        changed.run()
    assert contents(tmp_path) == before
    partial = sorted(tmp_path.rglob("*.partial"))
    assert len(partial) == 16
    for path in partial:
        trace = read_trace(path)
        assert trace.end is None
        assert trace.steps["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    changed.progress = lambda *_: None
    changed.run()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("first", [0, 1])
def test_two_processes_that_make_one_run_do_not_harm_each_other(first, tmp_path):
    header = {"domains": ["a"], "sizes": [1], "settings": {}}
    writers = [_RunWriter(tmp_path / "seed0.jsonl", header) for _ in range(2)]
    for writer in writers:
        writer.append({"step": 0, **dict.fromkeys(STEP_FIELDS, 0.0)})
    writers[first].close()
    whole = (tmp_path / "seed0.jsonl").read_text()
    writers[1 - first].append({"step": 1, **dict.fromkeys(STEP_FIELDS, 0.0)})
    writers[1 - first].close()
    assert (tmp_path / "seed0.jsonl").read_text() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["seed0.jsonl"]


def test_a_trace_is_read_once_until_its_file_changes(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(runs, "read_trace", lambda path: reads.append(path) or read_trace(path))
    study = small(tmp_path)
    study.run()
    records = study.records("digits-rotated")
    for _ in range(3):
        study.measure(records[::2], _first_loss)
    assert len(reads) == 8
    with pytest.raises(ValueError, match="read-only"):
        records[0].trace.evaluations["losses"][0] = 0.0
    other = small(tmp_path, arms=tuple(replace(arm, lr=0.2) for arm in ARMS))
    other.run()
    assert other.records("digits-rotated")[0].trace.header["settings"]["lr"] == 0.2


def test_traces_in_memory_stay_below_the_limit(tmp_path):
    study = small(tmp_path)
    study.run()
    paths = [record.path for record in study.records("digits-rotated")]
    kept = runs._Traces(60_000)
    for path in paths:
        kept.read(path)
    assert 0 < kept._held <= 60_000
    assert list(kept._kept) == paths[-len(kept._kept) :]
    assert len(kept._kept) >= 4


def test_the_key_of_a_job_is_that_of_what_it_computes(tmp_path):
    def keys(folder, arms=ARMS, **more):
        return [job.key for job in small(folder, arms=arms, **more).jobs()]

    assert keys(tmp_path / "a") == keys(tmp_path / "b")
    assert keys(tmp_path, seeds=1) != keys(tmp_path)
    assert keys(tmp_path, record_every=2) != keys(tmp_path)
    assert keys(tmp_path, arms=tuple(replace(arm, lr=0.3) for arm in ARMS)) != keys(tmp_path)


def test_stacks_are_of_equal_length_and_hold_every_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "STACK", 7)
    jobs = small(tmp_path).jobs()
    assert [len(job.records) for job in jobs] == [5, 5, 6]
    assert {record for job in jobs for record in job.records} == set(small(tmp_path).records("digits-rotated"))


def test_a_recorded_study_that_lacks_a_run_says_which(tmp_path):
    study = small(tmp_path, snapshot_steps=(0,), snapshot_seeds=1)
    with pytest.raises(UsageError, match=r"16 of 16 runs cannot be read: .*seed0\.jsonl is not there; .* --out "):
        study.require()
    study.run()
    study.require()
    weights = study.records("digits-rotated")[3].weights_path(0)
    weights.unlink()
    with pytest.raises(UsageError, match=f"1 of 16 runs cannot be read: {weights} is not there"):
        study.require()
    with pytest.raises(UsageError, match=r"16 of 16 .*jsonl is cut off or of other settings"):
        small(tmp_path, arms=tuple(replace(arm, steps=13) for arm in ARMS)).require()


def test_workers_that_write_elsewhere_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "STACK", 8)
    monkeypatch.setattr(study_module, "advance", lambda jobs, place, folder: (job.size for job in jobs))
    with pytest.raises(
        ComputationError, match=r"16 runs, \S*seed0 for one, .*; the workers must share its file system"
    ):
        small(tmp_path).run(Place(processes=2))
