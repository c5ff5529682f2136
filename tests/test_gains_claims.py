"""Tables 1 and 5 and the rate of false alarms, on fabricated studies whose truth is known."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from fabricated import FabricatedStudy, accuracy_trace, by_algorithm, loss_trace

from disam_theory.algorithms import STRENGTHS, Settings
from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError
from disam_theory.traces import Trace
from figures.gains import GAINS as FIGURE
from figures.gains import PRINTED
from figures.style import styled
from proofs_checks import gains
from proofs_checks.contrasts import SUITES
from proofs_checks.gains import (
    check_null_calibration,
    check_table1,
    check_table5,
    exchanged_labels,
    null_rates,
    one_algorithm,
    selected_accuracy,
)

NOISE = 0.001  # relative, of accuracies of about 50 %
ARMS = (
    Settings("erm"),
    *(Settings(name, rho=rho) for rho in (0.05, 0.5) for name in ("sam", "disam")),
    *(Settings(name, lam=lam) for name in ("gsam", "sagm") for lam in (0.0, 0.1)),
    *(Settings(name, objective=o) for o in ("vrex", "fishr") for name in ("erm", "disam")),
    *(Settings("disam", lam=-0.1, objective=o) for o in ("vrex", "fishr")),
)


def accuracies(level):
    """A trace of this unseen accuracy at the end; validation is best there."""
    made = accuracy_trace(level)
    return Trace(made.header, made.steps, {**made.evaluations, "validation_accuracy": np.array([0.1, 0.9])}, "finished")


@dataclass
class Study(FabricatedStudy):
    """With blocks of :data:`ARMS` on each suite; runs of the ``diverged`` (objective, seeds) cannot be read.

    Of the arms of which ``fewer`` is true there are three seeds.
    """

    arms: tuple = ARMS
    diverged: dict = field(default_factory=dict)
    fewer: Callable[[dict], bool] = lambda settings: False

    @property
    def blocks(self):
        return [SimpleNamespace(suite=suite, arms=self.arms, seeds=self.seeds, snapshot_seeds=0) for suite in SUITES]

    @property
    def suites(self):
        return list(SUITES)

    def records(self, suite, **settings):
        lost = self.diverged.get(settings.get("objective"), ())
        made = super().records(suite, **settings)
        kept = [r for r in made if r.seed < 3] if self.fewer(settings) else made
        return [Diverged(**vars(r)) if r.seed in lost else r for r in kept]

    def measure(self, records, statistic):
        return np.array([statistic(r.trace) for r in records]).reshape(len({r.seed for r in records}), -1)


class Diverged(SimpleNamespace):
    """A run without a trace to compare."""

    def __getattribute__(self, name):
        if name == "trace":
            raise ComputationError("the run diverged")
        return super().__getattribute__(name)


def with_term(gain):
    """Levels where the term, or DISAM on an objective, gains this share of accuracy."""

    def level(settings):
        name, objective = settings["algorithm"], settings.get("objective", "average")
        term = name == "disam" or (name in ("gsam", "sagm") and settings["lam"] > 0)
        plus = term and (objective != "average" or settings.get("lam", 0) > 0)
        return 0.5 * (1 + gain * plus)

    return level


def study(gain=0.0, noise=NOISE, **options):
    return Study(with_term(gain), accuracies, noise=noise, spread=0.05, **options)


def null_study(seeds=12, noise=0.05):
    """Arms that do not differ."""

    def make(level):
        made = accuracies(level)
        return Trace(made.header, made.steps, {**made.evaluations, "losses": loss_trace(level).steps["losses"]}, "")

    return Study(by_algorithm({}), make, noise=noise, seeds=seeds, arms=ARMS[:7])


# on the study's runs table1 is conditional, table5 and the rule's rate are undecided: these flip them
MUTATIONS = {
    "table1": {
        "on runs where the term gains a point": lambda: check_table1(study(0.02)),
        "exchanged, where the term loses a point": lambda: check_table1(study(-0.02), exchanged=True),
        "noise larger than any difference": lambda: check_table1(study(noise=0.1)),
    },
    "table5": {
        "on runs where DISAM gains a point on either": lambda: check_table5(study(0.02)),
        "exchanged, where DISAM loses a point": lambda: check_table5(study(-0.02), exchanged=True),
    },
    "null-calibration": {
        "intervals of level 90 % taken for 95 %": lambda: check_null_calibration(null_study(), level=0.90),
        "intervals of level 99 % taken for 95 %": lambda: check_null_calibration(null_study(), level=0.99),
    },
}


@pytest.mark.parametrize("check", [check_table1, check_table5])
def test_a_gain_is_supported_and_none_or_a_loss_refuted(check):
    assert check(study(0.02)).verdict is Verdict.SUPPORTED
    assert check(study(0.0)).verdict is Verdict.REFUTED  # practically equal
    assert check(study(-0.02)).verdict is Verdict.REFUTED
    assert check(study(0.0, noise=0.1)).verdict is Verdict.UNDECIDED


def test_effect_sizes_are_the_true_ones():
    evidence = check_table1(study(0.02, noise=1e-9))
    assert len(evidence.data["cases"]) == 4 * len(SUITES)
    assert [row["estimate"] for row in evidence.data["cases"]] == pytest.approx([1.0] * 12, abs=0.1)
    assert {row["case"].split(",")[0]: row["printed"] for row in evidence.data["averages"]} == gains.PRINTED
    five = check_table5(study(0.02, noise=1e-9))
    assert [row["case"] for row in five.data["averages"]] == ["vrex, rho=0.05", "fishr, rho=0.05"]
    parts = {part: [row["estimate"] for row in rows] for part, rows in five.data["parts"].items()}
    assert parts == {"SAM's": pytest.approx([0.0] * 2, abs=1e-6), "the term's": pytest.approx([1.0] * 2, abs=0.1)}


def controlled(settings):
    """Levels where the term gains a point and each control loses one."""
    term = settings["algorithm"] in ("disam", "gsam", "sagm") and settings.get("lam", 0)
    weaker = settings["algorithm"].startswith("weaker")
    return 0.5 + 0.01 * (np.sign(term) if term else -2 * weaker)


@pytest.mark.parametrize(
    ("check", "base", "methods"),
    [
        (check_table1, "the method alone", ("sam, rho=0.05", "sam, rho=0.5", "gsam, rho=0.05", "sagm, rho=0.05")),
        (check_table5, "the objective + SAM", ("vrex, rho=0.05", "fishr, rho=0.05")),
    ],
)
def test_each_method_has_its_own_controls_in_words_where_it_is_supported(check, base, methods):
    evidence = check(Study(controlled, accuracies, noise=1e-6, spread=0.01))
    cases = [f"{method}, {suite}" for method in methods for suite in SUITES]
    expected = {"with the term": 1, "with -lambda": -1, "with a weaker perturbation": -2}
    for title, points in expected.items():
        rows = evidence.data["controls"][title]
        assert [row["case"] for row in rows] == cases
        assert [row["estimate"] for row in rows] == pytest.approx([points] * len(cases), abs=0.1)
    for case in cases:
        assert f"minus {base} in {case}, at 95 % each: with the term +" in evidence.reason
    assert [row["cosine"] for row in evidence.data["how_far_apart"]] == pytest.approx([0.99] * len(cases))
    assert f"minus {base}" not in check(Study(lambda settings: 0.5, accuracies, noise=1e-6)).reason


def test_controls_of_fewer_seeds_are_compared_on_those_and_diverged_ones_are_said():
    def is_control(settings):
        return settings["algorithm"].startswith("weaker") or settings.get("lam", 0) < 0

    found = check_table1(Study(controlled, accuracies, noise=1e-6, spread=0.01, fewer=is_control))
    seeds = {title: {row["n"] for row in rows} for title, rows in found.data["controls"].items()}
    assert seeds == {"with the term": {6}, "with -lambda": {3}, "with a weaker perturbation": {3}}

    class Diverging(Study):
        def records(self, suite, **settings):
            made = super().records(suite, **settings)
            return [Diverged(**vars(r)) for r in made] if settings["algorithm"] == "weaker-gsam" else made

    reason = check_table1(Diverging(controlled, accuracies, noise=1e-6, spread=0.01)).reason
    assert "with a weaker perturbation diverged" in reason.partition("alone in gsam")[2].partition("minus")[0]


def test_what_was_not_trained_or_diverged_is_said_and_keeps_from_support():
    alone = check_table5(study(0.02, arms=tuple(a for a in ARMS if a.objective != "fishr")))
    assert alone.verdict is Verdict.UNDECIDED
    assert "fishr: no runs" in alone.reason
    few = check_table5(study(0.02, diverged={"vrex": [4]}))
    assert few.verdict is Verdict.SUPPORTED
    assert "vrex, rho=0.05, digits-rotated: 1 of 6 seeds" in few.reason
    assert {case["n"] for case in few.data["cases"] if "vrex" in case["case"]} == {5}
    many = check_table5(study(0.02, diverged={"vrex": [1, 4]}))
    assert many.verdict is Verdict.UNDECIDED
    assert not [case for case in many.data["cases"] if "vrex" in case["case"]]


def test_selection_takes_the_first_step_of_the_best_validation_accuracy():
    columns = {"validation_accuracy": np.array([0.2, 0.8, 0.8, 0.5]), "unseen_accuracy": np.array([0.1, 0.3, 0.4, 0.9])}
    assert selected_accuracy(Trace({}, {}, columns, "finished")) == pytest.approx(30.0)


def test_objectives_are_the_studys_own():
    pairs = gains.penalised(study())
    assert list(pairs) == ["vrex, rho=0.05", "fishr, rho=0.05"]
    for name, over in pairs.items():
        objective = name.split(",")[0]
        assert set(over) == set(SUITES)
        for first, second in over.values():
            assert (first["algorithm"], second["algorithm"]) == ("disam", "erm")
            assert first["objective"] == second["objective"] == objective
            assert STRENGTHS[objective] in first


def nulls(contrasts, distribution, seeds=12):
    generator = np.random.default_rng(0)
    values = getattr(generator, distribution)(size=(contrasts, len(SUITES), seeds))
    return list(values), [one - other for one, other in itertools.combinations(values, 2)]


@pytest.mark.parametrize("distribution", ["standard_normal", "standard_exponential"])
def test_the_rate_is_the_nominal_one_at_every_level(distribution):
    alone, contrasts = nulls(6, distribution)
    for level, most in ((0.95, 0.06), (0.80, 0.22)):
        for families, null in ((contrasts, exchanged_labels), (alone, one_algorithm)):
            for row in null_rates(families, null, level=level).values():
                assert row["low"] <= 1 - level <= row["high"] or row["rate"] < 1 - level
                assert row["rate"] < most
                assert row["low"] < row["rate"] < row["high"]


def test_errors_are_those_of_the_rule(monkeypatch):
    """By draw, against :func:`disam_theory.statistics.paired_interval` on the null data that the draw makes."""
    from disam_theory.statistics import paired_interval

    monkeypatch.setattr(gains, "DRAWS", 60)
    gains._draws.cache_clear()
    _, contrasts = nulls(4, "standard_normal", 7)
    picks, _, signs = gains._picks(7, 2)
    assert not (picks == 2).any()
    found = gains._errors(contrasts, exchanged_labels, 2, 0.8)
    for draw in range(60):
        alone, together = [], []
        for family in contrasts:
            redrawn = family[:, picks[draw]] * signs[draw]
            alone += [_errs(paired_interval(row, level=0.8)) for row in redrawn]
            together.append(any(_errs(paired_interval(row, level=1 - 0.2 / 3)) for row in redrawn))
        assert found[:, draw] == pytest.approx([np.mean(alone), np.mean(together)])
    gains._draws.cache_clear()


def _errs(interval):
    return not interval.low <= 0 <= interval.high


def test_null_data_are_not_called_a_finding_and_a_wrong_level_is():
    assert check_null_calibration(null_study(20)).verdict is not Verdict.REFUTED
    assert check_null_calibration(null_study(), level=0.85).verdict is Verdict.REFUTED
    assert check_null_calibration(null_study(seeds=4)).verdict is Verdict.UNDECIDED


def test_the_figure_has_every_comparison():
    rows = FIGURE.compute(study(0.02, noise=1e-9))
    averages = {row["method"]: row for row in rows if row["suite"] == "average"}
    assert {name: row["printed"] for name, row in averages.items()} == PRINTED
    assert [row["mean"] for row in averages.values()] == pytest.approx([1.0] * len(averages), abs=0.1)
    with styled():
        assert len(FIGURE.draw(rows).axes) == 1
