"""Checkpoints as the official trainer, DomainBed, Lightning, timm and others write them; convert; what is refused."""

import argparse
import json
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from disam_theory import architectures, backbones, checkpoints
from disam_theory.__main__ import main
from disam_theory.checkpoints import fill, infer_resnet, load_state_dict, read
from disam_theory.errors import UsageError
from disam_theory.models import digits_mlp
from disam_theory.provenance import sha256
from tests.written_checkpoints import (
    CLASSES,
    ERM,
    Featurizer,
    as_numpy_1_wrote_it,
    official_arguments,
    official_net,
    save_domainbed,
    save_lightning,
    save_official,
)


class LightningModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = digits_mlp()


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    return digits_mlp()


def differing(state, net):
    """The names that only one of them has, and those of tensors that are not the same to the last bit."""
    own = net.state_dict()
    return [n for n in {**own, **state} if not (n in own and n in state and torch.equal(own[n], state[n]))]


def same_outputs(a, b, *shape):
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.allclose(a.eval()(images), b.eval()(images), rtol=1e-5, atol=1e-5)


# --- each format gives the same function ---


def test_the_official_trainers_file_gives_torchvisions_resnet(torchvision, tmp_path):
    net = official_net(torchvision)
    save_official(tmp_path / "lodo_model_best.pth", net)
    found = read(tmp_path / "lodo_model_best.pth")
    assert (found.format, found.architecture, found.classes) == ("DISAM trainer", "torchvision:resnet18", CLASSES)
    assert found.told["args"]["test_domain"] == "s"
    assert found.told["results"]["1"]["val"]["acc"] == 0.6
    assert same_outputs(architectures.model_of(found, None, CLASSES, "file"), net, 3, 64, 64)


def test_the_official_nets_own_class_is_filled_too(torchvision, tmp_path):
    net = official_net(torchvision)
    save_official(tmp_path / "a.pth", net)
    other = official_net(torchvision)
    architectures.fitted(other, read(tmp_path / "a.pth"), "a.pth")
    assert not differing(other.state_dict(), net)


@pytest.mark.parametrize("numpy", [1, 2])
def test_domainbeds_file_gives_torchvisions_resnet_whichever_numpy_wrote_it(torchvision, tmp_path, numpy):
    algorithm = ERM(Featurizer(torchvision.models.resnet18()), 512, CLASSES)
    save_domainbed(tmp_path / "model.pkl", algorithm)
    if numpy == 1:
        as_numpy_1_wrote_it(tmp_path / "model.pkl")
    found = read(tmp_path / "model.pkl")
    assert (found.format, found.architecture, found.classes) == ("DomainBed", "torchvision:resnet18", CLASSES)
    hparams = found.told["model_hparams"]
    assert hparams["resnet_dropout"] in (0.0, 0.1, 0.5)
    assert (type(hparams["n_meta_test"]), hparams["class_balanced"]) == (int, False)
    assert same_outputs(architectures.model_of(found, None, CLASSES, "file"), algorithm, 3, 64, 64)


@pytest.mark.parametrize("numpy", [1, 2])
def test_domainbeds_small_network_fills_its_algorithm_its_pair_and_its_sequence(tmp_path, numpy):
    def network():
        return ERM(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), 5, CLASSES)

    algorithm = network()
    algorithm.discriminator = nn.Linear(5, 3)
    save_domainbed(tmp_path / "model.pkl", algorithm)
    if numpy == 1:
        as_numpy_1_wrote_it(tmp_path / "model.pkl")
        assert b"cnumpy.core.multiarray\n" in (tmp_path / "model.pkl").read_bytes()
    found = read(tmp_path / "model.pkl")
    assert found.architecture is None
    assert found.left == ("discriminator.weight", "discriminator.bias")
    pair = network()
    del pair.network
    sequence = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, CLASSES))
    for model in (network(), pair, sequence):
        if isinstance(model, ERM) and hasattr(model, "network"):
            model.discriminator = nn.Linear(5, 3)
        architectures.fitted(model, found, "model.pkl")
        inputs = torch.randn(4, 6)
        given = (
            model(inputs)
            if hasattr(model, "network") or model is sequence
            else pair.classifier(pair.featurizer(inputs))
        )
        assert torch.equal(given, algorithm(inputs))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, *checkpoints.CONTAINERS])
def test_plain_and_wrapped_state_dicts(mlp, tmp_path, prefix, key):
    state = {prefix + name: value for name, value in mlp.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "c.pt")
    assert not differing(load_state_dict(tmp_path / "c.pt"), mlp)


