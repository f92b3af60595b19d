"""Links that lead in a circle."""

from __future__ import annotations

import os


def is_circle(path: str) -> bool:
    """Whether a path is a link to a folder that it lies in."""
    if not os.path.islink(path):
        return False
    target, around = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return os.path.commonpath([target, around]) == target
