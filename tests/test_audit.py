"""The command line and the audit of a checkpoint, run as a user runs them."""

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from disam_theory.__main__ import main
from disam_theory.audit import audit
from disam_theory.domains import load_suite
from disam_theory.losses import cross_entropy
from disam_theory.models import digits_mlp

MODEL = ["--model", "disam_theory.models:digits_mlp", "--data", "digits-rotated"]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    torch.save(digits_mlp().state_dict(), tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


def run(*arguments, capsys):
    code = main(["audit", *arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_audit_agrees_with_a_dense_hessian_by_double_backward(checkpoint, tmp_path, capsys):
    code, out, _ = run(checkpoint, *MODEL, "--dtype", "float64", "--format", "json", "-k", "2", capsys=capsys)
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    suite = load_suite("digits-rotated")
    names = [domain.name for domain in suite.domains]
    losses = []
    for domain in suite.domains:
        outputs = model(domain.inputs.double())
        losses.append(cross_entropy(outputs, domain.labels).mean())
        correct = (outputs.argmax(1) == domain.labels).double().mean()
        assert rows[domain.name]["accuracy"] == pytest.approx(float(correct))
        assert rows[domain.name]["loss"] == pytest.approx(float(losses[-1]), rel=1e-12)
    L = torch.stack(losses)
    alpha = torch.tensor([float(len(d)) for d in suite.domains], dtype=torch.float64)
    alpha = alpha / alpha.sum()
    inspired = (alpha * L).sum() - 0.1 * ((L - L.mean()) ** 2).mean()
    beta = torch.tensor([rows[name]["beta"] for name in names], dtype=torch.float64)
    head = [*model[2].parameters()]  # the block of the last layer bounds the top eigenvalue from below
    for name, loss in {
        **dict(zip(names, L, strict=True)),
        "pooled": alpha @ L,
        "beta-weighted": beta @ L,
        "L_DI": inspired,
    }.items():
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), create_graph=True)])
        assert rows[name]["grad_norm"] == pytest.approx(float(gradient.detach().norm()), rel=1e-9)
        assert rows[name]["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
        block = _head_block(loss, head)
        assert rows[name]["eigenvalues"][0] >= torch.linalg.eigvalsh(block)[-1] - 1e-9
        assert all(r <= 1e-3 * v for r, v in zip(rows[name]["residuals"], rows[name]["eigenvalues"], strict=True))


def _head_block(loss, head):
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, head, create_graph=True)])
    rows = [torch.cat([h.flatten() for h in torch.autograd.grad(g, head, retain_graph=True)]) for g in gradient]
    return torch.stack(rows)


def test_full_spectrum_of_a_small_model_equals_the_dense_one():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10)).double()
    domains = [d.to(dtype=torch.float64) for d in load_suite("digits-corrupted").domains]
    rows = {row.name: row for row in audit(model, domains, k=5, tol=1e-8, dtype=torch.float64)}
    for domain in domains:
        loss = cross_entropy(model(domain.inputs), domain.labels).mean()
        dense = torch.linalg.eigvalsh(_head_block(loss, [*model.parameters()])).flip(0)[:5]
        assert torch.tensor(rows[domain.name].eigenvalues, dtype=torch.float64).sub(dense).abs().max() < 1e-8 * dense[0]


def test_formats_and_files_carry_the_same_numbers(checkpoint, tmp_path, capsys):
    code, out, _ = run(checkpoint, *MODEL, "--out", str(tmp_path / "o"), "--format", "csv", capsys=capsys)
    assert code == 0
    comment, *lines = (tmp_path / "o/audit.csv").read_text().splitlines(keepends=True)
    assert "".join(lines) == out
    assert "checkpoint_sha256" in json.loads(comment.removeprefix("# "))
    document = json.loads((tmp_path / "o/audit.json").read_text())
    assert document["schema"] == "disam-audit/1"
    assert len(document["provenance"]["checkpoint_sha256"]) == 64
    for line, row in zip(csv.DictReader(out.splitlines()), document["rows"], strict=True):
        assert line["name"] == row["name"]
        assert float(line["lambda_1"]) == row["eigenvalues"][0]


