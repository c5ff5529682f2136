"""Networks of torchvision, timm and a package of pretrained weights: trained, written as programs write, and audited.

What the command line finds in the files is found again from the network in memory, without this package: losses by
plain torch, eigenvalues by double backward and SciPy, or in closed form for a linear head.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from disam_theory import pretrained
from disam_theory.__main__ import main
from disam_theory.domains import Domain
from disam_theory.losses import model_losses, parameters_of, restrict
from disam_theory.operators import hessian
from disam_theory.optim import SharpnessAware, by_domain
from disam_theory.spectrum import top_eigenpairs
from tests.drawn_images import draw
from tests.written_checkpoints import ERM, Featurizer, official_net, save_domainbed, save_official

DOMAINS, CLASSES, SIDE = ("art", "photo", "sketch"), ("dog", "house"), 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("real") / "photos", DOMAINS, CLASSES, count=5)


@pytest.fixture(scope="module")
def pixels(photos):
    """Domain -> images and labels, read and normalised here."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    found = {}
    for domain in DOMAINS:
        files = sorted(photos.glob(f"{domain}/*/*.png"))
        images = np.stack([(np.asarray(Image.open(file)) / 255 - mean) / std for file in files])
        labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
        found[domain] = torch.from_numpy(images).permute(0, 3, 1, 2).float(), labels
    return found


def of_all(pixels, names=DOMAINS):
    return torch.cat([pixels[name][0] for name in names]), torch.cat([pixels[name][1] for name in names])


def run(capsys, *arguments):
    """The document that a command prints."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# --- ResNet-18 ---


@pytest.fixture(scope="module")
def resnet(torchvision, pixels):
    """The official trainer's network after three steps of DISAM."""
    torch.manual_seed(0)
    net = official_net(torchvision, len(CLASSES))
    inputs, labels = of_all(pixels)
    domains = torch.repeat_interleave(torch.arange(3), torch.tensor([len(pixels[name][1]) for name in DOMAINS]))
    optimizer = SharpnessAware(net.parameters(), torch.optim.SGD, algorithm="disam", rho=0.05, lam=0.1, lr=0.002)
    for _ in range(3):
        optimizer.step(lambda: by_domain(cross_entropy(net(inputs), labels, reduction="none"), domains, 3))
    return net.eval()


def plain(torchvision, net):
    """The same weights in torchvision's own class."""
    own = torchvision.models.resnet18(num_classes=len(CLASSES))
    own.load_state_dict({name.replace("fc_class", "fc"): value for name, value in net.state_dict().items()})
    return own.eval()


def write_official(path, torchvision, net):
    save_official(path, net)


def write_domainbed(path, torchvision, net):
    algorithm = ERM(Featurizer(plain(torchvision, net)), 512, len(CLASSES))
    algorithm.classifier.load_state_dict(net.fc_class.state_dict())
    save_domainbed(path, algorithm, len(CLASSES))


def write_parallel(path, torchvision, net):
    torch.save({"state_dict": nn.DataParallel(plain(torchvision, net)).state_dict(), "epoch": 3}, path)


WRITERS = {"lodo_model_best.pth": write_official, "model.pkl": write_domainbed, "parallel.pt": write_parallel}


def head_hessian(features, labels, head):
    """Of the mean cross-entropy in a linear head's (weight, bias): the mean of (diag p - p p') kron (f, 1)(f, 1)'."""
    p = head(features).softmax(1).double()
    f = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    size = p.shape[1] * f.shape[1]
    return torch.einsum("nab,nc,nd->acbd", curvature, f, f).reshape(size, size) / len(labels)


