"""The bytes of a cache: packed values of an example, and files of arrays. No pickle is used.

A file begins with `MAGIC`, the length of its header and the header's CRC-32 (two 32-bit numbers,
little endian). The header follows as JSON: types, shapes and places of the arrays, and the size and
the CRC-32 of all of them together. The arrays begin at the next multiple of 64 bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"mmprefix"
_LENGTHS = struct.Struct("<II")
_ALIGN = 64
_KINDS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


class Damaged(ValueError):
    """The bytes differ from those that were written; the message says how."""


def pack(value: Any) -> bytes:
    """Returns a value as bytes.

    The value may consist of dicts with text as keys, lists, tuples, text, numbers, None, tensors
    and arrays. A tensor on the "meta" device is kept as its shape and type.

    Raises:
        ValueError: the value holds an object of another type.
    """
    blobs: list[memoryview] = []
    head = json.dumps(_described(value, blobs), ensure_ascii=False).encode()
    return b"".join([struct.pack("<I", len(head)), head, *blobs])


def unpack(data: Any) -> Any:
    """Returns the value that `pack` turned into these bytes; its tensors are copies."""
    view = memoryview(data)
    (length,) = struct.unpack_from("<I", view)
    start = 4 + length
    return _restored(json.loads(bytes(view[4:start])), view[start:])


def _described(value: Any, blobs: list[memoryview]) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        return [_described(part, blobs) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_described(part, blobs) for part in value]}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _described(part, blobs) for name, part in value.items()}}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": _described(torch.from_numpy(np.ascontiguousarray(value)), blobs)}
    if not isinstance(value, Tensor) or _name(value.dtype) not in _KINDS:
        raise ValueError(
            f"a value of type {type(value).__name__} cannot be kept in a cache: tensors, text, "
            "numbers, and lists, tuples and dicts (by names) of them can"
        )
    described = [_name(value.dtype), list(value.shape)]
    if value.device.type == "meta":
        return {"empty": described}
    kept = _narrow(value)
    offset = sum(map(len, blobs))
    blobs.append(_bytes(kept))
    return {"tensor": [*described, offset, _name(kept.dtype)]}


def _restored(value: Any, data: memoryview) -> Any:
    if isinstance(value, list):
        return [_restored(part, data) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {name: _restored(part, data) for name, part in inner.items()}
    if kind == "tuple":
        return tuple(_restored(part, data) for part in inner)
    if kind == "array":
        return _restored(inner, data).numpy()
    if kind == "empty":
        return torch.empty(inner[1], dtype=_KINDS[inner[0]], device="meta")
    name, shape, offset, kept = inner
    size = int(np.prod(shape, dtype=np.int64)) * _KINDS[kept].itemsize
    if not size:
        return torch.empty(shape, dtype=_KINDS[name])
    flat = torch.frombuffer(bytearray(data[offset : offset + size]), dtype=_KINDS[kept])
    return flat.reshape(shape).to(_KINDS[name])


def _narrow(value: Tensor) -> Tensor:
    """Returns many 64-bit integers (the classes of a mask) in the smallest type that holds them.

    A few of them, and values of other types, are returned unchanged.
    """
    if value.dtype != torch.int64 or value.numel() < 256:
        return value
    low, high = (int(bound) for bound in value.aminmax())
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return value.to(dtype)
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A tensor with a single number may have any stride, but a view as bytes needs stride 1.
    return memoryview(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data)


def file_parts(about: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Iterator[Any]:
    """Yields the pieces of a file of arrays; `open_file` returns `about` (JSON-ready) again."""
    places: dict[str, Any] = {}
    pieces: list[Any] = []
    size = crc = 0
    for name, tensor in arrays.items():
        places[name] = [_name(tensor.dtype), list(tensor.shape), size]
        data = _bytes(tensor)
        for piece in (data, b"\0" * (-len(data) % _ALIGN)):
            pieces.append(piece)
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    header = {"about": dict(about), "arrays": places, "size": size, "crc": crc}
    text = json.dumps(header, sort_keys=True).encode()
    start = MAGIC + _LENGTHS.pack(len(text), zlib.crc32(text)) + text
    yield start
    yield b"\0" * (-len(start) % _ALIGN)
    yield from pieces


def open_file(data: np.ndarray, *, verify: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the `about` and the arrays of a file that `file_parts` made.

    Args:
        data: (bytes,) uint8, the file; the arrays are parts of its memory.
        verify: reads everything and compares it with the checksum.

    Raises:
        Damaged: this is another kind of file, or it was cut off or changed.
    """
    first = len(MAGIC) + _LENGTHS.size
    if len(data) < first or bytes(data[: len(MAGIC)]) != MAGIC:
        raise Damaged("it is not a file of a cache")
    length, crc = _LENGTHS.unpack(bytes(data[len(MAGIC) : first]))
    text = bytes(data[first : first + length])
    if len(text) != length or zlib.crc32(text) != crc:
        raise Damaged("its header was changed or cut off")
    header = json.loads(text)
    start = first + length
    start += -start % _ALIGN
    if len(data) != start + header["size"]:
        raise Damaged(f"it has {len(data):,} bytes instead of {start + header['size']:,}")
    body = data[start:]
    if verify and zlib.crc32(body.data) != header["crc"]:
        raise Damaged("its checksum differs")
    arrays = {}
    for name, (kind, shape, offset) in header["arrays"].items():
        dtype = _KINDS[kind]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        part = torch.from_numpy(body[offset : offset + size])
        arrays[name] = part.view(dtype).reshape(shape)
    return header["about"], arrays
