r"""What the released code's text says -> this project's own runs on embedded digits -> what it changes, with intervals.

The released code is never run. A seed draws the suite, the initial weights and the batches, and holds out one domain,
each domain in its turn; the runs compared share all four. Each interval is Student's at 95 %, over the seeds, for
itself alone: it says how much, and no verdict rests on it. All is in float64, so that round-off and a difference are
far apart.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from disam_theory.algorithms import Settings
from disam_theory.domains import Split, load_suite
from disam_theory.errors import ComputationError
from disam_theory.losses import Params, cross_entropy, model_losses, parameters_of, pooled
from disam_theory.models import digits_mlp
from disam_theory.optim import SharpnessAware, by_domain
from disam_theory.perturbations import disam_weights, dot, norm
from disam_theory.single_run import Options, one_pass
from disam_theory.statistics import paired_interval
from disam_theory.training import Result, Run, train

SUITES = ("digits-rotated", "digits-corrupted")
SEEDS = 5
STEPS = 60
PAPER = Settings("disam", rho=0.05, lam=0.1, lr=0.1, momentum=0.9, steps=STEPS, batch_size=32)
RHOS = (0.05, 0.5)  # Sec. 4.1, and App. C.1 for PACS, VLCS, OfficeHome and DomainNet
ROUND_OFF = 1e-9  # relative distance of two runs: round-off that 60 steps have amplified stays far below

DISTANCE, COSINE = "distance of the weights", "cosine of the ascent directions"
LOSS, ACCURACY, RUNNING = "training loss", "unseen accuracy", "running statistics"
QUANTITIES = {  # name -> (unit, least value, largest value)
    DISTANCE: ("of the way from the start", 0.0, np.inf),
    COSINE: ("", -1.0, 1.0),
    LOSS: ("%", -100.0, np.inf),
    ACCURACY: ("points", -100.0, 100.0),
    RUNNING: ("of their length at the start", 0.0, np.inf),
}
Values = dict[str, list[float]]  # quantity -> its value for each seed


@dataclass(frozen=True)
class Simulation:
    """Paired runs: how far apart they end, and what is reported of them."""

    what: str
    least: float  # the least relative distance of two runs that are compared
    rows: list[dict[str, Any]]  # a quantity's mean and interval each
    beside: Mapping[str, Any]  # the control, and what else is reported

    @property
    def differs(self) -> bool:
        """Whether every two runs that are compared end at different weights."""
        return self.least > ROUND_OFF

    @property
    def data(self) -> dict[str, Any]:
        """What goes into the evidence."""
        design = f"{SEEDS} seeds, {STEPS} steps of momentum SGD in batches of {PAPER.batch_size}, 95 % intervals"
        runs = f"{self.what}; {design}"
        return {"runs": runs, "intervals": self.rows, "least_distance_of_all_seeds": self.least, **self.beside}

    @property
    def summary(self) -> str:
        """How many of the differences are told from zero, in words."""
        told = ", ".join(f"on the {name} in {self._told(name)} cases" for name in (LOSS, ACCURACY))
        return f"with small networks on digits an effect is told from zero {told}"

    def _told(self, quantity: str) -> str:
        ends = [(row["low"], row["high"]) for row in self.rows if row["quantity"] == quantity]
        return f"{sum(low > 0 or high < 0 for low, high in ends)} of {len(ends)}"


@functools.cache
def split_of(suite: str, seed: int) -> Split:
    """The suite as ``seed`` draws it, in float64; the seeds hold out the domains in turn."""
    drawn = load_suite(suite, rng=seed)
    split = drawn.split(drawn.domains[seed % len(drawn.domains)].name, rng=seed)
    sources, validation = (tuple(d.to(dtype=torch.float64) for d in part) for part in (split.sources, split.validation))
    return Split(sources, validation, split.unseen.to(dtype=torch.float64))


def cut(split: Split) -> Split:
    """The split with as many samples of each source domain: as many as the least has."""
    least = min(len(domain) for domain in split.sources)
    return replace(split, sources=tuple(domain.take(torch.arange(least)) for domain in split.sources))


def distance(first: Params, second: Params, start: Params) -> float:
    r"""$\lVert w-v\rVert/\lVert v-w_0\rVert$ of the weights that two runs end at: how far apart, of how far moved."""
    apart, moved = ({name: a[name] - b[name] for name in b} for a, b in ((first, second), (second, start)))
    return float(norm(apart) / norm(moved))


@torch.no_grad()
def quality(model: nn.Module, split: Split) -> tuple[float, float]:
    r"""$L(w)=\sum_i\alpha_iL_i(w)$ on all training data and the unseen accuracy in %, both in evaluation mode."""
    losses = model_losses(model, split.sources, chunk=4096)
    loss = losses(parameters_of(model)) @ torch.tensor(losses.shares, dtype=torch.float64)
    hits = copy.deepcopy(model).eval()(split.unseen.inputs).argmax(1) == split.unseen.labels
    return float(loss), 100.0 * float(hits.double().mean())


def _differences(first: Sequence[nn.Module], second: Sequence[nn.Module], splits: Sequence[Split]) -> Values:
    """The first runs' training loss and unseen accuracy less the second's."""
    pairs = [(quality(a, s), quality(b, s)) for a, b, s in zip(first, second, splits, strict=True)]
    return {LOSS: [100.0 * (a[0] - b[0]) / b[0] for a, b in pairs], ACCURACY: [a[1] - b[1] for a, b in pairs]}


def _rows(case: Mapping[str, Any], values: Values) -> list[dict[str, Any]]:
    """A line for each quantity: mean over the seeds and interval, which ends where the quantity's range does."""
    rows = []
    for name, each in values.items():
        unit, least, largest = QUANTITIES[name]
        found = asdict(paired_interval(np.array(each)))
        ends = {"low": max(least, found["low"]), "high": min(largest, found["high"])}
        rows.append({**case, "quantity": name, "estimate": found["estimate"], **ends, "unit": unit})
    return rows


