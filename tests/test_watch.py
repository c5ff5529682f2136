"""People as domains: the recordings are what NumPy reads, the windows are cut by hand again, and no split parts one."""

import pickle

import numpy as np
import pytest
import torch

from disam_theory import watch
from disam_theory.__main__ import main
from disam_theory.domains import Domain, Suite, load_suite
from disam_theory.errors import UsageError


@pytest.fixture(scope="module")
def path():
    pytest.importorskip("seglearn")
    return watch._path()


@pytest.fixture(scope="module")
def suite(path):
    return load_suite("watch-subjects")


class Array:
    """Stands for an array, and for its element type, while unpickling."""

    def __init__(self, code=""):
        self.code = code

    def __setstate__(self, state):
        if not self.code:
            _, shape, kind, fortran, self.data = state
            if kind.code != "O8":
                self.data = np.frombuffer(self.data, kind.code).reshape(shape, order="F" if fortran else "C")


STAND_INS = {
    "numpy.core.multiarray._reconstruct": lambda kind, shape, code: Array(),
    "numpy.ndarray": None,
    "numpy.dtype": lambda code, align, copy: Array(code),
    "_codecs.encode": lambda text, coding: text.encode("latin1"),
}


class Unpickler(pickle.Unpickler):
    """Python's own reader of the opcodes; what the file names becomes a stand-in here, or a KeyError."""

    def find_class(self, module, name):
        return STAND_INS[f"{module}.{name}"]


def test_the_recordings_are_those_that_an_unpickler_finds_by_their_names(path):
    series, labels, people = watch.recordings(path)
    with path.open("rb") as file:
        file.seek(10 + int.from_bytes(path.read_bytes()[8:10], "little"))
        (content,) = Unpickler(file).load().data
    theirs = {name: value.data if isinstance(value, Array) else value for name, value in content.items()}
    theirs["X"] = [each.data for each in theirs["X"]]
    assert len(series) == watch.RECORDINGS
    assert all(np.array_equal(a, b) for a, b in zip(series, theirs["X"], strict=True))
    assert np.array_equal(labels, theirs["y"])
    assert np.array_equal(people, theirs["subject"])
    assert tuple(theirs["y_labels"]) == watch.EXERCISES


def test_a_person_is_a_domain_with_every_exercise(suite):
    assert [domain.name for domain in suite.domains] == [f"person{k}" for k in range(1, 11)]
    assert suite.classes == 7
    for domain in suite.domains:
        assert set(domain.labels.tolist()) == set(range(7))
        assert len(set(domain.groups.tolist())) == 14
        assert domain.inputs.shape == (len(domain), 120)
        assert 0.3 < float(domain.inputs.std()) < 3  # the units are near the channels' spread


def test_windows_by_hand(suite, path):
    """Each 0.1 s of a channel is one mean; what is left after the last whole window of 2 s is dropped."""
    series, labels, people = watch.recordings(path)
    assert sum(len(domain) for domain in suite.domains) == sum(len(one) // 100 for one in series)
    for k in (0, 77, 139):
        domain = suite[f"person{people[k]}"]
        mine = domain.inputs[domain.groups == k]
        assert set(domain.labels[domain.groups == k].tolist()) == {int(labels[k])}
        window, block = len(mine) - 1, 7
        at = 100 * window + 5 * block
        for channel, unit in ((2, 0.5), (4, 1.5)):
            expected = series[k][at : at + 5, channel].mean() / unit
            assert float(mine[window, 20 * channel + block]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rng", [0, 1, 2])
def test_no_recording_is_in_training_and_validation(suite, rng):
    split = suite.split("person3", rng=rng)
    for train, kept in zip(split.sources, split.validation, strict=True):
        assert not set(train.groups.tolist()) & set(kept.groups.tolist())
        assert len(train) + len(kept) == len(suite[train.name])
        assert abs(len(kept) / len(suite[train.name]) - 0.2) < 0.08  # half a recording of fourteen, nearly
    other = suite.split("person3", rng=rng + 1)
    assert any(
        set(a.groups.tolist()) != set(b.groups.tolist())
        for a, b in zip(split.validation, other.validation, strict=True)
    )


def test_groups_are_kept_whole_whatever_their_sizes():
    groups = torch.tensor([5, 5, 5, 5, 2, 2, 9, 9, 9, 2])
    first = Domain("a", torch.arange(10.0).unsqueeze(1), torch.zeros(10, dtype=torch.int64), groups)
    suite = Suite("grouped", (first, Domain("b", torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))), 1)
    seen = set()
    for rng in range(12):
        split = suite.split("b", rng=rng)
        kept = split.validation[0]
        seen.add(tuple(set(kept.groups.tolist())))
        assert sorted(kept.inputs.flatten().tolist() + split.sources[0].inputs.flatten().tolist()) == list(range(10))
        assert all(int((kept.groups == g).sum()) == int((groups == g).sum()) for g in set(kept.groups.tolist()))
    assert seen == {(2,), (5,), (9,)}
    one = Suite("one", (Domain("a", first.inputs, first.labels, torch.zeros(10)), suite.domains[1]), 1)
    with pytest.raises(UsageError, match="is one group"):
        one.split("b")
    with pytest.raises(UsageError, match="10 samples in 3 group numbers"):
        Domain("a", first.inputs, first.labels, torch.zeros(3))


def test_another_file_is_not_read(tmp_path, path):
    other = tmp_path / "watch_dataset.npy"
    other.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"not the file of seglearn 1\.2\.5"):
        watch.recordings(other)
    with pytest.raises(UsageError, match="cannot be read"):
        watch.recordings(tmp_path / "none.npy")


def test_without_seglearn_the_extra_is_named(monkeypatch, capsys):
    def missing(name):
        raise watch.PackageNotFoundError(name)

    watch.windows.cache_clear()
    monkeypatch.setattr(watch, "distribution", missing)
    arguments = ["--test-domain", "person1", "--model", "disam_theory.models:watch_mlp", "--out", "none"]
    assert main(["train", "--data", "watch-subjects", *arguments]) == 2
    assert capsys.readouterr().err.strip().endswith("needs seglearn: pip install 'disam_theory[watch]'")


def test_a_run_on_people(path, tmp_path, capsys):
    arguments = ["--data", "watch-subjects", "--test-domain", "person1", "--model", "disam_theory.models:watch_mlp"]
    some = ["--steps", "60", "--lr", "0.1", "--batch-size", "96", "--evaluate-every", "60", "--out", str(tmp_path)]
    assert main(["train", *arguments, *some, "--format", "json"]) == 0
    found = capsys.readouterr().out
    assert '"unseen_accuracy"' in found
    assert (tmp_path / "best.safetensors").exists()
