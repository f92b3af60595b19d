"""Predictions of a saved adapter for files and folders."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import Opened
from ..core.errors import InputErrors
from ..core.rows import Column
from ..data.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES

PREDICTIONS = "predictions.jsonl"


def predict(
    opened: Opened, inputs: Sequence[str], *, out: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the task's result for each input, JSON-ready.

    An input that cannot be used does not end the others: it is named after the last result.

    Args:
        inputs: files, folders, or what else the task takes. A folder stands for the pictures or
            recordings in it that the task reads, in the order of their names.
        out: a folder for larger results (masks, pictures), and for `predictions.jsonl`. It has a
            line for each result, written as soon as there is one, and for each input that cannot be
            used, with the reason under "error".

    Raises:
        ValueError: there is no input.
        BadInputs: some could not be used; raised at the end.
    """
    with _lines(out) as write:
        bad = InputErrors(lambda name, reason: write({"input": name, "error": reason}))
        suffixes = suffixes_of(opened.task.columns)
        expanded: list[str] = []
        for name in inputs:
            with bad.guarded(name):
                expanded += expand(name, suffixes)
        if not expanded:
            bad.end()
            raise ValueError(f"there is nothing to predict; give {opened.task.usage}")
        opened.model.eval()
        for result in opened.task.predict(opened.model, expanded, out=out, bad=bad):
            write(result)
            yield result
        bad.end()


@contextlib.contextmanager
def _lines(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that adds a line to `predictions.jsonl`, or does nothing without `out`.

    A kill leaves all lines that were written before it.
    """
    if out is None:
        yield lambda line: None
        return
    out.mkdir(parents=True, exist_ok=True)
    # A file name that is not in UTF-8 becomes an escape that JSON has too.
    with open(out / PREDICTIONS, "w", encoding="utf-8", errors="backslashreplace") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        yield write


def suffixes_of(columns: Mapping[str, Column]) -> tuple[str, ...]:
    """Returns the suffixes of the files that a task with these columns reads."""
    kinds = {column.kind for column in columns.values()}
    images = IMAGE_SUFFIXES if "image" in kinds else ()
    return (*images, *(AUDIO_SUFFIXES if "audio" in kinds else ()))


def expand(name: str, suffixes: Sequence[str]) -> list[str]:
    """Returns an input; in place of a folder, the files in it that have one of the suffixes.

    Hidden files and folders in the folder are left out.

    Raises:
        ValueError: the folder cannot be read, or has no such file.
    """
    if not os.path.isdir(name):  # also a text, which may be longer than a path
        return [name]
    try:
        entries = sorted(Path(name).iterdir())
    except OSError as error:
        raise ValueError(f"the folder {name} cannot be read: {error.strerror}") from None
    files = [
        str(path)
        for path in entries
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and not path.is_dir()
    ]
    if not files:
        raise ValueError(f"the folder {name} has no file that is read ({', '.join(suffixes)})")
    return files
