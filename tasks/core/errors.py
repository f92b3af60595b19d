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
