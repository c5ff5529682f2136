"""The two ways in which a user's request can end short: a mistake in what was asked, or a result that falls short."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class DisamError(Exception):
    """One line that says what is wrong, which value, and what to do. ``exit_code`` is what the command returns."""

    exit_code = 1


class UsageError(DisamError):
    """What was asked for cannot be: a missing file, an unknown name, an impossible value."""

    exit_code = 2


class ComputationError(DisamError):
    """The request was sound and the result falls short: a loss that is not finite, say."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def failure(error: BaseException) -> str:
    """An exception of somebody's code on one line: its type, what it says, and the line that raised it."""
    said = " ".join(str(error).split())
    where = traceback.extract_tb(error.__traceback__)[-1]
    at = "" if isinstance(error, SyntaxError) else f", {where.filename}, line {where.lineno}"  # that says it itself
    return f"{type(error).__name__}{': ' if said else ''}{said}{at}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among those known, with the nearest of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")
