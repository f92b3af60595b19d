"""Jobs learned one after another on one encoder, and what each is worth after every later one.

    matrix[i][j]    the score of job j on its test split after job i; none for i < j, which has no
                    head yet

Adapters: each job adds its own to the frozen encoder, and is measured with it and its own head.
Contrast: the encoder's weights go from job to job as they are, and each head stays what it was
after its own job. That adapters forget nothing is measured: every cell holds a hash of all that the
head and the task gave for the split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from mmadapters.files import write_text

from ... import artifact
from ...config.schema import SPLITS, JobConfig, Split
from ...core.metrics import Metric
from ...core.task import Record, Rows, Task, TaskModel
from ...data.load import load_splits
from ...registry import task_class
from ..run import (
    CONFIG,
    METRICS,
    build_model,
    check_folder,
    environment,
    evaluate_split,
    make_encoder,
    make_folder,
    measured_split,
    process_state,
    rows_to_fit,
    train_model,
)
from . import router
from .config import ContinualConfig, contrast_jobs, read_jobs
from .router import Routing

Splits = dict[Split, Rows]


@dataclass(frozen=True)
class Cell:
    """A job after a step: its deciding metric, and a hash of all outputs on the split."""

    metric: Metric
    outputs: str


@dataclass
class Chain:
    """One way of learning the jobs in turn.

    Attributes:
        jobs: names, in the order of learning.
        cells: (steps, jobs); None for a job that was not learned yet.
        encoder_unchanged: whether the encoder's tensors have the bits that they came with.
        seconds: in all, for training and evaluation.
    """

    jobs: list[str]
    cells: list[list[Cell | None]] = field(default_factory=list)
    encoder_unchanged: bool = True
    seconds: float = 0.0

    def history(self, job: int) -> list[Cell]:
        """A job from its own step on."""
        return [row[job] for row in self.cells if row[job] is not None]  # type: ignore[misc]

    @property
    def matrix(self) -> list[list[float]]:
        """(steps, jobs) scores, NaN where there is none."""
        return [[math.nan if c is None else c.metric.value for c in row] for row in self.cells]

    @property
    def last(self) -> list[Metric]:
        """Every job after the last step."""
        return [self.history(job)[-1].metric for job in range(len(self.jobs))]

    @property
    def average(self) -> float | None:
        """The mean score after the last step; None where metrics are no shares or point both ways
        (Lopez-Paz & Ranzato 2017, ACC)."""
        last = self.last
        alike = {(metric.unit, metric.greater_is_better) for metric in last}
        if len(alike) > 1 or last[0].unit != "%":
            return None
        return sum(metric.value for metric in last) / len(last)

    @property
    def forgetting(self) -> dict[str, float]:
        """Of each job but the last: its best score in earlier steps minus that after the last step
        (Chaudhry et al. 2018, f_j^k). Above 0 is worse, whichever way the metric points."""
        found = {}
        for job, name in enumerate(self.jobs[:-1]):
            *earlier, last = [_upwards(cell.metric) for cell in self.history(job)]
            found[name] = max(earlier) - last
        return found

    @property
    def backward_transfer(self) -> float:
        """The mean over all jobs but the last of the score after the last step minus that after
        their own (Lopez-Paz & Ranzato 2017, BWT). Below 0 is forgetting."""
        gains = []
        for job in range(len(self.jobs) - 1):
            own, *_, last = [_upwards(cell.metric) for cell in self.history(job)]
            gains.append(last - own)
        return sum(gains) / len(gains)

    @property
    def unchanged(self) -> dict[str, bool]:
        """Of each job but the last: whether later steps left all outputs bit for bit the same."""
        return {
            name: len({cell.outputs for cell in self.history(job)}) == 1
            for job, name in enumerate(self.jobs[:-1])
        }


def _upwards(metric: Metric) -> float:
    return metric.value if metric.greater_is_better else -metric.value


@dataclass
class Continual:
    """What came out. `routing`: figures, or why there are none; None where not asked for."""

    config: ContinualConfig
    jobs: list[JobConfig]
    folder: Path
    adapters: Chain
    full: Chain | None = None
    routing: Routing | str | None = None


def learn(
    config: ContinualConfig,
    *,
    overwrite: bool = False,
    quiet: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Continual:
    """Learns all jobs, with adapters and in contrast, and writes the run directory.

    Args:
        tell: is given a line before each job.

    Raises:
        ValueError: the jobs, their data, the encoder or the run directory do not fit.
    """
    jobs = read_jobs(config)
    others = contrast_jobs(config, jobs) if config.contrast == "full" else []
    folder = Path(config.output)
    state = process_state(jobs[0])
    _check_folders(folder, config, [*jobs, *others], overwrite=overwrite)
    state.wait_for_everyone()  # every process has looked before the first one writes
    if state.is_main_process:
        make_folder(folder, config)
        for job in [*jobs, *others]:
            make_folder(Path(job.output), job)
    state.wait_for_everyone()
    splits = [_load(job) for job in jobs]
    learner = _Learner(jobs, splits, quiet=quiet, tell=lambda text: tell(f"{text}, adapters"))
    done = Continual(config, jobs, folder, learner.learn())
    if config.routing:
        done.routing = learner.route()
    if others:
        del learner  # one encoder in memory at a time
        contrast = _Learner(others, splits, quiet=quiet, tell=lambda text: tell(f"{text}, full"))
        done.full = contrast.learn()
    if state.is_main_process:
        _write(done)
    state.wait_for_everyone()
    return done


def _check_folders(
    folder: Path, config: ContinualConfig, jobs: Sequence[JobConfig], *, overwrite: bool
) -> None:
    if (folder / CONFIG).is_file() and not overwrite:
        raise ValueError(
            f"{folder} holds a run already: choose another output=…, or pass --overwrite to "
            "replace it"
        )
    check_folder(folder, config, resume=False, overwrite=overwrite)
    for job in jobs:
        check_folder(Path(job.output), job, resume=False, overwrite=overwrite)


def _load(job: JobConfig) -> Splits:
    splits = load_splits(job.data, task_class(job.task)(job).columns, SPLITS)
    if "train" not in splits:
        raise ValueError(f"{job.name}: there is no training split: name it in data.splits")
    measured_split(splits)
    return splits


class _Learner:
    """Jobs in turn on one encoder. All are fitted before the first is learned, so that what is
    wrong with any data is told at once."""

    def __init__(
        self,
        jobs: Sequence[JobConfig],
        splits: Sequence[Splits],
        *,
        quiet: bool,
        tell: Callable[[str], None],
    ) -> None:
        set_seed(jobs[0].seed)
        backbone = artifact.make_backbone(jobs[0].backbone)
        self.tasks = [task_class(job.task)(job) for job in jobs]
        for task, own in zip(self.tasks, splits, strict=True):
            task.fit(rows_to_fit(own["train"]), backbone)
        self.encoder = make_encoder(backbone)
        self.models: list[TaskModel] = []
        self.records: list[list[Record]] = []
        self.splits, self.quiet, self.tell = splits, quiet, tell

    def learn(self) -> Chain:
        chain = Chain([task.config.name for task in self.tasks])
        started, before = time.perf_counter(), fingerprint(self.encoder.backbone.state_dict())
        for step, (task, splits) in enumerate(zip(self.tasks, self.splits, strict=True)):
            self.tell(f"{task.config.name}, {step + 1} of {len(self.tasks)}")
            set_seed(task.config.seed)
            self.models.append(build_model(task, self.encoder))
            train_model(task, self.models[-1], splits, quiet=self.quiet)
            self.records = []
            row = [self._measure(job) for job in range(step + 1)]
            chain.cells.append([*row, *[None] * (len(self.tasks) - len(row))])
        after = fingerprint(self.encoder.backbone.state_dict())
        chain.encoder_unchanged = after == before
        chain.seconds = round(time.perf_counter() - started, 1)
        return chain

    def _measure(self, job: int) -> Cell:
        """A job on its test split, with its own adapter and head; keeps the records."""
        task, model = self.tasks[job], self.models[job]
        name = task.config.name
        own = name if name in self.encoder.adapter_names else None
        drop = artifact.blocks_dropped(task.config)
        with self.encoder.using(own, drop=drop):
            cell, records = measure(task, model, self._test(job))
        self.records.append(records)
        return cell

    def _test(self, job: int) -> Rows:
        return measured_split(self.splits[job])[1]

    def route(self) -> Routing | str:
        """How well the jobs' test pictures find their adapters, or why that is not measured."""
        problem = router.obstacle(self.tasks)
        if problem is not None:
            return problem
        train: list[Any] = [rows_to_fit(splits["train"]) for splits in self.splits]
        test = [self._test(job) for job in range(len(self.tasks))]
        return router.measure(self.encoder, self.tasks, train, test, self.records)


