"""The verb rate as a user runs it: on traces of the project's own training, and on files that are none."""

import csv
import hashlib
import json
import sys
from dataclasses import asdict

import pytest
from torch import nn

from disam_theory.__main__ import main
from disam_theory.algorithms import Settings
from disam_theory.convergence import INEQUALITIES, analyse
from disam_theory.traces import STEP_FIELDS, TraceWriter, read_trace
from disam_theory.training import Run, train

STEPS = 80
ARMS = {
    "sam": Settings("sam", rho=0.2, lr=0.5, schedule="inverse-sqrt", sampling="full", steps=STEPS),
    "disam": Settings("disam", rho=0.2, lr=0.5, schedule="inverse-sqrt", sampling="full", steps=STEPS),
    "batches": Settings("sam", rho=0.2, lr=0.5, momentum=0.9, batch_size=6, steps=STEPS),
}


@pytest.fixture
def traces(make_split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = make_split()
    header = {"domains": [d.name for d in split.sources], "sizes": [len(d) for d in split.sources]}
    for name, settings in ARMS.items():
        writer = TraceWriter(tmp_path / f"runs/{name}.jsonl", {**header, "settings": asdict(settings)})
        train(lambda: nn.Linear(4, 3), [Run(settings, split, 0)], writers=[writer])
    return [f"runs/{name}.jsonl" for name in ARMS]


def run(capsys, *arguments):
    code = main(["rate", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_table_has_a_line_a_trace_and_says_what_cannot_be_had(traces, capsys):
    code, out, err = run(capsys, *traces, "--smoothness", "4")
    assert (code, err) == (0, "")
    head, rule, *lines = out.split("\n\n")[0].splitlines()
    assert head.split()[:5] == ["trace", "steps", "L", "(17)", "(18)"]
    assert set(rule) == {"-"}
    assert [line.split()[0] for line in lines] == ["runs/sam.jsonl", "runs/disam.jsonl", "runs/batches.jsonl"]
    sam, _, batches = (line.split() for line in lines)
    assert sam[1:3] == ["80", "4"]
    assert sam.count("holds") >= 3
    assert batches[3:9] == ["-"] * 6
    assert "the batch changes from step to step" in out
    assert "[runs/batches.jsonl]" in out


def test_without_smoothness_the_constant_is_a_lower_bound(traces, capsys, tmp_path):
    _, out, _ = run(capsys, *traces)
    estimate = analyse(read_trace(tmp_path / traces[0])).smoothness
    assert f">= {estimate:.3g}" in out.splitlines()[2]
    assert "L >= is an estimate, a lower bound: what holds with it holds with the true L" in out
    assert "fails" not in out


def test_json_and_csv_hold_the_same_numbers_with_their_provenance(traces, capsys, tmp_path):
    code, out, _ = run(capsys, *traces, "--smoothness", "4", "--out", "o", "--format", "json")
    document = json.loads(out)
    assert (code, document["schema"]) == (0, "disam-rate/1")
    assert json.loads((tmp_path / "o/rate.json").read_text()) == document
    digest = hashlib.sha256((tmp_path / traces[0]).read_bytes()).hexdigest()
    assert document["provenance"]["traces"][traces[0]] == digest
    assert {"commit", "command", "smoothness", "minimum"} <= set(document["provenance"])
    assert set(INEQUALITIES) < set(document["columns_needed"])
    comment, *lines = (tmp_path / "o/rate.csv").read_text().splitlines()
    assert json.loads(comment.removeprefix("# ")) == document["provenance"]
    found = analyse(read_trace(tmp_path / traces[1]), smoothness=4.0)
    for line, row in zip(csv.DictReader(lines), document["rows"], strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}
    row = document["rows"][1]
    assert (row["trace"], row["algorithm"], row["end"]) == (traces[1], "disam", "finished")
    assert row["corrected_sum_least_slack"] == found.findings["corrected_sum"].least_slack
    assert (row["rate_at_w_why"], row["rate_at_w_windows"]) == (found.rates["at_w"].why, 6)


def test_out_has_the_series_and_the_same_picture_again(traces, capsys, tmp_path):
    run(capsys, *traces, "--out", "o")
    comment, *lines = (tmp_path / "o/series.csv").read_text().splitlines()
    assert comment.startswith("# {")
    rows = list(csv.DictReader(lines))
    assert [(r["trace"], int(r["T"])) for r in rows] == [(name, t) for name in traces for t in range(1, STEPS + 1)]
    series = analyse(read_trace(tmp_path / traces[0])).series
    assert float(rows[6]["corrected_sum_left"]) == series["corrected_sum_left"][6]
    assert rows[-1]["corrected_sum_left"] == ""
    pictures = [(tmp_path / f"o/rate.{kind}").read_bytes() for kind in ("pdf", "png")]
    assert [picture[:4] for picture in pictures] == [b"%PDF", b"\x89PNG"]
    run(capsys, *traces, "--out", "o")
    assert [(tmp_path / f"o/rate.{kind}").read_bytes() for kind in ("pdf", "png")] == pictures


def test_without_matplotlib_the_numbers_are_written_all_the_same(traces, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, traces[0], "--out", "o")
    assert (code, err.count("\n")) == (0, 1)
    assert "no picture, as matplotlib is not installed" in err
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["rate.csv", "rate.json", "series.csv"]


HEAD = '{"schema":"disam-trace/1","domains":["a"],"sizes":[3],"settings":{}}\n'

STEP = json.dumps(dict.fromkeys(STEP_FIELDS, 0.5) | {key: [0.5] for key in ("losses", "losses_ascent", "beta")}) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a trace"),
        ("not a trace", "its first line must hold the schema"),
        ("[1, 2]\n", "a line of it is not as a trace has it"),
        (HEAD, "the trace holds no step"),
        (HEAD + '{"step":0,"losses":[1.0]}\n', "(KeyError: 'lr')"),
        (HEAD.replace('"domains":["a"],', "") + STEP, "the header is not as a trace has it (KeyError: 'domains')"),
        (HEAD.replace("{}", "[]") + STEP, "the header is not as a trace has it (AttributeError"),
        (HEAD.replace('["a"]', '["a","b"]') + STEP, "column 'losses' has shape (1, 1); steps and domains make (1, 2)"),
    ],
)
def test_a_file_that_is_no_trace_is_one_line_and_exit_code_2(traces, capsys, tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    code, out, err = run(capsys, traces[0], "bad.jsonl", "--out", "o")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("disam-theory: bad.jsonl: ")
    assert message in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smoothness", "-1"], "smoothness is -1.0; L must be finite and above 0"),
        (["--minimum", "nan"], "minimum is nan"),
        (["--gradient-bound", "0"], "gradient bound is 0"),
        (["--minimum", "5"], "below the minimum 5; give a lower one"),
    ],
)
def test_impossible_constants_are_one_line_and_exit_code_2(traces, capsys, options, message):
    code, out, err = run(capsys, traces[0], *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
