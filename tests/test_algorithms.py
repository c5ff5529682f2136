"""SAM's relatives: steps by hand, plain loops, a stack of all of them, divergence, and the names of their settings."""

import itertools
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from disam_theory.algorithms import Settings, StepRecords, ascent_point, gradual_point, relatives
from disam_theory.errors import UsageError
from disam_theory.perturbations import (
    WEAKER,
    adaptive_step,
    ascent_step,
    dot,
    matching_step,
    norm,
    relative_step,
    surrogate_gap_direction,
)
from disam_theory.traces import TraceWriter, read_trace
from disam_theory.training import Run, _domain_orders, train

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def vector(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def test_asams_step_by_hand():
    """w = (2, -1), eta = 1, g = (1, 2): T = (3, 2), Tg = (3, 4) of length 5, T^2 g = (9, 8)."""
    step = adaptive_step(vector(1.0, 2.0), vector(2.0, -1.0), number(0.5), number(1.0))
    torch.testing.assert_close(step["w"], 0.1 * torch.tensor([9.0, 8.0], dtype=torch.float64), **EXACT)


def test_asams_step_is_the_farthest_uphill_in_its_ellipsoid():
    r"""It maximises $\langle g,\epsilon\rangle$ over $\lVert T^{-1}\epsilon\rVert\leq\rho$."""
    generator = torch.Generator().manual_seed(0)
    g, w, other = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    step = adaptive_step({"w": g}, {"w": w}, number(0.3), number(0.01))["w"]
    scale = w.abs() + 0.01
    assert float((step / scale).norm()) == pytest.approx(0.3, rel=1e-12)
    for turn in (1e-1, 1e-3, -1e-3):
        inside = step / scale + turn * other
        near = scale * 0.3 * inside / inside.norm()
        assert float(g @ near) < float(g @ step)


def test_asam_does_not_see_a_rescaling_of_the_weights():
    r"""With $\eta=0$, $w\to Aw$ and $g\to A^{-1}g$ take $\epsilon$ to $A\epsilon$: the reason for ASAM."""
    w, g, a = vector(1.0, -2.0, 0.5), vector(0.3, 0.1, -2.0), number([4.0, 0.25, 2.0])
    step = adaptive_step(g, w, number(0.5), number(0.0))["w"]
    scaled = adaptive_step({"w": g["w"] / a}, {"w": a * w["w"]}, number(0.5), number(0.0))["w"]
    torch.testing.assert_close(scaled, a * step, **EXACT)


def test_sagms_step_by_hand():
    """g = (3, 4), rho = 1, alpha = 1/10: (1/5 - 1/10) g; with alpha = 1/2 it goes downhill."""
    assert matching_step(vector(3.0, 4.0), number(1.0), number(0.1))["w"].tolist() == pytest.approx([0.3, 0.4], 1e-12)
    assert matching_step(vector(3.0, 4.0), number(1.0), number(0.5))["w"].tolist() == pytest.approx([-0.9, -1.2], 1e-12)


def test_gsams_direction_by_hand():
    """up = (2, 0), g = (3, 5): the orthogonal part is (0, 5)."""
    direction = surrogate_gap_direction(vector(3.0, 5.0), vector(2.0, 0.0), number(0.4))
    assert direction["w"].tolist() == pytest.approx([2.0, -2.0], abs=1e-15)


def test_gsams_direction_keeps_the_descent_of_the_perturbed_loss():
    r"""$\langle d,\nabla L(w^{asc})\rangle=\lVert\nabla L(w^{asc})\rVert^2$ for every alpha; nothing else is kept."""
    generator = torch.Generator().manual_seed(1)
    g, up = ({"a": torch.randn(3, 2, generator=generator, dtype=torch.float64)} for _ in range(2))
    for alpha in (0.0, 0.4, 3.0):
        direction = surrogate_gap_direction(g, up, number(alpha))
        assert float(dot(direction, up)) == pytest.approx(float(dot(up, up)), rel=1e-12)
        assert (float(norm(direction)) > float(norm(up)) * (1 + 1e-9)) == (alpha > 0)


def test_weaker_sams_step_by_hand():
    """grad L = (3, 4), grad L_DI = (4, 3) of cosine 24/25: rho = 5 becomes 4.8, along (3, 4)/5."""

    def step(plain, inspired):
        return relative_step("weaker-sam", inspired, plain, {}, number(5.0), number(math.nan))["w"].tolist()

    assert step(vector(3.0, 4.0), vector(4.0, 3.0)) == pytest.approx([2.88, 3.84], rel=1e-12)
    assert step(vector(3.0, 4.0), vector(-4.0, -3.0)) == pytest.approx([-2.88, -3.84], rel=1e-12)
    for pair in [((0.0, 0.0), (4.0, 3.0)), ((3.0, 4.0), (0.0, 0.0))]:
        assert step(*(vector(*values) for values in pair)) == [0.0, 0.0]


@pytest.mark.parametrize("algorithm", ["asam", "sagm"])
def test_a_zero_gradient_gives_no_ascent(algorithm):
    zero = vector(0.0, 0.0)
    step = adaptive_step(zero, vector(1.0, 2.0), number(0.5), number(0.01))
    if algorithm == "sagm":
        step = matching_step(zero, number(0.5), number(0.1))
    assert step["w"].tolist() == [0.0, 0.0]


def test_a_zero_gradient_at_the_ascent_point_leaves_all_of_the_other_orthogonal():
    direction = surrogate_gap_direction(vector(3.0, 5.0), vector(0.0, 0.0), number(0.4))
    assert direction["w"].tolist() == pytest.approx([-1.2, -2.0])


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def convnet():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 3))


