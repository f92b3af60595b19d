"""Accuracy of a split, by question type and by answer, with intervals by image."""

from __future__ import annotations

import numpy as np
import pytest

from mmadapters.tasks.vqa import metrics
from mmadapters.tasks.vqa.answers import Vocabulary, score

from .conftest import fake_records

TEN = [
    ("yes", ["yes"] * 10),
    ("no", ["yes"] * 7 + ["no"] * 3),
    ("red", ["blue"] * 8 + ["red"] * 2),
    ("two", ["2"] * 9 + ["3"]),
    ("green", ["teal"] * 10),
]
VOCABULARY = Vocabulary(["yes", "no", "red", "blue", "two"], official=True)


def of(records: list, **options: object):  # type: ignore[no-untyped-def]
    given = {"limited": True, "groups": (), "resamples": 0, **options}
    return metrics.scores(records, VOCABULARY, **given)  # type: ignore[arg-type]


def test_accuracy_is_the_mean_official_score() -> None:
    found = of(fake_records(TEN))
    assert found.metrics[0].name == "accuracy"
    assert found["accuracy"].value == pytest.approx(np.mean([1, 0.9, 0.6, 1, 0]))
    assert found["accuracy"].count == 5
    assert found["most common answer"].value == pytest.approx(np.mean([1, 1, 0, 0, 0]))


def test_answers_outside_the_vocabulary_count_as_wrong_and_are_named() -> None:
    found = of(fake_records(TEN))
    assert found["within reach"].value == pytest.approx(np.mean([1, 1, 1, 1, 0]))
    table = next(table for table in found.tables if "lacks" in table.title)
    assert list(table.rows) == [("teal", 1)]
    assert "1 of 5" in table.caption
    # An answer that is written freely has no such bound.
    free = of(fake_records(TEN), limited=False)
    assert [metric.name for metric in free.metrics] == ["accuracy", "most common answer"]
    assert all("lacks" not in table.title for table in free.tables)


def test_accuracy_by_kind_of_question_and_by_answer() -> None:
    records = fake_records(
        TEN, question_type=["is", "is", "what", "how", "what"], floor=["1", "2", "1", "2", "1"]
    )
    found = of(records, groups=("floor",))
    assert list(found.groups) == ["question_type", "floor", "answer"]
    by_type = {value: row[0].value for value, row in found.groups["question_type"].items()}
    assert by_type == pytest.approx({"is": 0.95, "what": 0.3, "how": 1.0})
    by_floor = {value: row[0].value for value, row in found.groups["floor"].items()}
    assert by_floor == pytest.approx({"1": 1.6 / 3, "2": 0.95})
    by_answer = {value: row[0].value for value, row in found.groups["answer"].items()}
    assert by_answer == pytest.approx({"yes": 0.95, "blue": 0.6, "2": 1.0, "teal": 0.0})
    assert next(iter(by_answer)) == "yes"


def test_mistakes_are_counted_by_truth_and_answer() -> None:
    pairs = [("a", ["b"]), ("a", ["b"]), ("c", ["b"]), ("b", ["b"])]
    table = of(fake_records(pairs)).tables[0]
    assert list(table.rows) == [("b", "a", 2), ("b", "c", 1)]


def test_intervals_resample_images_with_all_their_questions() -> None:
    """Ten questions of an image that are right or wrong together are one observation."""
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7
    pairs = [("yes", ["yes" if right[n // 10] else "no"]) for n in range(400)]
    alone = fake_records(pairs)
    together = [{**record, "image": str(n // 10)} for n, record in enumerate(alone)]
    wide, narrow = (of(records, resamples=500)["accuracy"] for records in (together, alone))
    assert wide.value == narrow.value == pytest.approx(right.mean())
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)
    exact = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 40)
    assert (wide.high - wide.low) / 2 == pytest.approx(exact, rel=0.15)


def test_without_training_there_is_no_common_answer() -> None:
    found = metrics.scores(fake_records(TEN), None, limited=False, groups=(), resamples=0)
    assert [metric.name for metric in found.metrics] == ["accuracy"]


def test_truth_is_the_answer_of_most_people() -> None:
    assert metrics.truth(["b", "a", "b"]) == "b"
    assert metrics.truth(["b", "a"]) == "a"
    assert score(metrics.truth(["x"]), ["x"]) == 1.0
