"""A classifier's figures against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmadapters.tasks.classification import metrics
from mmadapters.tasks.core.metrics import Metric


def example(number: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truth (N,) and probabilities (N, C) that are better than chance."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=number)
    logits = rng.normal(size=(number, classes))
    logits[np.arange(number), truth] += 1
    odds = np.exp(logits)
    return truth, odds / odds.sum(axis=1, keepdims=True)


def by_name(found: list[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in found}


def counted(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    recalls, scores = [], []
    for c in range(classes):
        hit = sum(t == c and p == c for t, p in zip(truth, predicted, strict=True))
        true, told = sum(t == c for t in truth), sum(p == c for p in predicted)
        if true:
            recalls.append(hit / true)
        if true or told:
            precision = hit / told if told else 0.0
            recall = hit / true if true else 0.0
            both = precision + recall
            scores.append(2 * precision * recall / both if both else 0.0)
    return {
        "accuracy": float(np.mean([t == p for t, p in zip(truth, predicted, strict=True)])),
        "balanced accuracy": float(np.mean(recalls)),
        "macro F1": float(np.mean(scores)),
    }


@pytest.mark.parametrize(("number", "classes"), [(200, 4), (60, 8), (9, 12), (1, 3)])
def test_single_label_figures_are_what_counting_gives(number: int, classes: int) -> None:
    truth, probabilities = example(number, classes)
    found = by_name(metrics.single_label(truth, probabilities, resamples=0))
    expected = counted(truth, probabilities.argmax(axis=1), classes)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value)
        assert found[name].count == number
    assert ("top-5 accuracy" in found) is (classes > 5)
    if classes > 5:
        top = [t in np.argsort(-row)[:5] for t, row in zip(truth, probabilities, strict=True)]
        assert found["top-5 accuracy"].value == pytest.approx(np.mean(top))


def test_the_same_answer_for_all_is_no_better_than_its_share() -> None:
    """Among equal probabilities a class does not come first because it is the true one."""
    truth = np.arange(20) % 10
    found = by_name(metrics.single_label(truth, np.full((20, 10), 0.1), resamples=0))
    assert found["accuracy"].value == 0.1
    assert found["top-5 accuracy"].value == 0.5


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(60):
        truth, probabilities = example(300, 3, seed=seed)
        found = metrics.single_label(truth, probabilities, resamples=200)[1]
        assert found.name == "balanced accuracy"
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        inside += found.low <= EXPECTED_RECALL <= found.high
    assert inside >= 51  # of 60, at 95 %; fewer than 51 once in 1,000 times


def expected_recall() -> float:
    truth, probabilities = example(200_000, 3, seed=10_000)
    return float((probabilities.argmax(axis=1) == truth).mean())


EXPECTED_RECALL = expected_recall()


def test_of_very_many_classes_means_stay_exact_and_lose_their_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth, probabilities = example(50, 7)
    whole = metrics.single_label(truth, probabilities, resamples=20)
    monkeypatch.setattr(metrics, "LARGEST", 10)
    found = metrics.single_label(truth, probabilities, resamples=20)
    for before, after in zip(whole, found, strict=True):
        assert after.value == pytest.approx(before.value)
        assert after.count == 50
        assert (after.low is None) is (after.name in ("balanced accuracy", "macro F1"))
    many = probabilities.round().astype(int)
    exact = by_name(metrics.multi_label(many, probabilities, threshold=0.5, resamples=20))
    assert exact["macro F1"].value == 1
    assert exact["macro F1"].low is None


def precision_steps(truth: list[int], scores: list[float]) -> float:
    """Σ (R_k − R_k−1) P_k over thresholds, by counting at each."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        told = [t for t, s in zip(truth, scores, strict=True) if s >= threshold]
        recall = sum(told) / sum(truth)
        total += (recall - recall_before) * sum(told) / len(told)
        recall_before = recall
    return total


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_what_counting_gives_with_ties_and_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(2, size=30)
    scores = rng.integers(8, size=30) / 8  # many ties
    weights = np.stack([np.ones(30), rng.integers(3, size=30)])
    found = metrics.average_precision(truth, scores, weights)
    assert found[0] == pytest.approx(precision_steps(truth.tolist(), scores.tolist()))
    times = weights[1].astype(int)
    repeated = precision_steps(np.repeat(truth, times).tolist(), np.repeat(scores, times).tolist())
    assert found[1] == pytest.approx(repeated)


def test_average_precision_of_a_published_example() -> None:
    """scikit-learn's own: truth 0 0 1 1, scores .1 .4 .35 .8, average precision 0.83."""
    found = metrics.average_precision(
        np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]), np.ones((1, 4))
    )
    assert found[0] == pytest.approx(0.8333, abs=1e-4)


def test_multi_label_figures_are_what_counting_gives() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((40, 5)) < 0.4).astype(int)
    truth[:, 3] = 0  # a class that is not there
    probabilities = np.clip(0.3 * truth + rng.random((40, 5)) * 0.7, 0, 1)
    probabilities[:, 3] = 0.1
    found = by_name(metrics.multi_label(truth, probabilities, threshold=0.5, resamples=100))
    told = probabilities >= 0.5
    there = [0, 1, 2, 4]
    each = [precision_steps(truth[:, c].tolist(), probabilities[:, c].tolist()) for c in there]
    assert found["mAP"].value == pytest.approx(np.mean(each))
    hit = (truth * told).sum()
    assert found["micro F1"].value == pytest.approx(2 * hit / (truth.sum() + told.sum()))
    scores = [
        2 * (truth[:, c] * told[:, c]).sum() / (truth[:, c].sum() + told[:, c].sum()) for c in there
    ]
    assert found["macro F1"].value == pytest.approx(np.mean(scores))
    assert found["exact match"].value == np.mean((truth == told).all(axis=1))
    for metric in found.values():
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low <= metric.value <= metric.high


def test_the_deciding_metric_comes_first() -> None:
    truth, probabilities = example(20, 3)
    found = metrics.single_label(truth, probabilities, resamples=0, first="macro F1")
    assert [metric.name for metric in found] == ["macro F1", "accuracy", "balanced accuracy"]


def test_class_figures_are_not_there_where_nothing_is() -> None:
    figures = metrics.class_figures(np.array([[3, 1, 0], [0, 0, 2], [0, 0, 0]]))
    assert figures["recall"][0] == 0.75
    assert figures["precision"][0] == 1
    assert figures["F1"][1] == 0  # there, never predicted
    assert math.isnan(figures["recall"][2])
    assert figures["precision"][2] == 0
    nothing = metrics.class_figures(np.zeros((1, 1), dtype=int))
    assert all(math.isnan(figure[0]) for figure in nothing.values())
