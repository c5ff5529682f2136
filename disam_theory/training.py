"""(model, splits, settings, seeds) -> many runs advanced together as one stacked program -> traces and weights.

Every run carries its own radius, lambda, data, order of batches and initial weights; ``torch.func.vmap`` stacks the
runs' models, so a run gives the same numbers alone and among others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from disam_theory.algorithms import Ascent, Settings, StepRecords, ascent_point, objectives, relatives
from disam_theory.domains import Split
from disam_theory.errors import UsageError
from disam_theory.losses import Params, cross_entropy
from disam_theory.perturbations import norm
from disam_theory.traces import FLUSH_EVERY, TraceWriter


@dataclass(frozen=True)
class Run:
    """One run: its settings, the split it trains and tests on, and the seed of its weights and batches."""

    settings: Settings
    split: Split
    seed: int


@dataclass
class Result:
    """A run's end: the weights it reached, weights kept on the way, and where it diverged if it did."""

    params: Params
    snapshots: dict[int, Params] = field(default_factory=dict)  # step -> w at that step
    diverged: str | None = None


def train(
    model: Callable[[], nn.Module],
    runs: Sequence[Run],
    *,
    writers: Sequence[TraceWriter] | None = None,
    evaluate_every: int = 25,
    snapshot_steps: Sequence[int] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda step: None,
) -> list[Result]:
    """Train all runs together, appending to ``writers`` (one a run), and return where each ended.

    The runs must agree in everything that shapes the stacked program: the settings' ``steps``, ``sampling``,
    ``batch_size``, ``variance`` and ``ascent_gradient``, and the number of source domains; full-batch runs also in
    the number of samples. ``snapshot_steps`` are step numbers at whose start weights are kept; ``steps`` itself keeps
    the final ones. ``progress`` is called after each step. A run whose loss stops being finite is marked
    diverged, its trace ends there, and the others go on.
    """
    _check_alike(runs)
    program = _Program(model, runs, torch.device(device), dtype)
    results = [Result(params={}) for _ in runs]
    records = StepRecords()
    for step in range(runs[0].settings.steps):
        evaluation = program.evaluate() if writers and step % evaluate_every == 0 else None
        if step in snapshot_steps:
            _snapshot(results, program, step)
        lrs = [run.settings.lr_at(step) for run in runs]
        present, ascent = program.step(step, lrs)
        rows = records.rows(step, lrs, ascent, present)
        for r, why in _divergences(rows, ascent, present, runs):
            if results[r].diverged is None:
                results[r].diverged = why
                if writers:
                    writers[r].close("diverged", why=why)
        if writers:
            _append(rows, evaluation, results, writers)
        if writers and step % FLUSH_EVERY == 0:
            for writer in writers:
                writer.flush()
        progress(step)
    _finish(results, program, writers, runs, snapshot_steps)
    return results


def _divergences(
    rows: list[dict[str, Any]], ascent: Ascent, present: Tensor, runs: Sequence[Run]
) -> Iterator[tuple[int, str]]:
    """The runs whose loss or gradient at the ascent point, or whose update, is not finite, each with where."""
    finite = norm(ascent.update, 1).isfinite().tolist()
    for r, (row, here) in enumerate(zip(rows, present.tolist(), strict=True)):
        losses = zip(runs[r].split.sources, row["losses_ascent"], here, strict=True)
        bad = [domain.name for domain, value, there in losses if there and not math.isfinite(value)]
        if bad or not (math.isfinite(row["grad_norm_ascent"]) and finite[r]):
            yield r, f"not finite at step {row['step']} in {f'domain {bad[0]!r}' if bad else 'the gradient'}"


def _append(
    rows: list[dict[str, Any]],
    evaluation: list[dict[str, Any]] | None,
    results: list[Result],
    writers: Sequence[TraceWriter],
) -> None:
    for r, row in enumerate(rows):
        if results[r].diverged is None:
            writers[r].append(row if evaluation is None else {**row, "evaluation": evaluation[r]})


def _finish(
    results: list[Result],
    program: _Program,
    writers: Sequence[TraceWriter] | None,
    runs: Sequence[Run],
    snapshot_steps: Sequence[int],
) -> None:
    steps = runs[0].settings.steps
    final = program.evaluate() if writers else None
    if steps in snapshot_steps:
        _snapshot(results, program, steps)
    for r, result in enumerate(results):
        result.params = program.params_of(r)
        if writers and final is not None and result.diverged is None:
            writers[r].close("finished", step=steps, evaluation=final[r])


