"""Several processes, each with its share of the data: which one this is, and sums over all of them.

Every process holds the whole model and every ``world``-th sample of each domain, makes the same vectors, and sums its
products with the others': the values are those of one process up to the order of additions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Process ``rank`` of ``world``; :data:`ALONE` unless a launcher started several."""

    rank: int = 0
    world: int = 1

    def share(self, samples: Tensor) -> Tensor:
        """This process's samples (every ``world``-th)."""
        return samples[self.rank :: self.world] if self.world > 1 else samples

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same on each."""
        if self.world > 1:
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor)
        return tensor


ALONE = Ranks()


@contextmanager
def launched(device: str) -> Iterator[tuple[Ranks, str]]:
    """Join the processes that ``torchrun`` started, if it did; yields this one and its device."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), world), device
    finally:
        torch.distributed.destroy_process_group()