def test_image_folder_in_domainbeds_layout(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    for domain, shade in (("art", 40), ("photo", 200)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / domain / name
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = torch.randint(0, 50, (9, 7, 3), generator=generator) + shade
                Image.fromarray(pixels.byte().numpy()).save(folder / f"{i}.jpg")
    (tmp_path / "mymodel.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    pool = nn.AdaptiveAvgPool2d(1)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import mymodel

    torch.save({"state_dict": {f"module.{k}": v for k, v in mymodel.net().state_dict().items()}}, "net.pt")
    code, out, err = run(
        "net.pt", "--model", "mymodel:net", "--data", "data", "--image-size", "8", "--format", "json", capsys=capsys
    )
    assert (code, err) == (0, "")
    assert [(row["name"], row["n"]) for row in json.loads(out)["rows"][:3]] == [
        ("art", 6),
        ("photo", 6),
        ("pooled", 12),
    ]


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


MISTAKES = [
    (["missing.pt", *MODEL], None, "missing.pt: no such file"),
    (["c.pt", "--model", "disam_theory.models:digit_mlp", "--data", "digits-rotated"], {}, "did you mean 'digits_mlp'"),
    (["c.pt", "--model", "nowhere:net", "--data", "digits-rotated"], {}, "cannot import 'nowhere'"),
    (["c.pt", "--model", "digits_mlp", "--data", "digits-rotated"], {}, "PKG.MOD:CALLABLE"),
    (["c.pt", *MODEL[:3], "digits-rotatd"], {}, "did you mean 'digits-rotated'"),
    (["c.pt", *MODEL[:3], "no/such/folder"], {}, "no such folder"),
    (["c.pt", *MODEL, "--lam", "-1"], {}, "lambda is -1"),
    (["c.pt", *MODEL, "--lam", "nan"], {}, "lambda is nan"),
    (["c.pt", *MODEL, "-k", "0"], {}, "at least 1"),
    (["junk.pt", *MODEL], None, "junk.pt: refused: not a checkpoint"),
    (["cut.pt", *MODEL], None, "cut.pt: refused: not a checkpoint"),
    ([".", *MODEL], None, "cannot be read"),
    (["c.pt", *MODEL, "--device", "cuda:9"], {}, "not available here"),
    (["c.pt", *MODEL], {"0.weight": None}, "missing 0.weight"),
    (["c.pt", *MODEL], {"extra": torch.zeros(2)}, "unexpected extra"),
    (["c.pt", *MODEL], {"2.bias": torch.zeros(7)}, "2.bias is (7,), the model has (10,)"),
    (["c.pt", *MODEL], {"2.bias": torch.full((10,), torch.nan)}, "'2.bias' has 10 NaN or Inf"),
]


@pytest.mark.parametrize(("arguments", "change", "message"), MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = digits_mlp().state_dict()
    for name, value in (change or {}).items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    torch.save(state, "c.pt")
    Path("junk.pt").write_text("junk")
    Path("cut.pt").write_bytes(Path("c.pt").read_bytes()[:3000])
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    torch.save({"state_dict": Evil()}, tmp_path / "zip.pt")
    for name in ("evil.pt", "zip.pt"):
        code, out, err = run(str(tmp_path / name), *MODEL, capsys=capsys)
        assert code == 2
        assert "executed" not in out
        assert "refused" in err
        assert err.count("\n") == 1


def test_unreadable_checkpoints(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "empty.pt", "list.pt", "."):
        code, _, err = run(str(tmp_path / name), *MODEL, capsys=capsys)
        assert code == 2
        assert err.count("\n") == 1
        assert name in err or str(tmp_path) in err


def test_eigenvalues_that_did_not_converge_end_with_code_1_and_are_marked(checkpoint, capsys):
    code, out, err = run(checkpoint, *MODEL, "--max-products", "8", "--tol", "1e-9", capsys=capsys)
    assert code == 1
    assert "! not converged" in out
    assert "raise --max-products" in err


def test_overflowing_weights_name_the_domain(tmp_path, capsys):
    state = {name: value * 1e38 for name, value in digits_mlp().state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    code, _, err = run(str(tmp_path / "c.pt"), *MODEL, capsys=capsys)
    assert code in (1, 2)
    assert err.count("\n") == 1


def test_full_disk_is_one_line(checkpoint, capsys):
    code, _, err = run(checkpoint, *MODEL, "--out", "/proc/nowhere", capsys=capsys)
    assert code == 1
    assert "cannot be written" in err
    assert err.count("\n") == 1


def test_help_needs_no_torch():
    code = "import sys, disam_theory.__main__ as m; m._parser().format_help(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
