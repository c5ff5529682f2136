"""Anybody's own PyTorch loop -> a trace of the same schema, in two lines.

recorder = Recorder("run.jsonl", model, domains=("photo", "art", "sketch"), rho=0.05, lam=0.1)
for inputs, labels, domain_ids in loader:
    recorder.step(inputs, labels, domain_ids, lr=0.01)
    ...  # the loop's own forward, backward and optimizer step
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from disam_theory.algorithms import StepRecords, ascent_point
from disam_theory.errors import UsageError
from disam_theory.losses import Criterion, Params, cross_entropy
from disam_theory.provenance import provenance
from disam_theory.traces import FLUSH_EVERY, TraceWriter


class Recorder:
    r"""Measures, at each call of :meth:`step`, what one step of Algorithm 1 would see at the model's present weights.

    It computes $L_i$, $\beta$, $\nabla L$, $\nabla L_{DI}$ and the ascent point itself, with ``rho`` and ``lam``
    (``lam=0`` for SAM), whatever the loop's optimizer is, at the cost of two forward and three backward passes. The
    model is not touched: weights and buffers are read, and a private copy in evaluation mode (no dropout, running
    statistics in batch norm) does the work. ``criterion`` maps (outputs, labels) to a loss for each sample.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        *,
        domains: Sequence[str],
        rho: float = 0.05,
        lam: float = 0.1,
        criterion: Criterion = cross_entropy,
    ) -> None:
        if not (rho > 0 and math.isfinite(rho)):
            raise UsageError(f"rho is {rho}; the recorder needs a finite radius above 0, such as 0.05")
        if not (lam >= 0 and math.isfinite(lam)):
            raise UsageError(f"lambda is {lam}; it must be finite and at least 0, such as 0.1")
        self._model, self._private = model, copy.deepcopy(model).eval()
        self._domains, self._criterion = tuple(domains), criterion
        self._rho, self._lam = rho, lam
        self._records, self._count = StepRecords(), 0
        settings = {"algorithm": "recorded", "rho": rho, "lam": lam, "model": type(model).__qualname__}
        header = {"domains": list(domains), "settings": settings, "provenance": provenance()}
        self._writer = TraceWriter(Path(path), header)

    def step(self, inputs: Tensor, labels: Tensor, domains: Tensor, *, lr: float) -> None:
        r"""Record the present weights on this batch: ``inputs`` (B, ...), ``labels`` (B,), ``domains`` (B,) in 0..M-1.

        ``lr`` is $\eta_t$. Call it before the optimizer's step. Shares $\alpha_i$ are those of the batch.
        """
        M = len(self._domains)
        if len(domains) == 0 or int(domains.min()) < 0 or int(domains.max()) >= M:
            raise UsageError(
                f"domain numbers must lie in 0..{M - 1} for the {M} domains named, and the batch not be empty"
            )
        member = nn.functional.one_hot(domains.long(), M).to(inputs.device, torch.get_default_dtype())
        counts = member.sum(0)
        average = member / counts.clamp(min=1)
        params = {name: p.detach().unsqueeze(0) for name, p in self._model.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in self._model.named_buffers()}

        def losses_of(stacked: Params) -> Tensor:
            single = {name: p[0] for name, p in stacked.items()}
            outputs = functional_call(self._private, {**single, **buffers}, (inputs,))
            return (self._criterion(outputs, labels).unsqueeze(-1) * average).sum(0).unsqueeze(0)

        present = (counts > 0).to(member.dtype).unsqueeze(0)
        with torch.enable_grad():
            ascent = ascent_point(
                losses_of,
                params,
                alpha=(counts / counts.sum()).unsqueeze(0),
                present=present,
                rho=torch.tensor([self._rho], dtype=torch.float64, device=inputs.device),
                lam=torch.tensor([self._lam], dtype=member.dtype, device=inputs.device),
            )
        self._writer.append(self._records.rows(self._count, [lr], ascent, present)[0])
        self._count += 1
        if self._count % FLUSH_EVERY == 1:
            self._writer.flush()

    def close(self) -> None:
        """Mark the trace as finished; without it the trace reads as interrupted, with every step still there."""
        self._writer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.flush()
