"""DISAM in anybody's loop: the study's own steps, the two halves, schedules, states, and what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

from disam_theory.algorithms import Settings
from disam_theory.errors import UsageError
from disam_theory.matching import coral_statistics, fishr_statistics
from disam_theory.optim import SharpnessAware, by_domain
from disam_theory.perturbations import WEAKER
from disam_theory.training import Run, train

EXACT = {"rtol": 1e-12, "atol": 1e-13}
OPTIONS = {
    "erm": {"algorithm": "erm"},
    "sam": {"algorithm": "sam"},
    "disam": {"lam": 0.3},
    "disam, variance over samples": {"lam": 0.3, "variance": "samples"},
    "asam+di": {"algorithm": "asam", "rho": 0.5, "lam": 0.3},
    "gsam": {"algorithm": "gsam"},
    "gsam+di": {"algorithm": "gsam", "lam": 0.3},
    "sagm+di": {"algorithm": "sagm", "lam": 0.3, "sagm_alpha": 0.05},
    "disam, lambda < 0": {"lam": -0.3},
    "weaker-sam": {"algorithm": "weaker-sam", "lam": 3.0},
    "weaker-gsam": {"algorithm": "weaker-gsam", "lam": 3.0},
    "vrex + weaker-sagm": {"algorithm": "weaker-sagm", "lam": 3.0, "objective": "vrex", "sagm_alpha": 0.05},
    "vrex + weaker-sam": {"algorithm": "weaker-sam", "lam": 3.0, "objective": "vrex", "vrex_penalty": 2.0},
    "vrex + disam": {"objective": "vrex", "vrex_penalty": 2.0},
    "groupdro + gsam": {"algorithm": "gsam", "objective": "groupdro", "groupdro_eta": 0.5},
    "dgsam": {"algorithm": "dgsam"},
    "dgsam+di": {"algorithm": "dgsam", "lam": 2.0},
    "coral + disam": {"objective": "coral", "coral_penalty": 2.0},
    "fishr + disam": {"objective": "fishr", "fishr_penalty": 3.0},
    "fishr + gsam": {"algorithm": "gsam", "objective": "fishr", "fishr_penalty": 3.0},
}


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def model_of(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return mlp().to(dtype)


@pytest.fixture
def data(make_split):
    split = make_split()
    inputs = torch.cat([d.inputs for d in split.sources])
    labels = torch.cat([d.labels for d in split.sources])
    return inputs, labels, torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])


def closure_of(model, data, M=3, objective="average"):
    inputs, labels, domains = data

    def closure():
        features = model[:-1](inputs)
        outputs = model[-1](features)
        given = by_domain(nn.functional.cross_entropy(outputs, labels, reduction="none"), domains, M)
        if objective == "coral":
            return *given, coral_statistics(features, domains, M)
        if objective == "fishr":
            return *given, fishr_statistics(features, outputs, labels, domains, M)
        return given

    return closure


def sgd(model, **options):
    return SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.01, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("case", OPTIONS)
def test_five_steps_equal_the_studys(case, make_split, data):
    split = make_split()
    settings = Settings(**OPTIONS[case], lr=0.2, steps=5, sampling="full", momentum=0.9, weight_decay=0.01)
    (result,) = train(mlp, [Run(settings, split, 3)], dtype=torch.float64)
    model = model_of(3)
    optimizer = sgd(model, **OPTIONS[case], rng=3 + 2**33)  # the study's order of the domains for seed 3
    for _ in range(5):
        optimizer.step(closure_of(model, data, objective=settings.objective))
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), result.params[name], **EXACT)


def test_a_step_by_hand():
    """L1 = x^2/2, L2 = (x^2 + 2y^2)/2 at (3, 4), equal shares: see the comments; lr = 1."""
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = SharpnessAware([w], torch.optim.SGD, rho=5.0, lam=0.0, lr=1.0)
    losses = lambda: torch.stack([w[0] ** 2 / 2, w[0] ** 2 / 2 + w[1] ** 2])  # noqa: E731
    optimizer.first_step(losses())  # grad L = (3, 4): the ascent is (3, 4) itself
    assert w.tolist() == pytest.approx([6.0, 8.0], rel=1e-12)
    optimizer.second_step(losses())  # grad L there = (6, 8)
    assert w.tolist() == pytest.approx([-3.0, -4.0], rel=1e-12)
    # L = (4.5, 20.5) at (-3, -4), mean 12.5: beta = (1/2, 1/2) - lambda (-8, 8) = (0.9, 0.1) at lambda = 1/20
    optimizer = SharpnessAware([w], torch.optim.SGD, rho=1.0, lam=0.05, lr=1.0)
    assert optimizer.first_step(losses()).tolist() == pytest.approx([4.5, 20.5], rel=1e-12)
    length = (3.0**2 + 0.8**2) ** 0.5  # sum beta grad = (-3, 0.1 * -8)
    assert w.tolist() == pytest.approx([-3 - 3 / length, -4 - 0.8 / length], rel=1e-12)


def test_the_documented_loop_runs_and_lowers_the_loss(data):
    model = model_of(0, torch.float32)
    batch = data[0].float(), *data[1:]
    optimizer = SharpnessAware(model.parameters(), torch.optim.AdamW, algorithm="gsam", lam=0.1, lr=0.01)
    first = optimizer.step(closure_of(model, batch))
    for _ in range(30):
        last = optimizer.step(closure_of(model, batch))
    assert first.shape == (3,)
    assert not last.requires_grad
    assert float(last.sum()) < float(first.sum())


def test_by_domain_gives_means_and_shares_and_nothing_for_the_absent():
    losses, shares = by_domain(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]), 3)
    assert losses.tolist() == [1.0, 0.0, 4.0]
    assert shares.tolist() == pytest.approx([1 / 3, 0.0, 2 / 3])


@pytest.mark.parametrize("case", ["disam", "gsam+di", "vrex + disam", "coral + disam", "fishr + disam"])
def test_an_absent_domain_is_as_one_that_does_not_exist(case, data):
    inputs, labels, domains = data
    kept = domains != 1
    ends = []
    for M, names in ((3, domains[kept]), (2, domains[kept] // 2)):
        model = model_of(0)
        optimizer = sgd(model, **OPTIONS[case])
        for _ in range(3):
            optimizer.step(closure_of(model, (inputs[kept], labels[kept], names), M, OPTIONS[case].get("objective")))
        ends.append(model)
    for a, b in zip(*(m.parameters() for m in ends), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("algorithm", ["sam", "disam", "asam", "gsam", "sagm", *WEAKER])
def test_a_zero_gradient_moves_nothing(algorithm):
    w = nn.Parameter(torch.zeros(2))
    optimizer = SharpnessAware([w], torch.optim.SGD, algorithm=algorithm, lam=0.1, lr=1.0)
    losses = lambda: torch.stack([w.square().sum(), 2 * w.square().sum()])  # noqa: E731
    optimizer.first_step(losses())
    assert w.tolist() == [0.0, 0.0]
    optimizer.second_step(losses())
    assert w.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("case", ["disam", "groupdro + gsam", "fishr + disam", "dgsam+di"])
def test_a_state_goes_on_where_it_was(case, data):
    """Through torch.save, weights only; options, GroupDRO's weights, Fishr's average and DGSAM's order come with it."""
    model = model_of(0)
    optimizer = sgd(model, **OPTIONS[case])
    objective = OPTIONS[case].get("objective")
    for _ in range(3):
        optimizer.step(closure_of(model, data, objective=objective))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = model_of(9)
    other.load_state_dict(weights)
    resumed = SharpnessAware(other.parameters(), torch.optim.SGD, algorithm="sam", rho=9.0, lr=7.0, momentum=0.9)
    resumed.load_state_dict(state)
    for _ in range(3):
        optimizer.step(closure_of(model, data, objective=objective))
        resumed.step(closure_of(other, data, objective=objective))
    assert same(model, other)
    resumed.param_groups[0]["lr"] = 0.0  # still the base optimizer's group
    resumed.step(closure_of(other, data, objective=objective))
    assert same(model, other)


