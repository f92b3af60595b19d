"""Labels of rows: names, numbers, several, none, unseen."""

from __future__ import annotations

import math
from typing import Any

import datasets
import numpy as np
import pytest

from mmadapters.tasks.classification.labels import LabelMap, fit_labels
from mmadapters.tasks.core.errors import BadRow


def rows(values: list[Any], feature: Any = None) -> datasets.Dataset:
    features = None if feature is None else datasets.Features({"label": feature})
    return datasets.Dataset.from_dict({"label": values}, features=features)


def fit(values: list[Any], feature: Any = None, **options: Any) -> tuple[LabelMap, list[int]]:
    return fit_labels(rows(values, feature), **{"names": (), "separator": None, **options})


def test_names_are_sorted_and_numbers_are_in_their_own_order() -> None:
    assert fit(["b", "a", "b"]) == (LabelMap(("a", "b")), [1, 2])
    assert fit([10, 9, 10, 2])[0].names == ("2", "9", "10")
    assert fit([2.0, 1.0, math.nan])[0].names == ("1", "2")
    assert fit(["10", "9"])[0].names == ("9", "10")


def test_a_data_set_that_names_its_classes_keeps_their_order_and_only_those_there() -> None:
    labels, counts = fit([2, 0, 2], datasets.ClassLabel(names=["zebra", "yak", "ant"]))
    assert labels.names == ("zebra", "ant")
    assert counts == [1, 2]
    assert labels.indices(2) == [1]
    assert labels.indices("ant") == [1]
    with pytest.raises(BadRow, match=r"its label 'yak' is not a class of the training split"):
        labels.indices(1)
    with pytest.raises(BadRow, match="its label 3 is out of range: the data set names 3"):
        labels.indices(3)


def test_the_map_survives_being_saved() -> None:
    labels, _ = fit([["x"], ["y", "x"]], separator="|")
    again = LabelMap.from_state(labels.to_state())
    assert again == labels
    assert again.indices("y|x") == [0, 1]


def test_what_training_has_not_seen_is_a_bad_row_with_the_nearest_name() -> None:
    labels, _ = fit(["labrador", "poodle"])
    with pytest.raises(BadRow, match=r"'labradr' is not a class of .*did you mean 'labrador'"):
        labels.indices("labradr")


@pytest.mark.parametrize("value", [None, "", math.nan, np.float32("nan")])
def test_a_row_without_a_label_is_a_bad_row(value: Any) -> None:
    labels, _ = fit(["a", "b"])
    with pytest.raises(BadRow, match="it has no label"):
        labels.indices(value)


def test_rows_without_a_label_do_not_stop_the_others() -> None:
    assert fit(["a", None, "b", ""]) == (LabelMap(("a", "b")), [1, 1])


def test_several_labels_are_a_list_or_a_text() -> None:
    labels, counts = fit(["cat, dog", "dog", "", "bird"], separator=",")
    assert labels.names == ("bird", "cat", "dog")
    assert counts == [1, 1, 2]
    assert labels.indices("dog ,cat") == [1, 2]
    assert labels.indices(["cat", "cat"]) == [1]
    assert labels.indices(np.array(["bird"])) == [0]
    assert labels.indices("") == []
    assert labels.indices([]) == []
    with pytest.raises(BadRow, match="it has no label"):
        labels.indices(None)
    named = datasets.List(datasets.ClassLabel(names=["u", "v", "w"]))
    labels, counts = fit([[0, 2], [2], []], named, separator=",")
    assert (labels.names, counts) == (("u", "w"), [1, 2])
    assert labels.indices([2]) == [1]


def test_a_list_where_one_label_is_expected_says_what_to_set() -> None:
    labels, _ = fit(["a", "b"])
    with pytest.raises(BadRow, match="is not one name or number; for several, set multi_label"):
        labels.indices(["a"])


def test_classes_given_by_the_config_come_in_its_order() -> None:
    labels, counts = fit(["a", "b", "c"], names=("c", "a", "z"))
    assert labels.names == ("c", "a", "z")
    assert counts == [1, 1, 0]
    with pytest.raises(BadRow):
        labels.indices("b")
    with pytest.raises(ValueError, match=r"no training row has one of data\.labels \(x, y, …\)"):
        fit(["a", "b"], names=("x", "y"))


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="has only 'a'; a classifier needs 2 classes"):
        fit(["a", "a"])
    with pytest.raises(ValueError, match="has no label at all"):
        fit([None, None])
    with pytest.raises(ValueError, match="names a class twice"):
        fit(["a", "b"], names=("a", "b", "a"))
    assert fit([["a"], []], separator=",")[0].names == ("a",)
