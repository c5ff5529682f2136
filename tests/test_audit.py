"""The command line and the audit of a checkpoint, run as a user runs them."""

import csv
import errno
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from disam_theory import images
from disam_theory.__main__ import main
from disam_theory.audit import Audit, Settings, audit
from disam_theory.audit_measures import wilson
from disam_theory.dependence import require_gradients
from disam_theory.domains import load_suite
from disam_theory.errors import UsageError
from disam_theory.losses import cross_entropy
from disam_theory.models import digits_mlp
from tests.drawn_images import convolutional, draw

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
    rows = {row.name: row for row in audit(model, domains, Settings(k=5, tol=1e-8), dtype=torch.float64).rows}
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
    (digest,) = document["provenance"]["checkpoint_sha256"]
    assert len(digest) == 64
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


def folder_audit(*more):
    return [
        "c.pt",
        "--model",
        "tests.drawn_images:convolutional",
        "--data",
        "PACS",
        "--image-size",
        "8",
        "-k",
        "1",
        *more,
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(convolutional().state_dict(), "c.pt")
    return draw(tmp_path / "PACS", count=6)


def test_a_benchmark_goes_by_letters_and_a_sample_states_its_error(folder, capsys, monkeypatch):
    command = folder_audit("--dataset", "pacs", "--unseen", "S", "--max-samples", "10", "--format", "json")
    read = []
    monkeypatch.setattr(images, "read_rgb", lambda path, real=images.read_rgb: read.append(path) or real(path))
    code, out, err = run(*command, capsys=capsys)
    assert (code, err) == (0, "")
    assert len(read) == 3 * 10 + 9  # nothing is read that is not measured
    document = json.loads(out)
    rows = {row["name"]: row for row in document["rows"]}
    assert {name: row["n"] for name, row in rows.items() if row["role"] == "unseen"} == {"sketch": 9}
    total = 12 + 18 + 15
    assert [rows[name]["share"] for name in ("photo", "art_painting", "cartoon")] == pytest.approx(
        [12 / total, 18 / total, 15 / total]
    )
    errors = {row["name"]: row for row in document["sampling"]}
    assert {name: row["population"] for name, row in errors.items()} == {
        "photo": 12,
        "art_painting": 18,
        "cartoon": 15,
        "pooled": 45,
        "sketch": 9,
    }
    assert errors["sketch"]["loss_error"] == 0.0  # all of it was audited
    assert all(row["loss_error"] > 0 for name, row in errors.items() if name != "sketch")


def test_corrupt_images_are_left_out_on_request_and_counted(folder, capsys):
    broken = folder / "cartoon/dog/001.png"
    broken.write_bytes(broken.read_bytes()[:90])
    for verb in ("audit", "spectrum", "landscape"):
        command = folder_audit("--points", "3") if verb == "landscape" else folder_audit()
        command = [part for part in command if verb != "landscape" or part not in ("-k", "1")]
        assert main([verb, *command]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("disam-theory: 1 of 54 images cannot be read: PACS/cartoon/dog/001.png: not a ")
        assert printed.err.count("\n") == 1
        assert main([verb, *command, "--skip-corrupt", "--out", f"{verb}-out"]) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith("disam-theory: 1 left out: PACS/cartoon/dog/001.png: not a readable image (")
        document = json.loads(Path(f"{verb}-out/{verb}.json").read_text())
        comment = Path(f"{verb}-out/{verb}.csv").read_text().splitlines()[0]
        assert document["provenance"]["corrupt"] == json.loads(comment.removeprefix("# "))["corrupt"] == 1


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ("empty", [], "PACS/empty: no class folders"),
        ("empty/dog", [], "PACS/empty/dog: no images (.jpg, .jpeg, .png, .bmp, .webp); fill or remove the class"),
        ("photo/eel", [], "PACS/photo/eel: no images"),
        (
            None,
            ["--part", "train"],
            "nor folders DOMAIN/train, crossval, test; leave --part away",
        ),
        (None, ["--dataset", "pasc"], "unknown data set 'pasc': did you mean 'pacs'"),
        (None, ["--dataset", "vlcs"], "no folder 'VOC2007', a domain of vlcs"),
        (None, ["--dataset", "pacs", "--unseen", "x"], "unknown domain 'x'"),
        (None, ["--data", "digits-rotated", "--part", "test"], "--part is for a folder of images"),
        (None, ["--data", "d.npz", "--dataset", "pacs"], "--dataset is for a folder of images, and d.npz is none"),
        (None, ["--out", "c.pt"], "c.pt: cannot be written, as c.pt is no folder; give a folder"),
        (None, ["--out", "c.pt/o"], "c.pt/o: cannot be written, as c.pt is no folder; give a folder"),
    ],
)
def test_a_folder_that_does_not_do_is_one_line(folder, capsys, monkeypatch, change, more, said):
    from disam_theory import audit_measures

    if change:
        (folder / change).mkdir(parents=True)
    monkeypatch.setattr(audit_measures, "outcomes_of", lambda *_: pytest.fail("measured before it was refused"))
    code, out, err = run(*folder_audit(*more), capsys=capsys)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_class_that_a_domain_lacks_is_none_of_its_labels(folder, capsys):
    for path in (folder / "photo/dog").iterdir():
        path.unlink()
    (folder / "photo/dog").rmdir()
    code, out, err = run(*folder_audit("--format", "json"), capsys=capsys)
    assert (code, err) == (0, "")
    assert next(row["n"] for row in json.loads(out)["rows"] if row["name"] == "photo") == 8


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
    (["c.pt", *MODEL, "--rng", "-1"], {}, "--rng is -1; it must be from 0"),
    (["c.pt", *MODEL, "--rng", str(2**64)], {}, "it must be from 0 to 4294967295"),
    (["c.pt", *MODEL, "--rho", "0"], {}, "rho is 0.0; it must be finite and above 0"),
    (["c.pt", *MODEL, "--max-samples", "1"], {}, "max_samples is 1; a domain needs at least 2"),
    (["c.pt", *MODEL, "--unseen", "rot57"], {}, "did you mean 'rot75'"),
    (["c.pt", *MODEL, *(f"--unseen=rot{a}" for a in (0, 25, 50, 75))], {}, "leave at least one source"),
    (["c.pt", "c.pt", *MODEL], {}, "c.pt is given twice"),
    (["c.pt", "missing.pt", *MODEL], {}, "missing.pt: no such file"),
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
    assert "did not converge in 8 products each; raise --max-products" in err


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


