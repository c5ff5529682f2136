"""Domains from NumPy archives and from callables of the user's, and what of them is refused."""

import re

import numpy as np
import pytest
import torch

from disam_theory.__main__ import main
from disam_theory.archives import called, load_data, numpy_archive
from disam_theory.domains import Domain, Suite
from disam_theory.errors import UsageError


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    inputs, labels = generator.normal(size=(30, 64)).astype(np.float32), np.arange(30) % 10
    return inputs, labels, np.repeat(["photo", "sketch", "art"], [15, 10, 5])


def content(suite):
    """Name -> types and values, with the number of classes."""
    return suite.classes, {
        domain.name: (domain.inputs.dtype, domain.labels.dtype, domain.inputs.tolist(), domain.labels.tolist())
        for domain in suite.domains
    }


def expected(arrays):
    inputs, labels, domains = arrays
    return 10, {
        str(name): (torch.float32, torch.int64, inputs[domains == name].tolist(), labels[domains == name].tolist())
        for name in ("art", "photo", "sketch")
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_both_layouts_give_the_same_domains(tmp_path, arrays, save):
    inputs, labels, domains = arrays
    save(tmp_path / "one.npz", inputs=inputs, labels=labels, domains=domains)
    parts = {
        f"{name}/{part}": values[domains == name]
        for name in set(domains)
        for part, values in (("inputs", inputs), ("labels", labels.astype(np.uint8)))
    }
    save(tmp_path / "each.npz", **parts)
    for name in ("one.npz", "each.npz"):
        assert content(load_data(str(tmp_path / name))) == expected(arrays)


def test_the_number_of_classes_may_be_given(tmp_path, arrays):
    inputs, labels, domains = arrays
    np.savez(tmp_path / "d.npz", inputs=inputs, labels=labels, domains=domains, classes=12)
    assert numpy_archive(tmp_path / "d.npz").classes == 12


def test_domains_by_number_and_inputs_of_whole_numbers(tmp_path):
    inputs = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    np.savez(tmp_path / "d.npz", inputs=inputs, labels=[0, 1, 0, 1, 2, 0], domains=[1, 1, 1, 0, 0, 0])
    suite = numpy_archive(tmp_path / "d.npz")
    assert [domain.name for domain in suite.domains] == ["0", "1"]
    assert torch.equal(suite["1"].inputs, torch.arange(12.0).reshape(3, 2, 2))
    assert suite["0"].labels.tolist() == [1, 2, 0]


RETURNS = {
    "suite": lambda domains: Suite("mine", domains, 10),
    "domains": tuple,
    "listed": list,
    "tensors": lambda domains: {domain.name: (domain.inputs, domain.labels) for domain in domains},
    "lists": lambda domains: {domain.name: [domain.inputs.numpy(), domain.labels.tolist()] for domain in domains},
}


@pytest.mark.parametrize("kind", RETURNS)
def test_a_callable_may_return(tmp_path, monkeypatch, arrays, kind):
    inputs, labels, names = arrays
    domains = tuple(
        Domain(str(name), torch.from_numpy(inputs[names == name]), torch.from_numpy(labels[names == name]))
        for name in np.unique(names)
    )
    (tmp_path / f"mydata_{kind}.py").write_text("returned = []\ndef domains():\n    return returned[0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(f"mydata_{kind}")
    module.returned.append(RETURNS[kind](domains))
    assert content(load_data(f"mydata_{kind}:domains")) == expected(arrays)


def test_the_command_line_takes_both(tmp_path, monkeypatch, arrays, capsys):
    from disam_theory.models import digits_mlp

    inputs, labels, domains = arrays
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    torch.save(digits_mlp().state_dict(), "c.pt")
    np.savez("d.npz", inputs=inputs, labels=labels, domains=domains)
    (tmp_path / "fromfile.py").write_text(
        "from pathlib import Path\nfrom disam_theory.archives import numpy_archive\n"
        "def domains():\n    return numpy_archive(Path('d.npz')).domains\n"
    )
    printed = []
    for data in ("d.npz", "fromfile:domains"):
        options = ["--model", "disam_theory.models:digits_mlp", "--points", "3", "--dimensions", "1", "--format", "csv"]
        assert main(["landscape", "c.pt", "--data", data, *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("a,art,photo,sketch,pooled\n")


X, Y = np.ones((4, 3)), np.array([0, 1, 0, 1])
REFUSED = {
    "objects": ({"inputs": np.array([1, None], dtype=object)}, "Python objects, which would run code"),
    "other names": ({"x": X, "y": Y}, "expected arrays inputs, labels and domains"),
    "nothing": ({}, "it has none"),
    "labels missing": ({"a/inputs": X}, "expected arrays"),
    "lengths": ({"inputs": X, "labels": Y[:3], "domains": Y}, "must have a row a sample"),
    "lengths of a domain": ({"a/inputs": X, "a/labels": Y[:3]}, "domain 'a' has 4 inputs and 3 labels"),
    "one sample": ({"inputs": X, "labels": Y, "domains": [0, 1, 1, 1]}, "domain '0' has 1 sample"),
    "labels of half": ({"a/inputs": X, "a/labels": Y / 2}, "one whole number a sample, from 0"),
    "labels in columns": ({"a/inputs": X, "a/labels": np.eye(4, dtype=int)}, "one whole number a sample"),
    "below 0": ({"a/inputs": X, "a/labels": Y - 1}, "domain 'a' has label -1; labels must be whole numbers from 0 on"),
    "below 0 of 3 classes": ({"a/inputs": X, "a/labels": Y - 1, "classes": 3}, "has label -1; labels must lie in 0..2"),
    "above the classes": ({"a/inputs": X, "a/labels": Y, "classes": 1}, "has label 1; labels must lie in 0..0"),
    "classes": ({"a/inputs": X, "a/labels": Y, "classes": 2.5}, "must be one whole number above 0"),
    "text": ({"a/inputs": np.array(["x"] * 4), "a/labels": Y}, "inputs of domain 'a' are not an array of numbers"),
    "complex": ({"a/inputs": X + 1j, "a/labels": Y}, "inputs of domain 'a' are torch.complex128"),
    "nan": ({"a/inputs": X * np.nan, "a/labels": Y}, "domain 'a' holds NaN or Inf"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_archive_is_refused_with_what_is_wrong(tmp_path, what):
    content, words = REFUSED[what]
    np.savez(tmp_path / "d.npz", **content)
    with pytest.raises(UsageError) as caught:
        load_data(str(tmp_path / "d.npz"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -30, -1])
def test_an_archive_that_is_cut_short(tmp_path, cut):
    np.savez(tmp_path / "d.npz", **{"a/inputs": X, "a/labels": Y})
    content = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(content[:cut])
    with pytest.raises(UsageError, match="cut short or not one"):
        numpy_archive(tmp_path / "d.npz")


def test_an_archive_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        numpy_archive(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("3", "returned int; expected a Suite"),
        ("{}", "returned dict; expected"),
        ("{'a': 3}", "returned dict; expected"),
        ("{'a': ([1.0, 2.0], ['x', 'y'])}", "labels of domain 'a' are not an array of numbers"),
        ("{'a': ([[1], [2, 3]], [0, 1])}", "inputs of domain 'a' are not an array of numbers"),
    ],
)
def test_a_callable_that_returns_something_else(tmp_path, monkeypatch, returned, words):
    monkeypatch.syspath_prepend(str(tmp_path))
    name = re.sub(r"\W", "_", f"returns_{returned}")
    (tmp_path / f"{name}.py").write_text(f"def domains():\n    return {returned}\ndef needs(x):\n    return x\n")
    with pytest.raises(UsageError) as caught:
        called(f"{name}:domains")
    assert words in str(caught.value)
    with pytest.raises(UsageError, match="calling it without arguments failed"):
        called(f"{name}:needs")


def test_names_that_are_neither(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'digits-rotated'"):
        load_data("digits-rotatd")
    with pytest.raises(UsageError, match="cannot import 'nowhere'"):
        load_data("nowhere:domains")