def test_data_parallel_itself(mlp, tmp_path):
    torch.save(nn.DataParallel(mlp).state_dict(), tmp_path / "c.pt")
    assert not differing(load_state_dict(tmp_path / "c.pt"), mlp)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_file_formats_of_torch_save(mlp, tmp_path, zipped):
    torch.save(mlp.state_dict(), tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    assert not differing(load_state_dict(tmp_path / "c.pt"), mlp)


def test_lightnings_file(mlp, tmp_path):
    module = LightningModule()
    module.model.load_state_dict(mlp.state_dict())
    save_lightning(tmp_path / "last.ckpt", module)
    found = read(tmp_path / "last.ckpt")
    assert (found.format, found.classes) == ("Lightning", 10)
    assert found.told["hyper_parameters"] == {"lr": 0.1, "classes": 10}
    assert not differing(found.state, mlp)
    assert not differing(architectures.fitted(LightningModule(), found, "f").state_dict(), module)  # the module itself


def test_lightnings_file_with_a_loss_that_has_weights(mlp, tmp_path):
    module = LightningModule()
    module.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))
    save_lightning(tmp_path / "last.ckpt", module)
    filled = architectures.fitted(digits_mlp(), read(tmp_path / "last.ckpt"), "f")
    assert not differing(filled.state_dict(), module.model)


def test_lightnings_resnet_is_seen_beside_a_loss_that_has_weights(torchvision, tmp_path):
    module = nn.Module()
    module.criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    module.model = torchvision.models.resnet18(num_classes=CLASSES)
    save_lightning(tmp_path / "last.ckpt", module)
    found = read(tmp_path / "last.ckpt")
    assert (found.architecture, found.classes, found.left) == ("torchvision:resnet18", CLASSES, ("criterion.weight",))
    assert not differing(found.state, module.model)
    module.teacher = module.model  # which of the two is meant is not said
    save_lightning(tmp_path / "two.ckpt", module)
    assert read(tmp_path / "two.ckpt").architecture is None


def test_the_same_model_twice_below_two_prefixes_is_refused(mlp, tmp_path):
    state = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in mlp.state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(UsageError, match=r"holds the model 2 times, below student\., teacher\."):
        architectures.fitted(digits_mlp(), read(tmp_path / "c.pt"), "c.pt")


@pytest.mark.parametrize("averaged", [False, True])
def test_timms_own_saver(timm, tmp_path, averaged):
    from timm.utils import CheckpointSaver, ModelEmaV2

    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES)
    average = ModelEmaV2(net)
    with torch.no_grad():
        net.head.bias += 1.0
    arguments = argparse.Namespace(model="vit_tiny_patch16_224.augreg_in21k", num_classes=CLASSES, data_dir=None)
    optimizer = torch.optim.AdamW(net.parameters())
    saver = CheckpointSaver(net, optimizer, arguments, average, checkpoint_dir=str(tmp_path), recovery_dir="")
    saver.save_checkpoint(3, metric=0.5)
    found = read(tmp_path / "last.pth.tar", averaged=averaged)
    assert (found.format, found.architecture, found.classes) == ("timm", "timm:vit_tiny_patch16_224", CLASSES)
    assert same_outputs(
        architectures.model_of(found, None, CLASSES, "f"), average.module if averaged else net, 3, 224, 224
    )


def test_the_imagenet_examples_file_is_torchvisions(mlp, tmp_path):
    state = {f"module.{name}": value for name, value in mlp.state_dict().items()}
    torch.save(
        {"epoch": 9, "arch": "resnet50", "state_dict": state, "best_acc1": torch.tensor(7.0)}, tmp_path / "c.tar"
    )
    found = read(tmp_path / "c.tar")
    assert (found.format, found.architecture) == ("ImageNet example", "torchvision:resnet50")
    assert not differing(found.state, mlp)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d"]
)
def test_a_resnet_is_told_from_names_and_shapes(torchvision, name):
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    expected = f"torchvision:{name}" if name.startswith("resnet") else None
    assert infer_resnet(state) == expected