@torch.no_grad()
def check_resnet(capsys, path, photos, pixels, net):
    """Losses, and the head's top eigenvalues, of the file at ``path`` against those of ``net``."""
    data = [path, "--data", photos, "--image-size", SIDE]
    document = run(capsys, "landscape", *data, "--dimensions", 1, "--points", 3)
    found = next(row for row in document["rows"] if row["a"] == 0)
    spectra = run(capsys, "spectrum", *data, "--parameters", "fc.*", "-k", 1, "--samples", 2, "--tol", 1e-5)["rows"]
    tops = {row["loss of"]: row["lambda_1"] for row in spectra}
    trunk = nn.Sequential(*list(net.children())[:-1], nn.Flatten())
    features = {name: trunk(pixels[name][0]) for name in DOMAINS}
    total = sum(len(f) for f in features.values())
    whole = sum(len(f) * head_hessian(f, pixels[name][1], net.fc) for name, f in features.items()) / total
    assert tops["pooled"] == pytest.approx(float(torch.linalg.eigvalsh(whole)[-1]), rel=1e-4)
    for name in DOMAINS:
        inputs, labels = pixels[name]
        assert found[name] == pytest.approx(float(cross_entropy(net(inputs), labels)), rel=1e-5)
        block = head_hessian(features[name], labels, net.fc)
        assert tops[name] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-4)
    return document["provenance"]["model"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_trained_resnet_as_trainers_write_it(torchvision, resnet, photos, pixels, tmp_path, capsys, name):
    WRITERS[name](tmp_path / name, torchvision, resnet)
    said = check_resnet(capsys, tmp_path / name, photos, pixels, plain(torchvision, resnet))
    assert said == "torchvision:resnet18"


def test_a_resnet_that_lightning_trained_and_wrote(torchvision, photos, pixels, tmp_path, capsys):
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, classes, lr=0.002):
            super().__init__()
            self.save_hyperparameters()
            self.net = torchvision.models.resnet18(num_classes=classes)

        def training_step(self, batch, index):
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]

    torch.manual_seed(0)
    module = Classifier(len(CLASSES))
    kept = lightning.callbacks.ModelCheckpoint(tmp_path, filename="best", monitor="loss")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*of_all(pixels)), batch_size=12)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and on what it logs
        stopping = lightning.callbacks.EarlyStopping("loss")
        trainer = lightning.Trainer(max_epochs=1, callbacks=[kept, stopping], default_root_dir=tmp_path, **quiet)
        trainer.fit(module, loader)
    said = check_resnet(capsys, tmp_path / "best.ckpt", photos, pixels, module.net.eval())
    assert said == "torchvision:resnet18"


# --- a ViT ---


@pytest.fixture(scope="module")
def vit(timm, photos, tmp_path_factory):
    """A folder of ``disam-theory train`` with timm's smallest ViT, and there the same weights as timm saves them."""
    from timm.utils import CheckpointSaver

    folder = tmp_path_factory.mktemp("vit") / "run"
    method = ["--algorithm", "disam", "--steps", "4", "--batch-size", "8", "--lr", "0.02", "--augment", "none"]
    data = ["--data", str(photos), "--test-domain", "sketch", "--image-size", str(SIDE)]
    assert main(["train", "--model", "timm:test_vit", *data, *method, "--out", str(folder)]) == 0
    net = timm.create_model("test_vit", img_size=SIDE, num_classes=len(CLASSES))
    net.load_state_dict(load_file(folder / "last.safetensors"))
    arguments = argparse.Namespace(model="test_vit.r160_in1k", img_size=SIDE, num_classes=len(CLASSES))
    optimizer = torch.optim.AdamW(net.parameters())
    saver = CheckpointSaver(net, optimizer, arguments, checkpoint_dir=str(folder), recovery_dir="")
    saver.save_checkpoint(3, metric=0.5)
    return folder, net.eval().double()


@pytest.fixture(scope="module")
def audited(vit, photos):
    """The audit of both files by one command, and the folder that it wrote."""
    folder, _ = vit
    files = [str(folder / name) for name in ("last.safetensors", "last.pth.tar")]
    data = ["--data", str(photos), "--unseen", "sketch", "--image-size", str(SIDE)]
    assert main(["audit", *files, *data, "-k", "1", "--out", str(folder / "audit")]) == 0
    return folder / "audit"


