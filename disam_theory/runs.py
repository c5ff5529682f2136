"""One run -> its trace and weights on disk -> its trace in memory; a stack of runs that any process can make.

A run writes ``seedN.jsonl.XXXXXXXX.partial``, a trace as far as it goes, and gives it its name once it is complete.
So a trace's name never stands for half of one, and of two processes that make the same run, as when a lost worker
was only slow, neither harms the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.domains import Split, Suite, load_suite
from disam_theory.errors import ComputationError
from disam_theory.files import write_atomically
from disam_theory.losses import Params
from disam_theory.provenance import provenance
from disam_theory.traces import SCHEMA, Trace, TraceWriter, finished, read_trace
from disam_theory.training import Run, train

KEPT = 2**29  # bytes of traces kept in memory once they are read
HEADER = 8192  # bytes that a trace's header takes in memory, about


@dataclass(frozen=True)
class Record:
    """One run of a study."""

    suite: str
    held_out: str
    seed: int
    settings: Settings
    folder: Path

    @property
    def path(self) -> Path:
        """Where its trace is."""
        return self.folder / "traces" / f"{self.place}.jsonl"

    def weights_path(self, step: int) -> Path:
        """Where its weights at ``step`` are, if they were kept."""
        return self.folder / "weights" / f"{self.place}-step{step}.pt"

    @property
    def place(self) -> str:
        """``SUITE/HELD-OUT/ARM/seedN``."""
        return f"{self.suite}/{self.held_out}/{self.settings.name}/seed{self.seed}"

    @property
    def trace(self) -> Trace:
        """The recorded steps; its columns are read-only, as they are kept for the next reader.

        Raises:
            ComputationError: the run diverged, so that there is nothing to compare.
        """
        trace = _traces.read(self.path)
        if trace.end == "diverged":
            raise ComputationError(f"{self.path}: the run diverged; lower the learning rate or rho of this arm")
        return trace

    def weights(self, step: int) -> Params:
        """The weights at ``step``."""
        return dict(torch.load(self.weights_path(step), weights_only=True)["state_dict"])


@dataclass(frozen=True)
class Job:
    """A stack of runs with all that is needed to make them in any process that sees their folder."""

    records: tuple[Record, ...]
    model: Callable[[], nn.Module]
    evaluate_every: int
    device: str
    command: str  # for the traces' provenance: what started the study, whatever started this process
    snapshot_steps: tuple[int, ...] = ()
    snapshot_seeds: int = 0
    record_every: int = 1

    @property
    def key(self) -> str:
        """The SHA-256 of the configurations of its runs and of the traces' schema."""
        configurations = [self.configuration(record) for record in self.records]
        what = [SCHEMA, configurations, self.snapshot_steps, self.snapshot_seeds]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def configuration(self, record: Record) -> dict[str, Any]:
        """What a run's trace has as its settings, and what tells whether a trace on disk is this run's."""
        thinned = {"record_every": self.record_every} if self.record_every != 1 else {}
        return {
            **record.settings.header(),
            "suite": record.suite,
            "held_out": record.held_out,
            "seed": record.seed,
            "model": f"{self.model.__module__}:{self.model.__qualname__}",
            "evaluate_every": self.evaluate_every,
            **thinned,
        }

    def lacks(self, record: Record) -> str:
        """What of a run is not there; empty where its trace is complete, and its weights are where they are kept."""
        if not record.path.exists():
            return f"{record.path} is not there"
        if not finished(record.path, {"settings": self.configuration(record)}):
            return f"{record.path} is cut off or of other settings"
        weights = [record.weights_path(step) for step in self.snapshot_steps if self._keeps(record)]
        return next((f"{path} is not there" for path in weights if not path.exists()), "")

    @property
    def size(self) -> int:
        """The steps of all its runs together."""
        return sum(record.settings.steps for record in self.records)

    def pending(self) -> list[Record]:
        """The runs that are not there yet."""
        return [record for record in self.records if self.lacks(record)]

    def __call__(self, progress: Callable[[int], None] = lambda step: None) -> int:
        """Make the runs that are not there yet; returns :attr:`size`. ``progress`` is called after each step."""
        if pending := self.pending():
            self._train(pending, progress)
        return self.size

    def _train(self, stack: list[Record], progress: Callable[[int], None]) -> None:
        splits = Splits()
        runs = [Run(record.settings, splits.of(record), record.seed) for record in stack]
        headers = [self._header(record, run.split) for record, run in zip(stack, runs, strict=True)]
        writers = [_RunWriter(record.path, header) for record, header in zip(stack, headers, strict=True)]
        try:
            results = train(
                self.model,
                runs,
                writers=writers,
                evaluate_every=self.evaluate_every,
                record_every=self.record_every,
                snapshot_steps=self.snapshot_steps if any(self._keeps(record) for record in stack) else (),
                device=self.device,
                progress=progress,
            )
        finally:
            for writer in writers:
                writer.flush()
        for record, result, header in zip(stack, results, headers, strict=True):
            if self._keeps(record):
                for step, params in result.snapshots.items():
                    _save(record.weights_path(step), params, header)

    def _keeps(self, record: Record) -> bool:
        return record.seed < self.snapshot_seeds

    def _header(self, record: Record, split: Split) -> dict[str, object]:
        return {
            "domains": [domain.name for domain in split.sources],
            "sizes": [len(domain) for domain in split.sources],
            "settings": self.configuration(record),
            "provenance": provenance(rng=record.seed, device=self.device, dtype="float32", command=self.command),
        }


