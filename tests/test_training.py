"""Algorithm 1 against hand-written PyTorch loops; a stacked run equals the run alone; divergence is said."""

import math

import pytest
import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.domains import load_suite
from disam_theory.errors import UsageError
from disam_theory.models import digits_mlp
from disam_theory.traces import TraceWriter, read_trace
from disam_theory.training import Run, train


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def deep():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def convnet():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 3))


def header(split):
    return {"domains": [d.name for d in split.sources], "sizes": [len(d) for d in split.sources], "settings": {}}


def by_hand(model, split, seed, *, rho, lam, lr, steps, momentum=0.0, decay=0.0, samples=False):
    """Full-batch ERM (rho 0), SAM (lam 0) or DISAM with plain autograd and torch.optim.SGD, in float64."""
    torch.manual_seed(seed)
    net = model().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    sizes = torch.tensor([float(len(d)) for d in split.sources], dtype=torch.float64)
    alpha = sizes / sizes.sum()
    criterion = nn.CrossEntropyLoss()
    rows = []
    for _ in range(steps):
        losses = torch.stack([criterion(net(d.inputs), d.labels) for d in split.sources])
        p = alpha if samples else torch.full_like(alpha, 1 / len(alpha))
        variance = (p * (losses - (p * losses).sum()) ** 2).sum()
        grads = torch.autograd.grad((alpha * losses).sum() - lam * variance, list(net.parameters()))
        length = torch.cat([g.flatten() for g in grads]).norm()
        steps_up = [rho * g / length for g in grads]
        with torch.no_grad():
            for parameter, up in zip(net.parameters(), steps_up, strict=True):
                parameter += up
        optimizer.zero_grad()
        ascent = torch.stack([criterion(net(d.inputs), d.labels) for d in split.sources])
        (alpha * ascent).sum().backward()
        with torch.no_grad():
            for parameter, up in zip(net.parameters(), steps_up, strict=True):
                parameter -= up
        rows.append((losses.detach(), ascent.detach()))
        optimizer.step()
    return dict(net.named_parameters()), rows


