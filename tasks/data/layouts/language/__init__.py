"""Layouts of pictures with captions or questions.

A layout is a function that is given a request and the path of a folder or a file. It returns the
splits, or None if the path is laid out in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...parts import Parts
from ...wanted import Wanted
from .captions import coco_captions, karpathy
from .flickr import flickr
from .questions import llava, slake
from .vqa_pairs import vqa_pairs

LAYOUTS: tuple[Callable[[Wanted, Path], Parts | None], ...] = (
    karpathy,
    coco_captions,
    flickr,
    vqa_pairs,
    llava,
    slake,
)
