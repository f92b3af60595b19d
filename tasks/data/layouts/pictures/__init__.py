"""Layouts of pictures with masks or outlines of objects.

A layout is a function that is given a request and the path of a folder or a file. It returns the
splits, or None if the path is laid out in another way. Pictures and masks that are paired by their
names alone come last, after tables: see `pairs`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...parts import Parts
from ...wanted import Wanted
from .carvana import carvana
from .cityscapes import cityscapes
from .coco_instances import coco_instances
from .labelme import labelme
from .refused import refused_layouts
from .voc import voc

LAYOUTS: tuple[Callable[[Wanted, Path], Parts | None], ...] = (
    *(coco_instances, voc, cityscapes, carvana, labelme),
    refused_layouts,
)