CASES = {
    "erm": {},
    "sam": {"rho": 0.1},
    "disam": {"rho": 0.1, "lam": 0.3},
    "disam with momentum and decay": {"rho": 0.1, "lam": 0.3, "momentum": 0.9, "weight_decay": 0.01},
    "disam, one backward pass": {"rho": 0.1, "lam": 0.3, "ascent_gradient": "weights"},
    "disam, variance over samples": {"rho": 0.1, "lam": 0.3, "variance": "samples"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", [mlp, convnet])
def test_five_steps_equal_a_hand_written_loop(case, model, make_split, tmp_path):
    split = make_split(shape=(4,) if model is mlp else (1, 6, 6))
    options = CASES[case]
    settings = Settings(case.split()[0].strip(","), lr=0.2, steps=5, sampling="full", **options)
    writer = TraceWriter(tmp_path / "t.jsonl", header(split))
    (result,) = train(model, [Run(settings, split, 3)], writers=[writer], dtype=torch.float64)
    params, rows = by_hand(
        model,
        split,
        3,
        rho=settings.radius,
        lam=settings.strength,
        lr=0.2,
        steps=5,
        momentum=settings.momentum,
        decay=settings.weight_decay,
        samples=settings.variance == "samples",
    )
    for name, value in params.items():
        torch.testing.assert_close(result.params[name], value.detach(), rtol=1e-12, atol=1e-13)
    trace = read_trace(tmp_path / "t.jsonl")
    for at, column in enumerate(("losses", "losses_ascent")):
        expected = torch.stack([row[at] for row in rows])
        torch.testing.assert_close(
            torch.from_numpy(trace.steps[column]), expected, rtol=1e-8, atol=0
        )  # nine digits kept


def test_the_official_variance_differs_from_the_papers(make_split):
    split = make_split()
    ends = [
        train(mlp, [Run(Settings("disam", rho=0.1, lam=0.5, lr=0.2, steps=5, sampling="full", variance=v), split, 3)])
        for v in ("domains", "samples")
    ]
    assert not torch.equal(ends[0][0].params["0.weight"], ends[1][0].params["0.weight"])


def grid(model, splits, **common):
    arms = [
        Settings("erm", **common),
        Settings("sam", rho=0.05, **common),
        Settings("disam", rho=0.05, lam=0.1, **common),
        Settings("disam", rho=0.5, lam=1.0, lr=0.02, momentum=0.9, weight_decay=1e-3, **common),
    ]
    return [Run(arm, split, seed) for split in splits for arm in arms for seed in (0, 7)]


@pytest.mark.parametrize("sampling", ["pooled", "stratified", "full"])
@pytest.mark.parametrize("model", [mlp, convnet])
def test_stacked_runs_are_bit_identical_to_runs_alone(model, sampling, make_split, tmp_path):
    shape = (4,) if model is mlp else (1, 6, 6)
    splits = [make_split(shape=shape), make_split(shape=shape, rng=9)]
    runs = grid(model, splits, steps=8, sampling=sampling, batch_size=6)
    stacked = [TraceWriter(tmp_path / f"stacked{r}.jsonl", header(run.split)) for r, run in enumerate(runs)]
    together = train(model, runs, writers=stacked, evaluate_every=3)
    for r in range(0, len(runs), 3):
        writer = TraceWriter(tmp_path / f"alone{r}.jsonl", header(runs[r].split))
        (alone,) = train(model, [runs[r]], writers=[writer], evaluate_every=3)
        for name, value in alone.params.items():
            assert torch.equal(value, together[r].params[name])
        assert (tmp_path / f"alone{r}.jsonl").read_bytes() == (tmp_path / f"stacked{r}.jsonl").read_bytes()


def test_the_studys_runs_are_bit_identical_to_runs_alone():
    split = load_suite("digits-rotated").split("rot50")
    runs = [Run(s, split, seed) for s in (Settings("sam", steps=6), Settings("disam", steps=6)) for seed in range(4)]
    together = train(digits_mlp, runs)
    for r in (0, 5):
        (alone,) = train(digits_mlp, [runs[r]])
        assert all(torch.equal(value, together[r].params[name]) for name, value in alone.params.items())


def test_an_absent_domain_is_null_in_the_trace_and_has_no_weight(make_split, tmp_path):
    split = make_split(sizes=(40, 2, 40))
    writer = TraceWriter(tmp_path / "t.jsonl", header(split))
    train(mlp, [Run(Settings("disam", steps=10, batch_size=4, rho=0.1, lam=5.0), split, 0)], writers=[writer])
    trace = read_trace(tmp_path / "t.jsonl")
    absent = ~torch.from_numpy(trace.steps["losses"]).isfinite()
    assert absent.any()
    assert not absent.all(1).any()
    beta = torch.from_numpy(trace.steps["beta"])
    assert (beta[absent] == 0).all()
    torch.testing.assert_close(beta.sum(1), torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-6)
    # the variance is over the domains present: recompute beta of a step by Eq. 8 from its batch's losses
    step = int(absent.any(1).nonzero()[0])
    here = ~absent[step]
    losses = torch.from_numpy(trace.steps["losses"])[step][here]
    shares = beta[step][here] + 2 * 5.0 / here.sum() * (losses - losses.mean())
    torch.testing.assert_close(shares * 4, (shares * 4).round(), rtol=0, atol=1e-4)  # whole numbers of 4 samples


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_schedules(momentum):
    assert Settings("sam", lr=0.5, schedule="inverse-sqrt").lr_at(3) == 0.25
    step = Settings("sam", lr=0.5, schedule="step", steps=10, momentum=momentum)
    assert [step.lr_at(t) for t in (0, 7, 8, 9)] == [0.5, 0.5, 0.05, 0.05]
    assert Settings("sam", lr=0.5).lr_at(299) == 0.5
    cosine = Settings("sam", lr=0.5, schedule="cosine", steps=10)
    assert [cosine.lr_at(t) for t in (0, 5, 10)] == pytest.approx([0.5, 0.25, 0.0], abs=1e-15)


def test_a_diverged_run_is_marked_and_the_others_go_on(make_split, tmp_path):
    split = make_split()
    runs = [Run(Settings("sam", steps=6, lr=lr, sampling="full"), split, 0) for lr in (0.1, 1e38, 0.1)]
    writers = [TraceWriter(tmp_path / f"{r}.jsonl", header(split)) for r in range(3)]
    results = train(deep, runs, writers=writers)
    assert results[0].diverged is None
    assert "not finite at step 1 in domain 'source0'" in results[1].diverged
    assert torch.equal(results[0].params["0.weight"], results[2].params["0.weight"])
    traces = [read_trace(tmp_path / f"{r}.jsonl") for r in range(3)]
    assert [trace.end for trace in traces] == ["finished", "diverged", "finished"]
    assert len(traces[1].steps["lr"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "samm"}, "unknown algorithm 'samm': did you mean 'sam'"),
        ({"rho": 0.0}, "rho is 0.0"),
        ({"rho": -1.0}, "rho is -1.0"),
        ({"rho": math.nan}, "rho is nan"),
        ({"lam": -math.inf}, "lambda is -inf"),
        ({"lam": math.inf}, "lambda is inf"),
        ({"lr": 0.0}, "learning rate is 0.0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch size 0"),
        ({"sampling": "pool"}, "unknown sampling 'pool': did you mean 'pooled'"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"variance": "domain"}, "did you mean 'domains'"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(options, message):
    with pytest.raises(UsageError, match=message):
        Settings(**options)


def test_erm_needs_no_radius():
    assert Settings("erm", rho=0.0).radius == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 7}, "differ in steps"),
        ({"batch_size": 3}, "differ in batch_size"),
        ({"sampling": "full"}, "sampling"),
    ],
)
def test_runs_that_cannot_be_stacked_are_refused(make_split, change, message):
    split = make_split()
    common = {"steps": 4, "batch_size": 5, "sampling": "pooled"}
    with pytest.raises(UsageError, match=message):
        train(mlp, [Run(Settings(**common), split, 0), Run(Settings(**{**common, **change}), split, 0)])


def test_stacking_needs_equal_domains_and_a_model_without_buffers(make_split):
    few, many = make_split(sizes=(5, 6)), make_split(sizes=(5, 6, 7))
    with pytest.raises(UsageError, match="number of source domains"):
        train(mlp, [Run(Settings(), few, 0), Run(Settings(), many, 0)])
    with pytest.raises(UsageError, match="number of samples"):
        train(mlp, [Run(Settings(sampling="full"), s, 0) for s in (few, make_split(sizes=(5, 7)))])
    with pytest.raises(UsageError, match="batch norm"):
        train(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), [Run(Settings(), few, 0)])
    with pytest.raises(UsageError, match="no runs"):
        train(mlp, [])
