"""Rows that cannot be used, and the errors that they raise."""

from __future__ import annotations

from dataclasses import dataclass


class BadRow(ValueError):
    """A row that cannot be used; the message says what is wrong with it, not where it is."""


@dataclass(frozen=True)
class Problem:
    """A row that could not be used: its number in its split and why."""

    index: int
    reason: str


class DataError(ValueError):
    """Rows that cannot be used, where the config says that they end the run."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that holds text, without a final full stop, or
    the name of its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
