"""Suites of disjoint domains, leave-one-domain-out splits, and the data that are refused."""

import numpy as np
import pytest
import torch

from disam_theory import domains as module
from disam_theory.archives import load_data
from disam_theory.domains import SUITES, Domain, Suite, load_suite, logistic_domains
from disam_theory.errors import UsageError
from disam_theory.losses import model_losses, parameters_of
from disam_theory.operators import hessian

NAMES = sorted(name for name in SUITES if name.startswith("digits"))
RAW_COUNT = {name: 2400 + 1797 if name == "digits-sources" else 1797 for name in NAMES}


@pytest.fixture(scope="module")
def suites():
    return {name: load_suite(name) for name in NAMES}


# --- embedded suites ---


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_has_at_least_four_domains_of_different_sizes_over_ten_classes(suites, name):
    suite = suites[name]
    sizes = [len(d) for d in suite.domains]
    assert len(sizes) >= 4
    assert len(set(sizes)) > 1
    assert sum(sizes) == RAW_COUNT[name]
    for domain in suite.domains:
        assert set(domain.labels.tolist()) == set(range(10))
        assert domain.inputs.shape == (len(domain), 64)
        assert domain.inputs.dtype == torch.float32


def indexed_images(count, offset):
    """Images that carry their own number: constant, so that a domain's transformation acts on it alone."""
    number = np.arange(count, dtype=float) + offset
    return np.broadcast_to(number[:, None, None], (count, 8, 8)).copy(), np.arange(count) % 10


