"""Figures with their uncertainty, in the same form for every task.

Most metrics are a function of sums over examples (correct and all answers; errors and words;
intersections and unions). `resampled` draws examples, or whole clusters of them (all utterances
of a speaker), and evaluates the function on all resamples at once.

Shape legend: N examples, K statistics of one example, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

CHUNK = 50  # resamples at a time, so that memory stays below CHUNK × N numbers


@dataclass(frozen=True)
class Metric:
    """One figure. `low` and `high` bound its 95 % interval; `count` is how many examples it is of.

    `unit` is "%" for shares (the value stays between 0 and 1) and "" for plain numbers. `samples`:
    (S,) values on resampled examples, where its interval comes from such; as the draws depend on
    nothing but the number of examples, those of two models on one split belong together in pairs.
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
    """`function` of the summed statistics, with its bootstrap interval.

    Args:
        statistics: (N, K), one row an example.
        function: (..., K) sums -> (...) values, vectorised.
        clusters: (N,) labels; those of one label are drawn together.
        options: fields of `Metric`.
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
    """(S,) values of `function` over resampled sums (Efron 1979); None without resamples, or where
    there are fewer than two examples or clusters."""
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
    """Their 2.5 and 97.5 percentiles; None without samples."""
    if samples is None:
        return None, None
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(
    statistics: np.ndarray, function: Callable[[np.ndarray], np.ndarray], **options: Any
) -> tuple[float | None, float | None]:
    """The `interval` of what `resampled` gives with these options."""
    return interval(resampled(statistics, function, **options))
