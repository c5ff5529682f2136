"""Long work -> what it says on stderr meanwhile, with the time left where that can be estimated."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

SPARSE = 60.0  # seconds between two lines where stderr is no terminal
Clock = Callable[[], float]
Part = TypeVar("Part")


class Through(Protocol):
    """What is done, and its parts -> the parts, one after the other, while it is said how far that has come.

    ``costs`` (as many as parts) is the time that each takes, in any unit, where they are not alike.
    """

    def __call__(self, what: str, parts: Sequence[Part], costs: Sequence[float] = ()) -> Iterable[Part]: ...


def silently(what: str, parts: Sequence[Part], costs: Sequence[float] = ()) -> Iterable[Part]:
    """:class:`Through`, saying nothing."""
    return parts


class Line:
    """One line: rewritten in place on a terminal; elsewhere, as in a log, at most one a minute.

    ``heading`` is asked anew each time for what stands before it.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._last = clock, clock()
        self.heading: Callable[[], str] = lambda: ""

    def show(self, what: str) -> None:
        what = f"{self.heading()}{what}"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be rewritten
            print(f"\r\033[K{what[:width]}", end="", file=sys.stderr, flush=True)
        elif (now := self._clock()) - self._last >= SPARSE:
            self._last = now
            print(f"disam-theory: {what}", file=sys.stderr, flush=True)

    def through(self, what: str, parts: Sequence[Part], costs: Sequence[float] = ()) -> Iterator[Part]:
        """:class:`Through`, with the time left for ``what`` from the second part on."""
        costs = costs or [1.0] * len(parts)
        left = Parts(sum(costs), self._clock)
        for number, (part, cost) in enumerate(zip(parts, costs, strict=True), 1):
            self.show(f"{what} {number} of {len(parts)}{left}")
            yield part
            left.finished(cost)


def wipe() -> None:
    """Remove the line from a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def say(what: str) -> None:
    """A line that stays."""
    wipe()
    print(f"disam-theory: {what}", file=sys.stderr, flush=True)


class Parts:
    """Parts of a work, one after the other: those left are taken to be as fast as those done, cost for cost.

    ``total`` is the cost of all.
    """

    def __init__(self, total: float, clock: Clock = time.monotonic) -> None:
        self._total, self._clock, self._begun = total, clock, clock()
        self._done, self._taken = 0.0, 0.0

    def finished(self, cost: float = 1.0) -> None:
        """One more is done."""
        self._done, self._taken = self._done + cost, self._clock() - self._begun

    def __str__(self) -> str:
        if not 0 < self._done < self._total:
            return ""
        left = self._taken / self._done * self._total - (self._clock() - self._begun)
        return f", {duration(max(left, 0.0))} left by estimate"


class Spectra:
    """Progress of eigenvalues that are sought together: the time left for them by estimate, and at most.

    The estimate takes the largest relative residual to fall to ``tol`` geometrically, as it did from 1 until now; the
    end of the search, a probe for a missed eigenvalue, is a few products more. At most ``most`` products are made for
    each spectrum, at the mean time that one took.
    """

    def __init__(self, line: Line, label: str, tol: float, most: int, clock: Clock = time.monotonic) -> None:
        self._line, self._label, self._tol, self._most = line, label, tol, most
        self._clock, self._begun, self._rounds = clock, clock(), 0

    def __call__(self, products: int, running: int, error: float) -> None:
        self._rounds += 1
        taken = self._clock() - self._begun
        longest = max(self._most - self._rounds, 0) * running * taken / products
        said = f"{self._label}{products} products in all, residual {error:.0e} of {self._tol:.0e}"
        if 0 < error < 1:
            share = min(math.log(error) / math.log(self._tol), 1.0) if self._tol < 1 else 1.0
            said += f", {duration(min(taken * (1 / share - 1), longest))} left by estimate"
        self._line.show(f"{said}, at most {duration(longest)}")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, ``0:04:10``."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