def _trained(arms: Sequence[Settings], splits: Sequence[Split]) -> list[list[Result]]:
    """Each arm's run for each seed, with the weights at three steps of the way."""
    runs = [Run(arm, split, seed) for arm in arms for seed, split in enumerate(splits)]
    results = train(digits_mlp, runs, dtype=torch.float64, snapshot_steps=range(0, STEPS, STEPS // 3))
    return [results[k : k + len(splits)] for k in range(0, len(results), len(splits))]


def _apart(first: Sequence[Result], second: Sequence[Result]) -> list[float]:
    return [distance(a.params, b.params, b.snapshots[0]) for a, b in zip(first, second, strict=True)]


def _mlps(results: Sequence[Result]) -> list[nn.Module]:
    models = [digits_mlp().double() for _ in results]
    for model, result in zip(models, results, strict=True):
        model.load_state_dict(result.params)
    return models


# --- the variance in the ascent direction: code-variance-weighting ---

WEIGHTINGS = ("samples", "domains")  # the released one, and Eq. (6)
EACH = 8  # samples of each domain in a balanced batch


@functools.cache
def variance_training(weightings: tuple[str, str] = WEIGHTINGS, *, balanced: bool = False) -> Simulation:
    r"""DISAM's runs with the first weighting of $\mathrm{Var}\{L_i\}$ against the second's.

    The control, and all of it where ``balanced``, has as many samples of each domain in every batch: there the two
    weightings are one formula.
    """
    alike = _weighted(SUITES[0], WEIGHTINGS, rhos=RHOS[-1:], balanced=True)[1]
    control = max(max(_apart(first, second)) for first, second in alike)
    if control > ROUND_OFF:
        raise ComputationError(f"with equal counts the two weightings end {control:.2g} apart, not at round-off")
    rows: list[dict[str, Any]] = []
    least = np.inf
    for suite in SUITES:
        splits, pairs = _weighted(suite, weightings, balanced=balanced)
        for rho, (first, second) in zip(RHOS, pairs, strict=True):
            values = {DISTANCE: _apart(first, second)}
            values[COSINE] = [
                _mean_cosine(result.snapshots, split, weightings, balanced=balanced, rng=seed)
                for seed, (result, split) in enumerate(zip(second, splits, strict=True))
            ]
            rows += _rows({"suite": suite, "rho": rho}, values | _differences(_mlps(first), _mlps(second), splits))
            least = min(least, *values[DISTANCE])
    what = f"DISAM with a variance over {weightings[0]} less with one over {weightings[1]}"
    return Simulation(what, least, rows, {"control": {"largest_distance_with_equal_counts": control}})


def _weighted(
    suite: str, weightings: tuple[str, str], *, rhos: Sequence[float] = RHOS, balanced: bool
) -> tuple[list[Split], list[tuple[list[Result], list[Result]]]]:
    """The seeds' splits, and for each radius the runs of both weightings."""
    splits = [split_of(suite, seed) for seed in range(SEEDS)]
    arms = [replace(PAPER, rho=rho) for rho in rhos]
    if balanced:
        splits = [cut(split) for split in splits]
        arms = [replace(arm, sampling="stratified", batch_size=EACH) for arm in arms]
    first, second = (_trained([replace(arm, variance=variance) for arm in arms], splits) for variance in weightings)
    return splits, list(zip(first, second, strict=True))


def _mean_cosine(
    kept: Mapping[int, Params], split: Split, weightings: tuple[str, str], *, balanced: bool, rng: int
) -> float:
    """The mean of :func:`_cosine` over the weights kept along a run."""
    cosines = [_cosine(w, split, weightings, balanced=balanced, rng=(rng, step)) for step, w in kept.items()]
    return float(np.mean(cosines))


def _cosine(
    params: Params, split: Split, weightings: tuple[str, str], *, balanced: bool, rng: tuple[int, int]
) -> float:
    r"""The cosine between the two $\sum_i\beta_i\nabla L_i(w)$ on one batch drawn anew as the runs draw theirs."""
    at = {name: p.clone().requires_grad_(True) for name, p in params.items()}
    inputs, labels, domains = _pool(split)
    order = torch.from_numpy(np.random.default_rng(rng).permutation(len(labels)))
    index = order[: PAPER.batch_size]
    if balanced:
        index = torch.cat([order[domains[order] == i][:EACH] for i in range(len(split.sources))])
    each = cross_entropy(functional_call(digits_mlp(), at, (inputs[index],)), labels[index])
    losses, alpha = by_domain(each, domains[index], len(split.sources))
    lam = torch.tensor(PAPER.strength, dtype=torch.float64)
    directions = []
    for variance in weightings:
        beta = disam_weights(losses.detach(), alpha, lam, (alpha > 0).double(), variance=variance)
        gradient = torch.autograd.grad(pooled(losses, beta), list(at.values()), retain_graph=True)
        directions.append(dict(zip(at, gradient, strict=True)))
    a, b = directions
    return float(dot(a, b) / (norm(a) * norm(b)))


def _pool(split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """The sources' inputs, labels and domain numbers, one domain after the other."""
    domains = torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])
    return torch.cat([d.inputs for d in split.sources]), torch.cat([d.labels for d in split.sources]), domains


# --- the mode of the epoch: code-sam-eval-mode ---

Network = Callable[[], nn.Module]


def normalised() -> nn.Module:
    """The embedded study's network with batch norm after its first layer and dropout of 0.5 before its head."""
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 10))


