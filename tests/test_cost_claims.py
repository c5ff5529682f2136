"""What a step's times are made into: the interval, the turns, and Fig. 6(c)'s claim on times whose truth is known."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from disam_theory import step_cost
from disam_theory.claims import Verdict
from disam_theory.errors import UsageError
from disam_theory.step_cost import Setting, against, batch, in_turns, median_interval, residual_network, training_steps
from figures.fig6c_step_cost import FIG6C as FIGURE
from figures.style import styled
from proofs_checks.cost import check_fig6c

ROUNDS = 51


def times(ratios, noise=0.02):
    """Settings where a DISAM step costs so many times a SAM step, with drift that the steps of a round share."""

    def timed():
        generator, found = np.random.default_rng(0), []
        for k, ratio in enumerate(ratios):
            drift = 0.01 * np.exp(0.5 * generator.normal(size=ROUNDS))
            level = {"erm": 0.5, "plain-sam": 0.9, "sam": 1.0, "disam": ratio}
            seconds = {
                name: (drift * value * np.exp(noise * generator.normal(size=ROUNDS))).tolist()
                for name, value in level.items()
            }
            found.append(Setting(8 * (k + 1), 3, 1000 * (k + 1), seconds))
        return tuple(found)

    return timed


# on true times fig6c is supported: these flip it
MUTATIONS = {
    "fig6c": {
        "a term that costs a third of a step": lambda: check_fig6c(None, timed=times([1.33] * 5)),
        "a term whose cost grows with the model": lambda: check_fig6c(None, timed=times([1.0, 1.1, 1.2, 1.3, 1.4])),
        "times too noisy to tell": lambda: check_fig6c(None, timed=times([1.02] * 5, noise=0.6)),
        "SAM's step against ERM's": lambda: check_fig6c(None, timed=times([1.02] * 5), first="sam", second="erm"),
    }
}


def test_a_small_cost_is_supported_and_a_large_one_refuted():
    assert check_fig6c(None, timed=times([1.02] * 5)).verdict is Verdict.SUPPORTED
    assert check_fig6c(None, timed=times([1.33] * 5)).verdict is Verdict.REFUTED
    assert check_fig6c(None, timed=times([1.02, 1.33])).verdict is Verdict.CONDITIONAL
    assert check_fig6c(None, timed=times([1.02] * 5, noise=0.6)).verdict is Verdict.UNDECIDED
    row = check_fig6c(None, timed=times([1.05], noise=1e-6)).data["cases"][0]
    assert row["ratio"] == pytest.approx(1.05, abs=1e-5)


def test_the_median_interval_is_that_of_order_statistics():
    for n in (6, 11, 51):
        found = median_interval([float(k) for k in range(n)])
        j = int(found.low) + 1  # x_(j), counted from one
        assert found.high == n - j
        assert 1 - 2 * stats.binom.cdf(j - 1, n, 0.5) >= 0.95
        assert 1 - 2 * stats.binom.cdf(j, n, 0.5) < 0.95
    with pytest.raises(UsageError, match="5 values"):
        median_interval([1.0] * 5)


def test_steps_take_turns_and_each_is_timed():
    ticks, called = itertools.count(), []
    steps = {name: (lambda name=name: called.append(name)) for name in "abc"}
    seconds = in_turns(steps, 4, lambda: float(next(ticks)))
    assert seconds == {name: [1.0] * 4 for name in "abc"}
    assert ["".join(called[k : k + 3]) for k in range(6, 18, 3)] == ["abc", "bca", "cab", "abc"]


def test_pairs_are_of_one_round():
    seconds = {"x": [2.0, 20.0] * 10, "y": [1.0, 10.0] * 10}
    assert against(seconds, "x", "y")["ratio"] == step_cost.Estimate(2.0, 2.0, 2.0, 20)


def test_the_steps_are_the_algorithms():
    """SAM by hand and by the package end at the same weights; DISAM and ERM elsewhere."""
    torch.manual_seed(0)
    model = residual_network(4).double()
    inputs, labels, domains = batch(12, 3, 8)
    copies = []

    def kept(given):
        copies.append(torch.nn.ModuleList([given])[0])
        return given

    original = step_cost.copy.deepcopy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_cost.copy, "deepcopy", lambda given: kept(original(given)))
        steps = training_steps(model, inputs.double(), labels, domains, 3, step_cost.NAMES)
    for step in steps.values():
        step()
    end = {
        name: torch.cat([p.detach().flatten() for p in own.parameters()])
        for name, own in zip(steps, copies, strict=True)
    }
    assert torch.allclose(end["plain-sam"], end["sam"], rtol=0, atol=1e-12)
    assert (end["disam"] - end["sam"]).abs().max() > 1e-9
    assert (end["erm"] - end["sam"]).abs().max() > 1e-9


def test_the_figure_draws_what_was_timed(monkeypatch):
    found = times([1.02] * 3)()
    monkeypatch.setattr("figures.fig6c_step_cost.measured", lambda: found)
    rows = FIGURE.compute(None)
    swept = [row["parameters"] for row in rows if row["swept"] == "parameters" and row["algorithm"] == "disam"]
    assert swept == [1000, 2000, 3000]
    assert {row["ratio_median"] for row in rows if row["algorithm"] == "sam"} == {1.0}
    with styled():
        axes = FIGURE.draw(rows).axes
        assert len(axes) == 4
        assert not any(ax.get_legend() for ax in axes)  # it would lie over curves
