"""Limits on what a file may ask for, each with an environment variable that sets another.

A file of a few bytes can ask for gigabytes or hours. Each limit lies far above what data and models
of use need. docs/files.md has the table of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_PREFIX = "MMADAPTERS_MAX_"


@dataclass(frozen=True)
class Limit:
    """A limit.

    Attributes:
        name: the end of the environment variable, in capitals.
        default: the greatest number that is allowed without the variable.
        counts: the words for what is counted.
    """

    name: str
    default: int
    counts: str

    @property
    def variable(self) -> str:
        """The environment variable that sets another limit."""
        return f"{_PREFIX}{self.name}"

    @property
    def value(self) -> int:
        """The limit that holds now.

        Raises:
            ValueError: the environment variable is no whole number above 0.
        """
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        if not text.strip().isdecimal() or int(text) == 0:
            raise ValueError(f"{self.variable}={text!r} must be a whole number above 0")
        return int(text)

    def passed(self, count: float) -> str | None:
        """Returns words about a count that passes the limit, or None if it does not."""
        if count <= self.value:
            return None
        return (
            f"{count:,.10g} {self.counts}, more than the limit of {self.value:,} "
            f"({self.variable} sets another)"
        )


METHODS = Limit("METHODS", 64, "methods in one union")
OPTIONS = Limit("OPTIONS", 10_000, "values in one option of a method")
DESCRIPTION = Limit("DESCRIPTION", 64 << 20, "bytes in the description of an adapter")
MAGNITUDE = Limit("MAGNITUDE", 10**15, "as the size of a value")
FACTOR = Limit("FACTOR", 10**6, "as the size of a factor")
BLOCKS = Limit("BLOCKS", 1_000, "blocks")
PARAMETERS = Limit("PARAMETERS", 20 * 10**9, "parameters")
NODES = Limit("NODES", 100_000, "values, aliases written out")
DEPTH = Limit("DEPTH", 100, "levels of nesting")
PIXELS = Limit("PIXELS", 178_956_970, "pixels in a picture")
RATIO = Limit("RATIO", 500, "times as long as it is wide")
SECONDS = Limit("SECONDS", 4 * 3600, "seconds")
RATE = Limit("RATE", 10_000_000, "samples a second")

LIMITS = (
    *(METHODS, OPTIONS, DESCRIPTION, MAGNITUDE, FACTOR, BLOCKS, PARAMETERS),
    *(NODES, DEPTH, PIXELS, RATIO, SECONDS, RATE),
)