@functools.cache
def mode_training(
    modes: tuple[str, str] = ("eval", "train"), *, network: Network = normalised, control: Network = digits_mlp
) -> Simulation:
    r"""SAM's runs in the first mode against those in the second; beside it DISAM's against SAM's in the second.

    All start from weights and running statistics that 20 steps of ERM in training mode have found: they stand for
    the pretraining. ``control`` is a network that should not tell the modes apart.
    """
    alike = [parameters_of(model) for model in _in_modes(control, 0, ("eval", "train"))[:2]]
    if any(not torch.equal(alike[0][name], alike[1][name]) for name in alike[0]):
        raise ComputationError("without batch norm and dropout the two modes should take the same steps")
    splits = [split_of(SUITES[0], seed) for seed in range(SEEDS)]
    first, second, disam, start = zip(*(_in_modes(network, seed, modes) for seed in range(SEEDS)), strict=True)
    values = [_mode_values(models, second, start, splits) for models in (first, disam)]
    moved = {
        mode: max(_running_apart(model, begin, begin) for model, begin in zip(models, start, strict=True))
        for mode, models in zip(modes, (first, second), strict=True)
    }
    beside = {
        "control": {"without_batch_norm_and_dropout": "both modes end at the same weights to the last bit"},
        "running_statistics_move_at_most": moved,
        "for_comparison": _rows({"runs": f"{modes[1]} mode, DISAM less SAM"}, values[1]),
    }
    rows = _rows({"runs": f"SAM, {modes[0]} less {modes[1]} mode"}, values[0])
    return Simulation("SAM with batch norm and dropout", min(values[0][DISTANCE]), rows, beside)


