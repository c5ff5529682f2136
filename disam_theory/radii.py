r"""Accuracies over a grid of radii $\rho$ -> the largest radius that still works, for each seed.

| letter | meaning |
|---|---|
| ``S`` | number of seeds |
| ``H`` | number of held-out domains |
| ``G`` | number of radii on the grid |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from disam_theory.study import Study
from disam_theory.traces import Trace

ALLOWED = 1.0  # points below ERM's accuracy; a radius that costs more does not work
CRITERIA = {"unseen domain": "unseen_accuracy", "sources' validation parts": "validation_accuracy"}


@dataclass(frozen=True)
class LargestRadii:
    """The largest workable radius of each seed, and whether the grid ended before it was found."""

    rho: np.ndarray  # (S,)
    censored: np.ndarray  # (S,) bool: works up to the grid's last radius, or not even at its first


def final_accuracy(trace: Trace, field: str = "unseen_accuracy") -> float:
    """Accuracy after the last step, in per cent; ``field`` is one of :data:`CRITERIA`'s."""
    return 100.0 * float(trace.evaluations[field][-1])


def largest_radii(study: Study, suite: str, arms: Mapping[float, Mapping[str, object]], field: str) -> LargestRadii:
    """The largest radius at which an algorithm is at most :data:`ALLOWED` below ERM, averaged over held-out domains.

    ``arms``: for each radius, in ascending order, the settings that pick the algorithm's runs.
    """

    def accuracy(settings: Mapping[str, object]) -> np.ndarray:
        return study.measure(study.records(suite, **settings), partial(final_accuracy, field=field)).mean(1)

    reached = np.stack([accuracy(settings) for settings in arms.values()], axis=1)
    return last_above(reached, accuracy({"algorithm": "erm", "sampling": "pooled"}) - ALLOWED, tuple(arms))


def last_above(accuracy: np.ndarray, threshold: np.ndarray, rhos: Sequence[float]) -> LargestRadii:
    r"""Where accuracies (S, G) last fall below each seed's threshold (S,), by linear interpolation in $\log\rho$.

    ``rhos`` ascend. A seed that never falls for good gets the last radius, one that is never above the first; both
    are censored: all that is known is that the true radius lies beyond.
    """
    log, above = np.log(rhos), accuracy - threshold[:, None]
    last = above.shape[1] - 1 - np.argmax(above[:, ::-1] >= 0, axis=1)
    none, all_along = (above < 0).all(1), above[:, -1] >= 0
    found = np.empty(len(above))
    for s, (k, excess) in enumerate(zip(last, above, strict=True)):
        if none[s] or all_along[s]:
            found[s] = log[0] if none[s] else log[-1]
        else:
            found[s] = log[k] + (log[k + 1] - log[k]) * excess[k] / (excess[k] - excess[k + 1])
    return LargestRadii(np.exp(found), none | all_along)
