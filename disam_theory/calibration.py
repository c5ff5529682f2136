r"""(confidences, whether right) -> the calibration error, and what of it chance alone would show.

The confidence of a sample is the largest of its softmax probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # of equal width in [0, 1], as in Guo et al. (2017)
DRAWS = 200


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error, and its 95th percentile for a model that is calibrated and as confident."""

    error: float
    by_chance: float
    bins: int


def calibration(
    confidences: np.ndarray, right: np.ndarray, *, weights: np.ndarray | None = None, bins: int = BINS, rng: int = 0
) -> Calibration:
    r"""$\mathrm{ECE}=\sum_b\frac{|B_b|}n|\mathrm{acc}(B_b)-\mathrm{conf}(B_b)|$ over ``bins`` equal bins of confidence.

    The estimate is positive even for a calibrated model. ``by_chance`` is its 95th percentile when each sample is right
    with the probability that the model states (consistency resampling, Broecker and Smith 2007): a smaller error is no
    evidence of miscalibration. ``confidences`` and ``right`` are (n,); so are ``weights``, all alike unless given.
    """
    weights = np.ones(len(confidences)) if weights is None else weights
    confidences = np.asarray(confidences, dtype=float)
    member = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    drawn = np.random.default_rng(rng).random((DRAWS, len(confidences))) < confidences
    by_chance = [_error(member, confidences, each, weights, bins) for each in drawn]
    found = _error(member, confidences, np.asarray(right, dtype=float), weights, bins)
    return Calibration(found, float(np.quantile(by_chance, 0.95)), bins)


def _error(member: np.ndarray, confidences: np.ndarray, right: np.ndarray, weights: np.ndarray, bins: int) -> float:
    """The bins' gaps weigh by their samples, so the sizes cancel: each is a sum of differences."""
    gaps = np.bincount(member, weights=weights * (right - confidences), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())