def test_a_file_without_the_counts_of_batch_norm(torchvision, tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    state = {name: value for name, value in net.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "c.pt")
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    filled = architectures.fitted(other, read(tmp_path / "c.pt"), "c.pt")
    assert not differing(filled.state_dict(), net)


@pytest.mark.parametrize("head", ["fc_class", "classifier", "fc.1"])
def test_a_head_under_another_name(mlp, tmp_path, head):
    state = {name.replace("2.", f"{head}."): value for name, value in mlp.state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    assert not differing(architectures.fitted(digits_mlp(), read(tmp_path / "c.pt"), "c.pt").state_dict(), mlp)


def test_our_own_files_say_their_architecture(mlp, tmp_path):
    settings = {"model": "disam_theory.models:digits_mlp", "algorithm": "sam"}
    torch.save({"state_dict": mlp.state_dict(), "settings": settings, "provenance": {}}, tmp_path / "seed0.pt")
    metadata = {"settings": json.dumps(settings), "step": "3"}
    safetensors.torch.save_file(mlp.state_dict(), tmp_path / "best.safetensors", metadata)
    for name in ("seed0.pt", "best.safetensors"):
        found = read(tmp_path / name)
        assert (found.format, found.architecture) == ("disam_theory", settings["model"])
        assert not differing(architectures.model_of(found, None, 10, name).state_dict(), mlp)


def test_safetensors_by_content_under_another_name(mlp, tmp_path):
    safetensors.torch.save_file(mlp.state_dict(), tmp_path / "pytorch_model.bin")
    assert not differing(load_state_dict(tmp_path / "pytorch_model.bin"), mlp)


def test_paths_among_the_arguments(mlp, tmp_path):
    arguments = argparse.Namespace(data=tmp_path, backbone="resnet18")
    torch.save({"args": arguments, "model": mlp.state_dict()}, tmp_path / "c.pt")
    assert read(tmp_path / "c.pt").told["args"]["data"] == str(tmp_path)


def test_reading_leaves_torchs_allow_list_as_it_was(mlp, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"args": official_arguments(), "model": mlp.state_dict()}, tmp_path / "c.pt")
    read(tmp_path / "c.pt")
    assert set(torch.serialization.get_safe_globals()) == before


# --- the command line ---


def convert(*arguments, capsys):
    code = main(["convert", *map(str, arguments)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_convert_keeps_every_weight_and_says_where_from(torchvision, tmp_path, capsys):
    net = official_net(torchvision)
    source, out = tmp_path / "lodo_model_best.pth", tmp_path / "best.safetensors"
    save_official(source, net)
    code, text, err = convert(source, "--out", out, capsys=capsys)
    assert (code, err) == (0, "")
    said = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert said["architecture"] == "torchvision:resnet18"
    assert said["source_sha256"] == sha256(source)
    assert said["sha256"] == sha256(out)
    with safetensors.safe_open(out, "pt") as file:
        metadata = json.loads(file.metadata()["disam-weights/1"])
    assert (metadata["format"], metadata["architecture"]) == ("DISAM trainer", "torchvision:resnet18")
    assert (metadata["source"], metadata["source_sha256"]) == ("lodo_model_best.pth", sha256(source))
    assert metadata["provenance"]["disam_theory"]
    assert metadata["said"]["args"]["lambda_weight"] == 0.1
    again = read(out)
    assert same_outputs(architectures.model_of(again, None, None, "f"), net, 3, 64, 64)
    for name, value in net.state_dict().items():
        assert torch.equal(again.state[name.replace("fc_class", "fc")], value)


def test_convert_twice_gives_the_same_bytes(mlp, tmp_path, capsys):
    torch.save(mlp.state_dict(), tmp_path / "c.pt")
    out = tmp_path / "c.safetensors"
    model = ("--model", "disam_theory.models:digits_mlp")
    assert convert(tmp_path / "c.pt", "--out", out, *model, capsys=capsys)[0] == 0
    first = out.read_bytes()
    assert convert(tmp_path / "c.pt", "--out", out, *model, capsys=capsys)[0] == 0
    assert out.read_bytes() == first
    assert read(out).architecture == model[1]


def test_an_audit_needs_no_model_where_the_file_says_it(mlp, tmp_path, capsys):
    torch.save(mlp.state_dict(), tmp_path / "c.pt")
    model = ["--model", "disam_theory.models:digits_mlp"]
    assert convert(tmp_path / "c.pt", "--out", tmp_path / "c.safetensors", *model, capsys=capsys)[0] == 0
    options = ["--data", "digits-rotated", "--points", "3", "--dimensions", "1", "--format", "csv"]
    assert main(["landscape", str(tmp_path / "c.pt"), *model, *options]) == 0
    given = capsys.readouterr().out
    assert main(["landscape", str(tmp_path / "c.safetensors"), *options]) == 0
    assert capsys.readouterr().out == given
    assert main(["landscape", str(tmp_path / "c.pt"), *options]) == 2
    assert "(state dict) does not say its architecture; give --model" in capsys.readouterr().err


def test_code_that_a_file_names_is_not_imported(mlp, tmp_path, capsys, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": mlp.state_dict(), "settings": {"model": "evil:net"}, "provenance": {}}, "c.pt")
    assert main(["landscape", "c.pt", "--data", "digits-rotated"]) == 2
    assert "give --model evil:net if it is to" in capsys.readouterr().err


def test_another_number_of_classes_than_the_data_have(torchvision, tmp_path, capsys):
    save_official(tmp_path / "a.pth", official_net(torchvision))
    assert main(["landscape", str(tmp_path / "a.pth"), "--data", "digits-rotated"]) == 2
    assert "its head has 7 classes and the data have 10" in capsys.readouterr().err


def test_another_architecture_is_named_first(torchvision, tmp_path, capsys):
    save_official(tmp_path / "a.pth", official_net(torchvision))
    code, _, err = convert(
        tmp_path / "a.pth", "--out", tmp_path / "b.safetensors", "--model", "torchvision:resnet50", capsys=capsys
    )
    assert code == 2
    assert "is of torchvision:resnet18, not of torchvision:resnet50: " in err
    assert "missing layer1.0.conv3.weight" in err
    assert "misshapen layer1.0.conv1.weight is (64, 64, 3, 3), the model has (64, 64, 1, 1)" in err
    assert not (tmp_path / "b.safetensors").exists()


MISTAKES = {
    "out.pt": "must end in .safetensors",
    "c.safetensors": "is the checkpoint",
    "c.safetensors/d.safetensors": "as c.safetensors is no folder; give a folder",
    "/proc/nowhere/c.safetensors": "cannot be written",
    "folder": "--out is folder, which is a folder; give a file's name, such as folder/c.safetensors",
    "folder.safetensors": "such as folder.safetensors/c.safetensors",
    f"{'n' * 300}.safetensors": "cannot be written (File name too long)",
}


@pytest.mark.parametrize("out", MISTAKES)
def test_where_convert_writes(mlp, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file(mlp.state_dict(), "c.safetensors")
    for name in ("folder", "folder.safetensors"):
        Path(name).mkdir()
    before = sha256(tmp_path / "c.safetensors")
    code, text, err = convert("c.safetensors", "--out", out, capsys=capsys)
    assert code == (1 if "proc" in out or "nnn" in out else 2)
    assert MISTAKES[out] in err
    assert (text, err.count("\n"), sha256(tmp_path / "c.safetensors")) == ("", 1, before)


# --- what is refused, and in which words ---


def refusal(path, **options):
    with pytest.raises(UsageError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": {}, "config": types.SimpleNamespace(a=1)}, "types.SimpleNamespace"),
        ({"w": torch.ones(1), "grid": np.ones(3)}, "numpy._core.multiarray._reconstruct"),
        ({"w": torch.ones(1), "name": np.str_("x")}, "numpy.dtype('U1')"),
        ({"w": torch.ones(1), "model": nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
        ({"w": torch.ones(1), "filler": bytearray(5)}, "builtins.bytearray"),
    ],
)
def test_a_refused_pickle_names_what_it_holds_and_says_what_to_do(tmp_path, content, named):
    said = refusal(saved(tmp_path / "c.pt", content))
    assert f"refused, as it holds {named}" in said
    assert "torch.save(state_dict, FILE)" in said


def test_a_pickle_of_another_protocol_is_named_too(tmp_path):
    with (tmp_path / "c.pkl").open("wb") as file:
        pickle.dump({"x": types.SimpleNamespace()}, file, protocol=4)
    assert "refused, as it holds types.SimpleNamespace" in refusal(tmp_path / "c.pkl")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([1.0, torch.nan, torch.inf]), "'2.bias' has 2 NaN or Inf"),
        (torch.tensor([1.0, torch.nan], dtype=torch.bfloat16), "'2.bias' has 1 NaN or Inf"),
        (torch.tensor([1.0, torch.nan]).to(torch.float8_e5m2), "'2.bias' has 1 NaN or Inf"),
        (torch.eye(3).to_sparse(), "'2.bias' is a sparse or nested tensor"),
        (torch.ones(3, dtype=torch.complex64), "'2.bias' is a tensor of torch.complex64"),
        (torch.ones(3, device="meta"), "'2.bias' is a tensor without data"),
        (torch.ones(1).expand(10**10), "whose tensors claim 40000009600"),
    ],
)
def test_tensors_that_fill_no_model(mlp, tmp_path, value, words):
    assert words in refusal(saved(tmp_path / "c.pt", {**mlp.state_dict(), "2.bias": value}))


def test_not_finite_weights_are_counted_by_name(mlp, tmp_path):
    broken = {name: torch.full_like(value, torch.nan) for name, value in mlp.state_dict().items()}
    said = refusal(saved(tmp_path / "c.pt", broken))
    assert "'0.weight' has 2048 NaN or Inf, '0.bias' has 32 NaN or Inf, '2.weight' has 320 NaN or Inf" in said
    assert "and 1 tensors more" in said


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_a_value_that_is_no_tensor_is_missing(mlp, tmp_path, name):
    found = read(saved(tmp_path / "c.pt", {**mlp.state_dict(), name: [1.0, 2.0]}))
    with pytest.raises(UsageError, match=f"missing {name}"):
        architectures.fitted(digits_mlp(), found, "c.pt")


def test_missing_unexpected_and_misshapen_names_are_all_listed(mlp, tmp_path):
    state = dict(mlp.state_dict())
    del state["0.bias"]
    state |= {"2.bias": torch.ones(3), "a.x": torch.ones(1), "b.y": torch.ones(1)}
    with pytest.raises(UsageError) as caught:
        architectures.fitted(digits_mlp(), read(saved(tmp_path / "c.pt", state)), "c.pt")
    for words in ("missing 0.bias", "unexpected a.x, b.y", "misshapen 2.bias is (3,), the model has (10,)"):
        assert words in str(caught.value)


def test_a_mismatch_is_told_in_the_form_that_fits_best(mlp, tmp_path):
    """One name is missing below the prefix; that the prefix is there is not what is wrong."""
    module = LightningModule()
    save_lightning(tmp_path / "c.ckpt", module)
    model = nn.Sequential(*digits_mlp(), nn.Linear(10, 10))
    with pytest.raises(UsageError, match=r"the model: missing 3\.weight, 3\.bias; give"):
        architectures.fitted(model, read(tmp_path / "c.ckpt"), "c.ckpt")


def test_no_state_dict_lists_the_keys_that_there_are(tmp_path):
    said = refusal(saved(tmp_path / "c.pt", {"teacher": {"w": torch.ones(1)}, "epoch": 3}))
    assert "its keys: teacher, epoch" in said
    assert "holds a list, no state dict" in refusal(saved(tmp_path / "d.pt", [1]))


def test_no_moving_average(mlp, tmp_path):
    assert "leave --ema away" in refusal(saved(tmp_path / "c.pt", mlp.state_dict()), averaged=True)


FOREIGN = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a web page": b"<!DOCTYPE html><html><head><title>404</title>",
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(64),
    "gzip": b"\x1f\x8b\x08" + bytes(64),
    "empty": b"",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_told_by_its_kind(tmp_path, kind):
    (tmp_path / "c.pt").write_bytes(FOREIGN[kind])
    assert kind in refusal(tmp_path / "c.pt")


def test_a_file_cut_short_anywhere_is_said_to_be(mlp, tmp_path):
    """Of some lengths torch's reader says no more than that an argument is invalid."""
    content = saved(tmp_path / "c.pt", {"state_dict": mlp.state_dict(), "epoch": 3}).read_bytes()
    for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99):
        (tmp_path / "c.pt").write_bytes(content[: int(share * len(content))])
        assert "cut short" in refusal(tmp_path / "c.pt")


def test_archives_that_are_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    assert "a NumPy archive" in refusal(tmp_path / "a.npz")
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(traced, tmp_path / "t.pt")
    assert "a TorchScript archive" in refusal(tmp_path / "t.pt")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    saved(tmp_path / "c.pt", {"w": torch.ones(1)})

    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", forbidden)
    assert refusal(tmp_path / "c.pt").endswith("cannot be read (Permission denied)")


def test_fill_says_what_cannot_be_copied(mlp):
    with pytest.raises(UsageError, match=r"does not fit the model: .*2\.bias"):
        fill(digits_mlp(), {**mlp.state_dict(), "2.bias": torch.ones(10).to_sparse()}, "c.pt")


def test_train_starts_from_any_of_the_formats(torchvision, tmp_path):
    net = official_net(torchvision)
    save_official(tmp_path / "a.pth", net)
    model = backbones.build("torchvision:resnet18", CLASSES, weights=tmp_path / "a.pth")
    assert same_outputs(model, net, 3, 64, 64)