@pytest.mark.parametrize("rng", [0, 1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_the_domains_partition_the_images(monkeypatch, name, rng):
    """Every raw image is in exactly one domain: the numbers that the images carry are disjoint and complete."""
    monkeypatch.setattr(module, "_optdigits", lambda: indexed_images(1797, 10_000.0))
    monkeypatch.setattr(module, "_mnist", lambda: indexed_images(5000, 100_000.0))
    parts = []

    def keep_index(images, labels, recipe, rng):
        untouched = [(domain, share, lambda x, g: x) for domain, share, _ in recipe]
        domains = original(images, labels, untouched, rng)
        parts.extend(domain.inputs[:, 0].long().tolist() for domain in domains)
        return domains

    original = module._parts
    monkeypatch.setattr(module, "_parts", keep_index)
    suite = load_suite(name, rng=rng)
    assert [len(p) for p in parts] == [len(d) for d in suite.domains]
    everything = [index for part in parts for index in part]
    assert len(everything) == len(set(everything)) == RAW_COUNT[name]
    for part, domain in zip(parts, suite.domains, strict=True):
        labels = [(number % 10_000 if number < 100_000 else number - 100_000) % 10 for number in part]
        assert labels == domain.labels.tolist()  # each image keeps its own label


def test_untransformed_domains_are_raw_optdigits(suites):
    """The domains rot0 and clean consist of raw images, with their labels, each used no more often than it occurs."""
    images, labels = module._optdigits()
    raw = {}
    for image, label in zip(images.reshape(-1, 64).astype(np.float32), labels, strict=True):
        raw.setdefault((image.tobytes(), int(label)), []).append(1)
    for suite, name in (("digits-rotated", "rot0"), ("digits-corrupted", "clean"), ("digits-sources", "optdigits")):
        domain = suites[suite][name]
        count = {}
        for image, label in zip(domain.inputs.numpy(), domain.labels.tolist(), strict=True):
            key = (image.tobytes(), label)
            count[key] = count.get(key, 0) + 1
        assert all(number <= len(raw.get(key, [])) for key, number in count.items())


def test_transformations_are_what_the_names_say(suites):
    occluded = suites["digits-corrupted"]["occluded"].inputs.view(-1, 8, 8)
    squares = occluded.unfold(1, 4, 1).unfold(2, 4, 1).abs().sum((-1, -2))
    assert bool((squares.flatten(1).min(1).values == 0).all())
    inverted = suites["digits-corrupted"]["inverted"].inputs
    clean = suites["digits-corrupted"]["clean"].inputs
    assert inverted.mean() > 0.5 > clean.mean()
    assert float(inverted.min()) >= 0.0
    assert float(inverted.max()) <= 1.0
    noise = suites["digits-corrupted"]["noise"].inputs.double()
    corner = noise.view(-1, 8, 8)[:, :, 0]  # blank in nearly every raw image, so the noise alone
    assert float(corner.std()) == pytest.approx(0.35, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_determines_the_suite(suites, name):
    again, other = load_suite(name, rng=0), load_suite(name, rng=1)
    for a, b in zip(suites[name].domains, again.domains, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
    for a, b in zip(suites[name].domains, other.domains, strict=True):
        assert len(a) == len(b)
        assert not torch.equal(a.inputs, b.inputs)


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_suite("digits-corrupted").split("clean")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


# --- splits ---


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_a_split_cuts_each_source_into_disjoint_parts_that_cover_it(share):
    sizes = (40, 73, 10 * 5, 21)
    starts = np.cumsum([0, *sizes])
    domains = tuple(
        Domain(f"d{i}", torch.arange(start, start + n, dtype=torch.float64)[:, None], torch.arange(n) % 3)
        for i, (n, start) in enumerate(zip(sizes, starts, strict=False))
    )
    split = Suite("numbers", domains, 3).split("d2", validation=share, rng=4)
    assert [d.name for d in split.sources] == [d.name for d in split.validation] == ["d0", "d1", "d3"]
    for train, kept in zip(split.sources, split.validation, strict=True):
        whole = domains[int(train.name[1])]
        assert abs(len(kept) - share * len(whole)) <= 2
        both = torch.cat([train.inputs, kept.inputs]).flatten()
        assert both.sort().values.tolist() == whole.inputs.flatten().tolist()
        for part in (train, kept):
            assert torch.equal(part.labels, (part.inputs.flatten() - whole.inputs[0, 0]).long() % 3)
    assert split.unseen is domains[2]


def test_the_split_depends_on_its_seed_alone(suites):
    suite = suites["digits-rotated"]
    first, again, other = (suite.split("rot25", rng=rng) for rng in (0, 0, 1))
    for a, b, c in zip(first.sources, again.sources, other.sources, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert not torch.equal(a.inputs, c.inputs)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_validation_share_out_of_range_is_refused(suites, share):
    with pytest.raises(UsageError, match=r"validation share.*not between 0 and 1"):
        suites["digits-rotated"].split("rot0", validation=share)


def test_a_domain_too_small_to_split_is_named(make_domain):
    suite = Suite("s", (make_domain("big", 30), make_domain("tiny", 3)), 3)
    with pytest.raises(UsageError, match="'tiny'"):
        suite.split("big")


# --- refused names and data ---


def test_an_unknown_suite_suggests_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown suite 'digits-rotatd': did you mean 'digits-rotated'\?"):
        load_suite("digits-rotatd")


def test_an_unknown_domain_suggests_the_nearest_name(suites):
    with pytest.raises(UsageError, match=r"did you mean 'occluded'\?.*known: blur, clean"):
        suites["digits-corrupted"].split("ocluded")
    with pytest.raises(UsageError, match="digits-corrupted"):
        suites["digits-corrupted"]["zzzz"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        load_data(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("count", [0, 1])
def test_a_domain_needs_two_samples(count):
    with pytest.raises(UsageError, match=f"'thin' has {count} sample"):
        Domain("thin", torch.ones(count, 3), torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
def test_data_that_are_not_finite_are_refused_with_the_sample(value, shape):
    inputs = torch.zeros(shape)
    inputs[2, 1] = value
    with pytest.raises(UsageError, match=r"'bad' holds NaN or Inf \(first in sample 2\)"):
        Domain("bad", inputs, torch.zeros(4, dtype=torch.int64))


def test_data_of_one_axis_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="sample 1"):
        Domain("bad", torch.tensor([0.0, float("nan")]), torch.zeros(2, dtype=torch.int64))


def test_real_targets_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="'bad'"):
        Domain("bad", torch.zeros(2, 1), torch.tensor([0.0, float("nan")]))


def test_one_label_a_sample_is_needed():
    with pytest.raises(UsageError, match="4 inputs and 3 labels"):
        Domain("uneven", torch.ones(4, 2), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("label", [-1, 3, 10])
def test_labels_out_of_range_are_refused_with_domain_and_label(label):
    domain = Domain("strange", torch.ones(3, 2), torch.tensor([0, label, 2]))
    with pytest.raises(UsageError, match=rf"'strange' of suite 's' has label {label}; labels must lie in 0..2"):
        Suite("s", (domain,), 3)


def test_moving_a_domain_keeps_class_labels_and_converts_real_targets(make_domain):
    assert make_domain().to(dtype=torch.float32).labels.dtype == torch.int64
    assert make_domain().to(dtype=torch.float32).inputs.dtype == torch.float32
    real = Domain("r", torch.ones(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    assert real.to(dtype=torch.float32).labels.dtype == torch.float32


# --- the logistic family ---


def test_logistic_domains_have_the_closed_form_hessian():
    r"""$\nabla^2L_i=\frac1{n_i}\sum_js_j(1-s_j)x_jx_j^\top$ for two logits $(0,x^\top w)$, i.e. logistic regression."""
    features = 4
    domains = logistic_domains((30, 11, 6), features, rng=5)
    assert [len(d) for d in domains] == [30, 11, 6]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.linspace(-1, 1, features, dtype=torch.float64))

        def forward(self, x):
            score = x @ self.w
            return torch.stack([torch.zeros_like(score), score], dim=1)

    model = Logits()
    losses, params = model_losses(model, domains, chunk=7), parameters_of(model)
    for i, domain in enumerate(domains):
        x = domain.inputs
        s = torch.sigmoid(x @ params["w"])
        closed = x.T @ (x * (s * (1 - s))[:, None]) / len(domain)
        computed = hessian(losses, params, weights=[float(j == i) for j in range(3)]).dense()
        torch.testing.assert_close(computed, closed, rtol=0, atol=1e-14 * float(closed.norm()) * 10)


def test_logistic_domains_differ_and_repeat():
    first, again, other = (logistic_domains((20, 20), 3, rng=rng) for rng in (0, 0, 1))
    assert torch.equal(first[1].inputs, again[1].inputs)
    assert torch.equal(first[1].labels, again[1].labels)
    assert not torch.equal(first[1].inputs, other[1].inputs)
    assert not torch.equal(first[0].inputs, first[1].inputs)
    assert set(first[0].labels.tolist()) <= {0, 1}
