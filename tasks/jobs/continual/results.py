"""The results of continual learning: score matrices, forgetting, and the routing of pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ...config.schema import JobConfig
from ...core.metrics import Metric
from .config import ContinualConfig


@dataclass(frozen=True)
class ScoreCell:
    """The score of a job after a step.

    Attributes:
        metric: the deciding metric on the test split.
        outputs: a hash of all outputs on the split.
    """

    metric: Metric
    outputs: str


@dataclass
class LearningSequence:
    """The scores of jobs that were learned one after another in one way.

    Attributes:
        jobs: the names, in the order of learning.
        cells: (steps, jobs); None for a job that was not learned yet.
        encoder_unchanged: whether the encoder's tensors have the same bits as before the first job.
        seconds: the time of training and evaluation together.
    """

    jobs: list[str]
    cells: list[list[ScoreCell | None]] = field(default_factory=list)
    encoder_unchanged: bool = True
    seconds: float = 0.0

    def history(self, job: int) -> list[ScoreCell]:
        """Returns the cells of a job, from its own step to the last one."""
        return [row[job] for row in self.cells if row[job] is not None]  # type: ignore[misc]

    @property
    def matrix(self) -> list[list[float]]:
        """(steps, jobs) the scores; NaN for a job that was not learned yet."""
        return [[math.nan if c is None else c.metric.value for c in row] for row in self.cells]

    @property
    def last(self) -> list[Metric]:
        """The metric of every job after the last step."""
        return [self.history(job)[-1].metric for job in range(len(self.jobs))]

    @property
    def average(self) -> float | None:
        """The mean score after the last step (Lopez-Paz & Ranzato 2017, ACC).

        None if the metrics are not all percentages of one direction.
        """
        last = self.last
        alike = {(metric.unit, metric.greater_is_better) for metric in last}
        if len(alike) > 1 or last[0].unit != "%":
            return None
        return sum(metric.value for metric in last) / len(last)

    @property
    def forgetting(self) -> dict[str, float]:
        """The forgetting of each job but the last (Chaudhry et al. 2018, f_j^k).

        It is the best score of earlier steps minus the score after the last step. A value above 0
        is a loss, whichever direction the metric has.
        """
        forgotten = {}
        for job, name in enumerate(self.jobs[:-1]):
            *earlier, last = [_upwards(cell.metric) for cell in self.history(job)]
            forgotten[name] = max(earlier) - last
        return forgotten

    @property
    def backward_transfer(self) -> float:
        """The backward transfer (Lopez-Paz & Ranzato 2017, BWT).

        It is the mean, over all jobs but the last, of the score after the last step minus the
        score after the job's own step. A value below 0 is forgetting.
        """
        gains = []
        for job in range(len(self.jobs) - 1):
            first, *_, last = [_upwards(cell.metric) for cell in self.history(job)]
            gains.append(last - first)
        return sum(gains) / len(gains)

    @property
    def unchanged(self) -> dict[str, bool]:
        """For each job but the last, whether later steps left all its outputs bit for bit equal."""
        return {
            name: len({cell.outputs for cell in self.history(job)}) == 1
            for job, name in enumerate(self.jobs[:-1])
        }


def _upwards(metric: Metric) -> float:
    return metric.value if metric.greater_is_better else -metric.value


@dataclass(frozen=True)
class Routing:
    """The jobs to which a router sent the test pictures of J jobs.

    Attributes:
        jobs: (J,) the names.
        shares: (J, J), the share of a job's test pictures (row) that went to each job (column).
        told: (J,) the score of each job when its adapter is given, as in the last row of the
            matrix.
        routed: (J,) the score of each job when the router chooses; a picture that goes to a wrong
            job counts as 0.
        means: (J,) how many class means each job has.
    """

    jobs: list[str]
    shares: list[list[float]]
    told: list[float]
    routed: list[float]
    means: list[int]

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of each job's pictures that went to the right job."""
        return {name: self.shares[place][place] for place, name in enumerate(self.jobs)}


@dataclass
class Continual:
    """A finished run of continual learning.

    Attributes:
        config: the config of the run.
        jobs: the jobs, in the order of learning.
        folder: the run directory.
        adapters: the scores with an adapter for each job.
        full: the scores with sequential full fine-tuning; None if it was not asked for.
        routing: the routing, or the reason why it was not measured; None if it was not asked for.
        unreported: why a report could not be made; empty if all were.
    """

    config: ContinualConfig
    jobs: list[JobConfig]
    folder: Path
    adapters: LearningSequence
    full: LearningSequence | None = None
    routing: Routing | str | None = None
    unreported: str = ""
