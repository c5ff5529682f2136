r"""(model, split, settings, options) -> one run through data loaders -> trace, checkpoints, the best by validation.

The folder of a run holds ``trace.jsonl`` (schema disam-trace/1), ``last.safetensors``, ``best.safetensors`` (the
weights of the best accuracy on the sources' validation parts so far, the earlier of equals) and, until the run is
finished, ``state.pt``, from which the same call goes on.

A run that goes on ends as if it had not been interrupted, to the last bit: whatever is random in it is derived from
the seed and from where it happens, never from what was drawn before. The order of the samples depends on (seed,
epoch), a sample's augmentation on (seed, epoch, sample), dropout on (seed, step, pass).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import itertools
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from disam_theory.algorithms import Ascent, Settings, StepRecords, matching_of
from disam_theory.domains import Domain, Split
from disam_theory.errors import ComputationError, UsageError, first_line, unknown_name
from disam_theory.files import write_atomically
from disam_theory.images import (
    Batch,
    BatchOrder,
    ImageDomain,
    ImageSplit,
    Samples,
    Transform,
    collate,
    derived_seed,
    evaluation_transform,
)
from disam_theory.losses import Params, cross_entropy
from disam_theory.matching import Statistics, last_linear
from disam_theory.optim import SharpnessAware, by_domain
from disam_theory.provenance import provenance
from disam_theory.resume import Interrupted
from disam_theory.traces import FLUSH_EVERY, TraceWriter, read_trace

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
EVALUATION_BATCH = 128  # images at once where no gradient is taken; of no influence on what is found
STATE = "state.pt"
MASKS = 2  # the stream of dropout's seeds, apart from that of the samples


@dataclass(frozen=True)
class Options:
    r"""How the one run is made, beside its :class:`~disam_theory.algorithms.Settings`.

    Three of them name choices that the official code makes without saying so:

    * ``mode``: ``eval`` trains in evaluation mode, without dropout and with batch norm's running statistics as they
      are: what its SAM baseline does. For SAM alone.
    * ``dropout_mask``: ``same`` draws one mask a step, for both passes, so that $L(w)$ and $L(w^{asc})$ are one
      function at two points, as Algorithm 1 has it; ``new`` draws one in each, as the official code does.
    * ``batch_norm``: ``first`` updates the running statistics in the pass at $w$ alone, as they are to describe the
      weights that are evaluated and kept, and no $w^{asc}$ is; ``both``, as the official code does, mixes the two.

    ``record_every``: the trace holds every so many steps, and those that are evaluated. A row costs a backward pass,
    and in large models on a processor as much as a step.

    ``amp``: ``bf16`` runs the forward passes under autocast; losses and weights stay float32. ``train_losses``:
    whether an evaluation goes through all training data for the trace's ``losses``.
    """

    optimizer: str = "sgd"
    mode: str = "train"
    dropout_mask: str = "same"
    batch_norm: str = "first"
    amp: str = "none"
    seed: int = 0
    device: str = "cpu"
    evaluate_every: int = 300
    train_losses: bool = True
    record_every: int = 1
    skip_corrupt: bool = False
    save_every: int = 300
    workers: int = 0

    def __post_init__(self) -> None:
        choices = {
            "optimizer": tuple(OPTIMIZERS),
            "mode": ("train", "eval"),
            "dropout_mask": ("same", "new"),
            "batch_norm": ("first", "both"),
            "amp": ("none", "bf16", "fp16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name.replace("_", " "), getattr(self, name), known)
        if self.amp == "fp16":
            raise UsageError(
                "fp16 needs scaled losses, and beta is made of the losses; use bf16, which has the range of float32"
            )
        for name, least in (("evaluate_every", 1), ("record_every", 1), ("save_every", 1), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be at least {least}")

    def check(self, settings: Settings) -> None:
        """Raise :class:`UsageError` where the options and the settings do not go together."""
        if self.mode == "eval" and settings.algorithm != "sam":
            raise UsageError(f"mode eval is the official code's SAM baseline; {settings.algorithm} has no such form")
        if self.optimizer != "sgd" and settings.momentum:
            raise UsageError(f"momentum {settings.momentum:g} is sgd's; {self.optimizer} has its own betas")

    def recorded(self, step: int) -> bool:
        """Whether the trace holds the step."""
        return step % self.record_every == 0 or step % self.evaluate_every == 0

    def header(self) -> dict[str, Any]:
        """The options that the numbers depend on; a run that a broken image ended may go on without it."""
        free = ("save_every", "workers", "skip_corrupt")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class Outcome:
    """What a finished run found."""

    evaluations: tuple[dict[str, Any], ...]  # "step" and EVALUATION_FIELDS, the last one after the last step
    best: dict[str, Any]  # of them, the one whose weights best.safetensors has
    corrupt: tuple[str, ...]  # the images that were left out, with why


Progress = Callable[[int, Mapping[str, Any]], None]  # after each step: how many are done, the trace's row


def train(
    model: nn.Module,
    split: Split | ImageSplit,
    settings: Settings,
    options: Options,
    folder: Path,
    *,
    classes: int,
    named: Mapping[str, Any],
    transforms: tuple[Transform, Transform] = (evaluation_transform(224),) * 2,
    progress: Progress = lambda done, row: None,
) -> Outcome:
    """Train ``model``, in place, on the split's sources, or go on with the run that ``folder`` holds.

    ``named``: what else tells this run from others (suite, held-out domain, model), for the trace's header.
    ``transforms``: images to tensors in training and in evaluation. On Ctrl-C and SIGTERM the step in hand is finished
    and the state is kept; a second one ends at once, and the run goes on from the last state kept before.

    Raises:
        UsageError: the folder holds another run; a model that does not fit the data; an image that cannot be read.
        ComputationError: the run diverged: the trace says so, and the checkpoints are those of before.
        Interrupted: the user stopped it.
    """
    options.check(settings)
    header = {**settings.header(), **options.header(), **named, "held_out": split.unseen.name}
    if outcome := _already(folder, header):
        return outcome
    device = torch.device(options.device)
    _check_outputs(model.to(device), split, classes, transforms[1], device)
    private_rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with private_rng, _deterministic(device), _Signals() as signals:
        return _Run(model, split, settings, options, folder, header, transforms, signals).go(progress)


def _already(folder: Path, header: Mapping[str, Any]) -> Outcome | None:
    """The outcome of the finished run in ``folder``; None where there is none yet."""
    path = folder / "trace.jsonl"
    if not path.exists():
        return None
    trace = read_trace(path)
    theirs, ours = trace.header["settings"], json.loads(json.dumps(header))
    if theirs != ours:
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        said = ", ".join(f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}" for name in names[:3])
        raise UsageError(f"{folder}: holds another run ({said}); choose another folder, or remove it")
    if trace.end == "diverged":
        raise ComputationError(f"{path}: the run diverged; lower the learning rate or rho, and choose another folder")
    return _outcome(path) if trace.end else None


def _outcome(path: Path) -> Outcome:
    """From a finished trace."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{"step": line["step"], **line["evaluation"]} for line in lines if "evaluation" in line]
    best = max(rows, key=lambda row: row["validation_accuracy"])  # the first of equals
    return Outcome(tuple(rows), best, tuple(lines[-1]["corrupt"]))


