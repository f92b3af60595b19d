"""Layouts of many small files that lie together: webdataset's tars and img2dataset's folders.

A layout is a function as those of sounds. Media are never read before a row needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...parts import Parts
from ...wanted import Wanted
from .img2dataset import img2dataset
from .webdataset import webdataset

LAYOUTS: tuple[Callable[[Wanted, Path], Parts | None], ...] = (img2dataset, webdataset)
