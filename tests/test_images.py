"""Folders and split lists as domains, the samples read from them, and the mistakes that are named."""

import numpy as np
import pytest
import torch
from PIL import Image

from disam_theory import images
from disam_theory.domains import load_suite
from disam_theory.errors import UsageError
from disam_theory.images import BENCHMARKS, Samples, collate, evaluation_transform, image_split, training_transform
from tests.drawn_images import CLASSES, DOMAINS, draw, flipped

SOURCES = ["photo", "art_painting", "cartoon"]  # the benchmark's order


@pytest.fixture
def root(tmp_path):
    return draw(tmp_path / "PACS")


def write_lists(root, folder="lists", **changed):
    """The official lists over the drawn images: the first image of each class is kept aside."""
    (root / folder).mkdir()
    for domain in DOMAINS:
        paths = sorted((root / domain).glob("*/*.png"))
        lines = {p: f"{domain}/{p.parent.name}/{p.name} {CLASSES.index(p.parent.name) + 1}" for p in paths}
        parts = {
            "train": [lines[p] for p in paths if p.stem != "000"],
            "crossval": [lines[p] for p in paths if p.stem == "000"],
            "test": list(lines.values()),
        }
        for part, content in parts.items():
            name = f"{domain}_{part}_kfold.txt"
            (root / folder / name).write_text("\n".join(changed.get(f"{domain}_{part}", content)) + "\n")
    return root


def names(domains):
    return [domain.name for domain in domains]


# --- layouts ---


@pytest.mark.parametrize("held_out", ["s", "sketch", "Sketch"])
@pytest.mark.parametrize("at", [".", "PACS"])
def test_a_benchmark_is_found_at_its_folder_or_above_it_by_name_or_letter(root, at, held_out):
    split = image_split(root.parent / at, held_out, dataset="pacs")
    assert (names(split.sources), names(split.validation), split.unseen.name) == (SOURCES, SOURCES, "sketch")
    assert split.classes == 3
    assert [len(d) + len(v) for d, v in zip(split.sources, split.validation, strict=True)] == [18, 24, 21]
    assert len(split.unseen) == 15
    for domain in (*split.sources, *split.validation, split.unseen):
        assert [CLASSES[label] for label in domain.labels.tolist()] == [p.parent.name for p in domain.paths]
        assert {p.parents[1].name for p in domain.paths} == {domain.name}
    for domain, kept in zip(split.sources, split.validation, strict=True):
        assert not set(domain.paths) & set(kept.paths)


def test_the_letters_and_folders_are_the_benchmarks(tmp_path):
    letters = {name: "".join(b.domains) for name, b in BENCHMARKS.items()}
    expected = {"pacs": "pacs", "vlcs": "vlcs", "officehome": "pacr", "domainnet": "cipqrs"}
    assert letters == expected | {"terraincognita": "100384346"}
    draw(tmp_path / "Office_Home", ("Art", "Clipart", "Product", "Real_World"))
    split = image_split(tmp_path, "r", dataset="officehome")
    assert (split.unseen.name, names(split.sources)) == ("Real World", ["Product", "Art", "Clipart"])
    assert split.unseen.paths[0].parents[1].name == "Real_World"


def test_any_folder_of_domains_will_do_and_agrees_with_the_suite_in_memory(root):
    split, suite = image_split(root, "photo", rng=3), load_suite(str(root), image_size=8).split("photo", rng=3)
    for ours, theirs in zip((*split.sources, split.unseen), (*suite.sources, suite.unseen), strict=True):
        samples = Samples((ours,), evaluation_transform(8))
        inputs, labels, _, broken = collate([samples[0, i] for i in range(len(samples))])
        assert torch.equal(inputs, theirs.inputs)
        assert torch.equal(labels, theirs.labels)
        assert broken == []


