"""The verbs spectrum and landscape as a user runs them; audit has its own file."""

import csv
import itertools
import json

import pytest
import safetensors.torch
import torch

from disam_theory import commands
from disam_theory.__main__ import main
from disam_theory.domains import load_suite
from disam_theory.losses import model_losses, parameters_of, restrict
from disam_theory.models import digits_mlp
from disam_theory.operators import Curvature, domain_hessian, hessian

MODEL = ["--model", "disam_theory.models:digits_mlp", "--data", "digits-rotated"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = digits_mlp()
    torch.save(model.state_dict(), "c.pt")
    return model.double()


def run(capsys, *arguments):
    code = main([*arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_spectrum_gives_the_ends_and_the_trace_of_the_head(trained, capsys, tmp_path):
    """The head alone is small enough for a dense Hessian."""
    options = ["--parameters", "2.*", "--dtype", "float64", "--tol", "1e-6", "-k", "2", "--samples", "40"]
    code, out, err = run(capsys, "spectrum", "c.pt", *MODEL, *options, "--density", "--out", "o", "--format", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["schema"] == "disam-spectrum/1"
    assert {"checkpoint_sha256", "commit", "command", "rng", "dtype", "device"} <= set(document["provenance"])
    suite = load_suite("digits-rotated")
    domains = [d.to(dtype=torch.float64) for d in suite.domains]
    losses, params = restrict(model_losses(trained, domains), parameters_of(trained), "2.*")
    for row in document["rows"]:
        name = row["loss of"]
        operator = (
            hessian(losses, params, weights=losses.shares) if name == "pooled" else domain_hessian(losses, params, name)
        )
        exact = torch.linalg.eigvalsh(operator.dense()).flip(0)
        for j in (0, 1):
            assert row[f"lower_{j + 1}"] <= float(exact[j]) <= row[f"upper_{j + 1}"]
            assert row[f"lambda_{j + 1}"] == pytest.approx(float(exact[j]), rel=1e-6)
        assert row["lower_min"] - 1e-12 <= float(exact[-1]) <= row["upper_min"] + 1e-12
        assert abs(row["trace"] - float(exact.sum())) < 5 * row["trace_error"]
    comment, *lines = (tmp_path / "o/density.csv").read_text().splitlines()
    assert comment.startswith("# {")
    density = list(csv.DictReader(lines))
    for name in [*losses.names, "pooled"]:
        points = [(float(r["eigenvalue"]), float(r["density"])) for r in density if r["loss of"] == name]
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
        assert area == pytest.approx(1.0, abs=1e-3)


def test_the_table_shows_intervals(trained, capsys):
    code, out, _ = run(capsys, "spectrum", "c.pt", *MODEL, "-k", "1", "--samples", "4", "--kind", "ggn")
    assert code == 0
    head, rule, *rows = out.splitlines()
    assert head.split() == ["loss", "of", "trace", "lambda_1", "lambda_min"]
    assert set(rule) == {"-"}
    assert [row.split()[0] for row in rows] == ["rot0", "rot25", "rot50", "rot75", "pooled"]
    assert all("±" in row and row.count("[") == 2 for row in rows)


@pytest.mark.parametrize("direction", ["filter", "eigen"])
def test_landscape_has_the_checkpoints_losses_at_its_centre(trained, capsys, tmp_path, direction):
    options = ["--points", "3", "--direction", direction, "--span", "0.5", "--out", "o"]
    code, _, err = run(capsys, "landscape", "c.pt", *MODEL, *options)
    assert (code, err) == (0, "")
    rows = list(csv.DictReader((tmp_path / "o/landscape.csv").read_text().splitlines()[1:]))
    assert [(float(row["a"]), float(row["b"])) for row in rows] == [
        (a, b) for b in (-0.5, 0.0, 0.5) for a in (-0.5, 0.0, 0.5)
    ]
    suite = load_suite("digits-rotated")
    losses = model_losses(trained, [d.to(dtype=torch.float64) for d in suite.domains])
    exact = dict(zip(losses.names, losses(parameters_of(trained)).tolist(), strict=True))
    assert {name: float(rows[4][name]) for name in exact} == pytest.approx(exact, rel=1e-5)
    assert float(rows[4]["pooled"]) == pytest.approx(
        sum(a * exact[n] for a, n in zip(losses.shares, exact, strict=True))
    )


def test_along_an_eigenvector_the_loss_bends_by_its_eigenvalue(trained, capsys, tmp_path):
    options = ["--dimensions", "1", "--points", "3", "--span", "0.01", "--direction", "eigen", "--dtype", "float64"]
    run(capsys, "landscape", "c.pt", *MODEL, *options, "--out", "o")
    rows = list(csv.DictReader((tmp_path / "o/landscape.csv").read_text().splitlines()[1:]))
    left, middle, right = (float(row["pooled"]) for row in rows)
    _, out, _ = run(
        capsys, "spectrum", "c.pt", *MODEL, "-k", "1", "--samples", "2", "--dtype", "float64", "--format", "json"
    )
    assert (left - 2 * middle + right) / 1e-4 == pytest.approx(json.loads(out)["rows"][-1]["lambda_1"], rel=1e-2)


def test_per_layer_gives_a_row_a_layer_and_domain(trained, capsys):
    options = ["--per-layer", "-k", "1", "--samples", "2", "--tol", "1e-5"]
    _, out, _ = run(capsys, "spectrum", "c.pt", *MODEL, *options, "--format", "json")
    rows = json.loads(out)["rows"]
    assert [(row["layer"], row["loss of"]) for row in rows] == [
        (layer, name) for layer in ("0", "2") for name in ("rot0", "rot25", "rot50", "rot75", "pooled")
    ]
    _, out, _ = run(capsys, "spectrum", "c.pt", *MODEL, *options[1:], "--parameters", "2.*", "--format", "json")
    alone = json.loads(out)["rows"]
    assert [row["lambda_1"] for row in rows[5:]] == pytest.approx([row["lambda_1"] for row in alone], rel=1e-5)


@pytest.mark.parametrize(("verb", "after"), [("audit", 12), ("spectrum", 12), ("spectrum", 100)])
def test_an_interrupted_command_goes_on_from_what_it_had(trained, capsys, monkeypatch, tmp_path, verb, after):
    """Interrupted among the top eigenvalues, or later among the bottom ones and traces."""
    command = [verb, "c.pt", *MODEL, "-k", "2", "--format", "csv"]
    _, whole, _ = run(capsys, *command, "--out", "whole")
    products, calls = Curvature.products, itertools.count()

    def interrupted(self, vectors, weights):
        if next(calls) == after:
            raise KeyboardInterrupt
        return products(self, vectors, weights)

    monkeypatch.setattr(Curvature, "products", interrupted)
    code, out, err = run(capsys, *command, "--out", "o")
    assert (code, out) == (130, "")
    assert err == "disam-theory: interrupted; the same command goes on from what is done\n"
    assert [path.name for path in (tmp_path / "o").iterdir()] == [f".{verb}.partial"]
    monkeypatch.setattr(Curvature, "products", products)
    code, out, err = run(capsys, *command, "--out", "o")
    assert (code, err) == (0, "")
    assert not (tmp_path / f"o/.{verb}.partial").exists()
    resumed, first = (list(csv.DictReader(text.splitlines())) for text in (out, whole))
    for row, other in zip(resumed, first, strict=True):
        for j in ("1", "2"):
            assert float(row[f"lambda_{j}"]) == pytest.approx(float(other[f"lambda_{j}"]), rel=1e-4)


def test_an_interrupted_landscape_goes_on_at_its_next_line(trained, capsys, monkeypatch, tmp_path):
    command = ["landscape", "c.pt", *MODEL, "--points", "3", "--format", "csv"]
    _, whole, _ = run(capsys, *command)
    evaluate, lines = commands._line, []

    def interrupted(*arguments):
        lines.append(arguments[-1])
        if len(lines) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(commands, "_line", interrupted)
    assert run(capsys, *command, "--out", "o")[0] == 130
    code, out, _ = run(capsys, *command, "--out", "o")
    assert (code, out) == (0, whole)
    assert lines == [-1.0, 0.0, 1.0, 1.0]
    assert run(capsys, *command[:-2], "--out", "o")[0] == 0
    assert len(lines) == 7  # nothing was left to go on from


def test_what_another_command_left_is_not_used(trained, capsys, tmp_path):
    vectors = torch.zeros(3, 1)  # would be refused as a start
    (tmp_path / "o").mkdir()
    partial = tmp_path / "o/.audit.partial"
    partial.write_bytes(safetensors.torch.save({"pooled": vectors}, {"key": "another", "rows": "{}"}))
    assert run(capsys, "audit", "c.pt", *MODEL, "-k", "1", "--out", "o")[0] == 0
    partial.write_bytes(b"junk")
    code, _, err = run(capsys, "audit", "c.pt", *MODEL, "-k", "1", "--out", "o")
    assert code == 2
    assert "o/.audit.partial: cannot be gone on from" in err
    assert "remove it to start anew" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spectrum", "c.pt", *MODEL, "--parameters", "head.*"], "unknown parameter 'head.*'"),
        (["spectrum", "c.pt", *MODEL, "--density"], "give --out"),
        (["spectrum", "c.pt", *MODEL, "--samples", "0"], "--samples is 0"),
        (["spectrum", "c.pt", *MODEL, "--tol", "0"], "--tol is 0"),
        (["landscape", "c.pt", *MODEL, "--span", "-1"], "span is -1"),
        (["landscape", "c.pt", *MODEL, "--points", "0"], "--points is 0"),
        (["landscape", "absent.pt", *MODEL], "absent.pt: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(trained, capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