@dataclass
class _Reached:
    """What a run has reached: with weights and optimizer, all that its future depends on."""

    step: int = 0
    rows: int = 0  # of the trace
    best: float = -math.inf  # accuracy on the validation parts
    corrupt: list[str] = field(default_factory=list)


class _Run:
    """One run between two steps: what it works on, and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        split: Split | ImageSplit,
        settings: Settings,
        options: Options,
        folder: Path,
        header: Mapping[str, Any],
        transforms: tuple[Transform, Transform],
        signals: _Signals,
    ) -> None:
        self.model, self.split, self.settings, self.options = model, split, settings, options
        self.folder, self.header, self.signals = folder, header, signals
        self.device, self.to_evaluate = torch.device(options.device), transforms[1]
        self.samples = Samples(split.sources, transforms[0], options.seed)
        self.names = [domain.name for domain in split.sources]
        self.sizes = [len(domain) for domain in split.sources]
        self.at, self.records, self.seen = _Reached(), StepRecords(), list[Ascent]()
        self.last: Ascent | None = None
        self.matching = matching_of([settings], torch.zeros(()))
        self.head = last_linear(model)
        if self.matching and self.head is None:
            raise UsageError(f"objective {settings.objective!r} needs a model whose last layer is nn.Linear")
        self.whole = True  # whether weights, optimizer and records are those of one step
        self.optimizer = _optimizer(model, settings, options, self.seen.append)

    def go(self, progress: Progress) -> Outcome:
        """All steps that are left."""
        writer = self._resumed() or TraceWriter(self.folder / "trace.jsonl", self._trace_header())
        saved = self.at.step
        try:
            for batch in self._batches(self.samples, batch_sampler=self._order()):
                row = self._step(batch, writer)
                if self.at.step % self.options.save_every == 0:
                    self._save(writer)
                    saved = self.at.step
                elif self.at.step % FLUSH_EVERY == 0:
                    writer.flush()
                progress(self.at.step, row)
            return self._finish(writer)
        except (KeyboardInterrupt, UsageError) as stop:
            if self.whole:
                self._save(writer)
                saved = self.at.step
            if isinstance(stop, UsageError):
                raise
            raise Interrupted(f"interrupted; the same command goes on from step {saved}") from stop
        finally:
            writer.flush()

    def _order(self) -> BatchOrder:
        return BatchOrder(
            self.sizes,
            batch_size=self.settings.batch_size,
            steps=self.settings.steps,
            stratified=self.settings.sampling == "stratified",
            seed=self.options.seed,
            start=self.at.step,
        )

    def _batches(self, samples: Samples, **order: Any) -> Iterator[Batch]:
        """The samples in this order on the device, without those that cannot be read, until the user stops the run."""
        loader = DataLoader(
            samples,
            **order,
            num_workers=self.options.workers,
            collate_fn=collate,
            worker_init_fn=_ignore_signals,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the workers' seeds, which nothing uses, leave the global generator alone
        )
        batches = iter(loader)
        while True:
            if self.signals.stopped:
                raise KeyboardInterrupt
            try:
                inputs, labels, domains, broken = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:  # a worker that was killed
                raise ComputationError(f"reading the data failed: {first_line(error)}") from error
            self._note_broken(broken)
            yield inputs.to(self.device), labels.to(self.device), domains.to(self.device), broken

    def _note_broken(self, broken: Sequence[str]) -> None:
        for why in broken:
            if not self.options.skip_corrupt:
                raise UsageError(f"{why}; replace it, or leave such images out by --skip-corrupt")
            if why not in self.at.corrupt:
                self.at.corrupt.append(why)

    # --- one step ---

    def _step(self, batch: Batch, writer: TraceWriter) -> dict[str, Any]:
        """Evaluate where it is time, step, and write the row; returns it."""
        step, lr = self.at.step, self.settings.lr_at(self.at.step)
        evaluation = {}
        if step % self.options.evaluate_every == 0:
            evaluation = {"evaluation": self._evaluate()}
        self.whole = False
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train(self.options.mode == "train")
        present = self._present(batch)
        recorded = self.options.recorded(step)
        self.optimizer.watch = self.seen.append if recorded or self.options.recorded(step + 1) else None
        losses = self.optimizer.step(self._closure(batch, step)).masked_fill(present == 0, math.nan)
        row: dict[str, Any] = {"step": step, "losses": losses.tolist()}
        if self.seen:
            self.last = self.seen.pop()
            row = self.records.rows(step, [lr], self.last, present.unsqueeze(0))[0]
        if why := self._divergence(row, present.tolist()):
            writer.close("diverged", why=why)
            raise ComputationError(f"diverged: {why}; the checkpoints in {self.folder} are those of before")
        if recorded:
            writer.append(row | evaluation)
        self.at.rows += recorded
        self.at.step += 1
        self.whole = True
        return row

    def _present(self, batch: Batch) -> Tensor:
        """Which domains the batch has samples of, (M,)."""
        counts = torch.bincount(batch[2], minlength=len(self.sizes))
        if not len(batch[2]):
            raise ComputationError(f"step {self.at.step}: none of the batch's images can be read")
        return (counts > 0).double()

    def _closure(self, batch: Batch, step: int) -> Callable[[], tuple[Tensor, Tensor, Statistics | None]]:
        """The domain losses and shares of the batch, (M,) each, and what CORAL or Fishr needs; called once a pass."""
        inputs, labels, domains, _ = batch
        passes = itertools.count()

        def closure() -> tuple[Tensor, Tensor, Statistics | None]:
            with one_pass(self.model, self.options, step, next(passes)):
                outputs, features = self._with_features(inputs)
            losses, shares = by_domain(cross_entropy(outputs, labels), domains, len(self.sizes))
            if self.settings.sampling == "stratified":
                shares = self._data_shares(shares)
            if self.matching is None or self.head is None or features is None:
                return losses, shares, None
            bias = self.head.bias is not None
            return losses, shares, self.matching.statistics(features, outputs, labels, domains, len(shares), bias=bias)

        return closure

    def _data_shares(self, of_batch: Tensor) -> Tensor:
        """n_i/N over the domains that the batch has samples of."""
        shares = torch.tensor(self.sizes).to(of_batch) * (of_batch > 0)
        return shares / shares.sum()

    def _with_features(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, C) and, where the objective needs them, what enters the head, (B, d)."""
        if self.matching is None or self.head is None:
            return self._outputs(inputs), None
        seen: list[Tensor] = []
        with self.head.register_forward_pre_hook(lambda _, given: seen.append(given[0].float())):
            return self._outputs(inputs), seen[-1] if seen[-1].ndim == 2 else None

    def _outputs(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16"):
            return self.model(inputs).float()

    def _divergence(self, row: Mapping[str, Any], present: Sequence[float]) -> str | None:
        """Where a loss of the step, or a weight after it, is not finite."""
        for name, value, here in zip(self.names, row.get("losses_ascent", row["losses"]), present, strict=True):
            if here and not math.isfinite(value):
                return f"not finite at step {row['step']} in domain {name!r}"
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()
        return None if bool(finite) else f"not finite at step {row['step']} in the weights"

    # --- evaluation ---

    def _evaluate(self) -> dict[str, Any]:
        """Fields of :data:`~disam_theory.traces.EVALUATION_FIELDS`; keeps the weights if they are the best so far."""
        sources = self.split.sources if self.options.train_losses else ()
        losses, correct, counts = self._sums((*sources, *self.split.validation, self.split.unseen))
        kept = slice(len(sources), -1)
        validation = float(correct[kept].sum() / counts[kept].sum())
        if validation > self.at.best:
            self.at.best = validation
            self._checkpoint("best")
        return {
            "losses": (losses / counts)[: len(sources)].tolist() or [math.nan] * len(self.names),
            "validation_accuracy": validation,
            "unseen_loss": float(losses[-1] / counts[-1]),
            "unseen_accuracy": float(correct[-1] / counts[-1]),
        }

    @torch.no_grad()
    def _sums(self, domains: Sequence[Domain | ImageDomain]) -> tuple[Tensor, Tensor, Tensor]:
        """For each of the domains the sum of its losses, how many samples are right, and how many there are."""
        self.model.eval()
        samples = Samples(domains, self.to_evaluate)
        sums = torch.zeros(len(domains), 3, dtype=torch.float64)
        every = [(0, index) for index in range(len(samples))]
        for inputs, labels, numbers, _ in self._batches(samples, sampler=every, batch_size=EVALUATION_BATCH):
            if len(labels):
                outputs = self._outputs(inputs)
                each, right = cross_entropy(outputs, labels), outputs.argmax(-1) == labels
                found = torch.stack([each.double(), right.double(), torch.ones_like(each).double()], 1)
                sums.index_add_(0, numbers.cpu(), found.cpu())  # not on a GPU, which adds in any order
        if not bool(sums[:, 2].all()):
            empty = domains[int((sums[:, 2] == 0).nonzero()[0])]
            raise ComputationError(f"domain {empty.name!r}: none of its images can be read")
        return sums[:, 0], sums[:, 1], sums[:, 2]

    # --- what is on disk ---

    def _trace_header(self) -> dict[str, Any]:
        return {
            "domains": self.names,
            "sizes": self.sizes,
            "settings": self.header,
            "provenance": self._provenance(),
        }

    def _provenance(self) -> dict[str, Any]:
        return provenance(rng=self.options.seed, device=self.options.device, dtype="float32")

    def _checkpoint(self, name: str) -> None:
        """The weights, and in the metadata what made them and their hash."""
        tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in self._state().items()}
        about = {
            "settings": self.header,
            "provenance": self._provenance(),
            "step": self.at.step,
            "weights_sha256": _hash(tensors),
        }
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        write_atomically(self.folder / f"{name}.safetensors", safetensors.torch.save(tensors, metadata))

    def _state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}

    def _save(self, writer: TraceWriter) -> None:
        """The state to go on from. The trace is written first: a state never runs ahead of it."""
        writer.flush()
        buffer = io.BytesIO()
        state = {
            "settings": json.dumps(self.header),
            "reached": asdict(self.at),
            "model": self._state(),
            "optimizer": self.optimizer.state_dict(),
            "last": self.last and {"epsilon": self.last.epsilon, "gradient_ascent": self.last.gradient_ascent},
        }
        torch.save(state, buffer)
        write_atomically(self.folder / STATE, buffer.getvalue())
        self._checkpoint("last")

    def _resumed(self) -> TraceWriter | None:
        """Go back to the state that the folder holds, and the trace with it; None where it holds none."""
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if json.loads(state["settings"]) != json.loads(json.dumps(self.header)):
                raise UsageError(f"{path}: of another run; choose another folder, or remove this one")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.at = _Reached(**state["reached"])
            self._recall(**state["last"] or {})
        except UsageError:
            raise
        except Exception as error:  # a garbled file makes the unpickler raise whatever its bytes lead to
            raise UsageError(
                f"{path}: cannot be gone on from ({first_line(error)}); remove it to start anew"
            ) from error
        return TraceWriter.resumed(self.folder / "trace.jsonl", self.at.rows)

    def _recall(self, epsilon: Params | None = None, gradient_ascent: Params | None = None) -> None:
        """Show the records the last step again: the next row has its angle to that, and the cross term."""
        if epsilon is not None and gradient_ascent is not None:
            up, none = gradient_ascent, torch.zeros(1, len(self.sizes), device=self.device)
            gradients: dict[str, Any] = dict.fromkeys(("gradient", "gradient_di", "plain", "update"), up)
            shown: dict[str, Any] = dict.fromkeys(("losses", "losses_ascent", "beta"), none) | gradients
            self.last = Ascent(**shown, gradient_ascent=up, epsilon=epsilon)
            self.records.rows(self.at.step - 1, [0.0], self.last, none)

    def _finish(self, writer: TraceWriter) -> Outcome:
        evaluation = self._evaluate()
        self._checkpoint("last")
        writer.close("finished", step=self.at.step, evaluation=evaluation, corrupt=self.at.corrupt)
        (self.folder / STATE).unlink(missing_ok=True)
        return _outcome(self.folder / "trace.jsonl")


