"""Looks at texts, labels and answers for characters that nobody sees."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ...core.findings import Finding, Places, named_rows
from .results import RowPlace

# Control and format characters, blanks that look like a space, private and replacement characters.
# The ideographic space, U+3000, is an ordinary one where it is used.
_UNSEEN = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3164\ufeff\uffa0\ufff9-\ufffd]"
)
_JOINERS = "\u200c\u200d"  # they belong between letters of Persian, Hindi and others, and in emoji
_BREAKS = re.compile(r"[\n\r\t]")
# Unicode has no names for control characters.
_NAMES = {"\ufeff": "byte order mark", "\x00": "null character"}


def text_findings(
    values: Iterable[Any], place: Callable[[int], RowPlace], *, role: str, where: str
) -> list[Finding]:
    """Returns what is suspicious about the characters of a column.

    Args:
        values: the text or list of texts of each row.
        place: names a row.
        role: the column.
        where: the words for the rows ("of the 40 rows of train").
    """
    breaks, unseen = Places(), Places()
    kinds: Counter[str] = Counter()
    for index, value in enumerate(values):
        texts = [*texts_in(value)]
        if any(_BREAKS.search(text.strip()) for text in texts):
            breaks.add(index, place)
        if there := {character for text in texts for character in unseen_characters(text)}:
            unseen.add(index, place)
            kinds.update(there)
    results = []
    if breaks:
        has = "has" if len(breaks) == 1 else "have"
        results.append(
            Finding(
                f"{len(breaks):,} {where} {has} a line break or a tab inside of {role} "
                f"({named_rows(breaks)})",
                "if a lone quote in the file joins several rows into one, mend it there; else "
                "write blanks",
            )
        )
    if unseen:
        has = "has" if len(unseen) == 1 else "have"
        names = ", ".join(character_name(c) for c, _ in kinds.most_common(3))
        results.append(
            Finding(
                f"{len(unseen):,} {where} {has} invisible or broken characters in {role}: {names} "
                f"({named_rows(unseen)})",
                "remove them from the file, since equal words with and without them are different",
            )
        )
    return results


def texts_in(value: Any) -> Iterator[str]:
    """Yields the texts of a value: of a text, a list of texts, or answers as VQAv2 has them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_in(value.get("answer"))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)


def unseen_characters(text: str) -> set[str]:
    """Returns the invisible and broken characters of a text."""
    if text.isascii() and text.isprintable():
        return set()
    return {
        match[0]
        for match in _UNSEEN.finditer(text)
        if not (match[0] in _JOINERS and _joins(text, match.start()))
    }


def _joins(text: str, place: int) -> bool:
    """Returns whether a joiner stands between signs of scripts that need it."""
    around = text[place - 1 : place] + text[place + 1 : place + 2]
    return len(around) == 2 and min(around) > "\u0500"


def character_name(character: str) -> str:
    """Returns the name and the number of a character ("soft hyphen U+00AD")."""
    name = _NAMES.get(character) or unicodedata.name(character, "control character").lower()
    return f"{name} U+{ord(character):04X}"