OWN_CODE = """
import torch
class Linear(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
class Apart(Linear):
    def forward(self, x):
        return super().forward(x).detach()
class Few(Linear):
    def forward(self, x):
        return super().forward(x)[:, :9]
class Tuple(Linear):
    def forward(self, x):
        return super().forward(x), x
class Asserting(Linear):
    def forward(self, x):
        assert x.ndim == 4
class Missing(Linear):
    def forward(self, x):
        return {}["logits"]
def failing():
    raise ValueError("no such\\nconfiguration")
"""


@pytest.mark.parametrize("verb", ["audit", "spectrum", "landscape"])
def test_a_domain_called_as_a_loss_over_all_is_refused(checkpoint, tmp_path, capsys, verb):
    names = np.repeat(["photo", "pooled"], 10)
    np.savez(tmp_path / "d.npz", inputs=np.ones((20, 64)), labels=np.arange(20) % 10, domains=names)
    code = main([verb, str(checkpoint), *MODEL[:3], str(tmp_path / "d.npz")])
    assert code == 2
    assert "a domain is called 'pooled'" in capsys.readouterr().err


def test_names_in_letters_that_the_font_lacks_go_without_a_warning(checkpoint, tmp_path):
    np.savez(tmp_path / "d.npz", inputs=np.ones((20, 64)), labels=np.arange(20) % 10, domains=["\u6f22", "b"] * 10)
    out = tmp_path / "o"
    arguments = ["audit", str(checkpoint), *MODEL[:3], str(tmp_path / "d.npz"), "-k", "1", "--out", str(out)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main(arguments) == 0
    assert not [each for each in said if "Glyph" in str(each.message)]
    assert "\u6f22" in (out / "audit.html").read_text()


def test_two_domains_of_one_name_are_refused():
    model, domains = nn.Linear(4, 3), load_suite("digits-rotated").domains
    with pytest.raises(UsageError, match="2 domains are called 'rot0'; rename all but one"):
        audit(model, [domains[0], domains[0]])


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_labels_that_the_model_has_no_score_for_are_refused_with_those_it_has(make_domain, label):
    domain = make_domain("a", 6)
    domain.labels[4] = label
    with pytest.raises(UsageError, match=rf"domain 'a' has label {label}; labels must lie in 0\.\.2"):
        audit(nn.Linear(domain.inputs.shape[1], 3), [domain, make_domain("b", 6)])


@pytest.mark.parametrize("verb", ["audit", "spectrum", "landscape"])
@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("own_code:Tuple", "outputs are a tuple"),
        ("own_code:Asserting", "AssertionError"),
        ("own_code:Missing", "'logits'"),
        ("own_code:Few", "outputs have shape"),
        ("own_code:Apart", "do not depend on its parameters"),
        ("own_code:failing", "calling it failed (ValueError: no such configuration, "),
        ("own_garbled:net", "cannot import 'own_garbled' (SyntaxError: "),
    ],
)
def test_what_fails_in_a_users_own_code_is_one_line(tmp_path, monkeypatch, capsys, verb, named, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_code.py").write_text(OWN_CODE)
    Path("own_garbled.py").write_text("def net(:")
    torch.save(torch.nn.Linear(64, 10).state_dict(), "c.pt")
    code = main([verb, "c.pt", "--model", named, "--data", "digits-rotated"])
    err = capsys.readouterr().err
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


class Frozen(nn.Module):
    """A backbone of which autograd sees nothing where ``apart`` says so, a head, and a layer that nothing uses."""

    def __init__(self, apart="no_grad"):
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Linear(64, 64) for _ in range(2)))
        self.head, self.unused, self.apart = nn.Linear(64, 10), nn.Linear(3, 3), apart

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.apart != "no_grad"):
            x = self.backbone(x)
        if self.apart == "random":
            x = x.detach() + torch.rand(())
        return self.head(x.detach() if self.apart == "detach" else x)