def header(split):
    return {"domains": [d.name for d in split.sources], "sizes": [len(d) for d in split.sources], "settings": {}}


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def losses_of(net, split):
    return torch.stack([nn.functional.cross_entropy(net(d.inputs), d.labels) for d in split.sources])


def coral(net, split):
    """DomainBed's AbstractMMD without the Gaussian kernel: mean over pairs of the two mean squares."""
    total, pairs = 0.0, 0
    features = [net[:-1](d.inputs) for d in split.sources]
    for i, x in enumerate(features):
        for y in features[i + 1 :]:
            covariances = [(z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1) for z in (x, y)]
            total = total + (x.mean(0) - y.mean(0)).pow(2).mean() + (covariances[0] - covariances[1]).pow(2).mean()
            pairs += 1
    return total / pairs


def fishr(net, split, averages, *, keep):
    """DomainBed's Fishr with a gradient for each sample; ``averages``: a MovingAverage's ema_data for each domain."""
    smoothed, head = [], list(net[-1].parameters())
    for i, d in enumerate(split.sources):
        outputs = net(d.inputs)
        each = [nn.functional.cross_entropy(o, y) for o, y in zip(outputs, d.labels, strict=True)]
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(e, head, create_graph=True)]) for e in each]
        grads = torch.stack(grads)
        variance = (grads - grads.mean(0, keepdim=True)).pow(2).mean(0)
        average = 0.95 * averages.get(i, torch.zeros_like(variance)) + (1 - 0.95) * variance
        smoothed.append(average / (1 - 0.95))
        if keep:
            averages[i] = average.detach()
    mean = torch.stack(smoothed).mean(0)
    return sum((v - mean).pow(2).mean() for v in smoothed) / len(smoothed)


def plain_dgsam(model, split, seed, settings):
    """Song et al.'s loop: a domain after the other, the first again; the domains' order is the study's."""
    torch.manual_seed(seed)
    net = model().double()
    params, M, velocity = list(net.parameters()), len(split.sources), 0.0
    orders = torch.Generator().manual_seed(seed + 2**33)
    for _ in range(settings.steps):
        w, order = flat(params), torch.randperm(M, generator=orders).tolist()
        losses = losses_of(net, split).detach()
        total = torch.zeros_like(w)
        for i in [*order, order[0]]:
            d = split.sources[i]
            g = flat(torch.autograd.grad(nn.functional.cross_entropy(net(d.inputs), d.labels), params))
            length = settings.rho * (1 - 2 * settings.strength * (losses[i] - losses.mean()))
            nn.utils.vector_to_parameters(flat(params) + length * g / g.norm(), params)
            total += g
        velocity = settings.momentum * velocity + total / (M + 1) * M + settings.weight_decay * w
        nn.utils.vector_to_parameters(w - settings.lr * velocity, params)
    return dict(net.named_parameters())


