"""Answers: what a row holds, which of them are the same, and the vocabulary of a classifier."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..core.errors import BadRow
from ..core.rows import Rows

MANY = 4  # from so many answers to a question on, agreement of all of them makes a score of 1

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    "none": "0",
    **{
        word: str(number)
        for number, word in enumerate(
            ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        )
    },
}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _misspelt(word: str) -> Iterator[str]:
    """The word without one of its apostrophes, for each of them."""
    for place, letter in enumerate(word):
        if letter == "'":
            yield word[:place] + word[place + 1 :]


_SPELLINGS = {wrong: right for right in _CONTRACTIONS.split() for wrong in _misspelt(right)}
_SPELLINGS["somebody'd"] = "somebodyd"  # so it stands in the official table


def plain(answer: str) -> str:
    """Lower case, with single spaces."""
    return " ".join(answer.lower().split())


def normalise(answer: str) -> str:
    """An answer as the VQA challenge compares it (Antol et al. 2015, §4; its vqaEval script).

    Punctuation is dropped where it touches a space anywhere in the answer, or where the answer has
    a number with a comma, else becomes a space; then full stops not before a digit are dropped,
    number words become digits, articles go, and apostrophes of contractions are put back.
    """
    answer = " ".join(answer.strip().splitlines()).replace("\t", " ")
    text, numeral = answer, _NUMBER_COMMA.search(answer) is not None
    for mark in _PUNCTUATION:
        dropped = numeral or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if dropped else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def answers_of(row: Mapping[str, Any]) -> list[str]:
    """All answers of a row: of its `answers`, or else its `answer`.

    `answers` are texts, or dicts with the text under "answer" as in VQAv2 (also as `datasets` may
    turn them, a dict of lists), or such a list as JSON, as a CSV file holds it.

    Raises:
        BadRow: there is none, or one is not text or a number.
    """
    found = [_text(value) for value in _listed(row.get("answers"))]
    if not any(found):
        found = [_text(row.get("answer"))]
    found = [answer for answer in found if answer]
    if not found:
        raise BadRow("there is no answer")
    return found


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"its answers begin with [ but are no JSON list: {error}") from None
    if isinstance(value, Mapping):
        value = value.get("answer")
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (value,)
    return list(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("answer")
    if value is None or isinstance(value, str):
        return (value or "").strip()
    if isinstance(value, int | float):  # a column of counts is read as numbers
        return "" if value != value else str(value).lower().removesuffix(".0")
    raise BadRow(f"an answer is {type(value).__name__} {value!r}, not text")


def all_answers(rows: Rows) -> Iterator[list[str] | None]:
    """The answers of each row, read without its picture; None where they are bad."""
    columns = {n: list(rows[n]) for n in ("answer", "answers") if n in rows.column_names}
    for values in zip(*columns.values(), strict=True):
        try:
            yield answers_of(dict(zip(columns, values, strict=True)))
        except BadRow:
            yield None


def agreement(matches: int, answers: int) -> float:
    """The official score of an answer that `matches` of a question's `answers` agree with.

    The mean over all sets without one answer of min(1, matches in the set / 3). With fewer than
    `MANY` answers, which could not reach 1 by it, an answer is right if any agrees.
    """
    if answers < MANY:
        return float(matches > 0)
    without_own = min(1.0, (matches - 1) / 3) if matches else 0.0
    without_other = min(1.0, matches / 3)
    return (matches * without_own + (answers - matches) * without_other) / answers


def score(prediction: str, answers: Sequence[str]) -> float:
    """How right a prediction is, from 0 to 1, by `agreement`.

    Where a question's answers differ, they and the prediction are normalised by the official rules;
    where all are the same, or are few, only case and spaces are ignored.
    """
    same = plain
    if len(answers) >= MANY and len(set(answers)) > 1:
        same = normalise
    said = same(prediction)
    return agreement(sum(same(answer) == said for answer in answers), len(answers))


class Vocabulary:
    """The answers that a classifier knows, the most frequent first.

    Args:
        answers: each in its most frequent spelling.
        official: whether answers are the same by the official rules, or by letters.
    """

    def __init__(self, answers: Sequence[str], *, official: bool) -> None:
        self.answers = list(answers)
        self.official = official
        self._numbers = {self.key(answer): n for n, answer in enumerate(self.answers)}

    @classmethod
    def counted(
        cls, questions: Iterable[Sequence[str]], *, size: int, min_count: int, official: bool
    ) -> Vocabulary:
        """The `size` most frequent of all questions' answers; of equally frequent ones those that
        come first in the alphabet.

        Raises:
            ValueError: none is frequent enough.
        """
        key = cls([], official=official).key
        spellings: dict[str, Counter[str]] = defaultdict(Counter)
        for answers in questions:
            for answer in answers:
                spellings[key(answer)][plain(answer)] += 1
        counts = {same: sum(spelt.values()) for same, spelt in spellings.items()}
        kept = sorted(
            (same for same, count in counts.items() if count >= min_count),
            key=lambda same: (-counts[same], same),
        )[:size]
        if not kept:
            raise ValueError(
                f"no answer of the training split comes {min_count} times: lower answers.min_count"
            )
        return cls([_most(spellings[same]) for same in kept], official=official)

    def key(self, answer: str) -> str:
        """Equal for answers that are the same."""
        if self.official:
            # An answer of articles alone ("a") would be nothing.
            return normalise(answer) or plain(answer)
        return plain(answer)

    def __len__(self) -> int:
        return len(self.answers)

    def number(self, answer: str) -> int | None:
        """The place of an answer, None for one that is not here."""
        return self._numbers.get(self.key(answer))

    def spelt(self, answer: str) -> str:
        """An answer as it is spelt here, or as it is."""
        number = self.number(answer)
        return answer if number is None else self.answers[number]

    def targets(self, answers: Sequence[str]) -> dict[int, float]:
        """The score of every known answer that would not score 0, by its number."""
        counts = Counter(self.key(answer) for answer in answers)
        return {
            self._numbers[same]: value
            for same, count in counts.items()
            if same in self._numbers and (value := agreement(count, len(answers)))
        }

    def reachable(self, answers: Sequence[str]) -> float:
        """The best score that a known answer has."""
        return max(
            (score(self.spelt(a), answers) for a in set(answers) if self.number(a) is not None),
            default=0.0,
        )


def _most(counts: Counter[str]) -> str:
    return min(counts, key=lambda spelling: (-counts[spelling], spelling))
