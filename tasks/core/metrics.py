"""Metrics with their uncertainty, in the same form for every task.

Most metrics are a function of sums over examples (correct answers and all answers; errors and
words; intersections and unions). `resampled` draws examples, or whole clusters of them (all
utterances of a speaker), and evaluates the function on all resamples at once.

Shape legend: N examples, K statistics of one example, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

CHUNK = 50  # resamples at a time: memory stays below CHUNK × N numbers


@dataclass(frozen=True)
class Metric:
    """The value of a metric on a split or a part of it.

    Attributes:
        name: of the metric.
        value: a share lies between 0 and 1.
        low: the lower end of the 95 % interval; None without an interval.
        high: the upper end of the 95 % interval; None without an interval.
        count: the number of examples that were measured.
        unit: "%" for shares, "" for plain numbers.
        greater_is_better: whether a higher value is better.
        samples: (S,) values on resampled examples, if the interval comes from them. The draws
            depend on the number of examples only, so the samples of two models on one split can be
            compared pair by pair.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    unit: str = "%"
    greater_is_better: bool = True
    samples: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        factor = 100 if self.unit == "%" else 1
        text = f"{factor * self.value:.1f}"
        if self.low is not None and self.high is not None:
            text += f" [{factor * self.low:.1f}, {factor * self.high:.1f}]"
        return f"{text} %" if self.unit == "%" else text

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that are not None, without the samples; JSON-ready."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        return {name: value for name, value in values.items() if value is not None}


def summed_metric(
    name: str,
    statistics: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int,
    clusters: Sequence[Any] | None = None,
    **options: Any,
) -> Metric:
    """Returns `function` of the summed statistics, with its bootstrap interval.

    Args:
        name: of the metric.
        statistics: (N, K), one row for each example.
        function: (..., K) sums -> (...) values, vectorised.
        resamples: S; 0 for no interval.
        clusters: (N,) labels; the examples of one label are drawn together.
        options: other fields of `Metric`.
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    value = float(function(statistics.sum(axis=0)))
    samples = resampled(statistics, function, resamples=resamples, clusters=clusters)
    low, high = interval(samples)
    return Metric(name, value, low, high, count=len(statistics), samples=samples, **options)


def resampled(
    statistics: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
) -> np.ndarray | None:
    """Returns `function` of the sums over resampled examples (Efron 1979).

    Args:
        statistics: (N, K), one row for each example.
        function: (..., K) sums -> (...) values, vectorised.
        resamples: S.
        clusters: (N,) labels; the examples of one label are drawn together.
        seed: of the draws.

    Returns:
        (S,) values; None if S is 0 or if there are fewer than two examples or clusters.
    """
    if clusters is not None:
        _, inverse = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
        sums = np.zeros((inverse.max(initial=-1) + 1, statistics.shape[1]))
        np.add.at(sums, inverse, statistics)
        statistics = sums
    number = len(statistics)
    if resamples == 0 or number < 2:
        return None
    rng = np.random.default_rng(seed)
    values = []
    for start in range(0, resamples, CHUNK):
        draws = rng.multinomial(number, np.full(number, 1 / number), min(CHUNK, resamples - start))
        values.append(function(draws @ statistics))
    return np.concatenate(values)


def interval(samples: np.ndarray | None) -> tuple[float | None, float | None]:
    """Returns the 2.5 and 97.5 percentiles of (S,) samples, or None twice without samples."""
    if samples is None:
        return None, None
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(
    statistics: np.ndarray, function: Callable[[np.ndarray], np.ndarray], **options: Any
) -> tuple[float | None, float | None]:
    """Returns the 95 % interval of `function` over resampled sums.

    Args:
        statistics: (N, K), one row for each example.
        function: (..., K) sums -> (...) values, vectorised.
        options: of `resampled`.
    """
    return interval(resampled(statistics, function, **options))
