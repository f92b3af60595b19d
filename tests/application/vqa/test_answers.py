"""Normalisation and scores of answers against the official script, and the vocabulary."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.vqa.answers import (
    Vocabulary,
    agreement,
    all_answers,
    answers_of,
    normalise,
    plain,
    score,
)

# What processPunctuation and processDigitArticle of VQA's vqaEval.py (commit c4e6a0e) give.
OFFICIAL = {
    "Yes.": "yes",
    "The  dog": "dog",
    "a cat and a dog": "cat and dog",
    "Two": "2",
    "none": "0",
    "ten dogs": "10 dogs",
    "eleven": "eleven",
    "1,000": "1000",
    "1,000 red-ish": "1000 redish",
    "cat,dog": "cat dog",
    "cat, dog": "cat dog",
    "t-shirt": "t shirt",
    "t- shirt": "t shirt",
    "t-shirt -": "tshirt",
    "3.5": "3.5",
    "U.S.A.": "usa",
    "5.": "5",
    "dont": "don't",
    "don't": "don't",
    "couldnt've": "couldn't've",
    "couldntve": "couldntve",
    "yall'd've": "y'all'd've",
    "twas": "'twas",
    "oclock": "o'clock",
    "its": "its",
    "shes": "shes",
    "somebody'd": "somebodyd",
    "10:30": "10:30",
    "(red)": "red",
    "yes/no": "yes no",
    "what?!": "what",
    "dogs' bowl": "dogs' bowl",
    "#1": "#1",
    "$5": "$5",
    "a": "",
    "new\nline\ttab": "new line tab",
}


@pytest.mark.parametrize("answer", OFFICIAL)
def test_answers_are_normalised_as_in_the_official_script(answer: str) -> None:
    assert normalise(answer) == OFFICIAL[answer]


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_official_score_by_the_number_of_people_who_agree(matches: int, expected: float) -> None:
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    assert score("red", answers) == pytest.approx(expected)
    assert agreement(matches, 10) == pytest.approx(expected)


def test_score_is_the_mean_over_the_sets_that_leave_one_out() -> None:
    for matches in range(11):
        answers = ["red"] * matches + ["blue"] * (10 - matches)
        sets = itertools.combinations(answers, 9)
        scores = [min(1, nine.count("red") / 3) for nine in sets]
        assert agreement(matches, 10) == pytest.approx(sum(scores) / 10)


def test_equal_answers_are_left_out_one_at_a_time() -> None:
    """Comparing texts or dicts without an id would leave all equal ones out together."""
    assert score("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)


def test_answers_are_normalised_only_where_they_differ() -> None:
    assert score("two", ["2"] * 9 + ["3"]) == 1.0
    assert score("two", ["2"] * 10) == 0.0
    assert score("A dog.", ["dog"] * 8 + ["cat"] * 2) == 1.0
    assert score("Dog", ["dog"] * 10) == 1.0


def test_one_answer_is_right_if_it_is_the_same_text() -> None:
    assert score("Rectangle ", ["rectangle"]) == 1.0
    assert score("circle", ["rectangle"]) == 0.0
    assert score("2", ["two"]) == 0.0


def test_few_answers_are_right_if_one_agrees() -> None:
    """The official rule could give three people who all agree no more than 2/3."""
    assert score("red", ["red", "blue", "blue"]) == 1.0
    assert score("green", ["red", "blue", "blue"]) == 0.0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": "yes"}, ["yes"]),
        ({"answer": 3}, ["3"]),
        ({"answer": 3.0}, ["3"]),
        ({"answer": True}, ["true"]),
        ({"answers": ["yes", " no ", ""]}, ["yes", "no"]),
        ({"answers": [{"answer": "yes", "answer_id": 1}, {"answer": "no"}]}, ["yes", "no"]),
        ({"answers": {"answer": ["yes", "no"], "answer_id": [1, 2]}}, ["yes", "no"]),
        ({"answers": '["yes", "no"]'}, ["yes", "no"]),
        ({"answers": "yes"}, ["yes"]),
        ({"answers": None, "answer": "yes"}, ["yes"]),
        ({"answers": ["a", "b"], "answer": "a"}, ["a", "b"]),
    ],
)
def test_answers_are_read_in_every_form(row: dict[str, Any], expected: list[str]) -> None:
    assert answers_of(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": None}, "no answer"),
        ({"answer": "  "}, "no answer"),
        ({"answers": []}, "no answer"),
        ({"answer": float("nan")}, "no answer"),
        ({"answers": [b"yes"]}, "an answer is bytes"),
        ({"answers": "[yes, no"}, "no JSON list"),
    ],
)
def test_bad_answers_are_told(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        answers_of(row)


def counted(questions: list[list[str]], **options: Any) -> Vocabulary:
    return Vocabulary.counted(
        questions, **{"size": 100, "min_count": 1, "official": True, **options}
    )


def test_vocabulary_holds_the_most_frequent_answers_in_their_most_frequent_spelling() -> None:
    questions = [["2"], ["two"], ["two"], ["red"], ["Red"], ["blue"], ["a dog"], ["dog"], ["dog"]]
    assert counted(questions).answers == ["two", "dog", "red", "blue"]
    assert counted(questions, size=2).answers == ["two", "dog"]
    assert counted(questions, min_count=2).answers == ["two", "dog", "red"]
    assert counted(questions, official=False).answers[:3] == ["dog", "red", "two"]
    with pytest.raises(ValueError, match="min_count"):
        counted(questions, min_count=9)


def test_vocabulary_knows_an_answer_in_any_spelling() -> None:
    vocabulary = counted([["two", "two", "a"], ["red"]])
    assert vocabulary.number("2") == vocabulary.number("Two.") == 0
    assert vocabulary.number("a") is not None
    assert vocabulary.number("green") is None
    assert vocabulary.spelt("2") == "two"
    assert vocabulary.spelt("green") == "green"


def test_targets_are_the_scores_of_the_answers() -> None:
    vocabulary = counted([["red", "blue", "two"]])
    answers = ["red"] * 3 + ["blue"] * 5 + ["2"] * 1 + ["green"] * 1
    targets = vocabulary.targets(answers)
    assert targets == {
        number: pytest.approx(score(answer, answers))
        for number, answer in enumerate(vocabulary.answers)
    }
    assert vocabulary.targets(["green"]) == {}
    assert counted([["red"]]).targets(["red"]) == {0: 1.0}


def test_reachable_is_the_best_score_of_a_known_answer() -> None:
    vocabulary = counted([["red", "blue"]])
    assert vocabulary.reachable(["green"] * 8 + ["blue"] * 2) == pytest.approx(0.6)
    assert vocabulary.reachable(["green"] * 10) == 0.0
    assert vocabulary.reachable(["red"]) == 1.0


def test_a_bad_row_has_no_answers(squares: Any) -> None:
    class Rows:
        column_names = ("answer", "other")

        def __getitem__(self, key: str) -> list[Any]:
            return {"answer": ["yes", None]}[key]

    assert list(all_answers(Rows())) == [["yes"], None]  # type: ignore[arg-type]


def test_plain_ignores_case_and_spaces_alone() -> None:
    assert plain(" The  Red-ish ") == "the red-ish"
