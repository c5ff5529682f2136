"""Studies whose truth is known: traces made from a level for each arm, and a noise that the arms of a pair share."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from disam_theory.traces import Trace

SHARES = [3, 1]  # sizes of the two source domains


@dataclass
class FabricatedStudy:
    """Answers as a study does: ``level`` maps an arm's settings to a number, ``make`` such a number to a trace.

    Each run's level is multiplied by a random factor that all arms of its seed and held-out domain share, and by one
    of spread ``noise`` of its own.
    """

    level: Callable[[dict], float]
    make: Callable[[float], Trace]
    noise: float = 0.01
    spread: float = 0.3  # of the factor that the arms share
    seeds: int = 6
    held_out: int = 3
    full_batch_suites: tuple = ("a", "b")

    @property
    def blocks(self):
        return [
            SimpleNamespace(suite=suite, arms=[SimpleNamespace(sampling="full")]) for suite in self.full_batch_suites
        ]

    def records(self, suite, **settings):
        shared, own = (self._factors(key) for key in (suite, f"{suite}{sorted(settings.items())}"))
        factors = np.exp(self.spread * shared + self.noise * own)
        return [
            SimpleNamespace(
                suite=suite,
                seed=seed,
                held_out=f"domain{k}",
                settings=settings,
                trace=self.make(self.level(settings) * factors[seed, k]),
            )
            for seed in range(self.seeds)
            for k in range(self.held_out)
        ]

    def measure(self, records, statistic):
        return np.array([statistic(record.trace) for record in records]).reshape(self.seeds, -1)

    def _factors(self, key):
        return np.random.default_rng(zlib.crc32(key.encode())).normal(size=(self.seeds, self.held_out))


def by_algorithm(levels: dict) -> Callable[[dict], float]:
    """An arm's level by its algorithm; DISAM with a negative lambda under ``reversed``, unknown ones at 1."""

    def level(settings):
        name = settings["algorithm"]
        return levels.get("reversed" if name == "disam" and settings.get("lam", 0) < 0 else name, 1.0)

    return level


def loss_trace(level: float) -> Trace:
    """Training losses at this level after the first evaluation; unequal domains, SAM's direction a little apart."""
    losses = np.array([[9.0, 9.0], [level, 3 * level], [level, 3 * level]])
    steps = {
        "losses": losses,
        "beta": np.full((3, 2), 0.5),
        "cos_sam": np.full(3, 0.99),
    }
    return Trace(
        {"domains": ["x", "y"], "sizes": SHARES, "settings": {"lam": 0.1}}, steps, {"losses": losses}, "finished"
    )


def accuracy_trace(level: float) -> Trace:
    """Unseen accuracy at this level (a share) after the last step."""
    made = loss_trace(1.0)
    return Trace(made.header, made.steps, {**made.evaluations, "unseen_accuracy": np.array([0.1, level])}, "finished")


def turning_trace(rate: float) -> Trace:
    """A run whose perturbation turns by ``rate`` a unit of learning rate."""
    return Trace(
        {"domains": ["x", "y"]},
        {"step": np.arange(2.0), "phi": np.array([0.0, rate]), "lr": np.ones(2)},
        {},
        "finished",
    )