def plain_loop(model, split, seed, settings):
    """The papers' loops over one flat vector of weights, in float64; independent of the package's formulas."""
    if settings.algorithm == "dgsam":
        return plain_dgsam(model, split, seed, settings)
    torch.manual_seed(seed)
    net = model().double()
    averages = {}
    sizes = torch.tensor([float(len(d)) for d in split.sources], dtype=torch.float64)
    alpha, velocity = sizes / sizes.sum(), 0.0
    q = torch.ones_like(alpha)
    move = lambda w: nn.utils.vector_to_parameters(w, net.parameters())  # noqa: E731

    def gradient(value):
        return flat(torch.autograd.grad(value, list(net.parameters()), retain_graph=True))

    def objective(losses, *, ascended=False):
        if settings.objective == "coral":
            return (alpha * losses).sum() + settings.coral_penalty * coral(net, split)
        if settings.objective == "fishr":
            return (alpha * losses).sum() + settings.fishr_penalty * fishr(net, split, averages, keep=ascended)
        if settings.objective == "vrex":  # DomainBed: ((losses - mean) ** 2).mean()
            return (alpha * losses).sum() + settings.vrex_penalty * ((losses - losses.mean()) ** 2).mean()
        return (q * losses).sum() if settings.objective == "groupdro" else (alpha * losses).sum()

    for _ in range(settings.steps):
        w = flat(net.parameters())
        losses = losses_of(net, split)
        q = q * torch.exp(settings.groupdro_eta * losses.detach())
        q = q / q.sum()
        variance = ((losses - losses.mean()) ** 2).mean()
        g = gradient(objective(losses))
        inspired = gradient((alpha * losses).sum() - settings.strength * variance)
        if settings.algorithm == "asam":
            t = w.abs() + settings.asam_eta
            move(w + settings.rho * t**2 * inspired / (t * inspired).norm())
        elif settings.algorithm == "sagm":
            move(w + (settings.rho / inspired.norm() - settings.sagm_alpha) * inspired)
        elif settings.algorithm.startswith("weaker"):
            plain = gradient((alpha * losses).sum())
            along = plain / plain.norm()
            less = settings.sagm_alpha * plain if settings.algorithm == "weaker-sagm" else 0
            move(w + settings.rho * (along @ inspired / inspired.norm()) * along - less)
        else:
            move(w + settings.radius * inspired / inspired.norm())
        up = gradient(objective(losses_of(net, split), ascended=True))
        if settings.algorithm.endswith("gsam"):
            cosine = (g @ up) / (g.norm() * up.norm())
            up = up - settings.gsam_alpha * (g - cosine * g.norm() * up / up.norm())
        elif settings.algorithm.endswith("sagm"):
            up = g + up
        velocity = settings.momentum * velocity + up + settings.weight_decay * w
        move(w - settings.lr * velocity)
    return dict(net.named_parameters())


ARMS = {
    "asam": {"rho": 0.5},
    "asam+di": {"rho": 0.5, "lam": 0.3, "asam_eta": 0.1},
    "gsam": {"rho": 0.1},
    "gsam+di": {"rho": 0.1, "lam": 0.3, "gsam_alpha": 0.7},
    "sagm": {"rho": 0.1},
    "sagm+di": {"rho": 0.1, "lam": 0.3, "sagm_alpha": 0.05},
    "disam+against": {"rho": 0.1, "lam": -0.3},
    "weaker-sam": {"rho": 0.3, "lam": 3.0},
    "weaker-gsam": {"rho": 0.3, "lam": 3.0, "gsam_alpha": 0.7},
    "weaker-sagm": {"rho": 0.3, "lam": 3.0, "sagm_alpha": 0.05},
    "dgsam": {"rho": 0.1},
    "dgsam+di": {"rho": 0.1, "lam": 2.0},
}
OBJECTIVES = {
    "average": {},
    "vrex": {"objective": "vrex", "vrex_penalty": 2.0},
    "groupdro": {"objective": "groupdro", "groupdro_eta": 0.5},
    "coral": {"objective": "coral", "coral_penalty": 2.0},
    "fishr": {"objective": "fishr", "fishr_penalty": 3.0},
}
PAIRS = [(a, o) for a in [*ARMS, "erm", "sam", "disam"] for o in OBJECTIVES if o == "average" or "dgsam" not in a]