def test_a_schedule_and_a_new_group_reach_the_base_optimizer(data):
    """One step at a rate of zero leaves the weights; the group added later has its own."""
    model, extra = model_of(0), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = sgd(model)
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t == 0))
    first = closure_of(model, data)
    closure = lambda: (first()[0] + extra.sum(), first()[1])  # noqa: E731
    before = copy.deepcopy(model)
    optimizer.step(closure)
    assert not same(model, before)
    assert extra.tolist() == pytest.approx([1 - 0.5 * 1.01] * 3)
    schedule.step()
    before = copy.deepcopy(model)
    optimizer.step(closure)
    assert same(model, before)


def test_parameters_that_no_loss_depends_on_stay(data):
    """As with torch's own optimizers, also under weight decay; frozen ones are not touched either."""
    model, idle = model_of(0), nn.Parameter(torch.ones(2, dtype=torch.float64))
    model[0].bias.requires_grad_(False)
    bias = model[0].bias.clone()
    for algorithm in ("disam", "gsam"):
        optimizer = SharpnessAware(
            [*model.parameters(), idle], torch.optim.SGD, algorithm=algorithm, lr=0.1, weight_decay=0.5
        )
        optimizer.step(closure_of(model, data))
    assert idle.tolist() == [1.0, 1.0]
    assert torch.equal(model[0].bias, bias)


