"""Data that is generated here or that a package ships: `data.source: builtin/NAME`.

Each source is a module with `Options`, a config section in which each split has its size (0 leaves
it out), and `read(options, split)`. The same options give the same rows everywhere. Media are
encoded like files, so their readers treat them like any other data.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from mmadapters.suggest import nearest

from ...config.schema import SPLITS
from ..parts import Parts, Piece
from . import easy_vqa, scenes, speech

SOURCES: dict[str, ModuleType] = {"scenes": scenes, "speech": speech, "easy_vqa": easy_vqa}


def builtin_parts(name: str, options: Mapping[str, Any]) -> Parts:
    """Returns the splits of a builtin source, which are made when they are read.

    Raises:
        ValueError: there is no such source or option, or an option has a wrong value.
    """
    if name not in SOURCES:
        raise ValueError(
            f"data.source: there is no builtin/{name}{nearest(name, SOURCES)}; there are "
            + ", ".join(f"builtin/{known}" for known in SOURCES)
        )
    module = SOURCES[name]
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
