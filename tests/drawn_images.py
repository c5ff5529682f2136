"""Folders of small drawn images, and a small network for them with what makes going on hard."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "house", "person")
SIDE = 8


def draw(root: Path, domains=DOMAINS, classes=CLASSES, count=8) -> Path:
    """``root/domain/class/NNN.png``: a bar whose place is the class and whose colour is the domain, over noise.

    The domains have ``count``, ``count - 1``, ... images of each class.
    """
    generator = np.random.default_rng(0)
    for d, domain in enumerate(domains):
        for c, name in enumerate(classes):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(count - d):
                pixels = generator.integers(0, 90, (32, 32, 3))
                pixels[8 * c : 8 * c + 8, :, d % 3] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


def convolutional(num_classes: int = 3) -> nn.Module:
    """Batch norm, dropout and a head, for images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, num_classes),
    )


def flipped(image: Image.Image) -> torch.Tensor:
    """An augmentation from torch's generator: flipped or not, and noise."""
    pixels = torch.from_numpy(np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32).transpose(2, 0, 1) / 255)
    return (pixels.flip(2) if torch.rand(()) < 0.5 else pixels) + 0.05 * torch.randn(pixels.shape)
