"""Data that is made here or that a package ships: `data.source: builtin/NAME`.

A module for each: its `Options`, a config section in which each split has its size (0 leaves it
out), and `read(options, split)`. The same options give the same rows everywhere. Media are encoded
as files are, so that what reads them cannot tell them from anybody's own data.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mmadapters.suggest import nearest

from ...config.schema import SPLITS
from ..files import Parts, Piece

SOURCES = {
    "scenes": "drawn scenes with masks, captions and counts",
    "speech": "sentences read in accents by speech synthesis",
    "easy_vqa": "the questions and pictures of the package easy-vqa",
}


def builtin_parts(name: str, options: Mapping[str, Any]) -> Parts:
    """The splits of a builtin source, made when they are read.

    Raises:
        ValueError: there is no such source or option.
    """
    if name not in SOURCES:
        raise ValueError(
            f"data.source: there is no builtin/{name}{nearest(name, SOURCES)}; there are "
            + ", ".join(f"builtin/{own}" for own in SOURCES)
        )
    module = importlib.import_module(f".{name}", __name__)
    known = module.Options.model_fields
    if unknown := [key for key in options if key not in known]:
        raise ValueError(
            f"data.options: builtin/{name} has no {unknown[0]!r}{nearest(unknown[0], known)}; it "
            f"has {', '.join(known)}"
        )
    try:
        read = module.Options(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"data.options.{key}: {reason} (got {first['input']!r})") from None
    return {
        split: [Piece(lambda split=split: module.read(read, split), None)]  # type: ignore[misc]
        for split in SPLITS
        if getattr(read, split) > 0
    }
