"""Collects the results of `predict` before the error that names the inputs it cannot use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmadapters.tasks.core.errors import BadInputs, InputErrors


class Told(InputErrors):
    """Collects bad inputs, with their names in the order in which they were told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        super().__init__(lambda name, reason: self.names.append(name))


def until_error(results: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the results before the error, and the error's reasons.

    Raises:
        AssertionError: there is no error.
    """
    before = []
    try:
        for result in results:
            before.append(result)
    except BadInputs as error:
        return before, error.reasons
    raise AssertionError("every input could be used")
