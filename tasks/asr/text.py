"""The text of training and evaluation: its normaliser and its vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..core.errors import BadRow
from .config import TextConfig

PAD, DELIMITER = "<pad>", "|"
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "´": "'"})


def normalise(text: str, config: TextConfig) -> str:
    """Normalises a text.

    The text gets Unicode's form NFKC, one kind of apostrophe, and one space between words. Case and
    punctuation are removed unless the config keeps them.
    """
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    if config.lowercase:
        text = text.lower()
    if not config.punctuation:
        text = "".join(
            character if character == "'" or unicodedata.category(character)[0] not in "PS" else " "
            for character in text
        )
        # An apostrophe that quotes is punctuation; one inside a word belongs to the word.
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
        if not config.apostrophes:
            text = text.replace("'", "")
    return " ".join(text.split())


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a CTC head.

    Attributes:
        tokens: the characters, by id; `|` stands between words.
        blank: the id of the blank, which is the padding too.
    """

    tokens: tuple[str, ...]
    blank: int = 0

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Vocabulary:
        """Returns the vocabulary of normalised texts. They must be of the training split only.

        Raises:
            ValueError: the texts are empty.
        """
        characters = sorted({character for text in texts for character in text} - {" ", DELIMITER})
        if not characters:
            raise ValueError("the training split has no text to take a vocabulary from")
        return cls((PAD, DELIMITER, *characters))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Vocabulary:
        """Returns the vocabulary that `to_state` gave."""
        return cls(tuple(state["tokens"]), state["blank"])

    def to_state(self) -> dict[str, Any]:
        """Returns the vocabulary in a JSON-ready form."""
        return {"tokens": list(self.tokens), "blank": self.blank}

    @property
    def delimiter(self) -> int | None:
        """The id of `|`; None if there is none."""
        return self.tokens.index(DELIMITER) if DELIMITER in self.tokens else None

    @property
    def upper(self) -> bool:
        """Whether all letters are capitals, as in many published models."""
        letters = [t for t in self.tokens if len(t) == 1 and t.isalpha()]
        return bool(letters) and all(letter == letter.upper() for letter in letters)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a normalised text.

        Raises:
            BadRow: a character is not in the vocabulary.
        """
        ids = {token: index for index, token in enumerate(self.tokens)}
        written = text.upper() if self.upper else text
        try:
            return [ids[DELIMITER if character == " " else character] for character in written]
        except KeyError as error:
            raise BadRow(
                f"the transcript has {error.args[0]!r}, which is not among the characters of the "
                "head"
            ) from None

    def decode(self, ids: Sequence[int], *, lowercase: bool) -> str:
        """Returns the text of ids that have no repeats and no blanks any more.

        Args:
            ids: of the characters.
            lowercase: whether the text of a vocabulary of capitals is put into lower case.
        """
        special = {token for token in self.tokens if len(token) > 1}
        written = "".join(self.tokens[i] for i in ids if self.tokens[i] not in special)
        text = " ".join(written.replace(DELIMITER, " ").split())
        return text.lower() if lowercase and self.upper else text


def needed_frames(ids: Sequence[int]) -> int:
    """Returns the frames that CTC needs for a label.

    It needs one frame for each id, and one for a blank between equal neighbours.
    """
    return len(ids) + sum(a == b for a, b in pairwise(ids))
