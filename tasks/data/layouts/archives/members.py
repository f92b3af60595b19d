"""Puts the files of a row together: 000012.jpg, 000012.txt and 000012.json are one row.

Source: the webdataset format, https://github.com/webdataset/webdataset. The columns are

| member                          | column                                                      |
|---------------------------------|-------------------------------------------------------------|
| KEY.jpg, KEY.png, … (only one)  | image; jpg and png, if a row has both                       |
| KEY.wav, KEY.flac, … (only one) | audio                                                       |
| KEY.mask.png, KEY.caption.txt   | mask, caption                                               |
| KEY.json                        | one for each key of its object                              |
| KEY.txt, KEY.cls                | txt, cls                                                    |
| the key                         | __key__                                                     |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...media import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from ...tables.json_rows import load_json

KEY = "__key__"
TEXTS = ("txt", "text", "transcript", "caption")
NUMBERS = ("cls", "cls2", "index", "inx", "id")
# Formats whose readers can run any program that is written in the file.
PICKLES = ("pyd", "pickle", "pkl", "p", "pth", "pt", "ckpt", "joblib", "dill")
_NAME = re.compile(r"((?:.*/|)[^./][^.]*)[.]([^/]+)")  # as webdataset cuts names
_REMEMBERED = 1000  # keys at the start of an archive


@dataclass(frozen=True)
class Member:
    """A file of an archive or a folder.

    Attributes:
        name: with the folders inside of the archive.
        media: returns the value of a column of media.
        data: reads the file.
    """

    name: str
    media: Callable[[], Any]
    data: Callable[[], bytes]


@dataclass
class MemberRows:
    """The rows of members.

    Attributes:
        members: in the order of their archive.
        passed_over: the number of members of each suffix that no task reads.
    """

    members: Iterable[Member]
    passed_over: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rows.

        Raises:
            ValueError: a member is a pickle or cannot be read, or the members of a row are not next
                to each other.
        """
        first: set[str] = set()
        row: _Row | None = None
        for member in self.members:
            parts = _NAME.fullmatch(member.name)
            if parts is None:
                continue
            key, kind = parts[1], parts[2].lower()
            if row is None or row.key != key:
                if row is not None:
                    yield row.finished()
                if key in first:
                    raise ValueError(
                        f"the members of {key!r} are not next to each other: sort them by name, as "
                        "by tar --sort=name"
                    )
                if len(first) < _REMEMBERED:
                    first.add(key)
                row = _Row(key)
            if not row.add(kind, member):
                self.passed_over["." + kind.rpartition(".")[2]] += 1
        if row is not None:
            yield row.finished()


class _Row:
    def __init__(self, key: str) -> None:
        self.key = key
        self.values: dict[str, Any] = {}
        self.more: dict[str, Any] = {}  # keys of the .json
        self.bare: dict[str, list[tuple[str, Any]]] = {"image": [], "audio": []}

    def add(self, kind: str, member: Member) -> bool:
        """Takes a member, whose name is `key.kind`; returns False if no task reads such ones.

        Raises:
            ValueError: the member is a pickle, cannot be read, or stands there twice.
        """
        name, _, suffix = kind.rpartition(".")
        if suffix in PICKLES:
            raise ValueError(
                f"the member {member.name} is a pickle, which can run any program when it is read, "
                "and never is: write its values as .json or .txt, and the archive without it"
            )
        for role, suffixes in (("image", IMAGE_SUFFIXES), ("audio", AUDIO_SUFFIXES)):
            if f".{suffix}" in suffixes:
                if name:
                    self._set(name, member.media(), member)
                else:
                    self.bare[role].append((suffix, member.media()))
                return True
        if suffix in TEXTS or suffix in NUMBERS:
            text = _text(member)
            number = suffix in NUMBERS and re.fullmatch(r"-?\d{1,18}", text.strip())
            self._set(name or suffix, int(text) if number else text, member)
        elif suffix in ("json", "jsn"):
            value = _json(member)
            if name or not isinstance(value, dict):
                self._set(name or "json", value, member)
            else:
                self.more |= value
        else:
            return False
        return True

    def _set(self, name: str, value: Any, member: Member) -> None:
        if name in self.values:
            raise ValueError(f"the member {member.name} gives {self.key!r} a second {name!r}")
        self.values[name] = value

    def finished(self) -> dict[str, Any]:
        """Returns the row; the members come before the keys of the .json."""
        for role, media in self.bare.items():
            alone = len(media) == 1 and role not in self.values
            for suffix, value in media:
                name = role if alone else "jpg" if suffix == "jpeg" else suffix
                if name in self.values:
                    raise ValueError(f"there are two files {self.key}.{suffix}")
                self.values[name] = value
        return {KEY: self.key, **self.more, **self.values}


def _text(member: Member) -> str:
    try:
        text = member.data().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"the member {member.name} is no UTF-8 text") from None
    return text.removesuffix("\n").removesuffix("\r")


def _json(member: Member) -> Any:
    try:
        return load_json(_text(member))
    except ValueError as error:
        raise ValueError(f"the member {member.name} cannot be read: {error}") from None


def role_columns(columns: Iterable[str]) -> dict[str, str]:
    """Returns the column of each role that has another name in such rows."""
    there = set(columns)
    names = {"text": ("transcript", "txt"), "caption": ("txt",), "label": ("cls",)}
    if "image" not in there and "jpg" in there:
        names |= {"image": ("jpg",), "mask": ("png",)}
    by_role = {}
    for role, some in names.items():
        if role not in there and (named := [name for name in some if name in there]):
            by_role[role] = named[0]
    return by_role