def measure(task: Task, model: TaskModel, rows: Rows) -> tuple[Cell, list[Record]]:
    """A job's score and outputs on a split, and the records that they are of."""
    with _watched(model.head) as outputs:
        found = evaluate_split(task, model, rows)
    _feed(outputs, found.records)
    scores = task.score(found.records, bootstrap=task.config.evaluation.bootstrap)
    return Cell(scores[task.metric], outputs.hexdigest()), found.records


@contextmanager
def _watched(head: nn.Module) -> Iterator[Any]:
    """A hash of all that the head gives inside the block, in order."""
    sha = hashlib.sha256()
    handle = head.register_forward_hook(lambda module, args, output: _feed(sha, output))
    try:
        yield sha
    finally:
        handle.remove()


def fingerprint(value: Any) -> str:
    """A hash of every bit of nested plain data, arrays and tensors."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        sha.update(f"{value.dtype.str}{value.shape}".encode())
        sha.update(value.tobytes())
    elif isinstance(value, Mapping):
        _feed(sha, [part for item in value.items() for part in item])
    elif isinstance(value, (list, tuple, np.ndarray)):
        sha.update(f"[{len(value)}".encode())
        for part in value:
            _feed(sha, part)
    elif dataclasses.is_dataclass(value):
        _feed(sha, [getattr(value, part.name) for part in dataclasses.fields(value)])
    else:
        sha.update(f"{type(value).__name__}{value!r};".encode())


def metrics_of(done: Continual) -> dict[str, Any]:
    """What `metrics.json` says; null for a job that was not learned yet."""
    return {
        "name": done.config.name,
        "backbone": done.jobs[0].backbone.name,
        "seed": done.config.seed,
        "jobs": [
            {"name": job.name, "task": job.task, "metric": metric.name, "test": metric.count}
            for job, metric in zip(done.jobs, done.adapters.last, strict=True)
        ],
        "adapters": _chain(done.adapters),
        "full": None if done.full is None else _chain(done.full),
        "routing": _routing(done.routing),
        "environment": environment(),
    }


def _chain(chain: Chain) -> dict[str, Any]:
    return {
        "matrix": [[None if c is None else c.metric.value for c in row] for row in chain.cells],
        "outputs": [[None if c is None else c.outputs for c in row] for row in chain.cells],
        "last": {
            name: metric.to_dict() for name, metric in zip(chain.jobs, chain.last, strict=True)
        },
        "average": chain.average,
        "forgetting": chain.forgetting,
        "backward_transfer": chain.backward_transfer,
        "outputs_unchanged": chain.unchanged,
        "encoder_unchanged": chain.encoder_unchanged,
        "seconds": chain.seconds,
    }


def _routing(found: Routing | str | None) -> dict[str, Any] | None:
    if found is None:
        return None
    if isinstance(found, str):
        return {"skipped": found}
    return {**dataclasses.asdict(found), "accuracy": found.accuracy}


def _write(done: Continual) -> None:
    from .report import write_continual_report

    metrics = metrics_of(done)
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    write_text(done.folder / METRICS, text + "\n")
    write_continual_report(done, metrics["environment"])
