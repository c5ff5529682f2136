"""The main job: a small study end to end, its exit codes, and what an interruption leaves."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import paper_repro
from disam_theory.algorithms import Settings
from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.errors import ComputationError
from disam_theory.study import Block, Study
from figures import FIGURES
from figures.style import FigureSpec
from proofs_checks import CLAIMS

ROOT = Path(paper_repro.__file__).parent
FIELDS = {"id", "where", "statement", "assumptions", "scope", "verdict", "expected", "evidence", "seconds"}


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["paper_repro.py", *map(str, arguments)])
    return paper_repro.main()


def test_a_small_study_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(paper_repro, "QUICK", {"seeds": 2, "steps": 15})
    monkeypatch.setattr(paper_repro, "EVERY", 3)
    code = run_main(monkeypatch, "--quick", "--out", tmp_path)
    printed = capsys.readouterr()
    content = json.loads((tmp_path / "claims.json").read_text())
    assert [entry["id"] for entry in content["claims"]] == [claim.id for claim in CLAIMS]
    assert all(set(entry) >= FIELDS for entry in content["claims"])
    assert {entry["verdict"] for entry in content["claims"]} <= {verdict.value for verdict in Verdict}
    assert {"disam_theory", "commit", "torch", "command", "rng", "device", "dtype"} <= set(content["environment"])
    as_expected = all(entry["as_expected"] for entry in content["claims"])
    assert code == (0 if as_expected else 1)
    for figure in FIGURES:
        for kind in ("pdf", "svg", "png", "csv"):
            assert (tmp_path / "figures" / f"{figure.id}.{kind}").stat().st_size > 100
    page = (tmp_path / "report.html").read_text()
    assert all(f'id="{claim.id}"' in page for claim in CLAIMS)
    assert page.count("data:image/svg+xml") == len(FIGURES)
    assert all(claim.id in printed.out for claim in CLAIMS)
    assert printed.err == ""  # progress only on a terminal


ARMS = (Settings("erm", steps=6, batch_size=16), Settings("sam", steps=6, batch_size=16))


def unseen_loss(study):
    """A statistical check, a figure's rows and the kept weights, all from the runs of :func:`tiny`."""
    records = study.records("digits-rotated", algorithm="sam")
    values = study.measure(records, lambda trace: float(trace.evaluations["unseen_loss"][-1]))
    weight = float(records[0].weights(6)["0.weight"].sum())
    return [{"seed": seed, "mean": float(row.mean()), "weight": weight} for seed, row in enumerate(values)]


