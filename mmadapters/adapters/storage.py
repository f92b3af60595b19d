"""Adapter directories: `adapter.safetensors` and `adapter.json`, nothing else, never a pickle.

The JSON holds the format, the adapter's name, the method's config, the encoder's identity, the
checksum of the weights, and the metadata that a task adds (label map, vocabulary, preprocessing,
metrics). `identity` says what the identity of an encoder holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..files import read_directory, replacing_directory

FORMAT = 1
WEIGHTS_FILE, JSON_FILE = "adapter.safetensors", "adapter.json"
_HEAD = "head/"


@dataclass(kw_only=True)
class Stored:
    """The contents of an adapter directory."""

    # The adapter's name.
    name: str
    # Its config as plain data, with its method's name under "method".
    config: dict[str, Any]
    # The identity of the encoder that it was made for: {library, architecture, towers}.
    backbone: dict[str, Any]
    # The adapter's tensors by `<site>#<method>/<parameter>`.
    tensors: dict[str, Tensor]
    # The state dict of a task's head, empty without one.
    head: dict[str, Tensor] = field(default_factory=dict)
    # The task's data, which JSON can hold.
    metadata: dict[str, Any] = field(default_factory=dict)


def write(directory: str | os.PathLike, stored: Stored) -> None:
    """Writes an adapter directory whole or not at all.

    It replaces a directory that holds an adapter and nothing else.

    Raises:
        ValueError: the path exists and is not an adapter directory, or a value is not finite.
    """
    target = Path(directory)
    _check_replaceable(target)
    tensors = {**stored.tensors, **{_HEAD + key: value for key, value in stored.head.items()}}
    damaged = _not_finite(tensors)
    if damaged is not None:
        raise ValueError(f"{damaged} holds values that are not finite, so {target} was not written")
    # Copied, as safetensors refuses tensors that share memory (tied weights of a head).
    data = save_tensors(
        {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in tensors.items()
        }
    )
    description = {
        "format": FORMAT,
        "name": stored.name,
        "config": stored.config,
        "backbone": stored.backbone,
        "sha256": hashlib.sha256(data).hexdigest(),
        "metadata": stored.metadata,
    }
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replacing_directory(target) as fresh:
        _write_synced(fresh / WEIGHTS_FILE, data)
        _write_synced(fresh / JSON_FILE, text.encode())


def _check_replaceable(target: Path) -> None:
    """Raises ValueError unless `target` is free or holds an adapter and nothing else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose another path")
    inside = sorted(path.name for path in target.iterdir())
    foreign = [name for name in inside if name not in (JSON_FILE, WEIGHTS_FILE)]
    if foreign:
        raise ValueError(
            f"{target} holds {foreign[0]}, which is no part of an adapter and would be lost; "
            "choose another path"
        )


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with a value that is not finite, or None.

    Tensors of one dtype and device are checked at once, as an adapter has many small ones.
    """
    flat: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            flat.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach().reshape(-1))
    if all(bool(torch.isfinite(torch.cat(parts)).all()) for parts in flat.values()):
        return None
    return next(key for key, tensor in tensors.items() if not torch.isfinite(tensor).all())


def _write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(directory: str | os.PathLike) -> Stored:
    """Reads and checks a directory. Tensors are on the CPU, in the dtype they were saved in.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: the format is unknown, a file is truncated or changed, or a value is not finite.
    """
    path = Path(directory)
    return read_directory(path, lambda: _read(path))


def _read(path: Path) -> Stored:
    for name in (JSON_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not an adapter directory: it has no {name}")
    try:
        description = json.loads((path / JSON_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / JSON_FILE} is not readable as JSON: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        version = description.get("format") if isinstance(description, dict) else None
        raise ValueError(
            f"{path / JSON_FILE} has format {version!r}, this version reads format {FORMAT}; "
            "update mmadapters or save the adapter anew"
        )
    missing = [key for key in ("name", "config", "backbone", "sha256") if key not in description]
    if missing:
        raise ValueError(f"{path / JSON_FILE} lacks {', '.join(missing)}: it was changed by hand")
    _check_description(path / JSON_FILE, description)
    data = (path / WEIGHTS_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise ValueError(
            f"{path / WEIGHTS_FILE} is not the file that was saved (its checksum differs): it was "
            "truncated or changed; copy it again"
        )
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_FILE} is not a safetensors file: {error}") from None
    damaged = _not_finite(tensors)
    if damaged is not None:
        raise ValueError(f"{path / WEIGHTS_FILE}: {damaged} holds values that are not finite")
    return Stored(
        name=description["name"],
        config=description["config"],
        backbone=description["backbone"],
        tensors={key: value for key, value in tensors.items() if not key.startswith(_HEAD)},
        head={
            key.removeprefix(_HEAD): value
            for key, value in tensors.items()
            if key.startswith(_HEAD)
        },
        metadata=description.get("metadata", {}),
    )


def _check_description(path: Path, description: dict[str, Any]) -> None:
    """Raises ValueError for a backbone or metadata that `write` would not have written."""
    backbone = description["backbone"]
    towers = backbone.get("towers") if isinstance(backbone, dict) else None
    if not isinstance(towers, dict) or not towers:
        raise ValueError(f"{path}: backbone names no towers: it was changed by hand")
    for name, tower in towers.items():
        if not isinstance(tower, dict) or not {"width", "depth", "weights"} <= tower.keys():
            raise ValueError(
                f"{path}: backbone lacks width, depth or weights of tower {name!r}: it was changed "
                "by hand"
            )
    if not isinstance(description.get("metadata", {}), dict):
        raise ValueError(f"{path}: metadata is not a mapping: it was changed by hand")
