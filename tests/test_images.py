"""Folders and split lists as domains, the samples read from them, and the mistakes that are named."""

import numpy as np
import pytest
import torch
from PIL import Image

from disam_theory import images
from disam_theory.errors import UsageError
from disam_theory.images import (
    BENCHMARKS,
    Reading,
    Samples,
    collate,
    evaluation_transform,
    folder_suite,
    image_split,
    training_transform,
)
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


def in_memory(folder, image_size=4, rng=0, **reading):
    return folder_suite(folder, Reading(image_size=image_size, **reading), rng=rng)


# --- layouts ---


@pytest.mark.parametrize("held_out", ["s", "S", "sketch", "Sketch"])
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
    split, suite = image_split(root, "photo", rng=3), in_memory(root, 8).split("photo", rng=3)
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
        (["photo/dog/000.png 1", "", "photo/dog/001.png 2"], "label 2 is given to 'dog' here and to 'house' before"),
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


def write_plain_lists(root, domains, parts, at=None, order=CLASSES):
    """Lists with labels from 0, as VLCS and DomainNet have them; ``parts`` says which images are in, by number."""
    for domain, called in domains.items():
        paths = sorted((root / domain).glob("*/*.png"))
        lines = {p: f"{p.relative_to(root)} {order.index(p.parent.name)}" for p in paths}
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
    write_plain_lists(root, {name: name for name in domains}, parts, at=root / at)
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
        with pytest.raises(UsageError, match="train with --splits official"):
            image_split(tmp_path, "l", dataset="vlcs", lists=False)


def test_domainnets_lists_number_the_classes_in_their_own_order(tmp_path):
    domains, order = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), ("house", "person", "dog")
    root = draw(tmp_path / "domain_net", domains)
    parts = {"train": lambda n: n > "000", "test": lambda n: n == "000"}
    write_plain_lists(root, {name: name for name in domains}, parts, order=order)
    split = image_split(tmp_path, "q", dataset="domainnet")
    for domain in (*split.sources, *split.validation, split.unseen):
        assert [order[label] for label in domain.labels.tolist()] == [p.parent.name for p in domain.paths]
    assert image_split(tmp_path, "q", dataset="domainnet", lists=False).unseen.labels[0] == CLASSES.index("dog")


def test_an_official_part_of_vlcs_is_read_from_its_lists_or_its_folders(tmp_path):
    folders = ("PASCAL", "LABELME", "CALTECH", "SUN")
    root = draw(tmp_path / "VLCS", folders)
    parts = {"train": lambda n: n > "000", "crossval": lambda n: n > "000", "test": lambda n: n == "000"}
    write_plain_lists(root, {name: name for name in folders}, parts)
    suite = in_memory(root, dataset="vlcs", part="train", unseen=("LabelMe",))
    assert names(suite.domains) == ["VOC2007", "LabelMe", "Caltech101", "SUN09"]
    assert [len(d) for d in suite.domains] == [21, 3, 15, 12]
    for domain in folders:
        for part, count in {"train": 4, "crossval": 2, "test": 3, "full": 9}.items():
            draw(tmp_path / "parted" / domain, (part,), count=count)
    parted = in_memory(tmp_path / "parted", dataset="vlcs", part="crossval", unseen=("LabelMe",))
    assert [len(d) for d in parted.domains] == [6, 27, 6, 6]
    assert [len(d) for d in in_memory(tmp_path / "parted", dataset="vlcs").domains] == [27] * 4


def test_a_part_of_the_official_lists_is_read_and_of_unseen_domains_their_test(root):
    write_lists(root)
    for part, sizes in (("train", [15, 21, 18, 15]), ("crossval", [3, 3, 3, 15]), (None, [18, 24, 21, 15])):
        suite = in_memory(root, dataset="pacs", part=part, unseen=("sketch",))
        assert names(suite.domains) == ["photo", "art_painting", "cartoon", "sketch"]
        assert [len(d) for d in suite.domains] == sizes
    assert names(in_memory(root).domains) == sorted(DOMAINS)  # the lists' folder is no domain
    with pytest.raises(UsageError, match=r"no official split lists .*leave --part away"):
        in_memory(draw(root.parent / "other"), part="train")


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


# --- suites in memory ---

PIXELS = {("art", "cat"): [(0, 0, 0), (255, 255, 255), (10, 20, 30)], ("art", "dog"): [(200, 100, 50)]} | {
    ("photo", "dog"): [(1, 2, 3), (4, 5, 6)],
    ("photo", "eel"): [(7, 8, 9), (9, 9, 9), (254, 0, 127)],
}