@pytest.mark.parametrize(("arm", "objective"), PAIRS)
@pytest.mark.parametrize("model", [mlp, convnet])
def test_five_steps_equal_a_plain_loop(arm, objective, model, make_split):
    split = make_split(shape=(4,) if model is mlp else (1, 6, 6))
    settings = Settings(
        arm.split("+")[0],
        lr=0.2,
        steps=5,
        sampling="full",
        momentum=0.9,
        weight_decay=0.01,
        **ARMS.get(arm, {"rho": 0.1}),
        **OBJECTIVES[objective],
    )
    (result,) = train(model, [Run(settings, split, 3)], dtype=torch.float64)
    for name, value in plain_loop(model, split, 3, settings).items():
        torch.testing.assert_close(result.params[name], value.detach(), **EXACT)


def test_every_arm_ends_elsewhere(make_split):
    """No option is without effect: all algorithms over all objectives, from the same start."""
    split = make_split()
    common = {"lr": 0.2, "steps": 3, "sampling": "full"}
    settings = [Settings(a.split("+")[0], **common, **ARMS.get(a, {}), **OBJECTIVES[o]) for a, o in PAIRS]
    ends = [flat(r.params.values()) for r in train(mlp, [Run(s, split, 0) for s in settings], dtype=torch.float64)]
    for i, end in enumerate(ends):
        assert all(float((end - other).abs().max()) > 1e-9 for other in ends[:i])


def stack_of_all(split, **common):
    arms = [Settings(name, **common) for name in ("erm", "sam", "disam")]
    arms += [Settings(arm.split("+")[0], **common, **options) for arm, options in ARMS.items()]
    arms += [Settings("disam", **common, **OBJECTIVES[o]) for o in OBJECTIVES if o != "average"]
    arms += [Settings("gsam", lam=0.2, **common, **OBJECTIVES[o]) for o in ("groupdro", "fishr")]
    arms += [Settings("sam", **common, **OBJECTIVES[o]) for o in ("coral", "fishr")]
    return [Run(arm, split, seed) for arm in arms for seed in (0, 7)]


@pytest.mark.parametrize("sampling", ["pooled", "stratified", "full"])
@pytest.mark.parametrize("model", [mlp, convnet])
def test_stacked_runs_are_bit_identical_to_runs_alone(model, sampling, make_split, tmp_path):
    split = make_split(shape=(4,) if model is mlp else (1, 6, 6))
    runs = stack_of_all(split, steps=6, sampling=sampling, batch_size=6)
    stacked = [TraceWriter(tmp_path / f"stacked{r}.jsonl", header(split)) for r in range(len(runs))]
    together = train(model, runs, writers=stacked, evaluate_every=3)
    for r in range(0, len(runs), 2):
        writer = TraceWriter(tmp_path / f"alone{r}.jsonl", header(split))
        (alone,) = train(model, [runs[r]], writers=[writer], evaluate_every=3)
        assert all(torch.equal(value, together[r].params[name]) for name, value in alone.params.items())
        assert (tmp_path / f"alone{r}.jsonl").read_bytes() == (tmp_path / f"stacked{r}.jsonl").read_bytes()


def deep():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_diverged_runs_are_marked_and_the_others_go_on(make_split, tmp_path):
    split = make_split()
    sound = stack_of_all(split, steps=5, sampling="full")
    broken = [
        Run(
            Settings(run.settings.algorithm, steps=5, lr=1e38, sampling="full", objective=run.settings.objective), *rest
        )
        for run in sound[::2]
        for rest in [(split, 0)]
    ]
    runs = [*broken, *sound]
    writers = [TraceWriter(tmp_path / f"{r}.jsonl", header(split)) for r in range(len(runs))]
    results = train(deep, runs, writers=writers)
    alone = train(deep, sound)
    for r, result in enumerate(results):
        trace = read_trace(tmp_path / f"{r}.jsonl")
        if r < len(broken):
            assert "not finite at step" in result.diverged
            assert trace.end == "diverged"
            assert all(math.isfinite(x) for x in trace.steps["grad_norm_ascent"])
        else:
            same = alone[r - len(broken)].params
            assert (result.diverged, trace.end) == (None, "finished")
            assert all(torch.equal(value, same[name]) for name, value in result.params.items())


def test_a_run_that_diverged_long_ago_does_not_stop_the_others(make_split, tmp_path):
    """Its trace is closed when the others' are flushed, every 50 steps."""
    split = make_split()
    runs = [Run(Settings("gsam", steps=52, lr=lr, sampling="full"), split, 0) for lr in (1e38, 0.1)]
    writers = [TraceWriter(tmp_path / f"{r}.jsonl", header(split)) for r in range(2)]
    train(deep, runs, writers=writers)
    traces = [read_trace(tmp_path / f"{r}.jsonl") for r in range(2)]
    assert [(trace.end, len(trace.steps["lr"])) for trace in traces] == [("diverged", 1), ("finished", 52)]


