"""Folders that `save_to_disk` of the library `datasets` has written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmadapters.errors import first_line

from ..parts import Parts, Piece
from ..splits import KNOWN
from ..wanted import Wanted

if TYPE_CHECKING:
    from datasets import Dataset

_ONE = ("state.json", "dataset_info.json")  # the files of one data set
_SEVERAL = "dataset_dict.json"  # the file that names the splits


def saved_parts(wanted: Wanted, folder: Path) -> Parts | None:
    """Returns the splits of a saved `Dataset` or `DatasetDict`, or None for another folder.

    Folders named as splits, each with a saved `Dataset`, are splits too.
    """
    root = wanted.root(folder)
    if (folder / _SEVERAL).is_file():
        places = {path.name: path for path in _folders(folder) if _is_saved(path)}
        if missing := [name for name in _splits(folder) if name not in places]:
            raise ValueError(
                f"data.source: {folder / _SEVERAL} names the split {missing[0]}, but the folder "
                f"{folder / missing[0]} holds no saved data set: save the data again"
            )
        places = {name: places[name] for name in _splits(folder)}
    elif _is_saved(folder):
        places = {"": folder}
    else:
        places = {p.name: p for p in _folders(folder) if p.name.lower() in KNOWN and _is_saved(p)}
    if not places:
        return None
    return {
        name: [Piece(lambda place=place: _read(place), root)]  # type: ignore[misc]
        for name, place in places.items()
    }


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _is_saved(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _ONE)


def _splits(folder: Path) -> list[str]:
    import json

    file = folder / _SEVERAL
    try:
        names = json.loads(file.read_text("utf-8"))["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.source: {file} cannot be read: {first_line(error)}") from None
    return [str(name) for name in names]


def _read(folder: Path) -> Dataset:
    import datasets
    import pyarrow as pa

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(
            f"data.source: the data set saved in {folder} cannot be read: {first_line(error)}"
        ) from None
    # It may have been saved with a format (tensors of some columns).
    return dataset.with_format(None)
