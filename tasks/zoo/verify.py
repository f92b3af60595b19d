"""Recomputes the headline figures of the shipped encoders and compares them with their cards."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mmadapters.zoo import NANO

from .figure import CardFigure

__all__ = ["CardFigure", "verify"]


def verify(
    names: Iterable[str] | None = None,
    *,
    data: Path | None = None,
    directories: dict[str, Path] | None = None,
) -> list[CardFigure]:
    """Measures the headline figures of the named encoders.

    Args:
        names: keys of `NANO`; all of them if None.
        data: the folder of the data sets that some figures need. A figure without its data comes
            back with `holds` None.
        directories: folders of encoders that are not where they ship, by name.

    Returns:
        the figures; the name of each begins with that of its encoder.

    Raises:
        ValueError: a name is not in `NANO`.
        FileNotFoundError: an encoder's files are missing.
    """
    names = list(NANO if names is None else names)
    if unknown := sorted(set(names) - set(NANO)):
        raise ValueError(
            f"no encoder {', '.join(unknown)} ships with the package; "
            f"there are {', '.join(sorted(NANO))}"
        )
    from .headlines import HEADLINES

    figures = []
    for name in names:
        directory = (directories or {}).get(name, NANO[name].directory)
        recomputed = HEADLINES[name](directory, data)
        figures += [replace(figure, name=f"{name}: {figure.name}") for figure in recomputed]
    return figures
