"""The layouts that published data sets use."""

from __future__ import annotations

from pathlib import Path

from ..parts import Parts
from ..wanted import Wanted
from . import archives, language, pictures, sound

LAYOUTS = (*archives.LAYOUTS, *language.LAYOUTS, *pictures.LAYOUTS, *sound.LAYOUTS)


def known_parts(wanted: Wanted, path: Path) -> Parts | None:
    """Returns the splits of a folder or file in the first layout that recognises it, or None.

    Raises:
        ValueError: it is in a known layout, but it cannot be read so.
    """
    return next((parts for layout in LAYOUTS if (parts := layout(wanted, path)) is not None), None)