class Splits:
    """Suites as seeds draw them, and their splits, each loaded once."""

    def __init__(self) -> None:
        self._suites: dict[tuple[str, int], Suite] = {}
        self._splits: dict[tuple[str, str, int], Split] = {}

    def suite(self, name: str, seed: int) -> Suite:
        key = (name, seed)
        if key not in self._suites:
            self._suites[key] = load_suite(name, rng=seed)
        return self._suites[key]

    def of(self, record: Record) -> Split:
        """The split that a run trains and tests on: one object for the same data."""
        key = (record.suite, record.held_out, record.seed)
        if key not in self._splits:
            self._splits[key] = self.suite(record.suite, record.seed).split(record.held_out, rng=record.seed)
        return self._splits[key]


class _RunWriter(TraceWriter):
    """Writes beside ``path``, and takes its name once the trace is whole."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._named = path
        super().__init__(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial"), header)

    def close(self, end: str = "finished", **why: Any) -> None:
        if self._file.closed:
            return
        super().close(end, **why)
        with self._refusing():
            try:
                self._path.replace(self._named)
            except FileNotFoundError:
                if not self._named.exists():
                    raise
                return  # another process has made the same run meanwhile, and cleared up
            for other in self._named.parent.glob(f"{self._named.name}.*.partial"):
                other.unlink(missing_ok=True)


class _Traces:
    """Traces read from files that have not changed since; of more than ``limit`` bytes, those used last."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._kept: OrderedDict[Path, tuple[tuple[int, ...], Trace, int]] = OrderedDict()

    def read(self, path: Path) -> Trace:
        version = _version(path)
        kept_version, kept, size = self._kept.pop(path, ((), None, 0))
        self._held -= size
        trace = kept if kept is not None and kept_version == version else read_trace(path)
        columns = [*trace.steps.values(), *trace.evaluations.values()]
        for column in columns:
            column.flags.writeable = False
        size = HEADER + sum(sys.getsizeof(column) for column in columns)
        self._kept[path] = (version, trace, size)
        self._held += size
        while self._held > self._limit and len(self._kept) > 1:
            self._held -= self._kept.popitem(last=False)[1][2]
        return trace


_traces = _Traces(KEPT)


def _version(path: Path) -> tuple[int, ...]:
    """What changes when a file does; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _save(path: Path, params: Params, header: Mapping[str, object]) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": {name: p.cpu() for name, p in params.items()}, **header}, buffer)
    write_atomically(path, buffer.getvalue())