def test_an_exception_in_the_second_pass_leaves_the_weights(data):
    model = model_of(0)
    before, optimizer, calls = copy.deepcopy(model), sgd(model), []

    def closure():
        calls.append(same(model, before))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure_of(model, data)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert calls == [True, False]
    assert same(model, before)
    optimizer.step(closure_of(model, data))  # and it goes on


@pytest.mark.parametrize("call", [0, 1, 3])
def test_an_exception_in_any_of_dgsams_passes_leaves_the_weights(call, data):
    model = model_of(0)
    before, optimizer, calls = copy.deepcopy(model), sgd(model, algorithm="dgsam"), []

    def closure():
        calls.append(same(model, before))
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return closure_of(model, data)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert calls == [True, *[False] * call]
    assert same(model, before)
    calls.clear()
    assert optimizer.step(closure_of(model, data)).shape == (3,)
    assert not same(model, before)


def test_steps_out_of_order_and_wrong_losses_are_refused(data):
    model = model_of(0)
    optimizer = sgd(model)
    losses = closure_of(model, data)
    with pytest.raises(UsageError, match="needs first_step"):
        optimizer.second_step(*losses())
    with pytest.raises(UsageError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(UsageError, match="one number a domain"):
        optimizer.first_step(losses()[0].sum())
    optimizer.first_step(*losses())
    with pytest.raises(UsageError, match="called twice"):
        optimizer.first_step(*losses())
    with pytest.raises(UsageError, match="call second_step"):
        optimizer.state_dict()
    with pytest.raises(UsageError, match="not of SharpnessAware"):
        sgd(model).load_state_dict(torch.optim.SGD(model.parameters(), lr=1.0).state_dict())
    with pytest.raises(UsageError, match=r"0\.\.1"):
        by_domain(torch.ones(2), torch.tensor([0, 2]), 2)
    with pytest.raises(UsageError, match="more than two passes; call step"):
        sgd(model, algorithm="dgsam").first_step(*losses())
    with pytest.raises(UsageError, match="unknown algorithm"):
        sgd(model, algorithm="sma")


def test_groupdro_needs_every_domain_at_each_step(data):
    model = model_of(0)
    optimizer = sgd(model, objective="groupdro")
    optimizer.step(closure_of(model, data))
    with pytest.raises(UsageError, match="4 domain losses, 3 before"):
        optimizer.step(closure_of(model, data, M=4))
