"""``disam-theory train`` as a user runs it."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open

from disam_theory import train_command
from disam_theory.__main__ import _parser, main
from disam_theory.algorithms import Settings
from disam_theory.domains import load_suite
from disam_theory.single_run import Options
from disam_theory.traces import read_trace
from tests.drawn_images import draw

QUICK = ["--steps", "4", "--batch-size", "6", "--evaluate-every", "2", "--lr", "0.05", "--image-size", "8"]
IMAGES = ["--data", "data", "--dataset", "pacs", "--test-domain", "s", "--augment", "none"]
OWN = ["--model", "tests.drawn_images:convolutional"]
SUITE = ["--data", "digits-rotated", "--test-domain", "rot75", "--model", "disam_theory.models:digits_mlp"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "data" / "PACS")
    return tmp_path


def run(capsys, *arguments):
    code = main(["train", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_run_on_images_writes_what_its_reader_needs(folder, capsys):
    code, out, err = run(capsys, *IMAGES, *OWN, *QUICK, "--out", "run", "--algorithm", "disam")
    assert (code, err) == (0, "")
    assert sorted(p.name for p in (folder / "run").iterdir()) == [
        *("best.safetensors", "last.safetensors", "trace.jsonl", "train.csv", "train.json")
    ]
    trace = read_trace(folder / "run/trace.jsonl")
    assert (trace.end, trace.domains) == ("finished", ["photo", "art_painting", "cartoon"])
    assert (
        trace.header["settings"] | {"held_out": "sketch", "algorithm": "disam", "lam": 0.1, "momentum": 0.9}
        == (trace.header["settings"])
    )
    document = json.loads((folder / "run/train.json").read_text())
    assert [row["step"] for row in document["evaluations"]] == [0, 2, 4]
    comment, *lines = (folder / "run/train.csv").read_text().splitlines()
    assert comment.startswith("# {")
    table = list(csv.DictReader(lines))
    unseen = trace.evaluations["unseen_accuracy"]
    assert [float(row["unseen_accuracy"]) for row in table] == pytest.approx(unseen)
    best = trace.evaluations["validation_accuracy"].argmax()
    assert out.splitlines()[-1].startswith(f"best by validation: step {2 * best}, accuracy")
    assert f"and {unseen[best]:.4f} on the unseen domain" in out
    again = run(capsys, *IMAGES, *OWN, *QUICK, "--out", "run", "--algorithm", "disam")
    assert again == (code, out, err)


def loss_at(capsys, checkpoint, model, side):
    """The unseen domain's loss at the checkpoint, as another verb finds it."""
    line = ["--dimensions", "1", "--points", "3", "--data", "data/PACS", "--image-size", str(side), "--format", "json"]
    assert main(["landscape", checkpoint, "--model", model, *line]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    return next(row["sketch"] for row in rows if row["a"] == 0.0)


def test_its_checkpoint_is_one_for_the_other_verbs(folder, capsys):
    assert run(capsys, *IMAGES, *OWN, *QUICK, "--out", "run")[0] == 0
    best = json.loads((folder / "run/train.json").read_text())["best"]
    assert loss_at(capsys, "run/best.safetensors", OWN[1], 8) == pytest.approx(best["unseen_loss"], rel=1e-5)


def test_a_resnet_with_domainbeds_augmentation(torchvision, folder, capsys):
    options = ["--steps", "2", "--batch-size", "6", "--image-size", "32", "--dropout", "0.5", "--no-train-losses"]
    data = ["--data", "data", "--dataset", "pacs", "--test-domain", "sketch"]
    code, out, err = run(capsys, *data, *options, "--model", "torchvision:resnet18", "--out", "run", "--amp", "bf16")
    assert (code, err) == (0, "")
    state = load_file("run/last.safetensors")
    torchvision.models.resnet18(num_classes=3).load_state_dict(state)
    with safe_open("run/last.safetensors", "pt") as file:
        about = json.loads(file.metadata()["settings"])
    assert (about["augment"], about["dropout"], about["amp"]) == ("domainbed", 0.5, "bf16")
    assert "-" in out.splitlines()[2]  # losses on the training data, which were not asked for
    found = read_trace(folder / "run/trace.jsonl").evaluations["unseen_loss"][-1]
    theirs = loss_at(capsys, "run/last.safetensors", "torchvision:resnet18", 32)
    assert theirs == pytest.approx(found, rel=0.05)  # evaluated there in float32


def test_an_embedded_suite_will_do(folder, capsys):
    options = ["--algorithm", "sam", "--optimizer", "adamw", "--schedule", "cosine", "--sampling", "stratified"]
    code, out, _ = run(capsys, *SUITE, *QUICK, *options, "--out", "run", "--format", "csv")
    assert code == 0
    assert len(list(csv.DictReader(out.splitlines()))) == 3
    settings = read_trace(folder / "run/trace.jsonl").header["settings"]
    assert (settings["suite"], settings["momentum"], settings["schedule"]) == ("digits-rotated", 0.0, "cosine")


def test_archives_and_callables_will_do(folder, capsys):
    """The same run from both; other samples are another run."""
    suite = load_suite("digits-unequal-2")
    arrays = {f"{d.name}/{part}": getattr(d, part).numpy() for d in suite.domains for part in ("inputs", "labels")}
    np.savez("d.npz", **arrays)
    command = ["--test-domain", "noise3", "--model", "disam_theory.models:digits_mlp", *QUICK]
    code, out, err = run(capsys, "--data", "d.npz", *command, "--out", "archive")
    assert (code, err) == (0, "")
    assert run(capsys, "--data", "tests.test_train_command:own_domains", *command, "--out", "callable")[1] == out
    first, second = (load_file(f"{name}/last.safetensors") for name in ("archive", "callable"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    arrays["noise0/inputs"][0] += 1
    np.savez("d.npz", **arrays)
    code, _, err = run(capsys, "--data", "d.npz", *command, "--out", "archive")
    assert code == 2
    assert "archive: holds another run (samples" in err


def own_domains():
    return load_suite("digits-unequal-2").domains


def test_an_interrupted_command_says_how_to_go_on(folder, capsys, monkeypatch):
    monkeypatch.setattr(train_command, "_progress", lambda steps: stop)
    code, _, err = run(capsys, *SUITE, *QUICK, "--out", "run")
    assert code == 130
    assert err == "disam-theory: interrupted; the same command goes on from step 3\n"
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(capsys, *SUITE, *QUICK, "--out", "run")[0] == 0
    assert read_trace(folder / "run/trace.jsonl").steps["step"].tolist() == [0, 1, 2, 3]


def stop(done, row):
    if done == 3:
        raise KeyboardInterrupt


def test_a_broken_image_is_left_out_on_request_and_named(folder, capsys):
    path = folder / "data/PACS/cartoon/house/002.png"
    path.write_bytes(path.read_bytes()[:200])
    code, _, err = run(capsys, *IMAGES, *OWN, *QUICK, "--out", "run")
    assert code == 2
    assert "002.png: not a readable image" in err
    assert err.count("\n") == 1
    code, _, err = run(capsys, *IMAGES, *OWN, *QUICK, "--out", "run", "--skip-corrupt")
    assert code == 0
    assert err.startswith("disam-theory: 1 left out: data/PACS/cartoon/house/002.png")
    comment, *_ = (folder / "run/train.csv").read_text().splitlines()
    assert json.loads((folder / "run/train.json").read_text())["provenance"]["corrupt"] == 1
    assert json.loads(comment.removeprefix("# "))["corrupt"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SUITE, "--algorithm", "dissam"], "unknown algorithm 'dissam': did you mean 'disam'"),
        ([*SUITE, "--amp", "fp16"], "use bf16"),
        ([*SUITE, "--sam-mode", "eval"], "SAM baseline"),
        ([*SUITE, "--objective", "fishr", "--dropout", "0.5"], "leave --dropout away"),
        ([*SUITE, "--optimizer", "adam", "--momentum", "0.9"], "momentum 0.9 is sgd's"),
        ([*SUITE, "--device", "gpu"], "device 'gpu' is not available"),
        ([*SUITE, "--validation", "2"], "validation share 2.0"),
        ([*SUITE, "--test-domain", "rot57"], "did you mean 'rot75'"),
        ([*SUITE, "--data", "digit-rotated"], "did you mean 'digits-rotated'"),
        ([*SUITE, "--data", "no/where"], "no/where: no such folder"),
        ([*IMAGES, *OWN, "--dataset", "pas"], "did you mean 'pacs'"),
        ([*IMAGES, *OWN, "--splits", "official"], "no official split lists"),
        ([*IMAGES, *OWN, "--image-size", "0"], "--image-size is 0"),
        ([*SUITE, "--rng", "-1"], "--rng is -1"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, said):
    code, out, err = run(capsys, *arguments, "--out", "run")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (folder / "run").exists()


def test_a_diverged_run_is_exit_1(folder, capsys):
    code, _, err = run(capsys, *SUITE, *QUICK, "--lr", "1e38", "--save-every", "1", "--out", "run")
    assert code == 1
    assert "diverged: not finite at step" in err
    assert read_trace(folder / "run/trace.jsonl").end == "diverged"
    assert torch.cat([p.flatten() for p in load_file("run/best.safetensors").values()]).isfinite().all()


def test_a_terminal_is_shown_the_time_left(capsys, monkeypatch):
    clock = iter([100.0, 103.0, 104.0])
    monkeypatch.setattr(train_command.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    show = train_command._progress(1000)
    for done in (4, 5, 6):  # a run that went on at step 3
        show(done, {"losses": [1.0, float("nan") if done == 5 else 2.0]})
    lines = capsys.readouterr().err.split("\r\033[K")[1:]
    assert lines == [
        "step 4 of 1000, mean loss of the domains 1.500",
        "step 5 of 1000, mean loss of the domains 1.000, 0:49:45 left",
        "step 6 of 1000, mean loss of the domains 1.500, 0:33:08 left",
    ]


def test_every_setting_has_an_option():
    """But for the gradient of L_DI, which the optimizer takes by the weights."""
    known = vars(_parser().parse_args(["train", *SUITE, "--out", "run"])).keys()
    fields = {entry.name for kind in (Settings, Options) for entry in dataclasses.fields(kind)}
    aliases = {"seed": "rng", "mode": "sam_mode", "train_losses": "no_train_losses"}
    assert {aliases.get(name, name) for name in fields} - known == {"ascent_gradient"}