def test_an_update_that_overflows_is_a_divergence_though_both_gradients_are_finite(make_split, tmp_path):
    """GSAM with a huge alpha: nothing at w or at the ascent point is infinite, the update is."""
    split = make_split()
    run = Run(Settings("gsam", gsam_alpha=1e300, steps=1, sampling="full"), split, 0)
    (result,) = train(deep, [run], writers=[TraceWriter(tmp_path / "t.jsonl", header(split))])
    assert result.diverged == "not finite at step 0 in the gradient"
    assert read_trace(tmp_path / "t.jsonl").end == "diverged"


def test_the_pure_step_of_a_parabola():
    """L = (w1^2 + 4 w2^2)/2 at (1, 1) with rho = sqrt(17)/10: g = (1, 4), w_asc = (1.1, 1.4), up = (1.1, 5.6)."""
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)

    def step(settings):
        return ascent_point(
            lambda p: 0.5 * (curvature * p["w"] ** 2).sum(-1, keepdim=True),
            {"w": torch.ones(1, 2, dtype=torch.float64)},
            alpha=one,
            present=one,
            rho=number([settings.rho]),
            lam=number([settings.strength]),
            relatives=relatives([settings]),
        )

    rho, up, g = math.sqrt(17) / 10, number([1.1, 5.6]), number([1.0, 4.0])
    assert step(Settings("sam", rho=rho)).update["w"][0].tolist() == pytest.approx(up.tolist(), rel=1e-12)
    along = (1.1 + 22.4) / (1.21 + 31.36)
    found = step(Settings("gsam", rho=rho, gsam_alpha=0.5)).update["w"][0]
    torch.testing.assert_close(found, up - 0.5 * (g - along * up), **EXACT)
    found = step(Settings("sagm", rho=rho, sagm_alpha=0.1))  # (1/10 - 1/10) g: no ascent at all
    torch.testing.assert_close(found.epsilon["w"][0], torch.zeros(2).double(), **EXACT)
    torch.testing.assert_close(found.update["w"][0], 2 * g, **EXACT)
    found = step(Settings("asam", rho=1.0, asam_eta=1.0)).epsilon["w"][0]  # T = 2: twice SAM's step of length 1
    torch.testing.assert_close(found, 2 * ascent_step({"w": g}, number(1.0))["w"], **EXACT)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_trace_has_the_cosine_between_sams_direction_and_the_runs_own(objective, make_split, tmp_path):
    """Of the plain loss, whatever the objective; weaker SAM's radius is rho times it; SAM's is 1, at w = 0 null."""
    split = make_split()
    common = {"lr": 0.2, "steps": 3, "sampling": "full", "rho": 0.3, **OBJECTIVES[objective]}
    runs = [Run(Settings(name, lam=3.0, **common), split, 1) for name in ("disam", "weaker-sam", "sam")]
    writers = [TraceWriter(tmp_path / f"{r}.jsonl", header(split)) for r in range(3)]
    train(mlp, runs, writers=writers, dtype=torch.float64)
    traces = [read_trace(tmp_path / f"{r}.jsonl") for r in range(3)]
    torch.manual_seed(1)
    net = mlp().double()
    losses = losses_of(net, split)
    sizes = torch.tensor([float(len(d)) for d in split.sources], dtype=torch.float64)
    alpha = sizes / sizes.sum()
    plain = flat(torch.autograd.grad((alpha * losses).sum(), list(net.parameters()), retain_graph=True))
    inspired = (alpha * losses).sum() - 3.0 * ((losses - losses.mean()) ** 2).mean()
    inspired = flat(torch.autograd.grad(inspired, list(net.parameters())))
    cosine = float(plain @ inspired / plain.norm() / inspired.norm())
    assert 0 < cosine < 0.999
    assert [trace.steps["cos_sam"][0] for trace in traces] == pytest.approx([cosine, cosine, 1.0], rel=1e-8)
    assert traces[1].steps["beta"][0] == pytest.approx(alpha.tolist(), rel=1e-8)
    assert traces[0].steps["beta"][0] != pytest.approx(alpha.tolist(), rel=1e-2)


