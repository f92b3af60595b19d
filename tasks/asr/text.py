"""Text as it is trained on and compared: one normaliser, one vocabulary."""

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
    """NFKC, one kind of apostrophe, and without case and punctuation unless they count; words are
    separated by one space."""
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    if config.lowercase:
        text = text.lower()
    if not config.punctuation:
        text = "".join(
            character if character == "'" or unicodedata.category(character)[0] not in "PS" else " "
            for character in text
        )
        # Apostrophes that quote are punctuation, those inside a word belong to it.
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
        if not config.apostrophes:
            text = text.replace("'", "")
    return " ".join(text.split())


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a CTC head. `blank` is the padding's id; `|` stands between words."""

    tokens: tuple[str, ...]
    blank: int = 0

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Vocabulary:
        """Of normalised texts, the training split's alone.

        Raises:
            ValueError: there is no text in them.
        """
        characters = sorted({character for text in texts for character in text} - {" ", DELIMITER})
        if not characters:
            raise ValueError("the training split has no text to take a vocabulary from")
        return cls((PAD, DELIMITER, *characters))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Vocabulary:
        return cls(tuple(state["tokens"]), state["blank"])

    def to_state(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens), "blank": self.blank}

    @property
    def delimiter(self) -> int | None:
        return self.tokens.index(DELIMITER) if DELIMITER in self.tokens else None

    @property
    def upper(self) -> bool:
        """Whether the tokens know capitals alone, as those of many published models."""
        letters = [t for t in self.tokens if len(t) == 1 and t.isalpha()]
        return bool(letters) and all(letter == letter.upper() for letter in letters)

    def encode(self, text: str) -> list[int]:
        """Ids of a normalised text.

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
        """The text of ids from which repeats and blanks are gone already."""
        special = {token for token in self.tokens if len(token) > 1}
        written = "".join(self.tokens[i] for i in ids if self.tokens[i] not in special)
        text = " ".join(written.replace(DELIMITER, " ").split())
        return text.lower() if lowercase and self.upper else text


def needed_frames(ids: Sequence[int]) -> int:
    """The frames that CTC needs for a label: one each, and a blank between equal neighbours."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))