def top_eigenvalue(net, inputs, labels):
    """Of the mean loss's Hessian in all parameters, by double backward and SciPy's Lanczos."""
    params = list(net.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(cross_entropy(net(inputs.double()), labels), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])

    def product(v):
        again = torch.autograd.grad(flat, params, torch.from_numpy(v.ravel()), retain_graph=True)
        return torch.cat([h.flatten() for h in again]).numpy()

    operator = LinearOperator((len(flat),) * 2, matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=len(flat))
    return eigsh(operator, 1, which="LA", tol=1e-4, v0=start, return_eigenvectors=False)[0]


def test_a_trained_vits_losses_and_eigenvalues_are_those_of_the_network(vit, audited, pixels):
    _, net = vit
    document = json.loads((audited / "audit.json").read_text())
    assert document["provenance"]["model"] == "timm:test_vit"
    for label in ("last.safetensors", "last.pth.tar"):
        rows = {row["name"]: row for row in document["rows"] if row["checkpoint"] == label}
        for name in (*DOMAINS, "pooled"):
            inputs, labels = of_all(pixels, DOMAINS[:2]) if name == "pooled" else pixels[name]
            with torch.no_grad():
                outputs = net(inputs.double())
            assert rows[name]["loss"] == pytest.approx(float(cross_entropy(outputs, labels)), rel=1e-5)
            assert rows[name]["accuracy"] == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
        for name, data in {"pooled": of_all(pixels, DOMAINS[:2]), "sketch": pixels["sketch"]}.items():
            assert rows[name]["converged"]
            assert rows[name]["eigenvalues"][0] == pytest.approx(top_eigenvalue(net, *data), rel=1e-3)
    assert {each["difference"] for each in document["differences"]} == {0.0}


def test_a_fixed_size_of_images_is_that_of_the_data(vit, photos, tmp_path, capsys):
    folder, _ = vit
    assert main(["audit", str(folder / "last.safetensors"), "--data", str(photos), "--image-size", "64"]) == 2
    said = capsys.readouterr().err
    assert "misshapen pos_embed is (1, 5, 64), the model has (1, 17, 64)" in said
    assert "images of the size it was trained on: these have 64 pixels" in said
    train = ["train", "--data", str(photos), "--test-domain", "art", "--augment", "none", "--image-size", "40"]
    for name, why in (
        ("timm:test_vit", "should be divisible by patch size"),
        ("torchvision:vit_b_16", "indivisible by patch size"),
    ):
        code = main([*train, "--model", name, "--steps", "1", "--out", str(tmp_path / "run")])
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1)
        assert why in said
        assert not (tmp_path / "run").exists()


# --- EfficientNet-Lite0 with its published weights ---


@pytest.fixture(scope="module")
def lite0():
    for package in pretrained.PACKAGES:
        pytest.importorskip(package)
    return pretrained.backbone()