def test_the_cosine_is_null_where_a_gradient_is_zero():
    one = torch.ones(1, 1, dtype=torch.float64)
    step = ascent_point(
        lambda p: (p["w"] ** 2).sum(-1, keepdim=True),
        {"w": torch.zeros(1, 2, dtype=torch.float64)},
        alpha=one,
        present=one,
        rho=number([0.1]),
        lam=number([0.1]),
    )
    assert math.isnan(StepRecords().rows(0, [0.1], step, one)[0]["cos_sam"])


def test_a_trace_of_before_the_cosine_reads_as_nan(make_split, tmp_path):
    split, path = make_split(), tmp_path / "t.jsonl"
    train(mlp, [Run(Settings("disam", steps=3), split, 0)], writers=[TraceWriter(path, header(split))])
    new = read_trace(path)
    path.write_text(re.sub(r'"cos_sam":[^,]*,', "", path.read_text()))
    old = read_trace(path)
    assert np.isfinite(new.steps["cos_sam"]).all()
    assert old.steps["cos_sam"].shape == (3,)
    assert np.isnan(old.steps["cos_sam"]).all()
    assert old.steps["beta"].tolist() == new.steps["beta"].tolist()


@pytest.mark.parametrize("lam", [0.0, 0.25])
def test_dgsams_step_by_hand_with_an_absent_domain(lam):
    """L_i = |w - c_i|^2/2 at 0, c = (-3, 0) and (0, -4), domain 1 absent; order 1, 2, 0: passes 2, 0, 2.

    g_1 = (0, 4), so that w is at (0, l_2) with l_i the length of a step; g_2 = (3, l_2), and w is at l_0 along g_2
    beyond; g_3 = w + (0, 4). L = (4.5, 8): beta_i/alpha_i = 1 - 2 lambda (L_i - 6.25) = 1.875 and 0.125 at 1/4.
    """
    centres = number([[-3.0, 0.0], [99.0, 99.0], [0.0, -4.0]])
    last, first = (0.125, 1.875) if lam else (1.0, 1.0)
    found = gradual_point(
        lambda p: 0.5 * ((p["w"].unsqueeze(1) - centres) ** 2).sum(-1),
        {"w": torch.zeros(1, 2, dtype=torch.float64)},
        order=torch.tensor([[1, 2, 0]]),
        present=number([[1.0, 0.0, 1.0]]),
        rho=number([0.1]),
        lam=number([lam]) if lam else None,
    )
    second = number([3.0, 0.1 * last])
    epsilon = number([0.0, 0.1 * last]) + 0.1 * first * second / second.norm()
    total = number([0.0, 4.0]) + second + epsilon + number([0.0, 4.0])
    torch.testing.assert_close(found.epsilon["w"][0], epsilon, **EXACT)
    torch.testing.assert_close(found.update["w"][0], 2 / 3 * total, **EXACT)
    torch.testing.assert_close(found.beta[0], number([first / 2, 0.0, last / 2]), **EXACT)
    torch.testing.assert_close(found.losses_ascent[0], 0.5 * ((epsilon - centres) ** 2).sum(1), **EXACT)
    torch.testing.assert_close(found.plain["w"][0], number([1.5, 2.0]), **EXACT)
    torch.testing.assert_close(found.gradient_di["w"][0], number([1.5 * first, 2.0 * last]), **EXACT)
    torch.testing.assert_close(found.gradient_ascent["w"][0], epsilon + number([1.5, 2.0]), **EXACT)