@pytest.mark.parametrize("apart", ["no_grad", "detach"])
def test_parameters_that_autograd_does_not_see_are_refused(tmp_path, monkeypatch, capsys, apart):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    monkeypatch.setattr(Frozen.__init__, "__defaults__", (apart,))
    torch.manual_seed(0)
    torch.save(Frozen().state_dict(), "c.pt")
    model = ["c.pt", "--model", "tests.test_audit:Frozen", "--data", "digits-rotated"]
    line, few = ["--dimensions", "1", "--points", "3"], ["-k", "1", "--samples", "2"]
    names = "backbone.0.weight, backbone.0.bias, backbone.1.weight and others, which autograd does not see"
    eigen = ["landscape", "--direction", "eigen"]
    for verb, *more in (["audit"], ["spectrum"], ["spectrum", "--parameters", "b*"], eigen):
        assert main([verb, *model, *more]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert f"the model's outputs depend on {names}" in printed.err
    for verb, *more in (["spectrum", "--parameters", "head.*", *few], ["landscape", *line]):
        assert main([verb, *model, *more]) == 0


class Copy(torch.autograd.Function):
    """Without a backward of its own."""

    @staticmethod
    def forward(context, x):
        return x.clone()


def test_a_model_without_a_first_derivative_is_refused(make_domain):
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda module, inputs, outputs: Copy.apply(outputs))
    with pytest.raises(UsageError, match=r"outputs cannot be differentiated: NotImplementedError: .*backward"):
        audit(model, [make_domain("a", 6), make_domain("b", 6)])


