"""Captions as the words that their metrics compare, as COCO's evaluation cuts them.

COCO (Chen et al. 2015, §4) takes the Penn Treebank tokenizer of Stanford CoreNLP in lower case and
drops punctuation. This is the part of it that captions meet, without Java: contractions become two
words (do n't, man 's, can not, gon na); words with hyphens, numbers with a point, comma or colon,
abbreviations with dots and signs like $ and % stay. Ours differs in that it drops all brackets,
which COCO means to drop, but leaves in as -lrb- and -rrb-.
"""

from __future__ import annotations

import re

_QUOTES = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"'})
_NOT = re.compile(r"(?<=\w)n't\b")
_SHORT = re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll))\b")
_JOINED = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me))\b")
_WORD = re.compile(
    r"""
      \bn't\b | '(?:s|m|d|re|ve|ll)\b   # cut off by the two patterns above
    | (?:[^\W\d_]\.){2,}                # u.s.
    | \d+(?:[.,:]\d+)+                  # 1,000 and 3.5
    | \w+(?:[-']\w+)*                   # black-and-white, o'clock
    | [$%&#@+=*]
    """,
    re.VERBOSE,
)


def words(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation."""
    text = caption.lower().translate(_QUOTES)
    text = _SHORT.sub(r" \1", _NOT.sub(" n't", text))
    text = _JOINED.sub(lambda found: " ".join(filter(None, found.groups())), text)
    return _WORD.findall(text)
