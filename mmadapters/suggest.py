"""Suggestions for a misspelt word."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable

_NAMED = 20


def listing(names: Collection[str]) -> str:
    """Returns the first 20 names in quotes, and how many more there are; "none yet" for none."""
    named = ", ".join(map(repr, itertools.islice(names, _NAMED)))
    more = len(names) - _NAMED
    return f"{named} and {more:,} more" if more > 0 else named or "none yet"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest choice, or an empty string without one."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