def write_folder(root):
    """ROOT/domain/class/image.png, where no domain has all three classes and the domains differ in size."""
    for (domain, label), colours in PIXELS.items():
        folder = root / domain / label
        folder.mkdir(parents=True)
        for i, colour in enumerate(colours):
            Image.new("RGB", (5 + i, 9), colour).save(folder / f"{i}.png")
    (root / "readme.txt").write_text("not a domain")
    (root / "art" / "cat" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    return root


def test_an_image_folder_is_read_in_domainbed_layout(tmp_path):
    """Labels number the union of the classes; pixels are (p / 255 - mean) / std channel by channel, by hand."""
    suite = in_memory(write_folder(tmp_path / "pets"), 6)
    assert (suite.name, suite.classes) == ("pets", 3)
    assert [(d.name, len(d)) for d in suite.domains] == [("art", 4), ("photo", 5)]
    assert suite["art"].labels.tolist() == [0, 0, 0, 1]
    assert suite["photo"].labels.tolist() == [1, 1, 2, 2, 2]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for domain in suite.domains:
        assert domain.inputs.shape == (len(domain), 3, 6, 6)
        colours = [c for (name, _), values in PIXELS.items() if name == domain.name for c in values]
        for image, colour in zip(domain.inputs.double(), colours, strict=True):
            for channel in range(3):
                by_hand = (colour[channel] / 255 - mean[channel]) / std[channel]
                # float32 storage of a number of size at most 2.7
                assert float((image[channel] - by_hand).abs().max()) <= 3 * torch.finfo(torch.float32).eps


def test_an_image_keeps_its_orientation_and_channel_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    for domain in ("a", "b"):
        folder = tmp_path / domain / "c"
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels).save(folder / f"{i}.png")
    read = in_memory(tmp_path, 4)["a"].inputs[1].permute(1, 2, 0).double().numpy()
    back = (read * np.array([0.229, 0.224, 0.225]) + np.array([0.485, 0.456, 0.406])) * 255
    np.testing.assert_allclose(back, pixels, atol=1e-3)


def test_grey_and_palette_images_become_rgb(tmp_path):
    folder = tmp_path / "d" / "c"
    folder.mkdir(parents=True)
    Image.new("L", (4, 4), 51).save(folder / "grey.png")
    Image.new("RGB", (4, 4), (51, 51, 51)).convert("P").save(folder / "palette.png")
    suite = in_memory(tmp_path, 4)
    assert torch.equal(suite["d"].inputs[0], suite["d"].inputs[1])


def test_a_broken_image_is_named(tmp_path):
    root = write_folder(tmp_path / "pets")
    (root / "photo" / "eel" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    with pytest.raises(UsageError, match=r"photo/eel/broken\.jpg: not a readable image"):
        in_memory(root, 6)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_cut_or_altered_image_is_named_or_read_but_never_a_traceback(tmp_path, suffix):
    """A file cut short, or with one byte altered, gives the error that names it, or an image."""
    folder = tmp_path / "d" / "c"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    good = folder / f"a.{suffix}"
    Image.fromarray(pixels).save(good)
    whole = good.read_bytes()
    damaged = [whole[:cut] for cut in range(0, len(whole), max(1, len(whole) // 40))]
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    refused, other = 0, []
    for i, content in enumerate(damaged):
        path = folder / f"b.{suffix}"
        path.write_bytes(content)
        try:
            in_memory(tmp_path, 4)
        except UsageError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        except Exception as error:
            other.append((i, type(error).__name__))
    assert refused > 10
    assert other == []


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no domain folders"):
        in_memory(tmp_path)
    (tmp_path / "photo").mkdir()
    with pytest.raises(UsageError, match="no class folders"):
        in_memory(tmp_path)
    (tmp_path / "photo" / "dog").mkdir()
    with pytest.raises(UsageError, match=r"photo/dog: no images .*fill or remove the class"):
        in_memory(tmp_path)


def test_all_broken_images_are_counted_and_the_first_named(root):
    broken = [root / "cartoon" / "dog" / f"00{i}.png" for i in range(3)] + [root / "sketch" / "house" / "001.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError) as caught:
        in_memory(root)
    said = str(caught.value)
    assert said.startswith(f"4 of 78 images cannot be read: {broken[0]}: not a readable image (")
    assert [str(path) in said for path in broken] == [True, True, True, False]
    assert said.endswith("; and 1 more; replace them, or leave them out by --skip-corrupt")
    suite = in_memory(root, skip_corrupt=True)
    assert [len(d) for d in suite.domains] == [24, 18, 18, 14]
    assert [str(path) in why for path, why in zip(broken, suite.corrupt, strict=True)] == [True] * 4
    whole = in_memory(draw(root.parent / "whole"))
    assert torch.equal(suite["cartoon"].inputs, whole["cartoon"].inputs[3:])
    assert torch.equal(suite["cartoon"].labels, whole["cartoon"].labels[3:])


def test_a_domain_of_broken_images_is_named(root):
    for path in (root / "sketch").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"domain 'sketch' has 0 readable image\(s\)"):
        in_memory(root, skip_corrupt=True)


def test_a_sample_is_drawn_before_it_is_read_and_knows_what_it_is_of(root, monkeypatch):
    """The same samples as those of an audit that has read all."""
    from disam_theory.audit_measures import Settings, _drawn

    whole = in_memory(root, rng=3)
    read = []
    monkeypatch.setattr(images, "read_rgb", lambda path, real=images.read_rgb: read.append(path) or real(path))
    few = in_memory(root, rng=3, max_samples=16)
    assert len(read) == 16 * 3 + 15
    assert [(len(d), d.drawn_from) for d in few.domains] == [(16, 24), (16, 21), (16, 18), (15, None)]
    for number, domain in enumerate(whole.domains):
        theirs = _drawn(domain, Settings(rng=3, max_samples=16), number)
        assert torch.equal(few.domains[number].inputs, theirs.inputs)
        assert few.domains[number].drawn_from == theirs.drawn_from
    with pytest.raises(UsageError, match="max_samples is 1; a domain needs at least 2"):
        in_memory(root, max_samples=1)


def test_a_corrupt_image_is_no_part_of_the_population(root):
    for path in (root / "photo").glob("*/000.png"):
        path.write_bytes(b"nothing")
    found = in_memory(root, max_samples=17, skip_corrupt=True)
    assert len(found["photo"]) + len(found.corrupt) == 17
    assert found["photo"].drawn_from == 18 - len(found.corrupt)
