"""Recompute the headline figures of the shipped encoders and hold them against their cards."""

import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mmadapters.zoo import NANO

from .figure import Figure

__all__ = ["Figure", "verify"]


def verify(
    names: Iterable[str] | None = None,
    *,
    data: Path | None = None,
    directories: dict[str, Path] | None = None,
) -> list[Figure]:
    """The headline figures of the named encoders, measured now.

    Args:
        names: keys of `NANO`, all by default.
        data: folder that holds the data sets which some figures need; a figure whose data is not
            there comes back with `holds` None.
        directories: where an encoder's files lie, by name, if not where they ship.

    Returns:
        the figures, each named with its encoder in front.

    Raises:
        ValueError: a name that is not in `NANO`.
        FileNotFoundError: an encoder's files are missing.
    """
    names = list(NANO if names is None else names)
    if unknown := sorted(set(names) - set(NANO)):
        raise ValueError(f"no encoder {unknown} ships with the package; there are {sorted(NANO)}")
    figures = []
    for name in names:
        directory = (directories or {}).get(name, NANO[name].directory)
        module = importlib.import_module(NANO[name].module)
        found = module.verify(directory, data, **NANO[name].options)
        figures += [replace(figure, name=f"{name}: {figure.name}") for figure in found]
    return figures
