"""Metrics against brute force, a pixel at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmadapters.tasks.segmentation import metrics
from mmadapters.tasks.segmentation.metrics import Counts, boundary_f1, confusion, count, dilate

IGNORE = 255
NAMES = ("background", "a", "b", "absent")


def images(
    number: int, *, classes: int = 3, size: tuple[int, int] = (13, 17)
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prediction, truth) of blobs, with some pixels ignored."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(number):
        coarse = rng.integers(classes, size=(5, 5))
        truth = np.kron(coarse, np.ones((4, 4), dtype=int))[: size[0], : size[1]]
        noise = rng.random(size) < 0.15
        prediction = np.where(noise, rng.integers(classes, size=size), np.roll(truth, 1, axis=1))
        truth = truth.copy()
        truth[rng.random(size) < 0.05] = IGNORE
        pairs.append((prediction, truth))
    return pairs


def counts_of(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int = 4) -> list[Counts]:
    return [
        count(
            torch.from_numpy(prediction),
            torch.from_numpy(truth.astype(np.uint8)),
            classes=classes,
            ignore=IGNORE,
            tolerance=1.0,
        )
        for prediction, truth in pairs
    ]


def test_one_matrix_in_whole_numbers_over_all_images() -> None:
    pairs = images(6)
    expected = np.zeros((4, 4), dtype=np.int64)
    for prediction, truth in pairs:
        for guess, right in zip(prediction.ravel(), truth.ravel(), strict=True):
            if right != IGNORE:
                expected[right, guess] += 1
    found = confusion(counts_of(pairs), 4)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)


def test_counts_beyond_what_a_float_can_hold_stay_exact() -> None:
    large = Counts(np.array([0]), np.array([2**53], dtype=np.int64), np.zeros((0, 2)))
    one = Counts(np.array([0]), np.array([1], dtype=np.int64), np.zeros((0, 2)))
    assert confusion([large, one], 1)[0, 0] == 2**53 + 1


def brute_force(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> dict[str, list]:
    """Per class over the whole split, by sets of pixels; None where there is nothing."""
    found: dict[str, list] = {"iou": [], "dice": [], "accuracy": [], "precision": []}
    for k in range(classes):
        both = either = guesses = rights = 0
        for prediction, truth in pairs:
            valid = truth != IGNORE
            guess, right = (prediction == k) & valid, (truth == k) & valid
            both += int((guess & right).sum())
            either += int((guess | right).sum())
            guesses += int(guess.sum())
            rights += int(right.sum())
        found["iou"].append(both / either if either else None)
        found["dice"].append(2 * both / (guesses + rights) if guesses + rights else None)
        found["accuracy"].append(both / rights if rights else None)
        found["precision"].append(both / guesses if guesses else None)
    return found


def mean(values: list) -> float:
    return float(np.mean([value for value in values if value is not None]))


def test_metrics_are_those_of_brute_force_and_absent_classes_are_left_out() -> None:
    pairs = images(6)
    expected = brute_force(pairs, 4)
    assert expected["iou"][3] is None
    found = {
        metric.name: metric.value
        for metric in metrics.metrics(counts_of(pairs), NAMES, background="background", resamples=0)
    }
    assert next(iter(found)) == "mIoU"
    assert found["mIoU"] == pytest.approx(mean(expected["iou"]), rel=1e-12)
    assert found["Dice"] == pytest.approx(mean(expected["dice"]), rel=1e-12)
    assert found["mean accuracy"] == pytest.approx(mean(expected["accuracy"]), rel=1e-12)
    assert found["foreground IoU"] == pytest.approx(mean(expected["iou"][1:]), rel=1e-12)
    right = sum(int((p == t).sum()) for p, t in pairs)
    assert found["pixel accuracy"] == right / sum(int((t != IGNORE).sum()) for _, t in pairs)


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    """IoU 0, not left out: torchmetrics #2558 and others get one of the two wrong."""
    truth, prediction = np.zeros((2, 2), dtype=int), np.array([[0, 0], [0, 1]])
    counts = counts_of([(prediction, truth)], 3)
    sums = metrics.statistics(counts, 3).sum(axis=0)
    np.testing.assert_array_equal(metrics.class_iou(sums), [0.75, 0.0, np.nan])
    np.testing.assert_array_equal(metrics.class_accuracy(sums), [0.75, np.nan, np.nan])


def test_the_class_table_and_the_confused_pairs_say_the_same() -> None:
    pairs = images(6)
    counts = counts_of(pairs)
    expected = brute_force(pairs, 4)
    table = metrics.class_table(counts, NAMES, resamples=50)
    by_name = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    for number, name in enumerate(NAMES[:3]):
        row = by_name[name]
        for column, key in (("IoU", "iou"), ("Dice", "dice"), ("accuracy", "accuracy")):
            assert row[column] == round(100 * expected[key][number], 2)
        assert row["precision"] == round(100 * expected["precision"][number], 2)
        assert row["low"] < row["IoU"] < row["high"]
    assert by_name["absent"]["IoU"] == ""
    matrix = confusion(counts, 4)
    pairs_of = metrics.confused(matrix, NAMES).rows
    truth, prediction, pixels, share = pairs_of[0]
    wrong = matrix - np.diag(np.diag(matrix))
    assert pixels == wrong.max() == matrix[NAMES.index(truth), NAMES.index(prediction)]
    assert share == round(100 * pixels / matrix[NAMES.index(truth)].sum(), 2)
    assert sum(row[2] for row in pairs_of) == wrong.sum()


