"""Collects the results of `predict` before the error that names the inputs it cannot use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmadapters.tasks.core.errors import BadInputs


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
