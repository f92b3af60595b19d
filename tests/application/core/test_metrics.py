"""Bootstrap intervals against a loop over resamples and against the formula for shares."""

from __future__ import annotations

import numpy as np
import pytest

from mmadapters.tasks.core.metrics import Metric, bootstrap, summed_metric


def share(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def outcomes(count: int, p: float) -> np.ndarray:
    correct = np.random.default_rng(5).random(count) < p
    return np.stack([correct, np.ones(count)], axis=1)


def test_interval_of_a_share_is_the_normal_one_for_many_examples() -> None:
    metric = summed_metric("accuracy", outcomes(4000, 0.7), share, resamples=4000)
    half = 1.96 * (metric.value * (1 - metric.value) / 4000) ** 0.5
    assert metric.low == pytest.approx(metric.value - half, abs=0.002)
    assert metric.high == pytest.approx(metric.value + half, abs=0.002)
    assert metric.count == 4000


def test_interval_is_that_of_a_plain_loop_over_resamples() -> None:
    rng = np.random.default_rng(1)
    statistics = np.stack([rng.poisson(2.0, 60), rng.integers(1, 12, 60)], axis=1).astype(float)
    ratios = []
    for _ in range(4000):
        drawn = statistics[rng.integers(60, size=60)].sum(axis=0)
        ratios.append(drawn[0] / drawn[1])
    low, high = bootstrap(statistics, share, resamples=4000)
    np.testing.assert_allclose([low, high], np.percentile(ratios, [2.5, 97.5]), atol=0.01)


def test_clusters_widen_the_interval_where_their_members_agree() -> None:
    speakers = np.repeat(np.arange(20), 50)
    right = (np.arange(20) % 2).repeat(50)
    statistics = np.stack([right, np.ones(1000)], axis=1)
    alone = bootstrap(statistics, share, resamples=1000)
    together = bootstrap(statistics, share, resamples=1000, clusters=speakers)
    assert None not in (*alone, *together)
    assert together[1] - together[0] > 4 * (alone[1] - alone[0])  # type: ignore[operator]


def test_equal_data_give_equal_intervals_and_one_example_gives_none() -> None:
    statistics = outcomes(100, 0.5)
    assert bootstrap(statistics, share, resamples=100) == bootstrap(
        statistics, share, resamples=100
    )
    assert bootstrap(statistics[:1], share, resamples=100) == (None, None)
    assert bootstrap(statistics, share, resamples=0) == (None, None)
    assert bootstrap(statistics, share, resamples=9, clusters=["one"] * 100) == (None, None)


def test_metrics_read_as_a_person_would_write_them() -> None:
    assert str(Metric("accuracy", 0.4213, 0.4, 0.45)) == "42.1 [40.0, 45.0] %"
    assert str(Metric("median rank", 12.0, unit="")) == "12.0"
    assert Metric("WER", 0.1, count=3).to_dict() == {
        "name": "WER",
        "value": 0.1,
        "count": 3,
        "unit": "%",
        "greater_is_better": True,
    }