def _snapshot(results: list[Result], program: _Program, step: int) -> None:
    for r, result in enumerate(results):
        result.snapshots[step] = program.params_of(r)


def _check_alike(runs: Sequence[Run]) -> None:
    if not runs:
        raise UsageError("no runs to train; give at least one")
    for name in ("steps", "sampling", "batch_size", "variance", "ascent_gradient"):
        values = sorted({str(getattr(run.settings, name)) for run in runs})
        if len(values) > 1:
            raise UsageError(f"runs stacked together differ in {name} ({', '.join(values)}); train them apart")
    if len({len(run.split.sources) for run in runs}) > 1:
        raise UsageError("runs stacked together differ in the number of source domains; train them apart")
    if runs[0].settings.sampling == "full" and len({_size(run.split) for run in runs}) > 1:
        raise UsageError("full-batch runs stacked together differ in the number of samples; train them apart")


def _size(split: Split) -> int:
    return sum(len(domain) for domain in split.sources)


class _Program:
    """The stacked state of R runs: weights, momentum, objectives, data and the order of their batches."""

    def __init__(
        self, model: Callable[[], nn.Module], runs: Sequence[Run], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.runs, self.settings = runs, runs[0].settings
        self.device, self.dtype = device, dtype
        self.template, self.params = _initial(model, runs, device, dtype)
        self.convolves = any(p.ndim > 2 for p in self.template.parameters())
        self.velocity = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.M = len(runs[0].split.sources)
        self.rho = torch.tensor([r.settings.radius for r in runs], dtype=torch.float64, device=device)
        self.lam = torch.tensor([r.settings.strength for r in runs], dtype=dtype, device=device)
        self.relatives = relatives([r.settings for r in runs], device=device)
        self.objective = objectives([r.settings for r in runs], self.M, dtype=dtype, device=device)
        self.momentum = torch.tensor([r.settings.momentum for r in runs], dtype=dtype, device=device)
        self.decay = torch.tensor([r.settings.weight_decay for r in runs], dtype=dtype, device=device)
        self._load(runs)

    def _load(self, runs: Sequence[Run]) -> None:
        """Keep each distinct split's pooled data once, padded to one length, and each run's order of batches."""
        splits = list({id(run.split): run.split for run in runs}.values())
        place = {id(split): k for k, split in enumerate(splits)}
        self.members = [[r for r, run in enumerate(runs) if run.split is split] for split in splits]
        self.splits = splits
        self.split_of = torch.tensor([place[id(run.split)] for run in runs], device=self.device)
        longest = max(_size(split) for split in splits)
        inputs, labels, domains = zip(*(_pool(split, longest) for split in splits), strict=True)
        self.inputs = torch.stack(inputs).to(self.device, self.dtype)
        self.labels = torch.stack(labels).to(self.device)
        self.domains = torch.stack(domains).to(self.device)
        sizes = [[len(d) for d in run.split.sources] for run in runs]
        self.shares = torch.tensor(sizes, dtype=self.dtype, device=self.device)
        self.shares = self.shares / self.shares.sum(1, keepdim=True)
        self.order = torch.stack([_batches(run) for run in runs]).to(self.device)  # (R, steps or 1, B)

    def step(self, step: int, lrs: Sequence[float]) -> tuple[Tensor, Ascent]:
        """Advance every run by one step; returns which domains were present (R, M), and the step."""
        index = self.order[:, step % self.order.shape[1]]
        rows = self.split_of.unsqueeze(1)
        inputs, labels, domains = (
            self.inputs[rows, index],
            self.labels[rows, index],
            self.domains[rows, index],
        )
        member = nn.functional.one_hot(domains, self.M).to(self.dtype)  # (R, B, M)
        counts = member.sum(1)
        present = (counts > 0).to(self.dtype)
        alpha = counts / counts.sum(1, keepdim=True) if self.settings.sampling == "pooled" else self.shares
        average = member / counts.clamp(min=1).unsqueeze(1)
        ascent = ascent_point(
            lambda params: self._losses(params, inputs, labels, average),
            self.params,
            alpha=alpha,
            present=present,
            rho=self.rho,
            lam=self.lam,
            variance=self.settings.variance,
            ascent_gradient=self.settings.ascent_gradient,
            relatives=self.relatives,
            objective=self.objective,
        )
        self.objective = ascent.objective
        self._update(ascent.update, torch.tensor(lrs, dtype=self.dtype, device=self.device))
        return present, ascent

    def _forward(self, params: Params, inputs: Tensor) -> Tensor:
        """Outputs (R, B, ...). A convolution of one group takes another kernel, which rounds otherwise, than one of
        several: a run alone goes through with a copy of itself, so that it gives the numbers that it gives in a stack.
        """
        if len(inputs) == 1 and self.convolves:
            return self._forward({name: torch.cat([p, p]) for name, p in params.items()}, torch.cat([inputs, inputs]))[
                :1
            ]
        return vmap(lambda p, x: functional_call(self.template, p, (x,)))(params, inputs)

    def _losses(self, params: Params, inputs: Tensor, labels: Tensor, average: Tensor) -> Tensor:
        each = cross_entropy(self._forward(params, inputs).flatten(0, 1), labels.flatten()).view(labels.shape)
        return (each.unsqueeze(-1) * average).sum(1)

    def _update(self, gradient: Params, lr: Tensor) -> None:
        """Momentum SGD: v <- m v + g + wd w, w <- w - eta v (as torch.optim.SGD)."""
        for name, p in self.params.items():
            shape = (-1,) + (1,) * (p.ndim - 1)
            self.velocity[name] = self.momentum.view(shape) * self.velocity[name] + (
                gradient[name] + self.decay.view(shape) * p
            )
            self.params[name] = p - lr.view(shape) * self.velocity[name]

    def params_of(self, r: int) -> Params:
        """Run ``r``'s weights, without the leading axis, as an independent copy."""
        return {name: p[r].clone() for name, p in self.params.items()}

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, Any]]:
        """Each run's losses on all training data, and loss and accuracy on validation parts and the unseen domain."""
        rows: list[dict[str, Any]] = [{} for _ in self.runs]
        for split, members in zip(self.splits, self.members, strict=True):
            params = {name: p[members] for name, p in self.params.items()}
            train = [self._score(params, d.inputs, d.labels)[0] for d in split.sources]
            kept = _pooled_data(split.validation)
            _, validation = self._score(params, *kept)
            unseen_loss, unseen = self._score(params, split.unseen.inputs, split.unseen.labels)
            for k, r in enumerate(members):
                rows[r] = {
                    "losses": [float(loss[k]) for loss in train],
                    "validation_accuracy": float(validation[k]),
                    "unseen_loss": float(unseen_loss[k]),
                    "unseen_accuracy": float(unseen[k]),
                }
        return rows

    def _score(self, params: Params, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss (r,) and accuracy (r,) of r runs on the same data."""
        r = len(next(iter(params.values())))
        x = inputs.to(self.device, self.dtype).expand(r, *inputs.shape)
        y = labels.to(self.device).expand(r, -1)
        outputs = self._forward(params, x)
        each = cross_entropy(outputs.flatten(0, 1), y.flatten()).view(y.shape)
        return each.mean(1), (outputs.argmax(-1) == y).double().mean(1)


def _initial(
    model: Callable[[], nn.Module], runs: Sequence[Run], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Params]:
    """One module as the template, and every run's own initial weights, stacked."""
    models = []
    for run in runs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            models.append(model())
    template = models[0].to(device, dtype)
    if any(True for _ in template.buffers()):
        raise UsageError(
            "the model has buffers (batch norm's running statistics, say), which stacked runs cannot share; "
            "use a model without, such as one with group norm"
        )
    names = [name for name, _ in template.named_parameters()]
    stacks = {name: torch.stack([m.get_parameter(name).detach() for m in models]).to(device, dtype) for name in names}
    return template, stacks


def _pooled_data(domains: Sequence[Any]) -> tuple[Tensor, Tensor]:
    return torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains])


def _pool(split: Split, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sources' samples one after the other with their domain's number, repeated up to ``length`` rows."""
    inputs, labels = _pooled_data(split.sources)
    domains = torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])
    rows = torch.arange(length) % len(labels)  # rows beyond the data are padding that no batch refers to
    return inputs[rows], labels[rows], domains[rows]


def _batches(run: Run) -> Tensor:
    """The samples of every step, (steps, B): epochs of random permutations cut into batches; (1, N) for full batch."""
    settings, sizes = run.settings, [len(d) for d in run.split.sources]
    if settings.sampling == "full":
        return torch.arange(sum(sizes)).unsqueeze(0)
    generator = torch.Generator().manual_seed(run.seed + 2**32)
    if settings.sampling == "pooled":
        return _permutations(sum(sizes), settings.steps, settings.batch_size, generator)
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    parts = [
        start + _permutations(n, settings.steps, settings.batch_size, generator)
        for n, start in zip(sizes, starts, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _permutations(n: int, steps: int, batch: int, generator: torch.Generator) -> Tensor:
    epochs = -(-steps * batch // n)
    stream = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return stream[: steps * batch].view(steps, batch)