@pytest.mark.parametrize("apart", ["", "random"])
def test_an_unused_layer_and_random_outputs_are_not_taken_for_parameters_unseen_by_autograd(apart):
    model = Frozen(apart).eval()
    assert list(model.parameters())
    assert require_gradients(model, torch.ones(1, 64)) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["audit", "absent.pt", *MODEL],
        ["audit", "absent.pt", *MODEL, "-k", "0"],
        ["spectrum", "absent.pt", *MODEL, "--tol", "nan"],
        ["landscape", "absent.pt", *MODEL, "--span", "inf"],
        ["convert", "absent.pt", "--out", "o.bin"],
        ["rate", "absent.jsonl"],
    ],
)
def test_a_mistake_that_shows_in_the_arguments_waits_for_no_torch(arguments):
    code = "import sys, disam_theory.__main__ as m; print(m.main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.count("\n") == 1


# --- what is measured, on a model small enough for dense matrices ---


def mean_loss(model, domain, params=None):
    outputs = model(domain.inputs) if params is None else torch.func.functional_call(model, params, (domain.inputs,))
    return cross_entropy(outputs, domain.labels).mean()


@pytest.fixture(scope="module")
def small():
    """A model trained a little on three domains of four, and its full audit in float64."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10)).double()
    domains = [d.to(dtype=torch.float64) for d in load_suite("digits-rotated").domains]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        sum(mean_loss(model, domain) for domain in domains[:3]).backward()
        optimizer.step()
    found = audit(model, domains, Settings(k=2, tol=1e-6), unseen=["rot75"], dtype=torch.float64)
    return model, domains, found


def gradient_of(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])


def test_the_unseen_domain_is_measured_and_has_no_part_in_the_others(small):
    model, domains, found = small
    roles = {row.name: (row.role, row.n) for row in found.rows}
    assert list(roles) == ["rot0", "rot25", "rot50", "rot75", "pooled", "beta-weighted", "L_DI"]
    assert roles["rot75"] == ("unseen", len(domains[3]))
    assert roles["pooled"] == ("over the sources", sum(map(len, domains[:3])))
    unseen, dense = found.row("rot75"), _head_block(mean_loss(model, domains[3]), [*model.parameters()])
    assert unseen.eigenvalues == pytest.approx(torch.linalg.eigvalsh(dense).flip(0)[:2].tolist(), rel=1e-6)
    assert unseen.grad_norm == pytest.approx(float(gradient_of(mean_loss(model, domains[3]), model).norm()), rel=1e-9)
    assert unseen.loss == pytest.approx(float(mean_loss(model, domains[3])), rel=1e-12)
    assert unseen.beta is None
    without = audit(model, domains[:3], Settings(k=2, tol=1e-6), dtype=torch.float64)
    for name in ("pooled", "beta-weighted", "L_DI"):
        assert without.row(name).loss == pytest.approx(found.row(name).loss, rel=1e-12)
        assert without.row(name).eigenvalues == pytest.approx(found.row(name).eigenvalues, rel=1e-6)


def test_traces_lie_within_their_errors_and_those_of_the_weightings_agree(small):
    model, domains, found = small
    dense = {d.name: _head_block(mean_loss(model, d), [*model.parameters()]) for d in domains}
    exact = {name: float(matrix.trace()) for name, matrix in dense.items()}
    for name, matrix in dense.items():  # Hutchinson's variance: twice the squares off the diagonal
        spread = float((2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / 10).sqrt())
        assert 0.4 < found.row(name).trace_error / spread < 2
    alpha = {name: found.row(name).share for name in list(exact)[:3]}
    beta = {name: found.row(name).beta for name in alpha}
    exact["pooled"] = sum(alpha[name] * exact[name] for name in alpha)
    exact["beta-weighted"] = sum(beta[name] * exact[name] for name in beta)
    gradients = torch.stack([gradient_of(mean_loss(model, d), model) for d in domains[:3]])
    spread = float((gradients - gradients.mean(0)).square().sum() / 3)
    exact["L_DI"] = exact["beta-weighted"] - 2 * 0.1 * spread
    for name, value in exact.items():
        row = found.row(name)
        assert abs(row.trace - value) < 5 * row.trace_error
    correction = found.row("beta-weighted").trace - found.row("L_DI").trace
    assert correction == pytest.approx(2 * 0.1 * spread, rel=1e-9)


def test_sharpness_of_an_unseen_domain_is_that_of_its_own_gradient(small):
    model, domains, found = small
    params = {name: p.detach() for name, p in model.named_parameters()}
    own = torch.autograd.grad(mean_loss(model, domains[3]), model.parameters())
    length = torch.cat([g.flatten() for g in own]).norm()
    moved = {name: p + 0.05 * g / length for (name, p), g in zip(params.items(), own, strict=True)}
    with torch.no_grad():
        rise = float(mean_loss(model, domains[3], moved) - mean_loss(model, domains[3]))
    row = found.row("rot75")
    assert row.sam == pytest.approx(rise, rel=1e-6)
    assert row.worst_lower >= row.sam
    assert row.worst_upper == pytest.approx(0.05 * row.grad_norm + 0.00125 * row.eigenvalues[0], rel=1e-4)


def test_shares_add_up_and_the_unseen_domain_feels_the_sources_step(small):
    model, domains, found = small
    shares = {(row["domain"], row["method"]): row for row in found.shares}
    for method in ("SAM", "DISAM"):
        assert sum(shares[d.name, method]["share"] for d in domains[:3]) == pytest.approx(1.0, rel=1e-9)
    weights = {"SAM": [found.row(d.name).share for d in domains[:3]]}
    weights["DISAM"] = [found.row(d.name).beta for d in domains[:3]]
    gradients = [gradient_of(mean_loss(model, d), model) for d in domains]
    for method, values in weights.items():
        step = sum(w * g for w, g in zip(values, gradients[:3], strict=True))
        step = 0.05 * step / step.norm()
        felt = shares["rot75", method]
        assert felt["first_order"] == pytest.approx(float(step @ gradients[3]), rel=1e-8)
        assert (felt["weight"], felt["share"]) == (None, None)
        flat = torch.cat([p.detach().flatten() for p in model.parameters()]) + step
        moved = dict(model.named_parameters())
        pieces = flat.split([p.numel() for p in moved.values()])
        moved = {name: piece.reshape(p.shape) for (name, p), piece in zip(moved.items(), pieces, strict=True)}
        with torch.no_grad():
            rise = float(mean_loss(model, domains[3], moved) - mean_loss(model, domains[3]))
        assert felt["rise"] == pytest.approx(rise, rel=1e-6)


def test_overlaps_slices_and_gradient_variance_are_there_for_every_domain(small):
    model, domains, found = small
    assert len(found.overlaps) == 10
    assert all(0 <= row["overlap"] <= 1 + 1e-9 for row in found.overlaps)
    centre = next(row for row in found.slices if row["a"] == 0)
    for domain in domains:
        assert centre[domain.name] == pytest.approx(float(mean_loss(model, domain)), rel=1e-9)
        assert found.row(domain.name).gradient_variance > 0
    bend = [row["pooled"] for row in found.slices]
    assert min(bend) > 0


def test_a_negative_weight_is_warned_of(small):
    model, domains, _ = small
    calm = audit(model, domains[:3], Settings(k=1), dtype=torch.float64)
    assert "negative weight" not in [row["name"] for row in calm.warnings]
    loud = audit(model, domains, Settings(k=1, lam=3.0), dtype=torch.float64)
    negative = [row.name for row in loud.rows if row.beta is not None and row.beta < 0]
    assert negative
    messages = [row["message"] for row in loud.warnings if row["name"] == "negative weight"]
    assert len(messages) == len(negative)
    assert all(repr(name) in message for name, message in zip(negative, messages, strict=True))


def test_a_sample_keeps_the_shares_and_states_its_error(small):
    model, domains, _ = small
    part = audit(model, domains, Settings(k=1, max_samples=150), unseen=["rot75"], dtype=torch.float64)
    total = sum(map(len, domains[:3]))
    for domain in domains[:3]:
        row = part.row(domain.name)
        assert (row.n, row.share) == (150, pytest.approx(len(domain) / total))
    expected = sum(row.share * row.loss for row in part.rows if row.role == "source")
    assert part.row("pooled").loss == pytest.approx(expected)
    assert part.row("pooled").accuracy == pytest.approx(
        sum(row.share * row.accuracy for row in part.rows if row.role == "source")
    )
    errors = {row["name"]: row for row in part.sampling}
    assert (errors["rot75"]["n"], errors["rot75"]["population"]) == (150, 200)
    for domain in domains:
        whole = float(mean_loss(model, domain))
        assert abs(part.row(domain.name).loss - whole) < 5 * errors[domain.name]["loss_error"]
    each = torch.nn.functional.cross_entropy(model(domains[3].inputs), domains[3].labels, reduction="none")
    rough = float(each.std()) / 150**0.5 * (1 - 150 / 200) ** 0.5
    assert errors["rot75"]["loss_error"] == pytest.approx(rough, rel=0.3)
    every = audit(model, domains, Settings(k=1, max_samples=10**6), unseen=["rot75"], dtype=torch.float64)
    assert every.sampling == ()
    assert every.row("rot0").n == len(domains[0])


def test_wilsons_interval_is_scipys():
    from scipy.stats import binomtest

    for right, n in ((0, 10), (7, 10), (355, 400), (400, 400)):
        exact = binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert wilson(right / n, n) == pytest.approx((exact.low, exact.high), abs=1e-6)


def test_an_audit_survives_the_way_through_json(small):
    found = small[-1]
    again = Audit.from_plain(json.loads(json.dumps(found.to_plain())), found.draws)
    assert again == found


def test_an_interruption_among_the_measures_and_between_checkpoints_loses_nothing(
    checkpoint, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(5)
    torch.save(digits_mlp().state_dict(), tmp_path / "second.pt")
    command = [checkpoint, str(tmp_path / "second.pt"), *MODEL, "-k", "1", "--format", "json"]
    _, whole, _ = run(*command, capsys=capsys)
    from disam_theory import sharpness
    from disam_theory.operators import Curvature

    measured, worst = [], sharpness.worst_case_sharpness

    def interrupted(*arguments, **options):
        measured.append(len(measured))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return worst(*arguments, **options)

    monkeypatch.setattr(sharpness, "worst_case_sharpness", interrupted)
    code, out, err = run(*command, "--out", str(tmp_path / "o"), capsys=capsys)
    assert (code, out) == (130, "")
    assert "goes on from what is done" in err
    products, made = Curvature.products, []
    monkeypatch.setattr(Curvature, "products", lambda *a: made.append(len(a[1])) or products(*a))
    code, out, _ = run(*command, "--out", str(tmp_path / "o"), capsys=capsys)
    assert code == 0
    assert len(measured) == 3  # the first checkpoint's are kept, the second's are made again
    again, first = json.loads(out), json.loads(whole)
    assert [row for row in again["rows"] if row["checkpoint"] == "model.pt"] == [
        row for row in first["rows"] if row["checkpoint"] == "model.pt"
    ]
    for row, other in zip(again["rows"], first["rows"], strict=True):
        assert row["eigenvalues"] == pytest.approx(other["eigenvalues"], rel=1e-4)
    assert len(again["differences"]) == len(first["differences"]) > 0


def test_a_page_that_cannot_be_written_loses_nothing_that_was_measured(checkpoint, tmp_path, monkeypatch, capsys):
    from disam_theory import sharpness

    measured, worst = [], sharpness.worst_case_sharpness
    monkeypatch.setattr(sharpness, "worst_case_sharpness", lambda *a, **o: measured.append(1) or worst(*a, **o))
    (tmp_path / "o/audit.html").mkdir(parents=True)  # no file can take its place
    code, out, err = run(checkpoint, *MODEL, "-k", "1", "--out", str(tmp_path / "o"), capsys=capsys)
    assert code == 1
    assert out.startswith("loss of")  # or it would be lost where there is no room for what is kept either
    assert "audit.html: cannot be written" in err
    (tmp_path / "o/audit.html").rmdir()
    assert run(checkpoint, *MODEL, "-k", "1", "--out", str(tmp_path / "o"), capsys=capsys)[0] == 0
    assert len(measured) == 1


def of_npz(folder, change):
    inputs = np.linspace(0, 1, 20 * 3 * 64, dtype=np.float32).reshape(20, 3, 8, 8)
    inputs[7, 0, 3, 3] += change
    np.savez(folder / "d.npz", inputs=inputs, labels=np.arange(20) % 3, domains=["a", "b"] * 10)
    return "d.npz"


def of_folder(folder, change):
    if not change:
        return str(draw(folder / "PACS", count=6).relative_to(folder))
    path = folder / "PACS/photo/dog/001.png"
    times, pixels = path.stat(), np.array(Image.open(path))
    pixels[16:20, 16:20] ^= change  # of as many pixels as one is made of at the size that is audited
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return "PACS"


def of_callable(folder, change):
    (folder / "called_data.py").write_text("import numpy as np\ndef domains():\n    return CONTENT\n")
    import called_data

    inputs = np.linspace(0, 1, 20 * 3 * 64, dtype=np.float32).reshape(20, 3, 8, 8)
    labels = np.arange(20) % 3
    labels[0] = change
    called_data.CONTENT = {"a": (inputs, labels), "b": (inputs, labels)}
    return "called_data:domains"


@pytest.mark.parametrize("make", [of_npz, of_folder, of_callable])
def test_what_was_kept_is_used_for_the_same_data_alone(tmp_path, monkeypatch, capsys, make):
    from disam_theory import sharpness

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    torch.save(convolutional().state_dict(), "c.pt")
    measured, worst = [], sharpness.worst_case_sharpness
    monkeypatch.setattr(sharpness, "worst_case_sharpness", lambda *a, **o: measured.append(1) or worst(*a, **o))
    command = folder_audit("--out", "o", "--format", "csv")
    command[4] = make(tmp_path, 0)
    Path("o/audit.html").mkdir(parents=True)  # no file can take its place: the numbers are kept
    first = run(*command, capsys=capsys)[1]
    assert (run(*command, capsys=capsys)[1], len(measured)) == (first, 1)
    make(tmp_path, 1)
    code, second, _ = run(*command, capsys=capsys)
    assert (code, len(measured)) == (1, 2)
    assert second != first
    assert (run(*command, capsys=capsys)[1], len(measured)) == (second, 2)


class Full:
    """A file on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        pass

    def isatty(self):
        return False

    def fileno(self):
        return self.place.fileno()


def test_an_output_that_cannot_be_written_is_one_line_and_loses_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    full = Full()
    with (tmp_path / "place").open("w") as full.place, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        code = main(["audit", checkpoint, *MODEL, "-k", "1", "--out", str(tmp_path / "o")])
    assert code == 1
    assert capsys.readouterr().err == "disam-theory: standard output: cannot be written (No space left on device)\n"
    assert (tmp_path / "o/.audit.partial").exists()
    assert run(checkpoint, *MODEL, "-k", "1", "--out", str(tmp_path / "o"), capsys=capsys)[0] == 0
