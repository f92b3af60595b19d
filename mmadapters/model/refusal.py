"""Stands in for methods of an encoder that must not run."""

from __future__ import annotations

from typing import Any


class RefusedMethod:
    """A method that refuses every call. It can be copied and pickled.

    Attributes:
        reason: the sentence with which it refuses.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(self.reason)
