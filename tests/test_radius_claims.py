"""Claims on the radius and on lambda, on accuracies whose truth is known."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from fabricated import SHARES, FabricatedStudy, loss_trace

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError
from disam_theory.radii import ALLOWED, last_above
from disam_theory.statistics import Interval
from disam_theory.traces import Trace
from proofs_checks.contrasts import SUITES
from proofs_checks.radius import (
    RADII,
    RADIUS_CLAIMS,
    STABLE,
    check_fig1a,
    check_fig3cd,
    check_fig5_lambda,
    check_fig5_rho,
    spread_ratio,
    within,
)

ERM = 0.9


def accuracies(level):
    """A run whose unseen accuracy ends at this share, and its validation accuracy 0.05 above."""
    made = loss_trace(1.0)
    ends = {"unseen_accuracy": np.array([0.1, level]), "validation_accuracy": np.array([0.1, level + 0.05])}
    return Trace({**made.header, "sizes": SHARES}, made.steps, {**made.evaluations, **ends}, "finished")


@dataclass
class Arms(FabricatedStudy):
    """Accuracy of an arm from its settings; noise, in points, is added: one all arms share and one of each arm."""

    def records(self, suite, **settings):
        quiet = replace(self, noise=0.0, spread=0.0)
        found = FabricatedStudy.records(quiet, suite, **settings)
        own = self._factors(f"{suite}{sorted(settings.items())}").ravel()
        shared = self._factors(suite).ravel()
        for record, one, all_arms in zip(found, own, shared, strict=True):
            own_points = one * self.noise * (self.wild(settings) if callable(self.wild) else 1.0)
            shift = (own_points + all_arms * self.spread) / 100
            record.trace = accuracies(self.level(settings) + shift)
        return found

    wild: object = None  # settings -> a factor of the arm's own noise


def offsets(noise=0.05, seeds=6, wild=None, **points):
    """ERM at 0.9 and each arm so many points above it: a number, or a function of its settings."""

    def level(settings):
        found = points.get(settings["algorithm"], 0.0)
        return ERM + (found(settings) if callable(found) else found) / 100

    return Arms(level, accuracies, noise=noise, spread=0.3, seeds=seeds, wild=wild)


def falling(start):
    """Accuracy that falls by ten points a decade from the radius ``start`` on."""
    return lambda settings: -10 * max(0.0, np.log10(settings["rho"] / start))


def larger_lambda(slope):
    return lambda settings: slope * (settings["lam"] - 0.1)


def wilder(settings):
    """The arm's own noise is thirty times as large at lambda = 1."""
    return 30.0 if settings.get("lam") == 1.0 else 1.0


STABLE_AND_WILD = offsets(seeds=20, wild=wilder)
FURTHER = offsets(sam=falling(0.05), disam=falling(0.1))
BETTER = offsets(disam=2.0)

# on the study's runs these are refuted: these flip them
MUTATIONS = {
    "fig1a": {
        "on runs where SAM is below ERM at every radius": lambda: check_fig1a(offsets(sam=-3.0)),
        "ERM and SAM exchanged, where SAM is above": lambda: check_fig1a(offsets(sam=3.0), first="erm", second="sam"),
        "noise larger than any difference": lambda: check_fig1a(offsets(noise=30.0)),
    },
    "fig3cd": {
        "on runs where DISAM works to twice the radius": lambda: check_fig3cd(FURTHER),
        "every radius works, so that the grid ends too early": lambda: check_fig3cd(offsets()),
    },
    "fig5-rho": {
        "on runs where DISAM is two points better": lambda: check_fig5_rho(BETTER),
        "noise larger than any difference": lambda: check_fig5_rho(offsets(noise=30.0)),
    },
    "fig5-lambda": {
        "stable, and wild at lambda = 1": lambda: check_fig5_lambda(STABLE_AND_WILD),
        "noise larger than any difference": lambda: check_fig5_lambda(offsets(noise=30.0)),
    },
}


@pytest.mark.parametrize("claim", RADIUS_CLAIMS, ids=lambda claim: claim.id)
def test_a_wrong_statement_flips_the_verdict(claim):
    wrong = MUTATIONS[claim.id]
    assert len(wrong) >= 2
    assert claim.expected not in {mutated().verdict for mutated in wrong.values()}


def test_fig1a_needs_every_radius():
    assert check_fig1a(offsets(sam=-3.0)).verdict is Verdict.SUPPORTED

    def but_one(settings):
        return 2.0 if settings["rho"] == 0.2 else -3.0

    found = check_fig1a(offsets(sam=but_one))
    assert found.verdict is Verdict.REFUTED
    assert set(found.data["suites"].values()) == {"refuted"}
    assert "above zero at 1 of 7 radii, below at 6, within 0.5 points of it at 0, unclear at 0" in found.reason
    assert check_fig1a(offsets(sam=0.0)).verdict is Verdict.REFUTED  # practically equal
    assert [gap["estimate"] for gap in found.data["erm_gap"].values()] == pytest.approx([5.0] * 3)
    json.dumps(found.data, allow_nan=False)


def test_largest_radius_is_interpolated_in_log_rho_and_censored_at_the_ends():
    accuracy = np.array(
        [
            [90.0, 90.0, 86.0],  # falls below 88 half of the way from 0.1 to 1
            [90.0, 87.0, 89.0],  # comes back: the last radius works
            [80.0, 80.0, 80.0],  # none works
            [90.0, 80.0, 87.0],  # falls below at the start and does not come back
        ]
    )
    found = last_above(accuracy, np.full(4, 88.0), (0.01, 0.1, 1.0))
    assert found.rho == pytest.approx([10**-0.5, 1.0, 0.01, 0.01 * 10**0.2])
    assert found.censored.tolist() == [False, True, True, False]


