"""Predictions of a saved adapter for files and folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..artifact import Opened
from ..data.media import MEDIA_SUFFIXES


def predict(
    opened: Opened, inputs: Sequence[str], *, out: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the task's result for each input, JSON-ready.

    Args:
        inputs: files, folders, or what else the task takes. A folder stands for the pictures and
            recordings in it, in the order of their names.
        out: a folder for larger results (masks, pictures).

    Raises:
        ValueError: there is no input, or one cannot be read.
    """
    expanded = list(expand(inputs))
    if not expanded:
        raise ValueError(f"there is nothing to predict; give {opened.task.usage}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    opened.model.eval()
    yield from opened.task.predict(opened.model, expanded, out=out)


def expand(inputs: Sequence[str]) -> Iterator[str]:
    """Yields the inputs; in place of a folder, the pictures and recordings in it."""
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            yield from (
                str(f) for f in sorted(path.iterdir()) if f.suffix.lower() in MEDIA_SUFFIXES
            )
        else:
            yield name