def _mode_values(
    first: Sequence[nn.Module], second: Sequence[nn.Module], start: Sequence[nn.Module], splits: Sequence[Split]
) -> Values:
    triples = list(zip(first, second, start, strict=True))
    apart = [distance(*(parameters_of(model) for model in three)) for three in triples]
    running = [_running_apart(*three) for three in triples]
    return {DISTANCE: apart, RUNNING: running} | _differences(first, second, splits)


def _in_modes(network: Network, seed: int, modes: tuple[str, str]) -> tuple[nn.Module, ...]:
    """SAM's run in each mode, DISAM's in the second, and what the three start from."""
    start = _start(network, seed)
    arms = [("sam", modes[0]), ("sam", modes[1]), ("disam", modes[1])]
    models = [copy.deepcopy(start) for _ in arms]
    for model, (algorithm, mode) in zip(models, arms, strict=True):
        _fine_tune(model, split_of(SUITES[0], seed), 2 * seed + 1, algorithm, mode)
    return (*models, start)


def _start(network: Network, seed: int) -> nn.Module:
    """Weights and running statistics after 20 steps of ERM, in place of pretraining."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = network().double()
    _fine_tune(start, split_of(SUITES[0], seed), 2 * seed, "erm", "train", steps=20)
    return start


def _fine_tune(
    model: nn.Module,
    split: Split,
    rng: int,
    algorithm: str,
    mode: str,
    *,
    passes: Options | None = None,
    steps: int = STEPS,
) -> None:
    """Train ``model`` in place; ``rng`` decides the batches and dropout's masks.

    ``passes``: how the passes of a step are made in ``disam-theory train``; None makes them plain, as released.
    """
    inputs, labels, domains = _pool(split)
    options: dict[str, Any] = {name: getattr(PAPER, name) for name in ("rho", "lam", "lr", "momentum")}
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, algorithm=algorithm, **options)
    order = np.random.default_rng(rng)
    model.train(mode == "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng)
        for step in range(steps):
            index, numbers = order.permutation(len(labels))[: PAPER.batch_size], itertools.count()

            def losses(index: Any = index, numbers: Any = numbers, step: int = step) -> tuple[Tensor, Tensor]:
                with one_pass(model, passes, step, next(numbers)) if passes else contextlib.nullcontext():
                    each = cross_entropy(model(inputs[index]), labels[index])
                return by_domain(each, domains[index], len(split.sources))

            optimizer.step(losses)


def _running_apart(model: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """How far the running means and variances lie apart, relative to their length at the start; 0 without any."""
    ours, theirs, begin = (
        {name: value for name, value in m.named_buffers() if value.is_floating_point()} for m in (model, other, start)
    )
    return float(norm({name: ours[name] - theirs[name] for name in ours}) / norm(begin)) if ours else 0.0


# --- what training mode does in the two passes of a step, and dropout: beside code-sam-eval-mode ---


@functools.cache
def passes_training(network: Network = normalised, *, control: Network = digits_mlp) -> Simulation:
    r"""DISAM's runs with the options of ``disam-theory train`` that two plain passes amount to, less its defaults.

    One at a time: dropout's mask in the second pass, what batch norm's statistics are of, and whether there is dropout.
    ``control`` is a network that the first two should not move. In training mode batch
    norm's running statistics have no part in the steps: they move what is evaluated and not the weights.
    """
    choices = (Options(), Options(dropout_mask="new"), Options(batch_norm="both"))
    bare = _start(control, 0)
    ends = [parameters_of(_passes(bare, 0, options)) for options in choices]
    if any(not torch.equal(end[name], ends[0][name]) for end in ends for name in end):
        raise ComputationError("without batch norm and dropout the passes of a step should be the same")
    start = [_start(network, seed) for seed in range(SEEDS)]
    plain, masks, both = ([_passes(model, k, options) for k, model in enumerate(start)] for options in choices)
    without = [_passes(model, k, Options(), dropout=0.0) for k, model in enumerate(start)]
    compared = {
        "a mask of dropout in each pass, less one a step": (masks, plain),
        "batch norm's statistics of both passes, less of the first": (both, plain),
        "dropout of 0.5, less none": (plain, without),
    }
    splits = [split_of(SUITES[0], seed) for seed in range(SEEDS)]
    values = {what: _mode_values(*pair, start, splits) for what, pair in compared.items()}
    rows = [row for what, each in values.items() for row in _rows({"runs": what}, each)]
    unmoved = {"without_batch_norm_and_dropout": "the first two end at the same weights to the last bit"}
    least = min(min(each[DISTANCE]) for each in values.values())
    return Simulation("DISAM with batch norm and dropout", least, rows, {"control": unmoved})


def _passes(start: nn.Module, seed: int, options: Options, *, dropout: float = 0.5) -> nn.Module:
    """DISAM's run from ``start`` on."""
    model = copy.deepcopy(start)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    options = replace(options, seed=2 * seed + 1)
    _fine_tune(model, split_of(SUITES[0], seed), options.seed, "disam", "train", passes=options)
    return model