def test_fig3cd_finds_the_true_ratio():
    found = check_fig3cd(FURTHER)
    assert found.verdict is Verdict.SUPPORTED
    # ten points a decade from `start` on: a point below at start * 10 ** 0.1; between the radii of the grid the
    # interpolation is exact on a line, and 0.05 and 0.1 are on the grid
    for case in check_fig3cd(replace(FURTHER, noise=1e-6)).data["cases"]:
        assert case["estimate"] == pytest.approx(1.0, abs=1e-3)
        assert case["radii"]["sam"]["estimate"] == pytest.approx(0.05 * 10 ** (ALLOWED / 10), rel=1e-3)
        assert case["radii"]["disam"]["estimate"] == pytest.approx(0.1 * 10 ** (ALLOWED / 10), rel=1e-3)
    assert len(found.data["cases"]) == 6
    assert check_fig3cd(FURTHER, first="sam", second="disam").verdict is Verdict.REFUTED
    same = offsets(sam=falling(0.1), disam=falling(0.1), noise=1e-3)
    assert check_fig3cd(same).verdict is Verdict.REFUTED


def test_a_grid_that_ends_too_early_decides_nothing():
    found = check_fig3cd(offsets(sam=0.0, disam=falling(0.1)))
    assert found.verdict is Verdict.UNDECIDED
    assert {case["largest_share_censored"] for case in found.data["cases"]} == {1.0}
    assert "the grid ends too early in 6 of 6 cases" in found.reason


def test_fig5_rho_needs_half_of_the_radii():
    def at(rhos):
        return offsets(disam=lambda settings: 2.0 if settings["rho"] in rhos else 0.0)

    assert check_fig5_rho(BETTER).verdict is Verdict.SUPPORTED
    assert check_fig5_rho(at(RADII[:4])).verdict is Verdict.SUPPORTED
    assert check_fig5_rho(at(RADII[:3])).verdict is Verdict.REFUTED  # four are practically equal
    assert check_fig5_rho(offsets(noise=30.0)).verdict is Verdict.UNDECIDED
    assert check_fig5_rho(BETTER, first="sam", second="disam").verdict is Verdict.REFUTED
    assert set(check_fig5_rho(BETTER).data["controls"]) >= {"DISAM with -lambda minus SAM", "weaker SAM minus SAM"}


def test_fig5_lambda_needs_both_parts():
    found = check_fig5_lambda(STABLE_AND_WILD)
    assert found.verdict is Verdict.SUPPORTED
    assert found.data["suites"] == {suite: {"stable": "supported", "grows": "supported"} for suite in SUITES}
    moved = check_fig5_lambda(offsets(seeds=20, wild=wilder, disam=larger_lambda(10.0)))
    assert moved.verdict is Verdict.REFUTED
    assert "stable refuted" in moved.reason
    assert "variance grows supported" in moved.reason
    calm = check_fig5_lambda(offsets(seeds=20, noise=0.01))
    assert calm.verdict is Verdict.REFUTED  # the spread is the same to within the margin
    assert "stable supported" in calm.reason
    large_too = check_fig5_lambda(offsets(seeds=20, disam=larger_lambda(3.0)), stable=(*STABLE, 1.0))
    assert large_too.verdict is Verdict.REFUTED
    json.dumps(calm.data, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.4, 0.4, Verdict.SUPPORTED),
        (0.1, 0.4, Verdict.SUPPORTED),
        (0.6, 0.9, Verdict.REFUTED),
        (-2.0, -0.6, Verdict.REFUTED),
        (0.4, 0.6, Verdict.UNDECIDED),
        (-0.6, 0.6, Verdict.UNDECIDED),
    ],
)
def test_equivalence_is_supported_inside_the_margin_only(low, high, verdict):
    assert within(Interval((low + high) / 2, low, high, 10, 0.95), margin=0.5) is verdict


def test_ratio_of_spreads_covers_the_truth_at_its_level():
    generator = np.random.default_rng(0)
    inside, wrong = 0, 0
    for _ in range(2000):
        shared = generator.normal(size=12)
        first, second = (2.0 * (shared + generator.normal(size=12)), shared + generator.normal(size=12))
        found = spread_ratio(first, second)
        inside += found.low < 1.0 < found.high  # 2 ** 1
        null = spread_ratio(first / 2, second)
        wrong += null.low > 0 or null.high < 0
    assert 0.935 < inside / 2000 < 0.965
    assert wrong / 2000 < 0.065


def test_ratio_of_spreads_agrees_with_the_test_of_pitman_and_morgan():
    """The interval ends at zero where the correlation of sum and difference is just significant."""
    from scipy import stats

    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(2, 15)) * [[1.6], [1.0]] + generator.normal(size=15)
    p = stats.pearsonr(first + second, first - second).pvalue
    found = spread_ratio(first, second, level=1 - p)
    assert min(abs(found.low), abs(found.high)) == pytest.approx(0.0, abs=1e-9)
    assert found.estimate == pytest.approx(np.log2(first.std() / second.std()))


def test_too_few_seeds_for_a_ratio_of_spreads_are_said_so():
    with pytest.raises(ComputationError, match="2 seed"):
        spread_ratio(np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    with pytest.raises(ComputationError, match="accuracies that differ"):
        spread_ratio(np.ones(4), np.arange(4.0))
