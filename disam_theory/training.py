"""(model, splits, settings, seeds) -> many runs advanced together as one stacked program -> traces and weights.

Every run carries its own radius, lambda, data, order of batches and initial weights; ``torch.func.vmap`` stacks the
runs' models, so a run gives the same numbers alone and among others. Runs of DGSAM, of CORAL and of Fishr, whose steps
are of another shape, make up programs of their own beside the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from disam_theory.algorithms import (
    Ascent,
    LossesOf,
    Settings,
    StepRecords,
    ascent_point,
    gradual_point,
    matching_of,
    objectives,
    relatives,
)
from disam_theory.domains import Domain, Split
from disam_theory.errors import UsageError
from disam_theory.losses import Params, cross_entropy
from disam_theory.matching import Statistics, last_linear
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
    record_every: int = 1,
    snapshot_steps: Sequence[int] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda step: None,
) -> list[Result]:
    """Train all runs together, appending to ``writers`` (one a run), and return where each ended.

    The runs must agree in everything that shapes the stacked program: the settings' ``steps``, ``sampling``,
    ``batch_size``, ``variance`` and ``ascent_gradient``, and the number of source domains; full-batch runs also in
    the number of samples. Every ``record_every``-th step is written, and the evaluated ones; what is only written is
    not computed for others. ``snapshot_steps`` are step numbers at whose start weights are kept; ``steps`` itself keeps
    the final ones. ``progress`` is called after each step. A run whose loss stops being finite is marked
    diverged, its trace ends there, and the others go on.
    """
    _check_alike(runs)
    results = [Result(params={}) for _ in runs]
    programs = [
        _Program(
            model,
            [runs[r] for r in kind],
            [results[r] for r in kind],
            [writers[r] for r in kind] if writers else None,
            torch.device(device),
            dtype,
            record_every,
        )
        for kind in _kinds(runs)
    ]
    steps = runs[0].settings.steps
    for step in range(steps):
        for program in programs:
            if step in snapshot_steps:
                program.snapshot(step)
            program.advance(step, evaluate=step % evaluate_every == 0)
        if writers and step % FLUSH_EVERY == 0:
            for writer in writers:
                writer.flush()
        progress(step)
    for program in programs:
        if steps in snapshot_steps:
            program.snapshot(steps)
        program.finish()
    return results


def _kinds(runs: Sequence[Run]) -> list[list[int]]:
    """The numbers of the runs that make up a program together."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for r, run in enumerate(runs):
        kinds.setdefault(run.settings.passes, []).append(r)
    return list(kinds.values())


