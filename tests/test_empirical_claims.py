"""The statistical claims on fabricated traces whose truth is known, so that each verdict is seen to flip."""

from unittest import mock

import numpy as np
import pytest
import torch
from fabricated import FabricatedStudy, by_algorithm, loss_trace, turning_trace

from disam_theory.claims import Verdict, run
from disam_theory.perturbations import disam_weights
from disam_theory.traces import Trace
from proofs_checks import empirical
from proofs_checks.contrasts import weight_change
from proofs_checks.empirical import FIG3AB, THM1_GAMMA, check_fig3ab, check_fig8, check_thm1_gamma, turning_rate

LEVELS = {"erm": 0.7, "disam": 0.9, "sam": 1.0}


def losses(levels, noise=0.01):
    """Runs whose training loss is at these levels."""
    return FabricatedStudy(by_algorithm(levels), loss_trace, noise=noise)


def gamma(disam, sam, noise=0.0):
    """Evidence on runs that turn at these rates; what stands beside the verdict is left out."""
    study = FabricatedStudy(by_algorithm({"disam": disam, "sam": sam}), turning_trace, noise=noise)
    with mock.patch.multiple(empirical, _angles=lambda *_: {}, _against_smoothness=lambda *_: {}):
        return check_thm1_gamma(study)


# on the study's runs fig3ab and fig8 are conditional and thm1-gamma is refuted: these flip them
MUTATIONS = {
    "fig3ab": {
        "on runs where it is plainly true": lambda: check_fig3ab(losses(LEVELS)),
        "SAM and DISAM exchanged": lambda: check_fig3ab(losses(LEVELS), first="sam", second="disam"),
    },
    "fig8": {
        "on runs where it is plainly true": lambda: check_fig8(losses(LEVELS)),
        "the order reversed": lambda: check_fig8(losses(LEVELS), order=("sam", "disam", "erm")),
    },
    "thm1-gamma": {
        "DISAM turns more slowly": lambda: gamma(disam=0.5, sam=1.0),
        "noise larger than any difference": lambda: gamma(disam=1.0, sam=1.0, noise=1.0),
    },
}


def test_faster_disam_is_supported_and_the_mutated_statement_refuted():
    study = losses(LEVELS)
    assert check_fig3ab(study).verdict is Verdict.SUPPORTED
    assert check_fig3ab(study, first="sam", second="disam").verdict is Verdict.REFUTED


def test_the_effect_size_is_the_true_one():
    cases = check_fig3ab(losses(LEVELS, noise=1e-6)).data["cases"]
    assert [case["estimate"] for case in cases] == pytest.approx([-10.0] * 6, abs=1e-3)


def test_an_average_below_is_not_taken_for_a_loss_below_in_the_end():
    """DISAM's loss is half of SAM's on the way, and a tenth above it after the last step."""

    def trace(level):
        made = loss_trace(level)
        rows = np.array([[9.0, 9.0], [level, level], [0.9 * level, 0.9 * level]])
        if level > 100:  # DISAM's
            level /= 1000
            rows = np.array([[9.0, 9.0], [0.5 * level, 0.5 * level], [level, level]])
        return Trace(made.header, made.steps, {"losses": rows}, "finished")

    found = check_fig3ab(FabricatedStudy(by_algorithm({"sam": 1.0, "disam": 1000.0}), trace))
    assert found.verdict is Verdict.SUPPORTED
    assert found.data["last_step"]["verdict"] == "refuted"
    assert "beside it, refuted, DISAM minus SAM, training loss after the last step: +1" in found.reason


def test_the_controls_are_said_where_a_case_is_supported():
    found = check_fig3ab(losses({**LEVELS, "weaker-sam": 0.92, "reversed": 1.1}, noise=1e-6))
    case = "digits-sources, rho=0.5"
    assert f"minus SAM in {case}, at 95 % each: DISAM -10.00 (-10.00 to -10.00), -lambda +10.00" in found.reason
    assert "a weaker SAM -8.00 (-8.00 to -8.00)" in found.reason
    assert "minus SAM in" not in check_fig3ab(losses(dict.fromkeys(LEVELS, 1.0), noise=1e-4)).reason


def test_the_orders_steps_are_corrected_together_and_have_the_controls():
    found = check_fig8(losses(LEVELS))
    levels = {case["level"] for part in found.data["contrasts"] for case in part["cases"]}
    assert levels == {1 - 0.05 / 12}
    assert set(found.data["controls"]) == {
        "DISAM minus SAM",
        "DISAM with -lambda minus SAM",
        "weaker SAM minus SAM",
    }


def test_equal_turning_is_refuted_as_it_is_in_the_study():
    assert gamma(disam=1.0, sam=1.0, noise=1e-4).verdict is Verdict.REFUTED


def test_equal_arms_are_refuted_as_practically_equal_and_noise_is_undecided():
    equal = dict.fromkeys(LEVELS, 1.0)
    assert check_fig3ab(losses(equal, noise=1e-4)).verdict is Verdict.REFUTED
    assert check_fig3ab(losses(equal, noise=0.5)).verdict is Verdict.UNDECIDED


def test_order_needs_both_steps():
    study = losses(LEVELS)
    assert check_fig8(study).verdict is Verdict.SUPPORTED
    assert check_fig8(study, order=("sam", "disam", "erm")).verdict is Verdict.REFUTED
    assert check_fig8(study, order=("erm", "sam", "disam")).verdict is Verdict.REFUTED


def test_turning_rate_is_the_least_constant_that_bounds_the_angle():
    steps = {
        "step": np.arange(5.0),
        "phi": np.array([np.nan, 0.2, 0.3, np.nan, 0.1]),
        "lr": np.array([1.0, 0.5, 0.25, 0.2, 0.1]),
    }
    made = Trace({}, steps, {}, "finished")
    # phi_t / eta_{t-1}: 0.2 / 1, 0.3 / 0.5, -, 0.1 / 0.2
    assert turning_rate(made) == pytest.approx(0.6)


def test_a_quick_study_may_be_undecided_but_not_contrary():
    def claim_with(verdict):
        evidence = check_fig3ab(losses(LEVELS))
        return run(
            type(FIG3AB)(**{**FIG3AB.__dict__, "expected": verdict, "check": lambda study: evidence}), None, quick=True
        )

    assert claim_with(Verdict.CONDITIONAL).as_expected
    assert claim_with(Verdict.SUPPORTED).as_expected
    assert not claim_with(Verdict.REFUTED).as_expected
    assert THM1_GAMMA.statistical


def test_the_weight_change_is_of_the_domains_in_the_batch():
    losses, sizes, lam = np.array([[0.3, 1.2, 0.6], [0.3, np.nan, 0.6]]), [10, 30, 40], 0.7
    trace = Trace({"settings": {"lam": lam}, "sizes": sizes}, {"losses": losses}, {}, "finished")
    alpha = torch.tensor(sizes, dtype=torch.float64) / 80
    beta = disam_weights(
        torch.tensor(losses[0]), alpha, torch.tensor(lam, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    )
    change = weight_change(trace)
    assert 1 - change[0] == pytest.approx((beta / alpha).numpy(), abs=1e-12)
    apart = 0.15  # of either loss from their mean
    assert change[1] == pytest.approx(
        [-2 * lam * apart / (2 * 10 / 80), np.nan, 2 * lam * apart / (2 * 40 / 80)], nan_ok=True
    )