def _optimizer(
    model: nn.Module, settings: Settings, options: Options, watch: Callable[[Ascent], None]
) -> SharpnessAware:
    shared = inspect.signature(SharpnessAware).parameters.keys() & {entry.name for entry in fields(Settings)}
    base: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    base |= {"momentum": settings.momentum} if options.optimizer == "sgd" else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {name: getattr(settings, name) for name in shared}
    return SharpnessAware(trained, OPTIMIZERS[options.optimizer], watch=watch, **own, **base)


def _check_outputs(
    model: nn.Module, split: Split | ImageSplit, classes: int, transform: Transform, device: torch.device
) -> None:
    """Raise :class:`UsageError` where the model does not take the first sample or gives another number of outputs."""
    samples = (Samples((split.unseen,), transform)[0, index] for index in range(len(split.unseen)))
    first = next((sample for sample in samples if not isinstance(sample, str)), None)
    if first is None:
        raise UsageError(f"domain {split.unseen.name!r}: none of its images can be read")
    inputs = first[0].unsqueeze(0).to(device)
    try:
        with torch.no_grad():
            shape = tuple(model.eval()(inputs).shape)
    except Exception as error:  # torch's, or whatever the model's own code raises
        said = first_line(error)
        raise UsageError(f"the model does not take inputs of shape {tuple(inputs.shape)}: {said}") from error
    if shape != (1, classes):
        raise UsageError(
            f"the model's outputs for one sample have shape {shape}; {classes} classes need (1, {classes})"
        )


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def one_pass(model: nn.Module, options: Options, step: int, number: int) -> Iterator[None]:
    """A step's forward pass ``number``, from 0: dropout's mask and batch norm's statistics as the options have them."""
    seed = derived_seed(MASKS, options.seed, step, number if options.dropout_mask == "new" else 0)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack for devices that are not there
    if torch.device(options.device).type == "cuda":
        torch.cuda.manual_seed_all(seed)
    keeps = number > 0 and options.batch_norm == "first"
    with _kept_statistics(model) if keeps else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch and leaves its running statistics as they are."""
    layers = [layer for layer in model.modules() if getattr(layer, "track_running_stats", False)]
    for layer in layers:
        layer.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True  # type: ignore[assignment]


def _deterministic(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """cuDNN's deterministic kernels, and no trial of several, so that a run that goes on rounds as it did."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    tf32 = torch.backends.cudnn.allow_tf32
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)


class _Signals:
    """Ctrl-C and SIGTERM are noted in ``stopped``, for the run to end between two batches; a second one raises."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python installs no handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _ignore_signals(worker: int) -> None:
    """In a loader's worker: a terminal or a scheduler signals all processes, and it is the main one that decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
