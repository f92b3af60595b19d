"""The results of a comparison: scores, costs, and the intervals of differences between methods."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...core.metrics import Metric, interval
from .config import ComparisonConfig

Verdict = Literal["better", "worse", "no difference"]


@dataclass(frozen=True)
class TrainingScore:
    """The deciding metric of one training.

    Attributes:
        test: the metric on the test split.
        validation: its value on the validation split, which chooses the learning rate; None
            without that split.
    """

    test: Metric
    validation: float | None


@dataclass(frozen=True)
class Cost:
    """The cost of a training step: forward, backward and update.

    Attributes:
        step_seconds: the median time of a step.
        kept_bytes: the tensors that the forward pass keeps for the backward pass, without
            parameters.
        peak_bytes: the largest memory allocated on an accelerator, the model included; None on CPU.
    """

    step_seconds: float
    kept_bytes: int
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Entrant:
    """A method, a reference or a bottleneck, trained with every seed.

    Attributes:
        name: its name in the table.
        parameters: all trained parameters, the head's included.
        rate: the learning rate.
        trainings: the scores, in the order of the seeds.
    """

    name: str
    parameters: int
    rate: float
    trainings: tuple[TrainingScore, ...]

    @functools.cached_property
    def metric(self) -> Metric:
        """The mean over seeds; its interval covers test examples and seeds together."""
        values = np.array([training.test.value for training in self.trainings])
        mean = _over_seeds(self.trainings[0].test, values, _mean_samples(self.trainings))
        if mean.unit == "%" and mean.low is not None:
            return replace(mean, low=max(mean.low, 0.0))
        return mean


@dataclass(frozen=True)
class Duel:
    """A method and the bottleneck that trains as many parameters, with the costs of both."""

    method: Entrant
    bottleneck: Entrant
    cost: Cost
    bottleneck_cost: Cost

    @functools.cached_property
    def difference(self) -> Metric:
        """The metric of the method minus that of the bottleneck."""
        return difference(self.method.trainings, self.bottleneck.trainings)

    @property
    def verdict(self) -> Verdict:
        """The direction of the difference, or "no difference" if its interval contains zero."""
        metric = self.difference
        if metric.low is None or metric.high is None or metric.low <= 0 <= metric.high:
            return "no difference"
        return "better" if (metric.low > 0) is metric.greater_is_better else "worse"


@dataclass
class Comparison:
    """A finished comparison.

    Attributes:
        config: the config of the comparison.
        folder: the run directory.
        task: the name of the task.
        backbone: the name of the encoder.
        duels: the methods with their bottlenecks, in the order of the config.
        references: the references with their costs, in the order of the config.
    """

    config: ComparisonConfig
    folder: Path
    task: str
    backbone: str
    duels: list[Duel] = field(default_factory=list)
    references: list[tuple[Entrant, Cost]] = field(default_factory=list)


def difference(trainings: Sequence[TrainingScore], others: Sequence[TrainingScore]) -> Metric:
    """Returns the mean over seeds of a metric minus that of others, with its 95 % interval.

    Two independent errors add up. The first is that of the choice of test examples: these are
    resampled, the same ones for both sides. The second is that of the random numbers of training:
    the spread of the differences of the seeds, with Student's t as the seeds are few.
    """
    values = np.array(
        [a.test.value - b.test.value for a, b in zip(trainings, others, strict=True)], dtype=float
    )
    samples = None
    mine, theirs = _mean_samples(trainings), _mean_samples(others)
    if mine is not None and theirs is not None and mine.shape == theirs.shape:
        samples = mine - theirs
    return _over_seeds(trainings[0].test, values, samples)


def spread(values: np.ndarray, samples: np.ndarray | None, *, seed: int = 1) -> np.ndarray:
    """Draws the mean of `values` with its two errors.

    Args:
        values: (seeds,) a value for each seed.
        samples: (S,) the mean on resampled test examples; None if it was not resampled.
        seed: of the random numbers drawn here.

    Returns:
        (S,) the samples, each plus a random error of a mean of so few seeds: t-distributed, with
        one degree of freedom less than there are seeds.
    """
    if samples is None:
        samples = np.full(1000, values.mean())
    error = values.std(ddof=1) / np.sqrt(len(values))
    draws = np.random.default_rng(seed).standard_t(len(values) - 1, size=len(samples))
    return samples + error * draws


def _over_seeds(like: Metric, values: np.ndarray, samples: np.ndarray | None) -> Metric:
    """Returns the mean of `values` (seeds,) as a metric of the same kind, with its interval."""
    low, high = interval(spread(values, samples))
    return replace(like, value=float(values.mean()), low=low, high=high, samples=None)


def _mean_samples(trainings: Sequence[TrainingScore]) -> np.ndarray | None:
    samples = [training.test.samples for training in trainings]
    given = [values for values in samples if values is not None]
    return np.mean(given, axis=0) if len(given) == len(samples) else None
