"""Answers of a row, their comparison, and the vocabulary of a classifier."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..core.errors import BadRow
from ..core.rows import Rows
from ..data.cells import listed

MANY = 4  # the fewest answers to a question by whose agreement the official score can reach 1

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
    """Yields the word without one of its apostrophes, for each of them."""
    for place, letter in enumerate(word):
        if letter == "'":
            yield word[:place] + word[place + 1 :]


_SPELLINGS = {wrong: right for right in _CONTRACTIONS.split() for wrong in _misspelt(right)}
_SPELLINGS["somebody'd"] = "somebodyd"  # the official table has it so


def plain(answer: str) -> str:
    """Returns the answer in lower case with single spaces."""
    return " ".join(answer.lower().split())


def normalise(answer: str) -> str:
    """Returns an answer as the VQA challenge compares it (Antol et al. 2015, §4; its vqaEval).

    A punctuation mark is removed if it touches a space anywhere in the answer, or if the answer has
    a number with a comma; else it becomes a space. Then full stops that are not before a digit are
    removed, number words become digits, articles are removed, and contractions get their
    apostrophes back.
    """
    answer = " ".join(answer.strip().splitlines()).replace("\t", " ")
    text, numeral = answer, _NUMBER_COMMA.search(answer) is not None
    for mark in _PUNCTUATION:
        dropped = numeral or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if dropped else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def answers_of(row: Mapping[str, Any]) -> list[str]:
    """Returns all answers of a row: those in `answers`, or else the one in `answer`.

    `answers` is a list of texts, or of dicts with the text under "answer" as in VQAv2 (also as a
    dict of lists, into which `datasets` may turn it), or such a list as text, as in a CSV file.
    `answer` may hold such a list too, as in LAVIS.

    Raises:
        BadRow: there is no answer, or one is neither text nor a number.
    """
    answers = [_text(value) for value in _listed(row.get("answers"))]
    if not any(answers):
        answer = row.get("answer")
        several = listed(answer)
        answers = [_text(value) for value in ([answer] if several is None else several)]
    answers = [answer for answer in answers if answer]
    if not answers:
        raise BadRow("there is no answer")
    return answers


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        several = listed(value)
        if several is None:
            raise BadRow(f"its answers begin with [ but are no JSON list: {value[:60]!r}")
        value = several
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
    """Yields the answers of each row, read without its picture; None if they cannot be used."""
    columns = {n: list(rows[n]) for n in ("answer", "answers") if n in rows.column_names}
    for values in zip(*columns.values(), strict=True):
        try:
            yield answers_of(dict(zip(columns, values, strict=True)))
        except BadRow:
            yield None


def agreement(matches: int, answers: int) -> float:
    """Returns the official score, 0 to 1, of an answer with which `matches` of `answers` agree.

    It is the mean of min(1, matches in the set / 3) over all sets that lack one answer. With fewer
    than `MANY` answers this could not reach 1, and an answer is right if any answer agrees.

    Args:
        matches: the answers to a question that agree.
        answers: all answers to the question.
    """
    if answers < MANY:
        return float(matches > 0)
    without_match = min(1.0, (matches - 1) / 3) if matches else 0.0
    without_other = min(1.0, matches / 3)
    return (matches * without_match + (answers - matches) * without_other) / answers


def score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of a prediction, from 0 to 1, by `agreement`.

    If a question has `MANY` answers that differ, answers and prediction are normalised by the
    official rules. Otherwise only case and spaces are ignored.
    """
    same = plain
    if len(answers) >= MANY and len(set(answers)) > 1:
        same = normalise
    said = same(prediction)
    return agreement(sum(same(answer) == said for answer in answers), len(answers))


class Vocabulary:
    """The answers that a classifier can give, the most frequent first.

    Args:
        answers: each in its most frequent spelling.
        official: whether the official rules say which answers are the same; else letters do,
            regardless of case.
    """

    def __init__(self, answers: Sequence[str], *, official: bool) -> None:
        self.answers = list(answers)
        self.official = official
        self._numbers = {self.key(answer): n for n, answer in enumerate(self.answers)}

    @classmethod
    def counted(
        cls, questions: Iterable[Sequence[str]], *, size: int, min_count: int, official: bool
    ) -> Vocabulary:
        """Returns a vocabulary of the most frequent answers to all questions.

        Of equally frequent answers it takes the first ones in the alphabet.

        Args:
            questions: the answers to each question.
            size: the most answers of the vocabulary.
            min_count: the least number of times that an answer of the vocabulary is given.
            official: as in `Vocabulary`.

        Raises:
            ValueError: no answer is frequent enough.
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
        """Returns a key that is equal for answers that are the same."""
        if self.official:
            # An answer of articles only ("a") would become empty.
            return normalise(answer) or plain(answer)
        return plain(answer)

    def __len__(self) -> int:
        return len(self.answers)

    def number(self, answer: str) -> int | None:
        """Returns the number of an answer, or None if it is not in the vocabulary."""
        return self._numbers.get(self.key(answer))

    def spelt(self, answer: str) -> str:
        """Returns an answer in the vocabulary's spelling, or unchanged if it is not in it."""
        number = self.number(answer)
        return answer if number is None else self.answers[number]

    def targets(self, answers: Sequence[str]) -> dict[int, float]:
        """Returns the scores above 0 of the vocabulary's answers to a question, by number."""
        counts = Counter(self.key(answer) for answer in answers)
        return {
            self._numbers[same]: value
            for same, count in counts.items()
            if same in self._numbers and (value := agreement(count, len(answers)))
        }

    def reachable(self, answers: Sequence[str]) -> float:
        """Returns the best score that an answer of the vocabulary has for a question."""
        return max(
            (score(self.spelt(a), answers) for a in set(answers) if self.number(a) is not None),
            default=0.0,
        )


def _most(counts: Counter[str]) -> str:
    return min(counts, key=lambda spelling: (-counts[spelling], spelling))
