"""Work on micro-batches -> the same work, on smaller ones where the memory is not enough."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from disam_theory.errors import ComputationError, first_line

Found = TypeVar("Found")
# of a RuntimeError that is no OutOfMemoryError: torch's on the CPU, oneDNN's, cuBLAS's
SAYS_SO = ("can't allocate memory", "could not create a primitive", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, NumPy or Python could not have the memory that they asked for."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAYS_SO)


class MicroBatch:
    """At most ``chunk`` samples in memory at once, of at most ``largest`` that there are; halved where need be.

    ``halved`` hears the number that did not fit and the next one.
    """

    def __init__(self, chunk: int, largest: int, halved: Callable[[int, int], None]) -> None:
        self.chunk, self._largest, self._halved = chunk, largest, halved

    def run(self, work: Callable[[int], Found]) -> Found:
        """``work(chunk)``, repeated with half as many samples as long as the memory is not enough for them.

        What ``work`` finds before it fails is for it to keep.

        Raises:
            ComputationError: the memory is not enough for one sample at a time.
        """
        while True:
            try:
                return work(self.chunk)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            gc.collect()  # here the error is gone, and with it the frames that hold what did not fit
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            before = min(self.chunk, self._largest)
            if before == 1:
                raise ComputationError(
                    f"out of memory with one sample at a time ({reason}); use smaller images, a smaller model or "
                    "--dtype float32, or a machine with more memory"
                )
            self.chunk = before // 2
            self._halved(before, self.chunk)
