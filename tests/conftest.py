"""What every test shares: one thread, so that no result depends on how sums are cut among cores."""

import importlib

import pytest
import torch

from disam_theory.domains import Domain, Split

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, also a build that does not fit torch: its models and transforms need no compiled operator."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:  # the schemas of its operators, which importing it asks for
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        yield importlib.import_module("torchvision")
    else:
        yield importlib.import_module("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):
    """timm, which imports torchvision."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        pytest.skip("timm is not installed")


@pytest.fixture
def make_domain():
    """``make_domain(name, n, shape, classes, rng)``: Gaussian inputs in float64 and uniform labels."""

    def make(name="d", n=5, shape=(4,), classes=3, rng=0):
        generator = torch.Generator().manual_seed(1000 * rng + n)
        inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        return Domain(name, inputs, torch.randint(0, classes, (n,), generator=generator))

    return make


@pytest.fixture
def make_split(make_domain):
    """``make_split(sizes, shape, classes, rng)``: a split with source domains of these sizes."""

    def make(sizes=(19, 7, 12), shape=(4,), classes=3, rng=0):
        names = [f"source{i}" for i in range(len(sizes))]
        sources = tuple(
            make_domain(name, n, shape, classes, rng + i) for i, (name, n) in enumerate(zip(names, sizes, strict=True))
        )
        kept = tuple(make_domain(name, 4 + i, shape, classes, rng + 50 + i) for i, name in enumerate(names))
        return Split(sources, kept, make_domain("unseen", 9, shape, classes, rng + 99))

    return make