def test_a_head_on_pretrained_features_of_real_digits(lite0, tmp_path, capsys):
    """A linear probe: what is audited is the block of the whole network's Hessian that belongs to the head."""
    seen, arrays = {}, {}
    for j, (name, (images, labels)) in enumerate(pretrained.digit_images().items()):
        part = np.arange(j, len(labels), 60)  # no digit in two domains
        seen[name] = pretrained.seen_by_network(torch.from_numpy(images[part]).float()), torch.from_numpy(labels[part])
        with torch.no_grad():
            features = lite0.extract_features(seen[name][0]).mean((2, 3))
        arrays |= {f"{name}/inputs": features.numpy(), f"{name}/labels": labels[part]}
    np.savez(tmp_path / "features.npz", **arrays)
    sources = [name for name in seen if name != "optdigits"]
    inputs, labels = (np.concatenate([arrays[f"{n}/{part}"] for n in sources]) for part in ("inputs", "labels"))
    torch.manual_seed(0)
    head = nn.Linear(1280, 10)
    optimizer = torch.optim.Adam(head.parameters(), 0.005)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(head(torch.from_numpy(inputs)), torch.from_numpy(labels)).backward()
        optimizer.step()
    torch.save(head.state_dict(), tmp_path / "head.pt")
    data = ["--data", tmp_path / "features.npz", "--unseen", "optdigits"]
    document = run(capsys, "audit", tmp_path / "head.pt", "--model", "tests.test_real_models:probe", *data, "-k", 1)
    rows = {row["name"]: row for row in document["rows"]}
    assert rows["mnist"]["accuracy"] > 0.9
    assert rows["optdigits"]["loss"] > rows["pooled"]["loss"]

    lite0._fc = head
    domains = [Domain(name, *seen[name]) for name in sources]
    losses = model_losses(lite0, domains)
    params = parameters_of(lite0)
    block, parts = restrict(losses, params, "_fc.*")
    top = top_eigenpairs(hessian(block, parts, weights=block.shares), 1)
    assert sum(p.numel() for p in parts.values()) == 12810
    assert rows["pooled"]["eigenvalues"][0] == pytest.approx(float(top.values[0]), rel=2e-3)
    assert rows["pooled"]["loss"] == pytest.approx(float(losses(params) @ torch.tensor(losses.shares)), rel=1e-4)


def probe():
    return nn.Linear(1280, 10)


# --- the page, in a browser ---

BROWSER = [
    *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
]
needs_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
MEASURE = """<script>onload = () => {
  const inside = document.querySelector("iframe").contentDocument
  const asked = inside.defaultView.performance.getEntriesByType("resource").map(each => each.name)
  const count = name => inside.querySelectorAll(name).length
  document.title = JSON.stringify([inside.documentElement.scrollWidth, asked, count("figure svg"), count("td")])
}</script>"""


def browse(folder, page, *options):
    (folder / "page.html").write_text(page)
    command = [*BROWSER, f"--user-data-dir={folder}/profile", *options, f"file://{folder}/page.html"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def on_a_phone(folder, page):
    """Width of the page in pixels, addresses asked for, figures and cells: 360 pixels wide, its own scripts off."""
    frame = (
        f'<iframe sandbox="allow-same-origin" style="width:360px;height:800px" srcdoc="{html.escape(page)}"></iframe>'
    )
    dom = browse(folder, f"<!DOCTYPE html><title></title>{MEASURE}{frame}", "--dump-dom")
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))


@needs_browser
def test_the_page_fits_a_phone_and_asks_for_nothing(audited, tmp_path):
    page = (audited / "audit.html").read_text()
    width, asked, figures, cells = on_a_phone(tmp_path, page)
    assert width <= 360
    assert asked == []
    assert figures == 8
    assert cells > 200
    worse = '<img src="http://127.0.0.1:9/x.png"><pre style="width:520px">wide</pre></main>'
    wider, asked, _, _ = on_a_phone(tmp_path, page.replace("</main>", worse))
    assert (wider > 500, asked) == (True, ["http://127.0.0.1:9/x.png"])


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_colours_of_the_system(audited, tmp_path, dark):
    shot = [f"--screenshot={tmp_path}/page.png", "--window-size=1000,1200"]
    colours = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    browse(tmp_path, (audited / "audit.html").read_text(), *shot, *colours)
    counts = Image.open(tmp_path / "page.png").convert("RGB").getcolors(2**20)
    assert max(counts)[1] == ((22, 22, 22) if dark else (255, 255, 255))
    found = {colour for _, colour in counts}
    assert {(0, 114, 178), (213, 94, 0)} <= found  # of the figures


@needs_browser
def test_the_page_prints(audited, tmp_path):
    browse(tmp_path, (audited / "audit.html").read_text(), f"--print-to-pdf={tmp_path}/page.pdf")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type /Page\b", content)) <= 15