# --- the defaults: code-defaults ---


@functools.cache
def defaults_training(released: Settings, command: Settings, paper: Settings) -> Simulation:
    r"""Runs with the released defaults against the paper's; whether they, and those of the README's command, are ERM's.

    Beside them, what the released $\rho$ does alone, in the paper's loop.
    """
    splits = [split_of(SUITES[0], seed) for seed in range(SEEDS)]
    alone = replace(paper, rho=released.rho)
    ours, readme, rho, printed, erm = _trained(
        [released, command, alone, paper, replace(paper, algorithm="erm")], splits
    )
    rows = []
    for case, runs in (("the released defaults", ours), ("the released rho alone", rho)):
        values = {DISTANCE: _apart(runs, printed)} | _differences(_mlps(runs), _mlps(printed), splits)
        rows += _rows({"runs": f"{case} less the paper's"}, values)
    erms = {"released_defaults": _same(ours, erm), "readme_command": _same(readme, erm), "paper": _same(printed, erm)}
    what = "the embedded study's network"
    return Simulation(what, min(_apart(ours, printed)), rows, {"ends_where_erm_does": erms})


def _same(first: Sequence[Result], second: Sequence[Result]) -> bool:
    """Whether each pair of runs ends at the same weights to the last bit."""
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a.params[name], b.params[name]) for a, b in pairs for name in a.params)