def test_the_fingerprint_changes_with_any_file_label_or_part(root):
    first = image_split(root, "photo").fingerprint()
    assert image_split(root, "photo").fingerprint() == first
    others = [
        image_split(root, "sketch"),
        image_split(root, "photo", rng=1),
        image_split(root, "photo", validation=0.3),
    ]
    (root / "sketch" / "dog" / "000.png").rename(root / "sketch" / "dog" / "new.png")
    assert len({first, *(split.fingerprint() for split in (*others, image_split(root, "photo")))}) == 5


# --- official lists ---


@pytest.mark.parametrize("inner", [".", "raw_images"])
def test_the_official_lists_are_taken_where_they_are(tmp_path, inner):
    root = tmp_path / "PACS"
    write_lists(draw(root / inner), "Train val splits and h5py files pre-read")
    split = image_split(root, "s", dataset="pacs")
    assert [len(d) for d in split.validation] == [3, 3, 3]
    assert [len(d) for d in split.sources] == [15, 21, 18]
    assert {p.stem for d in split.validation for p in d.paths} == {"000"}
    assert len(split.unseen) == 15
    assert [CLASSES[label] for label in split.unseen.labels.tolist()] == [p.parent.name for p in split.unseen.paths]
    assert [len(d) for d in image_split(root, "s", dataset="pacs", lists=False).validation] == [4, 5, 4]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["photo/dog/999.png 1"],
            r"photo_train_kfold\.txt, line 1: names photo/dog/999\.png, and there is no such file",
        ),
        (["photo/dog/000.png"], "line 1: .* is not a path and a label from 1 on"),
        (["photo/dog/000.png 0"], "is not a path and a label from 1 on"),
        (["photo/dog/000.png 1", "", "photo/dog/001.png 2"], "label 2 is given to 'house' here and to 'dog' before"),
        (["photo/dog/000.png 1", "photo/dog/001.png 4"], "labels are not 1, 2, ... with a class each: .*4 dog"),
        (["photo/dog/000.png 1"], r"domain 'photo' has 1 image\(s\)"),
        (["photo/dog/000.png 5", "photo/house/000.png 2"], "with a class each: 1 dog, 2 house, 3 person, 5 dog"),
    ],
)
def test_a_list_that_does_not_fit_is_named(root, lines, said):
    write_lists(root, photo_train=lines)
    with pytest.raises(UsageError, match=said):
        image_split(root, "s", dataset="pacs")


def test_a_missing_list_is_named(root):
    write_lists(root)
    (root / "lists" / "cartoon_crossval_kfold.txt").unlink()
    with pytest.raises(UsageError, match=r"cartoon_crossval_kfold\.txt is missing .*--splits random"):
        image_split(root, "s", dataset="pacs")
    with pytest.raises(UsageError, match="no official split lists"):
        image_split(draw(root.parent / "other"), "sketch", lists=True)


def write_plain_lists(root, domains, parts, at=None):
    """Lists with labels from 0, as VLCS and DomainNet have them; ``parts`` says which images are in, by number."""
    for domain, called in domains.items():
        paths = sorted((root / domain).glob("*/*.png"))
        lines = {p: f"{p.relative_to(root)} {CLASSES.index(p.parent.name)}" for p in paths}
        for part, kept in parts.items():
            content = [line for p, line in lines.items() if kept(p.stem)]
            (at or root).mkdir(exist_ok=True)
            ((at or root) / f"{called}_{part}.txt").write_text("\n".join(content) + "\n")


