"""`adapter.json`: its text with a checksum of its own, and the checks of what is read.

The checksum is the SHA-256 of all other entries as JSON in one canonical form, the checksum of the
weights among them. So it also says that both files belong together. Files of earlier versions have
none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import first_line
from ..limits import DESCRIPTION

FORMAT = 1
_CHECKSUM = "checksum"
_NEEDED = ("name", "config", "backbone", "sha256")
_KNOWN = ("format", *_NEEDED, "metadata", _CHECKSUM)


def to_text(description: Mapping[str, Any]) -> str:
    """Returns the text of `adapter.json`: the description, its format and its checksum.

    Raises:
        TypeError, ValueError: JSON cannot hold a value.
    """
    data = {"format": FORMAT, **description}
    # Read back, as JSON has neither tuples nor keys that are numbers.
    plain = json.loads(json.dumps(data, allow_nan=False))
    data[_CHECKSUM] = checksum(plain)
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def checksum(description: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a description as it was read, without its own checksum.

    Raises:
        ValueError: a number in it is not finite.
    """
    data = {key: value for key, value in description.items() if key != _CHECKSUM}
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_description(path: Path) -> dict[str, Any]:
    """Reads and checks an `adapter.json`.

    Raises:
        ValueError: it is too large, no JSON, of a format that is not known, changed, or an entry is
            missing or of another type.
    """
    if (reason := DESCRIPTION.passed(path.stat().st_size)) is not None:
        raise ValueError(f"{path} has {reason}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{path} is not readable as JSON: it is nested too deeply") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON: {first_line(error)}") from None
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is not int or version != FORMAT:  # true equals 1
        raise ValueError(
            f"{path} has format {version!r}, this version reads format {FORMAT}; update mmadapters "
            "or save the adapter anew"
        )
    missing = [key for key in _NEEDED if key not in data]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was changed by hand")
    for key in data:
        if key not in _KNOWN:
            raise ValueError(f"{path} has an entry {key[:40]!r}, which no format has")
    try:
        changed = _CHECKSUM in data and checksum(data) != data[_CHECKSUM]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from None
    if changed:
        raise ValueError(
            f"{path} is not the file that was saved (its checksum differs): copy it again, or take "
            f"out its line {_CHECKSUM!r} if the change is meant"
        )
    _check_types(path, data)
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _check_types(path: Path, data: dict[str, Any]) -> None:
    """Raises ValueError for a backbone or metadata that would not have been written."""
    backbone = data["backbone"]
    towers = backbone.get("towers") if isinstance(backbone, dict) else None
    if not isinstance(towers, dict) or not towers:
        raise ValueError(f"{path}: backbone names no towers: it was changed by hand")
    for name, tower in towers.items():
        if not isinstance(tower, dict) or not {"width", "depth", "weights"} <= tower.keys():
            raise ValueError(
                f"{path}: backbone lacks width, depth or weights of tower {name!r}: it was changed "
                "by hand"
            )
    if not isinstance(data.get("metadata", {}), dict):
        raise ValueError(f"{path}: metadata is not a mapping: it was changed by hand")
