"""Models by name: heads, weights, and what is refused."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from disam_theory.backbones import Head, build
from disam_theory.errors import UsageError

OWN = "tests.drawn_images:convolutional"


def test_an_own_callable_is_given_the_number_of_classes():
    assert build(OWN, 5)(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert build("disam_theory.models:digits_mlp", 10)(torch.zeros(2, 64)).shape == (2, 10)


def test_the_seed_determines_the_weights_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first, again, other = build(OWN, 3, rng=1), build(OWN, 3, rng=1), build(OWN, 3, rng=2)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_goes_before_the_head_and_changes_no_name():
    plain, dropped = build(OWN, 3, rng=1), build(OWN, 3, rng=1, dropout=0.5)
    assert plain.state_dict().keys() == dropped.state_dict().keys()
    assert torch.equal(plain[-1].weight, dropped[-1].weight)
    head, x = Head(1000, 2, 0.5), torch.ones(1, 1000)
    kept = nn.functional.linear(x, head.weight, head.bias)
    assert torch.equal(head.eval()(x), kept)
    assert not torch.equal(head.train()(x), kept)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_are_taken_with_or_without_the_head(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    for classes in (3, 7):
        state = build(OWN, classes, rng=4).state_dict()
        torch.save(state, path) if suffix == "pt" else save_file(state, path)
        model = build(OWN, 3, weights=path, rng=1)
        assert torch.equal(model[0].weight, state["0.weight"])
        assert torch.equal(model[-1].weight, state["6.weight"]) == (classes == 3)
    del state["1.num_batches_tracked"]  # as old files lack it
    torch.save(state, tmp_path / "old.pt")
    assert torch.equal(build(OWN, 3, weights=tmp_path / "old.pt")[0].weight, state["0.weight"])


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"other\.pt does not fit the model"):
        build(OWN, 3, weights=tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"none\.safetensors: no such file"):
        build(OWN, 3, weights=tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(UsageError, match=r"cut\.safetensors: refused: not a safetensors file"):
        build(OWN, 3, weights=tmp_path / "cut.safetensors")


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UsageError, match="dropout is 1; it must be"):
        build(OWN, 3, dropout=1)
    with pytest.raises(UsageError, match="--pretrained is for models of torchvision and timm"):
        build(OWN, 3, pretrained=True)
    with pytest.raises(UsageError, match="give one"):
        build(OWN, 3, pretrained=True, weights=tmp_path)
    with pytest.raises(UsageError, match="not of the form"):
        build("resnet50", 3)


@pytest.mark.parametrize("library", ["torchvision.models", "timm"])
def test_a_missing_library_names_the_extra(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=r"pip install 'disam_theory\[images\]'"):
        build(f"{library.removesuffix('.models')}:resnet18", 3)


def test_a_torchvision_model_has_a_head_of_its_own_size(torchvision, tmp_path):
    model = build("torchvision:resnet18", 3, dropout=0.5)
    own = torchvision.models.resnet18(num_classes=3)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}
    whole = torchvision.models.resnet18()  # 1,000 classes, as ImageNet's weights have
    torch.save(whole.state_dict(), tmp_path / "imagenet.pth")
    filled = build("torchvision:resnet18", 3, weights=tmp_path / "imagenet.pth")
    assert torch.equal(filled.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)
    assert filled.fc.weight.shape == (3, 512)
    with pytest.raises(UsageError, match="unknown model of torchvision: 'resnet81': did you mean 'resnet18'"):
        build("torchvision:resnet81", 3)
    with pytest.raises(UsageError, match="has no linear layer"):
        build("torchvision:squeezenet1_1", 3)


def test_weights_that_cannot_be_fetched_are_one_line(torchvision, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UsageError, match=r"torchvision:resnet18: its weights cannot be had \(no route to host\)"):
        build("torchvision:resnet18", 3, pretrained=True)


def test_a_timm_model_has_a_head_of_its_own_size(torchvision):
    pytest.importorskip("timm")
    model = build("timm:vit_tiny_patch16_224", 3, dropout=0.1)
    assert model.head.weight.shape == (3, 192)
    assert "head.weight" in model.state_dict()
