"""Makes malformed inputs from a seed: adapter directories, configs, media, tables, metadata.

Each kind is a function that writes its inputs below a folder and yields (name, path). The same seed
gives the same inputs.
"""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

# Values of kinds that an entry of JSON does not have, and some that are too large for it.
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0.5, 10**30, 1e300, "x", "", [], {}, [[]], ["\ud800"], {"a": {"b": []}}),
    "../../evil",
)


def flipped(adapter: Path, folder: Path, *, seed: int, count: int) -> Iterator[tuple[str, Path]]:
    """Adapter directories with one bit flipped in one of their two files."""
    chance = random.Random(seed)
    for number in range(count):
        file = ("adapter.json", "adapter.safetensors")[number % 2]
        copied = Path(shutil.copytree(adapter, folder / f"flip{number}"))
        data = bytearray((copied / file).read_bytes())
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (copied / file).write_bytes(bytes(data))
        yield f"{file} bit {bit}", copied


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of every value in plain data."""
    items = data.items() if isinstance(data, dict) else ()
    items = enumerate(data) if isinstance(data, list) else items
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(data: Any, path: tuple, value: Any) -> Any:
    """Returns plain data with another value at a path."""
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def mistyped(data: Any, *, seed: int, count: int) -> Iterator[tuple[str, Any]]:
    """Plain data in which one value is of another kind."""
    chance = random.Random(seed)
    every = list(places(data))
    for _ in range(count):
        path, value = chance.choice(every), chance.choice(WRONG)
        yield f"{'.'.join(map(str, path))} = {str(value)[:30]}", changed(data, path, value)


def configs(*, seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Texts of YAML that are no config: bombs, and good ones that were cut or mixed up."""
    good = (
        "task: classification\nname: x\nbackbone: {name: nano/vit}\n"
        "data: {source: builtin/shapes, limit: {train: 4}}\ntrainer: {batch_size: 4}\n"
    )
    nine = ",".join(["*a0"] * 9)
    yield (
        "aliases",
        good
        + f"a0: &a0 [1]\nb: [{nine}]\n"
        + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9)),
    )
    yield (
        "interpolation",
        good + "k0: aaaaaaaaaa\n" + "".join(f"k{i + 1}: {f'${{k{i}}}' * 10}\n" for i in range(12)),
    )
    yield "base 60", good.replace("batch_size: 4", "batch_size: 1:30")
    yield "negative limit", good.replace("train: 4", "train: -1")
    for bracket in ("[]", "{}"):
        yield f"deep {bracket}", good + f"adapter: {bracket[0] * 3000}{bracket[1] * 3000}\n"
    chance = random.Random(seed)
    marks = "{}[]:,&*!|>'\"%@`#-?\t\0\x85${}"
    for number in range(count - 6):
        text = list(good)
        for _ in range(chance.randint(1, 4)):
            text.insert(chance.randrange(len(text)), chance.choice(marks))
        yield f"mixed up {number}", "".join(text)


def png(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds few bytes."""

    def part(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * min((width + 1) * height, 1 << 20))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", body) + part(b"IEND", b"")


def pictures(*, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Bytes that are no picture of use."""
    yield "long", png(300_000, 1)
    yield "tall", png(1, 300_000)
    yield "bomb", png(60_000, 60_000)
    yield (
        "postscript",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    )
    chance = random.Random(seed)
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    goods = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        goods.append((kind, buffer.getvalue()))
    for number in range(count - 4):
        kind, data = goods[number % len(goods)]
        cut = bytearray(data[: chance.randrange(len(data))])
        for _ in range(3):
            if cut:
                cut[chance.randrange(len(cut))] = chance.randrange(256)
        yield f"{kind} {number}", bytes(cut)


def sounds(*, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Bytes that are no recording of use."""

    def wav(rate: int, samples: np.ndarray, kind: str = "PCM_16", form: str = "WAV") -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, rate, format=form, subtype=kind)
        return buffer.getvalue()

    yield "1 Hz", wav(1, np.zeros(20_000), "PCM_U8")
    yield "2 GHz", wav(2_147_483_647, np.zeros(10))
    yield "five hours", wav(1000, np.zeros(5 * 3600 * 1000), form="FLAC")
    chance = random.Random(seed)
    noise = np.random.default_rng(seed).standard_normal(400) * 0.1
    goods = [wav(8000, noise), wav(8000, noise, form="FLAC"), wav(8000, noise, "VORBIS", "OGG")]
    for number in range(count - 3):
        data = bytearray(goods[number % 3])
        for _ in range(4):
            data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
        yield f"changed {number}", bytes(data)


def tables(*, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Texts of JSON lines that are no table."""
    deep = "[" * 50_000 + "]" * 50_000
    yield "deep", f'{{"image": {deep}, "label": "a"}}\n'.encode() * 2
    yield "deep objects", (b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n") * 2
    yield "deep list", deep.encode()
    yield "climbing", b'{"file_name": "../outside.png", "label": "a"}\n' * 2
    yield "server", b'{"file_name": "http://localhost:1/a.png", "label": "a"}\n' * 2
    chance = random.Random(seed)
    good = b'{"file_name": "a.png", "label": "a"}\n{"file_name": "b.png", "label": "b"}\n'
    for number in range(count - 5):
        data = bytearray(good)
        for _ in range(3):
            data[chance.randrange(len(data))] = chance.choice(b'{}[]",:\\\0\xff 0a')
        yield f"changed {number}", bytes(data)


def as_text(data: Any) -> str:
    """Returns plain data as JSON; half of a surrogate pair is escaped."""
    return json.dumps(data)
