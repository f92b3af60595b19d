"""Words of captions, for their metrics, as COCO's evaluation cuts them.

COCO (Chen et al. 2015, §4) uses the Penn Treebank tokenizer of Stanford CoreNLP in lower case and
removes punctuation. This file does the part of it that matters for captions, without Java.
Contractions become two words (do n't, man 's, can not, gon na). Words with hyphens, numbers with a
point, comma or colon, abbreviations with dots and signs like $ and % stay whole. One thing differs:
all brackets are removed. COCO means to remove them, but leaves them in as -lrb- and -rrb-.
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
    """Returns the words of a caption, in lower case and without punctuation."""
    text = caption.lower().translate(_QUOTES)
    text = _SHORT.sub(r" \1", _NOT.sub(" n't", text))
    text = _JOINED.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return _WORD.findall(text)
