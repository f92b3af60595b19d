"""Metrics of a classifier, with their bootstrap intervals.

Shape legend: N examples, C classes, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..core.metrics import CHUNK, Metric, interval, summed_metric

LARGEST = 1e7  # the most statistics (examples × classes) for which means over classes get intervals


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns (C, C) int64 counts. Rows are the truth, columns the prediction.

    Args:
        truth: (N,) class numbers.
        predicted: (N,) class numbers.
        classes: C.
    """
    pairs = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return pairs.reshape(classes, classes).astype(np.int64)


def class_figures(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Returns precision, recall and F1 of each class, (C,), from a confusion matrix (C, C).

    A value is NaN where it would be 0 / 0. F1 = 2 TP / (2 TP + FP + FN) is NaN only for a class
    that neither occurs nor is predicted.
    """
    hit = np.diag(matrix).astype(float)
    told, true = matrix.sum(axis=0), matrix.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "precision": hit / told,
            "recall": hit / true,
            "F1": 2 * hit / (told + true),
        }


def rank_of_truth(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns (N,) ranks from 0 of the true class. Of equal classes the lower number comes first.

    Args:
        truth: (N,) class numbers.
        probabilities: (N, C).
    """
    of_truth = np.take_along_axis(probabilities, truth[:, None], axis=1)
    before = np.arange(probabilities.shape[1]) < truth[:, None]
    return ((probabilities > of_truth) | ((probabilities == of_truth) & before)).sum(axis=1)


def single_label(
    truth: np.ndarray, probabilities: np.ndarray, *, resamples: int, first: str = "accuracy"
) -> list[Metric]:
    """Returns accuracy, balanced accuracy, macro F1 and, from six classes on, top-5 accuracy.

    Balanced accuracy is the mean recall of the classes that occur. Macro F1 is the mean F1 of the
    classes that occur or are predicted.

    Args:
        truth: (N,) class numbers.
        probabilities: (N, C).
        resamples: S; 0 for no intervals.
        first: the metric that stands first.
    """
    number, classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    hit = (predicted == truth).astype(float)
    one = np.ones(number)
    metrics = [summed_metric("accuracy", np.stack([hit, one], 1), _share, resamples=resamples)]
    if number * 3 * classes <= LARGEST:
        row = np.arange(number)
        hits, true, told = np.zeros((3, number, classes))
        hits[row, truth] = hit
        true[row, truth] = 1
        told[row, predicted] = 1
        statistics = np.concatenate([hits, true, told], axis=1)
    else:
        matrix = confusion(truth, predicted, classes)
        sums = [np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)]
        statistics = np.concatenate(sums)[None]
    metrics += [
        _of_classes("balanced accuracy", statistics, _mean_recall, number, resamples),
        _of_classes("macro F1", statistics, _mean_f1, number, resamples),
    ]
    if classes > 5:
        top = (rank_of_truth(truth, probabilities) < 5).astype(float)
        metrics.append(
            summed_metric("top-5 accuracy", np.stack([top, one], 1), _share, resamples=resamples)
        )
    return sorted(metrics, key=lambda metric: metric.name != first)


def multi_label(
    truth: np.ndarray,
    probabilities: np.ndarray,
    *,
    threshold: float,
    resamples: int,
    first: str = "mAP",
) -> list[Metric]:
    """Returns mAP, micro F1, macro F1 and the share of examples with exactly the right labels.

    mAP is the mean average precision of the classes that occur. Macro F1 is the mean F1 of the
    classes that occur or are predicted.

    Args:
        truth: (N, C) of 0 and 1.
        probabilities: (N, C).
        threshold: the probability from which a label counts as predicted.
        resamples: S; 0 for no intervals.
        first: the metric that stands first.
    """
    true = truth.astype(float)
    told = (probabilities >= threshold).astype(float)
    both = true * told
    one = np.ones(len(true))
    exact = np.stack([(true == told).all(axis=1), one], 1)
    micro = np.stack([both.sum(1), true.sum(1) + told.sum(1)], 1)
    statistics = np.concatenate([both, true, told], axis=1)
    if statistics.size > LARGEST:
        statistics = statistics.sum(axis=0)[None]
    metrics = [
        mean_average_precision(true, probabilities, resamples=resamples),
        summed_metric("micro F1", micro, lambda sums: 2 * _share(sums), resamples=resamples),
        _of_classes("macro F1", statistics, _mean_f1, len(true), resamples),
        summed_metric("exact match", exact, _share, resamples=resamples),
    ]
    return sorted(metrics, key=lambda metric: metric.name != first)


def average_precision(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the area under the precision-recall steps, Σ (R_k − R_k−1) P_k over distinct scores.

    The value is that of scikit-learn's average_precision_score.

    Args:
        truth: (N,) of 0 and 1.
        scores: (N,).
        weights: (S, N) of the examples.

    Returns:
        (S,) values, NaN where no example of positive weight is true.
    """
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    weights = weights[:, order]
    # Examples of equal score are one step, which stands at the last of them.
    step = np.append(scores[1:] != scores[:-1], True)
    hits = np.cumsum(weights * truth, axis=1)[:, step]
    told = np.cumsum(weights, axis=1)[:, step]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(told > 0, hits / told, 0.0)
        recall = hits / hits[:, -1:]
    gained = np.diff(recall, axis=1, prepend=0.0)
    return (gained * precision).sum(axis=1)


def mean_average_precision(
    truth: np.ndarray, probabilities: np.ndarray, *, resamples: int, seed: int = 0
) -> Metric:
    """Returns mAP with its interval. Unlike other metrics it is no function of sums over examples.

    Args:
        truth: (N, C) of 0 and 1.
        probabilities: (N, C).
        resamples: S; 0 for no interval.
        seed: of the resamples.
    """
    number = len(truth)

    def over(weights: np.ndarray) -> np.ndarray:
        columns = zip(truth.T, probabilities.T, strict=True)
        each = [average_precision(true, scores, weights) for true, scores in columns]
        return _nanmean(np.stack(each, axis=1))

    value = float(over(np.ones((1, number)))[0])
    samples = None
    if resamples and number > 1:
        rng = np.random.default_rng(seed)
        values = [
            over(
                rng.multinomial(
                    number, np.full(number, 1 / number), min(CHUNK, resamples - start)
                ).astype(float)
            )
            for start in range(0, resamples, CHUNK)
        ]
        samples = np.concatenate(values)
    low, high = interval(samples)
    return Metric("mAP", value, low, high, count=number, samples=samples)


def _of_classes(
    name: str,
    statistics: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    number: int,
    resamples: int,
) -> Metric:
    """Returns a mean over classes, from (N, 3C) statistics or (1, 3C) sums.

    Sums give no interval. `number` is N.
    """
    metric = summed_metric(name, statistics, function, resamples=resamples)
    return replace(metric, count=number)


def _share(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _parts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hit, true, told = np.split(sums, 3, axis=-1)
    return hit, true, told


def _mean_recall(sums: np.ndarray) -> np.ndarray:
    hit, true, _ = _parts(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _nanmean(hit / true)


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    hit, true, told = _parts(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _nanmean(2 * hit / (true + told))


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the last dimension without NaN; NaN, without a warning, if all are."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, values, 0).sum(-1) / there.sum(-1)