def test_dgsams_order_of_the_domains_is_random_and_the_seeds_own(make_split):
    split = make_split()
    orders = [_domain_orders(Run(Settings("dgsam", steps=40), split, seed), 3) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert {tuple(order) for order in orders[0].tolist()} == set(itertools.permutations(range(3)))


@pytest.mark.parametrize(
    ("algorithm", "objective"), [("dgsam", "average"), *itertools.product(("disam", "weaker-sam"), OBJECTIVES)]
)
def test_without_lambda_it_is_the_plain_one_bit_for_bit(algorithm, objective, make_split):
    """Also in company: a stack with lambda differentiates L_DI, one without does not."""
    split = make_split()
    common = {"steps": 6, "batch_size": 9, **OBJECTIVES[objective]}
    with_lambda = Settings(algorithm, lam=0.3, **common)
    without = Settings(algorithm, lam=0.0, **common)
    plain = Settings(algorithm if algorithm == "dgsam" else "sam", **common)
    di, _ = train(mlp, [Run(s, split, 0) for s in (without, with_lambda)])
    (alone,) = train(mlp, [Run(plain, split, 0)])
    assert all(torch.equal(value, alone.params[name]) for name, value in di.params.items())


def test_lambda_turns_the_domain_inspired_form_on():
    assert [Settings(name).strength for name in ("erm", "sam", "disam")] == [0.0, 0.0, 0.1]
    assert [Settings(name).strength for name in ("asam", "gsam", "sagm", "dgsam")] == [0.0] * 4
    assert [Settings(name, lam=0.2).strength for name in ("asam", "gsam", "sagm")] == [0.2, 0.2, 0.2]
    assert {Settings(name).lam for name in ("erm", "sam", "disam", *WEAKER)} == {0.1}
    assert Settings("disam", lam=-0.2).strength == -0.2


def test_the_header_holds_the_options_in_force_and_gives_the_settings_back():
    """Traces of ERM, SAM and DISAM keep the header that they have always had."""
    old = "algorithm rho lam lr momentum weight_decay schedule steps sampling batch_size variance ascent_gradient"
    for name in ("erm", "sam", "disam"):
        assert list(Settings(name).header()) == old.split()
    assert set(Settings("gsam").header()) == {*old.split(), "gsam_alpha"}
    both = Settings("sagm", lam=0.1, objective="groupdro", groupdro_eta=0.5)
    assert set(both.header()) == {*old.split(), "sagm_alpha", "objective", "groupdro_eta"}
    assert Settings(**both.header()) == both
    assert both.header().items() <= asdict(both).items()


def test_names_tell_the_arms_apart():
    names = {
        "erm-pooled": Settings("erm"),
        "sam-rho0.05-pooled": Settings("sam"),
        "disam-rho0.05-lam0.1-full": Settings("disam", sampling="full"),
        "gsam-rho0.05-lam0-0.4-pooled": Settings("gsam"),
        "gsam-rho0.05-lam0.1-0.4-pooled": Settings("gsam", lam=0.1),
        "asam-rho0.5-lam0-0.1-pooled": Settings("asam", rho=0.5, asam_eta=0.1),
        "disam-rho0.05-lam0.1-vrex10-pooled": Settings("disam", objective="vrex"),
        "erm-groupdro0.01-pooled": Settings("erm", objective="groupdro"),
        "disam-rho0.05-lam-0.1-pooled": Settings("disam", lam=-0.1),
        "weaker-sam-rho0.05-lam0.1-pooled": Settings("weaker-sam"),
        "dgsam-rho0.05-lam0-pooled": Settings("dgsam"),
        "disam-rho0.05-lam0.1-coral1-pooled": Settings("disam", objective="coral"),
        "sam-rho0.05-fishr1000-pooled": Settings("sam", objective="fishr"),
    }
    assert {name: settings.name for name, settings in names.items()} == {name: name for name in names}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "gsa"}, "did you mean 'gsam'"),
        ({"algorithm": "gsam", "rho": 0.0}, "gsam needs a finite radius"),
        ({"algorithm": "gsam", "lam": math.nan}, "lambda is nan"),
        ({"algorithm": "weaker-sam", "rho": 0.0}, "weaker-sam needs a finite radius"),
        ({"algorithm": "weaker"}, "did you mean 'weaker-sam'"),
        ({"algorithm": "asam", "asam_eta": -0.1}, "asam_eta is -0.1"),
        ({"sagm_alpha": math.inf}, "sagm_alpha is inf"),
        ({"gsam_alpha": math.nan}, "gsam_alpha is nan"),
        ({"vrex_penalty": -1.0}, "vrex_penalty is -1"),
        ({"groupdro_eta": -1.0}, "groupdro_eta is -1"),
        ({"coral_penalty": -1.0}, "coral_penalty is -1"),
        ({"fishr_penalty": math.inf}, "fishr_penalty is inf"),
        ({"algorithm": "dgsam", "objective": "vrex"}, "no form for objective 'vrex'"),
        ({"objective": "vrx"}, "unknown objective 'vrx': did you mean 'vrex'"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(options, message):
    with pytest.raises(UsageError, match=message):
        Settings(**options)
