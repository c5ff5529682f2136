"""The calibration error against its definition, and its level under chance."""

import numpy as np
import pytest

from disam_theory.calibration import calibration


def naive(confidences, right, bins):
    total = 0.0
    for b in range(bins):
        inside = (confidences > b / bins) & (confidences <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidences[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_it_is_the_definition(bins):
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.1, 1.0, 500)
    right = (rng.random(500) < confidences**2).astype(float)
    assert calibration(confidences, right, bins=bins).error == pytest.approx(naive(confidences, right, bins), rel=1e-12)


def test_a_calibrated_model_is_seldom_above_its_level_and_an_overconfident_one_always():
    rng = np.random.default_rng(1)
    above = wrong = 0
    for seed in range(100):
        confidences = rng.uniform(0.2, 1.0, 300)
        right = rng.random(300)
        found = calibration(confidences, right < confidences, rng=seed)
        above += found.error > found.by_chance
        worse = calibration(confidences, right < confidences - 0.15, rng=seed)
        wrong += worse.error > worse.by_chance
    assert above <= 14  # 5 expected; more than 14 have a chance of 1e-4
    assert wrong == 100


def test_weights_count_samples_more_than_once():
    confidences, right = np.array([0.9, 0.6, 0.7]), np.array([1.0, 0.0, 1.0])
    repeated = calibration(np.repeat(confidences, [3, 1, 2]), np.repeat(right, [3, 1, 2])).error
    assert calibration(confidences, right, weights=np.array([3.0, 1.0, 2.0])).error == pytest.approx(repeated)
