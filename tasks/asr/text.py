"""The text of training and evaluation: its normaliser and its vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from ..core.errors import BadRow
from .config import TextConfig

PAD, DELIMITER = "<pad>", "|"
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "´": "'"})
# Languages with a dotted and a dotless i, which are four letters: İ i, I ı.
_DOTTED = ("tr", "az")
# The scripts that have no spaces between words, by the beginnings of their letters' names.
_UNSPACED = (
    *("CJK UNIFIED", "CJK COMPATIBILITY", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATA"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI THAM", "NEW TAI LUE", "JAVANESE"),
)
_BRACKETS = re.compile(r"<.+>|\[.+\]")
_LOOKED_AT = 2_000  # texts whose letters tell the script


def normalise(text: str, config: TextConfig) -> str:
    """Normalises a text.

    The text gets Unicode's form NFC, one kind of apostrophe, and one space between words.
    Compatible forms of a character become one (ligatures, full-width letters), but superscript
    letters and digits, which modify a sound or number a tone, stay. Characters without a width are
    removed. Case and punctuation are removed unless the config keeps them; tone letters are no
    punctuation. Tones and modifiers are removed if the config says so.
    """
    text = unicodedata.normalize("NFC", text.translate(_APOSTROPHES))
    text = "".join(map(_compatible, text)).translate(_APOSTROPHES)
    if not config.modifiers:
        text = "".join("" if _modifies(character) else character for character in text)
    if config.lowercase:
        text = lower(text, config.language)
    if not config.punctuation:
        text = "".join(
            character if character == "'" or not _is_punctuation(character) else " "
            for character in text
        )
        # An apostrophe that quotes is punctuation; one inside a word belongs to the word.
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
        if not config.apostrophes:
            text = text.replace("'", "")
    return unicodedata.normalize("NFC", " ".join(text.split()))


def lower(text: str, language: str | None) -> str:
    """Returns a text in lower case, in Turkish and Azeri with their two kinds of i."""
    if _has_dots(language):
        text = text.translate({ord("İ"): "i", ord("I"): "ı"})
    return text.lower()


def upper(text: str, language: str | None) -> str:
    """Returns a text in capitals, in Turkish and Azeri with their two kinds of i."""
    return (text.replace("i", "İ") if _has_dots(language) else text).upper()


def _has_dots(language: str | None) -> bool:
    return language is not None and re.split("[-_]", language.lower())[0] in _DOTTED


def _compatible(character: str) -> str:
    """Returns the usual form of a character, or nothing for one without a width."""
    if character.isascii():
        return character if character.isprintable() or character.isspace() else ""
    category = unicodedata.category(character)
    if category in ("Cc", "Cf"):
        return character if character.isspace() else ""
    if "\ufe00" <= character <= "\ufe0f":  # selects another drawing of the character before it
        return ""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    if kind in ("<super>", "<sub>") and category in ("Lm", "No"):
        return character
    return unicodedata.normalize("NFKC", character) if kind.startswith("<") else character


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" and not _is_tone(character)


def _is_tone(character: str) -> bool:
    """Whether a character is a sign of phonetics that Unicode counts as a symbol (˥, ˞, ꜊)."""
    return unicodedata.category(character) == "Sk" and (
        "\u02b0" <= character <= "\u02ff" or "\ua700" <= character <= "\ua721"
    )


def _modifies(character: str) -> bool:
    """Whether a character is a tone, or modifies the sound before it (ʰ, ː, ˈ, ⁵)."""
    if "\u02b0" <= character <= "\u02ff" or _is_tone(character):
        return True
    return unicodedata.decomposition(character).startswith(("<super>", "<sub>"))


def has_words(texts: Sequence[str]) -> bool:
    """Tells whether spaces separate the words of texts as they were written.

    They do not if no text has a space, or if most letters are of a script without spaces between
    words (Chinese, Japanese, Thai) and most texts have no space.
    """
    texts = [text.strip() for text in texts]
    spaced = sum(len(text.split()) > 1 for text in texts)
    if not spaced:
        return not any(texts)
    if 2 * spaced >= sum(map(bool, texts)):
        return True
    letters = [letter for text in texts[:_LOOKED_AT] for letter in text if letter.isalpha()]
    unspaced = sum(unicodedata.name(letter, "").startswith(_UNSPACED) for letter in letters)
    return 2 * unspaced <= len(letters)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a CTC head: characters, or longer parts of a text such as phonemes.

    Attributes:
        tokens: the tokens, by id; `|` stands between words.
        blank: the id of the blank, which is the padding too.
        special: the ids that are never part of a text, besides the blank.
        spaced: whether tokens are written with spaces between them, as phonemes are.
        language: the language whose rules of case hold.
    """

    tokens: tuple[str, ...]
    blank: int = 0
    special: tuple[int, ...] | None = None
    spaced: bool = False
    language: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.special is None:
            # Heads that were saved without the list have special tokens in brackets: <s>, [UNK].
            ids = (i for i, token in enumerate(self.tokens) if _BRACKETS.fullmatch(token))
            object.__setattr__(self, "special", tuple(ids))

    @classmethod
    def of_texts(
        cls, texts: Iterable[str], *, words: bool = False, language: str | None = None
    ) -> Vocabulary:
        """Returns the vocabulary of normalised texts. They must be of the training split only.

        Args:
            texts: of the training split.
            words: whether the tokens are the parts between spaces, and not the characters.
            language: the language whose rules of case hold.

        Raises:
            ValueError: the texts are empty.
        """
        parts = {part for text in texts for part in (text.split() if words else text)}
        tokens = sorted(parts - {" ", DELIMITER})
        if not tokens:
            raise ValueError("the training split has no text to take a vocabulary from")
        first = (PAD,) if words else (PAD, DELIMITER)
        return cls((*first, *tokens), special=(0,), spaced=words, language=language)

    @classmethod
    def from_state(cls, state: dict[str, Any], *, language: str | None = None) -> Vocabulary:
        """Returns the vocabulary that `to_state` gave."""
        special = state.get("special")
        return cls(
            tuple(state["tokens"]),
            state["blank"],
            special=None if special is None else tuple(special),
            spaced=state.get("spaced", False),
            language=language,
        )

    def to_state(self) -> dict[str, Any]:
        """Returns the vocabulary in a JSON-ready form."""
        assert self.special is not None
        return {
            "tokens": list(self.tokens),
            "blank": self.blank,
            "special": list(self.special),
            "spaced": self.spaced,
        }

    @cached_property
    def delimiter(self) -> int | None:
        """The id of `|`; None if there is none."""
        return self.tokens.index(DELIMITER) if DELIMITER in self.tokens else None

    @cached_property
    def upper(self) -> bool:
        """Whether all letters are capitals, as in many published models."""
        letters = [letter for token in self._ids for letter in token if letter.isalpha()]
        return (
            not self.spaced
            and bool(letters)
            and all(letter == upper(letter, self.language) for letter in letters)
            and any(letter != lower(letter, self.language) for letter in letters)
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The ids of the tokens that are part of a text, in Unicode's form NFC."""
        hidden = {self.blank, *(self.special or ())}
        return {
            unicodedata.normalize("NFC", token): i
            for i, token in enumerate(self.tokens)
            if i not in hidden
        }

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=1)

    def holds(self, part: str) -> bool:
        """Tells whether a text in form NFC is a token."""
        return part in self._ids

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a normalised text.

        At each place the longest token is taken, as by the tokenizers of transformers.

        Raises:
            BadRow: a part of the text is no token.
        """
        written = upper(text, self.language) if self.upper else text
        if self.delimiter is None and " " in written and not self.spaced:
            raise BadRow("the transcript has ' ', which is not among the tokens of the head")
        ids: list[int] = []
        for number, word in enumerate(written.split(" ") if written else ()):
            if number and not self.spaced:
                ids.append(self._ids[DELIMITER])
            ids += self._split(word)
        return ids

    def _split(self, word: str) -> Iterator[int]:
        start = 0
        while start < len(word):
            for end in range(min(start + self._longest, len(word)), start, -1):
                if (number := self._ids.get(word[start:end])) is not None:
                    yield number
                    break
            else:
                named = word if self.spaced else word[start]
                raise BadRow(
                    f"the transcript has {named!r}, which is not among the "
                    f"{'tokens' if self.spaced else 'characters'} of the head"
                )
            start = end

    def shown(self, number: int) -> str:
        """Returns the part of a text that an id stands for; "" for a special one."""
        return "" if number == self.blank or number in self._hidden else self.tokens[number]

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(self.special or ())

    def decode(self, ids: Sequence[int], *, lowercase: bool) -> str:
        """Returns the text of ids that have no repeats and no blanks any more.

        Args:
            ids: of the tokens.
            lowercase: whether the text of a vocabulary of capitals is put into lower case.
        """
        if self.spaced:
            return " ".join(filter(None, (self.shown(i) for i in ids if i != self.delimiter)))
        written = "".join(map(self.shown, ids))
        text = " ".join(written.replace(DELIMITER, " ").split())
        return lower(text, self.language) if lowercase and self.upper else text


def needed_frames(ids: Sequence[int]) -> int:
    """Returns the frames that CTC needs for a label.

    It needs one frame for each id, and one for a blank between equal neighbours.
    """
    return len(ids) + sum(a == b for a, b in pairwise(ids))