def test_intervals_hold_the_value_and_shrink_with_more_images() -> None:
    widths = []
    for number in (8, 64):
        found = metrics.metrics(
            counts_of(images(number)), NAMES, background="background", resamples=300
        )
        for metric in found:
            assert metric.low is not None
            assert metric.high is not None
            assert metric.low <= metric.value <= metric.high
            assert metric.count == number
        widths.append(found[0].high - found[0].low)  # type: ignore[operator]
    assert widths[1] < 0.6 * widths[0]


def test_an_image_that_is_all_ignored_changes_nothing() -> None:
    pairs = images(3)
    empty = (pairs[0][0], np.full_like(pairs[0][1], IGNORE))
    without = metrics.metrics(counts_of(pairs), NAMES, background=None, resamples=0)
    with_it = metrics.metrics(counts_of([*pairs, empty]), NAMES, background=None, resamples=0)
    assert [m.value for m in without] == [m.value for m in with_it]
    assert np.isnan(metrics.image_iou(counts_of([empty]), 4)[0])


def test_the_iou_of_an_image_is_that_of_a_split_of_one() -> None:
    pairs = images(4)
    for pair, score in zip(pairs, metrics.image_iou(counts_of(pairs), 4), strict=True):
        assert score == pytest.approx(mean(brute_force([pair], 4)["iou"]), rel=1e-12)


def outline(values: np.ndarray, k: int) -> set[tuple[int, int]]:
    """Pixels of a class beside one of another."""
    height, width = values.shape
    found = set()
    for y in range(height):
        for x in range(width):
            if values[y, x] != k:
                continue
            for other in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= other[0] < height and 0 <= other[1] < width
                if inside and values[other] not in (k, IGNORE):
                    found.add((y, x))
    return found


def brute_boundary(prediction: np.ndarray, truth: np.ndarray, radius: int) -> dict[int, float]:
    prediction = np.where(truth == IGNORE, IGNORE, prediction)
    found = {}
    for k in sorted({*np.unique(prediction), *np.unique(truth)} - {IGNORE}):
        ours, theirs = outline(prediction, k), outline(truth, k)

        def near(points: set, others: set) -> float:
            hits = sum(
                any(math.hypot(y - v, x - u) <= radius for v, u in others) for y, x in points
            )
            return hits / len(points) if points else 0.0

        precision, recall = near(ours, theirs), near(theirs, ours)
        if not ours and not theirs and (prediction == k).any() and (truth == k).any():
            found[int(k)] = 1.0
        else:
            total = precision + recall
            found[int(k)] = 2 * precision * recall / total if total else 0.0
    return found


@pytest.mark.parametrize(("tolerance", "radius"), [(1.0, 1), (2.0, 2), (3.0, 3), (0.08, 2)])
def test_boundary_f1_is_that_of_brute_force(tolerance: float, radius: int) -> None:
    """0.08 of the diagonal of 13×17 pixels is 1.7, rounded up."""
    for prediction, truth in images(4):
        found = boundary_f1(
            torch.from_numpy(prediction),
            torch.from_numpy(truth),
            ignore=IGNORE,
            tolerance=tolerance,
        )
        expected = brute_boundary(prediction, truth, radius)
        assert found[:, 0].astype(int).tolist() == list(expected)
        np.testing.assert_allclose(found[:, 1], list(expected.values()), atol=1e-12)


def test_boundary_f1_at_its_ends() -> None:
    """Equal maps have 1, as has one class without outlines; a class on one side only has 0."""

    def scores(prediction: np.ndarray, truth: np.ndarray) -> dict[int, float]:
        found = boundary_f1(
            torch.from_numpy(prediction), torch.from_numpy(truth), ignore=IGNORE, tolerance=1.0
        )
        return {int(k): float(value) for k, value in found}

    ((_, truth),) = images(1)
    assert set(scores(truth, truth).values()) == {1.0}
    flat = np.zeros((5, 5), dtype=int)
    assert scores(flat, flat) == {0: 1.0}
    dot = flat.copy()
    dot[2, 2] = 1
    assert scores(dot, flat) == {0: 0.0, 1: 0.0}
    assert scores(flat, np.full_like(flat, IGNORE)) == {}


def test_boundary_f1_of_a_split_is_the_mean_over_images_then_classes() -> None:
    pairs = images(5)
    by_class: dict[int, list[float]] = {}
    for prediction, truth in pairs:
        for k, value in brute_boundary(prediction, truth, 1).items():
            by_class.setdefault(k, []).append(value)
    expected = np.mean([np.mean(values) for values in by_class.values()])
    found = metrics.metrics(counts_of(pairs), NAMES, background=None, resamples=0)
    assert found[-1].name == "boundary F1"
    assert found[-1].value == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 7, 30])
def test_dilation_is_a_disk(radius: int) -> None:
    points = torch.rand(2, 1, 11, 14) < 0.02
    points[0, 0, 5, 5] = points[1, 0, 0, 13] = True
    expected = torch.zeros_like(points)
    for place in points.nonzero().tolist():
        rows = torch.arange(11)[:, None] - place[2]
        columns = torch.arange(14) - place[3]
        expected[place[0], place[1]] |= rows**2 + columns**2 <= radius**2
    assert torch.equal(dilate(points, radius), expected)
