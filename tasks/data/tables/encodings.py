"""Reads text files in the encodings that spreadsheets and other programs write."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PIECE = 1 << 20  # bytes that are decoded at once
_START = 4096  # bytes from which UTF-16 without a byte order mark is recognised


def read_text(file: Path, encoding: str | None) -> str:
    """Returns the text of a file, without a byte order mark.

    Args:
        encoding: its encoding; None recognises UTF-8 and UTF-16.

    Raises:
        ValueError: the text is in another encoding.
    """
    return "".join(_pieces(file, encoding))


def read_lines(file: Path, encoding: str | None) -> Iterator[str]:
    """Yields the lines of a file, as `read_text(…).split("\\n")`, without holding all of it.

    Raises:
        ValueError: the text is in another encoding.
    """
    rest: list[str] = []
    for piece in _pieces(file, encoding):
        first, *others = piece.split("\n")
        rest.append(first)
        if others:
            yield "".join(rest)
            yield from others[:-1]
            rest = others[-1:]
    yield "".join(rest)


def _pieces(file: Path, encoding: str | None) -> Iterator[str]:
    with open(file, "rb") as stream:
        data = stream.read(_PIECE)
        name = encoding or _recognised(data)
        try:
            decoder = codecs.getincrementaldecoder(name)()
        except LookupError:
            raise ValueError(
                f"data.encoding: there is no encoding {name!r}; cp1252 is one"
            ) from None
        lines, started = 0, False  # line breaks in the text so far
        while True:
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise ValueError(_undecoded(error, name, encoding, lines)) from None
            if not started and text:
                text, started = text.removeprefix("\ufeff"), True
            yield text
            if not data:
                return
            lines += text.count("\n")
            data = stream.read(_PIECE)


def _undecoded(error: UnicodeDecodeError, name: str, encoding: str | None, lines: int) -> str:
    data, place = error.object, error.start
    line = lines + data.count(b"\n", 0, place) + 1
    advice = "name its encoding in data.encoding"
    if encoding is None:
        advice += f", as cp1252{_as_cp1252(data, place)}"
    return f"line {line} is not {name} (byte 0x{data[place : place + 1].hex()}): {advice}"


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