def _divergences(step: int, ascent: Ascent, present: Tensor, runs: Sequence[Run]) -> Iterator[tuple[int, str]]:
    """The runs whose loss or gradient at the ascent point, or whose update, is not finite, each with where."""
    lost = (present > 0) & ~ascent.losses_ascent.isfinite()  # (R, M)
    trees = {id(tree): tree for tree in (ascent.gradient_ascent, ascent.update)}
    whole = [values.flatten(1).isfinite().all(1) for tree in trees.values() for values in tree.values()]
    for r in (lost.any(1) | ~torch.stack(whole).all(0)).nonzero().flatten().tolist():
        bad = [domain.name for domain, gone in zip(runs[r].split.sources, lost[r].tolist(), strict=True) if gone]
        yield r, f"not finite at step {step} in {f'domain {bad[0]!r}' if bad else 'the gradient'}"


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
    """The stacked state of R runs: weights, momentum, objectives, data and the order of their batches and domains."""

    def __init__(
        self,
        model: Callable[[], nn.Module],
        runs: Sequence[Run],
        results: Sequence[Result],
        writers: Sequence[TraceWriter] | None,
        device: torch.device,
        dtype: torch.dtype,
        record_every: int,
    ) -> None:
        self.runs, self.settings, self.record_every = runs, runs[0].settings, record_every
        self.results, self.writers, self.records = results, writers, StepRecords()
        self.device, self.dtype = device, dtype
        self.template, self.params = _initial(model, runs, device, dtype)
        self.convolves = any(p.ndim > 2 for p in self.template.parameters())
        self.velocity = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.M = len(runs[0].split.sources)
        self.rho = torch.tensor([r.settings.radius for r in runs], dtype=torch.float64, device=device)
        lam = [r.settings.strength for r in runs]
        self.lam = torch.tensor(lam, dtype=dtype, device=device) if any(lam) else None
        self.relatives = relatives([r.settings for r in runs], device=device)
        self.objective = objectives([r.settings for r in runs], self.M, dtype=dtype, device=device)
        self.matching = matching_of([r.settings for r in runs], self.velocity[next(iter(self.velocity))])
        self.head = _head(self.template) if self.matching else None
        self.momentum = torch.tensor([r.settings.momentum for r in runs], dtype=dtype, device=device)
        self.decay = torch.tensor([r.settings.weight_decay for r in runs], dtype=dtype, device=device)
        self._load(runs)

    def _load(self, runs: Sequence[Run]) -> None:
        """Keep each distinct split's pooled data once, and each run's order of batches as rows of them."""
        splits = list({id(run.split): run.split for run in runs}.values())
        place = {id(split): k for k, split in enumerate(splits)}
        self.members = [[r for r, run in enumerate(runs) if run.split is split] for split in splits]
        self.splits = splits
        inputs, labels, domains = zip(*(_pool(split) for split in splits), strict=True)
        self.inputs = torch.cat(inputs).to(self.device, self.dtype)
        self.labels, self.domains = torch.cat(labels).to(self.device), torch.cat(domains).to(self.device)
        starts = torch.tensor([0, *(_size(split) for split in splits)]).cumsum(0)
        sizes = [[len(d) for d in run.split.sources] for run in runs]
        self.shares = torch.tensor(sizes, dtype=self.dtype, device=self.device)
        self.shares = self.shares / self.shares.sum(1, keepdim=True)
        order = torch.stack([starts[place[id(run.split)]] + _batches(run) for run in runs])
        self.order = order.to(self.device)  # (R, steps or 1, B), rows of the data above
        if self.settings.algorithm == "dgsam":
            self.domain_order = torch.stack([_domain_orders(run, self.M) for run in runs]).to(self.device)

    def advance(self, step: int, *, evaluate: bool) -> None:
        """One step of every run, written to the traces of those that have not diverged if it is to be recorded."""
        evaluation = self.evaluate() if evaluate and self.writers else None
        recorded = self.writers is not None and (step % self.record_every == 0 or evaluate)
        lrs = [run.settings.lr_at(step) for run in self.runs]
        present, ascent = self._step(step, lrs, measured=recorded)
        for r, why in _divergences(step, ascent, present, self.runs):
            if self.results[r].diverged is None:
                self.results[r].diverged = why
                if self.writers:
                    self.writers[r].close("diverged", why=why)
        if not recorded:
            self.records.passed(ascent)
            return
        rows = self.records.rows(step, lrs, ascent, present)
        for r, writer in enumerate(self.writers or ()):
            if self.results[r].diverged is None:
                writer.append(rows[r] if evaluation is None else {**rows[r], "evaluation": evaluation[r]})

    def snapshot(self, step: int) -> None:
        """Keep every run's weights as those at ``step``."""
        for r, result in enumerate(self.results):
            result.snapshots[step] = self.params_of(r)

    def finish(self) -> None:
        """Keep the weights reached; close the traces with the last evaluation."""
        final = self.evaluate() if self.writers else []
        for r, result in enumerate(self.results):
            result.params = self.params_of(r)
            if self.writers and result.diverged is None:
                self.writers[r].close("finished", step=self.settings.steps, evaluation=final[r])

    def _step(self, step: int, lrs: Sequence[float], *, measured: bool) -> tuple[Tensor, Ascent]:
        """Advance every run's weights; returns which domains were present (R, M), and the step."""
        index = self.order[:, step % self.order.shape[1]]
        batch = [
            values.index_select(0, index.flatten()).view(*index.shape, *values.shape[1:])
            for values in (self.inputs, self.labels, self.domains)
        ]
        inputs, labels, domains = batch
        member = nn.functional.one_hot(domains, self.M).to(self.dtype)  # (R, B, M)
        counts = member.sum(1)
        present = (counts > 0).to(self.dtype)
        average = member / counts.clamp(min=1).unsqueeze(1)

        def losses_of(params: Params) -> Tensor | tuple[Tensor, Callable[[], Statistics]]:
            return self._losses(params, inputs, labels, domains, average)

        ascent = self._ascent(losses_of, step, counts, present, measured)
        self.objective, self.matching = ascent.objective, ascent.matching
        self._update(ascent.update, torch.tensor(lrs, dtype=self.dtype, device=self.device))
        return present, ascent

    def _ascent(self, losses_of: LossesOf, step: int, counts: Tensor, present: Tensor, measured: bool) -> Ascent:
        if self.settings.algorithm == "dgsam":
            order = self.domain_order[:, step]
            return gradual_point(losses_of, self.params, order=order, present=present, rho=self.rho, lam=self.lam)
        return ascent_point(
            losses_of,
            self.params,
            alpha=counts / counts.sum(1, keepdim=True) if self.settings.sampling == "pooled" else self.shares,
            present=present,
            rho=self.rho,
            lam=self.lam,
            variance=self.settings.variance,
            ascent_gradient=self.settings.ascent_gradient,
            relatives=self.relatives,
            objective=self.objective,
            matching=self.matching,
            measured=measured,
        )

    def _forward(self, params: Params, inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs (R, B, C) and, where the objective needs them, features (R, B, d)."""
        if self._alone(inputs):
            return tuple(values[:1] for values in self._forward(_twice(params), torch.cat([inputs, inputs])))
        return vmap(self._call)(params, inputs)

    def _alone(self, inputs: Tensor) -> bool:
        """Whether to go through with a copy: a convolution of one group takes another kernel, which rounds otherwise,
        than one of several, and a run alone has to give the numbers that it gives in a stack.
        """
        return len(inputs) == 1 and self.convolves

    def _call(self, params: Params, inputs: Tensor) -> tuple[Tensor, ...]:
        """One run's model."""
        if self.head is None:
            return (functional_call(self.template, params, (inputs,)),)
        seen: list[tuple[Tensor, Tensor]] = []
        with self.head.register_forward_hook(lambda _, given, output: seen.append((given[0], output))):
            outputs = functional_call(self.template, params, (inputs,))
        if not seen or seen[-1][1] is not outputs or seen[-1][0].ndim != 2:
            raise UsageError(f"objective {self.settings.objective!r} needs a model that ends in its last nn.Linear")
        return outputs, seen[-1][0]

    def _losses(
        self, params: Params, inputs: Tensor, labels: Tensor, domains: Tensor, average: Tensor
    ) -> Tensor | tuple[Tensor, Callable[[], Statistics]]:
        if self._alone(inputs):
            batch = (torch.cat([values, values]) for values in (inputs, labels, domains, average))
            double = self._losses(_twice(params), *batch)
            if isinstance(double, Tensor):
                return double[:1]
            both, compute = double
            return both[:1], lambda: Statistics(*(values[:1] for values in vars(compute()).values()))
        outputs, *features = self._forward(params, inputs)
        losses = (_each(outputs, labels).unsqueeze(-1) * average).sum(1)
        matching, head = self.matching, self.head
        if matching is None or head is None:
            return losses
        bias = head.bias is not None
        return losses, lambda: matching.statistics(features[0], outputs, labels, domains, self.M, bias=bias)

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
            parts = [*split.sources, *split.validation, split.unseen]
            each, correct = self._score({name: p[members] for name, p in self.params.items()}, parts)
            M, sizes = self.M, [len(part) for part in parts]
            losses = torch.stack([part.mean(1) for part in each.split(sizes, 1)], 1).tolist()
            validation = correct[:, sum(sizes[:M]) : -sizes[-1]].mean(1).tolist()
            unseen = correct[:, -sizes[-1] :].mean(1).tolist()
            for k, r in enumerate(members):
                rows[r] = {
                    "losses": losses[k][:M],
                    "validation_accuracy": validation[k],
                    "unseen_loss": losses[k][-1],
                    "unseen_accuracy": unseen[k],
                }
        return rows

    def _score(self, params: Params, parts: Sequence[Domain]) -> tuple[Tensor, Tensor]:
        """Loss of each sample of the parts, (r, N), and whether it is right, of r runs."""
        r = len(next(iter(params.values())))
        inputs, labels = _pooled_data(parts)
        y = labels.to(self.device).expand(r, -1)
        outputs, *_ = self._forward(params, inputs.to(self.device, self.dtype).expand(r, *inputs.shape))
        return _each(outputs, y), (outputs.argmax(-1) == y).double()


def _twice(params: Params) -> Params:
    return {name: torch.cat([p, p]) for name, p in params.items()}


def _each(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample (R, B), of outputs (R, B, C); classes before samples make softmax five times faster."""
    return cross_entropy(outputs.transpose(1, 2), labels)


def _head(model: nn.Module) -> nn.Linear:
    head = last_linear(model)
    if head is None:
        raise UsageError("objectives 'coral' and 'fishr' need a model that ends in nn.Linear; this one has none")
    return head


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


def _pooled_data(domains: Sequence[Domain]) -> tuple[Tensor, Tensor]:
    return torch.cat([d.inputs for d in domains]), torch.cat([d.labels for d in domains])


def _pool(split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """The sources' samples one after the other with their domain's number."""
    return *_pooled_data(split.sources), torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])


def _domain_orders(run: Run, M: int) -> Tensor:
    """DGSAM's order of the domains at every step, (steps, M)."""
    generator = torch.Generator().manual_seed(run.seed + 2**33)
    return torch.stack([torch.randperm(M, generator=generator) for _ in range(run.settings.steps)])


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
