"""Reads text files in the encodings that spreadsheets and other programs write."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_START = 4096  # bytes from which UTF-16 without a byte order mark is recognised


def read_text(file: Path, encoding: str | None) -> str:
    """Returns the text of a file, without a byte order mark.

    Args:
        encoding: its encoding; None recognises UTF-8 and UTF-16.

    Raises:
        ValueError: the text is in another encoding.
    """
    data = file.read_bytes()
    name = encoding or _recognised(data)
    try:
        return data.decode(name).removeprefix("\ufeff")
    except LookupError:
        raise ValueError(f"data.encoding: there is no encoding {name!r}; cp1252 is one") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong = f"{data[error.start : error.start + 1].hex()}"
        advice = "name its encoding in data.encoding"
        if encoding is None:
            advice += f", as cp1252{_as_cp1252(data, error.start)}"
        raise ValueError(f"line {line} is not {name} (byte 0x{wrong}): {advice}") from None


def _recognised(data: bytes) -> str:
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    start = data[:_START]
    if len(start) >= 4 and start.count(0) > len(start) // 4:
        return "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
    return "utf-8"


def _as_cp1252(data: bytes, place: int) -> str:
    """Returns how the words around a byte read in cp1252, for a message."""
    begin = data.rfind(b"\n", 0, place) + 1
    words = data[max(begin, place - 20) : place + 20].split(b"\n")[0]
    try:
        return f" (then it reads {words.decode('cp1252').strip()!r})"
    except UnicodeDecodeError:
        return ""
