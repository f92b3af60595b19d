"""Errors of other libraries, told in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that holds text, without a final full stop.

    It is the name of the error's type if the message is empty.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