def tiny(monkeypatch):
    """A study of 16 short runs with one statistical claim and one figure."""

    def check(study):
        return Evidence(Verdict.UNDECIDED, "as measured", {"rows": unseen_loss(study)})

    def blocks(*, seeds, steps):
        return [Block("digits-rotated", ARMS, 2, snapshot_steps=(6,), snapshot_seeds=1)]

    claim = Claim("measured", "", "", (), "", Verdict.UNDECIDED, check, statistical=True)
    figure = FigureSpec("measured", "", "", "", unseen_loss, lambda rows: Figure())
    monkeypatch.setattr(paper_repro, "blocks", blocks)
    monkeypatch.setattr(paper_repro, "CLAIMS", (claim,))
    monkeypatch.setattr(paper_repro, "FIGURES", (figure,))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with all that the main job makes of :func:`tiny`."""
    out = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        tiny(patch)
        assert run_main(patch, "--out", out) == 0
    return out


def test_from_traces_trains_nothing_and_finds_the_same(recorded, monkeypatch, tmp_path):
    tiny(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in recorded.rglob("*")}
    monkeypatch.setattr(Study, "run", None)
    assert run_main(monkeypatch, "--from", recorded / "traces", "--out", tmp_path) == 0
    first, again = (
        json.loads((out / "claims.json").read_text())["claims"][0]["evidence"] for out in (recorded, tmp_path)
    )
    assert first == again
    assert len(first["rows"]) == 2
    csv = [(out / "figures" / "measured.csv").read_text().splitlines()[1:] for out in (recorded, tmp_path)]
    assert csv[0] == csv[1]
    assert {path: path.stat().st_mtime_ns for path in recorded.rglob("*")} == before
    assert not (tmp_path / "traces").exists()


def test_from_traces_that_lack_a_run_is_one_line(recorded, monkeypatch, capsys, tmp_path):
    tiny(monkeypatch)
    missing = next((recorded / "traces").rglob("*.jsonl"))
    kept = missing.read_bytes()
    missing.unlink()
    try:
        assert run_main(monkeypatch, "--from", recorded / "traces", "--out", tmp_path) == 2
    finally:
        missing.write_bytes(kept)
    error = capsys.readouterr().err
    assert f"1 of 16 runs cannot be read: {missing} is not there; " in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_runs_cut_off_by_ctrl_c_are_one_line_and_exit_code_130(monkeypatch, capsys, tmp_path):
    tiny(monkeypatch)

    def interrupt(self, what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(paper_repro._Progress, "__call__", interrupt)
    monkeypatch.setattr("disam_theory.study.STACK", 4)
    assert run_main(monkeypatch, "--jobs", "1", "--out", tmp_path) == 130
    error = capsys.readouterr().err
    assert error == "paper_repro: interrupted; finished runs are kept, and the same command goes on\n"
    assert len(list(tmp_path.rglob("*.jsonl"))) == 8


def test_progress_says_how_far_and_how_long_yet(monkeypatch):
    said, clock = [], iter([0.0, 10.0, 10.1, 20.0, 30.0])
    monkeypatch.setattr(paper_repro, "_say", said.append)
    monkeypatch.setattr(paper_repro.time, "monotonic", lambda: next(clock))
    progress = paper_repro._Progress()
    for done in (0, 100, 101, 200, 1600):
        progress("16 runs", done, 1600)
    assert said == [
        "16 runs",
        "16 runs: 6 %, 2 min 30 s left",
        "16 runs: 12 %, 2 min 20 s left",
        "16 runs: 100 %, 0 min 00 s left",
    ]


def test_chosen_claims_only(monkeypatch, capsys, tmp_path):
    assert run_main(monkeypatch, "--only", "eq8", "thm1", "--out", tmp_path) == 0
    content = json.loads((tmp_path / "claims.json").read_text())
    assert [entry["id"] for entry in content["claims"]] == ["eq8", "thm1"]
    assert not (tmp_path / "traces").exists()
    assert "2 of 2 verdicts are as expected" in capsys.readouterr().out


def test_the_list_names_every_claim(monkeypatch, capsys):
    assert run_main(monkeypatch, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[claim.id, claim.expected.value] for claim in CLAIMS]


def test_the_ledger_page_in_docs_is_up_to_date(monkeypatch):
    """``docs/claims.md`` is a copy of what the full main job writes."""
    page = (ROOT / "docs/claims.md").read_text()
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(#[\w-]+\) \| (.*) \| . (\w+) \|$", page, re.MULTILINE)
    assert rows == [(claim.id, claim.where, claim.expected.value) for claim in CLAIMS]
    for claim in CLAIMS:
        assert f"> {claim.statement}\n" in page
        assert all(f"- {assumption}\n" in page for assumption in claim.assumptions)


def test_a_changed_verdict_is_exit_code_1(monkeypatch, capsys, tmp_path):
    changed = tuple(dataclasses.replace(claim, expected=Verdict.REFUTED) for claim in CLAIMS if claim.id == "eq6")
    monkeypatch.setattr(paper_repro, "CLAIMS", changed)
    assert run_main(monkeypatch, "--only", "eq6", "--out", tmp_path) == 1
    assert "expected refuted" in capsys.readouterr().out


def test_an_interruption_keeps_the_finished_claims(monkeypatch, capsys, tmp_path):
    def interrupt(study):
        raise KeyboardInterrupt

    first = next(claim for claim in CLAIMS if claim.id == "eq3")
    monkeypatch.setattr(paper_repro, "CLAIMS", (first, dataclasses.replace(first, id="stopped", check=interrupt)))
    assert run_main(monkeypatch, "--only", "eq3", "stopped", "--out", tmp_path) == 130
    assert [entry["id"] for entry in json.loads((tmp_path / "claims.json").read_text())["claims"]] == ["eq3"]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_figure_that_cannot_be_computed_is_named_and_the_others_drawn(tmp_path):
    def fail(study):
        raise ComputationError("a run diverged")

    def draw(rows):
        return Figure()

    failing = FigureSpec("broken", "", "", "", fail, draw)
    whole = FigureSpec("whole", "", "", "", lambda study: [{"x": 1.0}], draw)
    entries, problems = paper_repro._figures([failing, whole], None, tmp_path, {})
    assert [entry.id for entry in entries] == ["whole"]
    assert problems == ["figure broken: a run diverged"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fig3ba"], "unknown claim 'fig3ba': did you mean 'fig3ab'?"),
        (["--only", "fig3a"], "did you mean 'fig3ab'?"),
        (["--device", "cuba"], "--device cuba: this PyTorch finds no such device here"),
        (["--device", "meta"], "--device meta: this PyTorch finds no such device here"),
        (["--from", "nowhere"], "--from nowhere: not a study's folder of traces"),
        (["--jobs", "0"], "0 processes cannot run anything; give at least 1"),
        (["--backend", "dask"], "backend dask has no address"),
        (["--address", "tcp://x:1"], "backend local takes no address"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    command = [sys.executable, str(ROOT / "paper_repro.py"), *arguments, "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert run_main(monkeypatch, "--only", "eq3", "--out", tmp_path / "file") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'file'} is no folder; give a folder" in error
    assert error.count("\n") == 1
