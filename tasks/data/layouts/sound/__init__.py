"""Layouts of recordings.

A layout is a function that is given a request and the path of a folder or a file. It returns the
splits, or None if the path is laid out in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...parts import Parts
from ...wanted import Wanted

LAYOUTS: tuple[Callable[[Wanted, Path], Parts | None], ...] = ()