def test_vlcs_lists_have_labels_from_0_and_other_names(tmp_path):
    folders = {"VOC2007": "PASCAL", "LabelMe": "LABELME", "Caltech101": "CALTECH", "SUN09": "SUN"}
    root = draw(tmp_path / "VLCS", tuple(folders))
    parts = {"train": lambda n: n > "000", "crossval": lambda n: n == "000", "test": lambda n: True}
    write_plain_lists(root, folders, parts)
    split = image_split(tmp_path, "v", dataset="vlcs", lists=True)
    assert (split.unseen.name, names(split.sources)) == ("VOC2007", ["LabelMe", "Caltech101", "SUN09"])
    assert [(len(a), len(b)) for a, b in zip(split.sources, split.validation, strict=True)] == [
        (18, 3),
        (15, 3),
        (12, 3),
    ]
    assert (len(split.unseen), split.classes) == (24, 3)
    for domain in (*split.sources, *split.validation, split.unseen):
        assert [CLASSES[label] for label in domain.labels.tolist()] == [p.parent.name for p in domain.paths]
    (root / "SUN_crossval.txt").unlink()
    with pytest.raises(UsageError, match=r"SUN09_crossval\.txt is missing"):
        image_split(tmp_path, "v", dataset="vlcs")
    (root / "SUN_crossval.txt").write_text("SUN09/dog/000.png -1\n")
    with pytest.raises(UsageError, match="is not a path and a label from 0 on"):
        image_split(tmp_path, "v", dataset="vlcs")


@pytest.mark.parametrize("at", [".", "splits"])
def test_domainnets_lists_have_no_crossval_and_test_on_a_part(tmp_path, at):
    domains = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    root = draw(tmp_path / "domain_net", domains, count=9)
    parts = {"train": lambda n: n > "001", "test": lambda n: n <= "001"}
    write_plain_lists(root, {name: name for name in domains}, parts, root / at)
    split = image_split(tmp_path, "q", dataset="domainnet")
    assert [len(d) for d in split.sources] == [21, 18, 15, 9, 6]
    assert [len(d) for d in (*split.validation, split.unseen)] == [6] * 6
    assert {p.stem for d in (*split.validation, split.unseen) for p in d.paths} == {"000", "001"}
    assert len(image_split(tmp_path, "q", dataset="domainnet", lists=False).unseen) == 18


def test_other_text_files_are_no_lists(root):
    (root / "readme_train.txt").write_text("not a list\n")
    assert len(image_split(root, "s", dataset="pacs").unseen) == 15


@pytest.mark.parametrize("full", [True, False])
def test_parts_in_folders_are_taken_as_the_official_split(tmp_path, full):
    sizes = {"train": 5, "crossval": 2, "test": 3} | ({"full": 9} if full else {})
    for domain in ("PASCAL", "LABELME", "CALTECH", "SUN"):
        for part, count in sizes.items():
            draw(tmp_path / "VLCS" / domain, (part,), count=count)
    split = image_split(tmp_path, "l", dataset="vlcs")
    assert [len(d) for d in (*split.sources, *split.validation)] == [15] * 3 + [6] * 3
    assert (split.unseen.name, len(split.unseen), split.classes) == ("LabelMe", 27 if full else 9, 3)
    for domain, part in ((split.sources[0], "train"), (split.validation[0], "crossval")):
        assert {p.parents[1].name for p in domain.paths} == {part}
        assert [CLASSES[label] for label in domain.labels.tolist()] == [p.parent.name for p in domain.paths]
    if full:
        drawn = image_split(tmp_path, "l", dataset="vlcs", lists=False)
        assert [len(a) + len(b) for a, b in zip(drawn.sources, drawn.validation, strict=True)] == [27] * 3
    else:
        with pytest.raises(UsageError, match="use --splits official"):
            image_split(tmp_path, "l", dataset="vlcs", lists=False)


# --- samples ---


def test_an_augmentation_depends_on_seed_epoch_and_sample_alone(root):
    domains = image_split(root, "sketch").sources
    one, again = Samples(domains, flipped, 1), Samples(domains, flipped, 1)
    before = torch.random.get_rng_state()
    first = one[0, 5][0]
    again[0, 2]
    assert torch.equal(again[0, 5][0], first)
    assert torch.equal(torch.random.get_rng_state(), before)
    others = [one[1, 5][0], one[0, 6][0], Samples(domains, flipped, 2)[0, 5][0]]
    assert not any(torch.equal(first, other) for other in others)


def test_samples_lie_end_to_end_over_the_domains(root):
    domains = image_split(root, "sketch").sources
    samples = Samples(domains, evaluation_transform(4))
    _, labels, numbers, _ = collate([samples[0, i] for i in range(len(samples))])
    assert labels.tolist() == [label for d in domains for label in d.labels.tolist()]
    assert numbers.tolist() == [i for i, d in enumerate(domains) for _ in range(len(d))]


def test_training_images_are_cropped_coloured_and_normalised_as_domainbed_does(torchvision, root):
    """Against torchvision's own functions on a plain image, where colour and place of the crop do not matter."""
    transform = training_transform(16)
    crop, flip, jitter, grey, *_ = transform.transforms
    assert [type(step).__name__ for step in (flip, grey)] == ["RandomHorizontalFlip", "RandomGrayscale"]
    assert (flip.p, grey.p) == (0.5, 0.1)
    assert (crop.size, crop.scale) == ((16, 16), (0.7, 1.0))
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.7, 1.3),) * 3
    assert jitter.hue == (-0.3, 0.3)
    black = transform(Image.new("RGB", (40, 30)))
    plain = evaluation_transform(16)(Image.new("RGB", (40, 30)))
    torch.testing.assert_close(black, plain)
    samples = Samples(image_split(root, "sketch").sources, transform, 0)
    assert torch.equal(samples[3, 1][0], samples[3, 1][0])
    assert not torch.equal(samples[3, 1][0], samples[4, 1][0])


def test_evaluation_agrees_with_torchvisions_resize(torchvision, root):
    from torchvision import transforms

    theirs = transforms.Compose(
        [
            transforms.Resize((20, 20)),
            transforms.ToTensor(),
            transforms.Normalize(images.IMAGENET_MEAN, images.IMAGENET_STD),
        ]
    )
    image = Image.open(root / "photo" / "dog" / "001.png").convert("RGB")
    torch.testing.assert_close(evaluation_transform(20)(image), theirs(image), rtol=0, atol=2e-6)


def test_augmentation_without_torchvision_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match=r"needs torchvision .*pip install 'disam_theory\[images\]'"):
        training_transform(16)


# --- mistakes ---


def test_mistakes_are_named(root):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        image_split(root / "nowhere", "s")
    with pytest.raises(UsageError, match="unknown data set 'pasc': did you mean 'pacs'"):
        image_split(root, "s", dataset="pasc")
    with pytest.raises(UsageError, match="unknown domain of pacs: 'skecth': did you mean 'sketch'"):
        image_split(root, "skecth", dataset="pacs")
    with pytest.raises(UsageError, match="unknown domain of the folder: 's'"):
        image_split(root, "s")  # without a benchmark there are no letters
    with pytest.raises(UsageError, match="no folder 'VOC2007', a domain of vlcs; there: art_painting, cartoon"):
        image_split(root, "s", dataset="vlcs")
    (root / "photo" / "eel").mkdir()
    with pytest.raises(UsageError, match=r"photo/eel: no images .*fill or remove the class"):
        image_split(root, "sketch")


def test_an_empty_domain_is_named(root):
    (root / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: no class folders"):
        image_split(root, "sketch")


def test_a_class_may_be_absent_from_a_domain(root):
    for path in (root / "photo" / "dog").iterdir():
        path.unlink()
    (root / "photo" / "dog").rmdir()
    split = image_split(root, "sketch")
    assert split.classes == 3
    assert set(np.unique(split.sources[2].labels)) == {1, 2}


def test_a_sample_that_cannot_be_read_is_its_reason(root):
    (root / "photo" / "dog" / "000.png").write_bytes(b"nothing")
    domains = image_split(root, "sketch").sources
    samples = Samples(domains, evaluation_transform(4))
    inputs, labels, numbers, broken = collate([samples[0, i] for i in range(len(samples))])
    missing = sum(path.parts[-3:] == ("photo", "dog", "000.png") for domain in domains for path in domain.paths)
    assert len(broken) == missing
    assert len(inputs) == len(labels) == len(numbers) == len(samples) - missing
