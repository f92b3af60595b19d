"""Learns jobs one after another on one encoder, and measures each again after every later one.

    matrix[i][j]    the score of job j on its test split after job i; none for i < j, as job j has
                    no head yet

Adapters: each job adds an adapter of its own to the frozen encoder, and is measured with this
adapter and its own head.
Contrast: full fine-tuning passes the encoder's weights from job to job, and each head stays as it
was after its own job.
Every cell of a matrix holds a hash of all outputs of the head and the task on the split. So it is
measured, and not assumed, that adapters forget nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from mmadapters.files import write_text

from ... import artifact
from ...config.schema import SPLITS, JobConfig, Split
from ...core.capabilities import Calibration, capability
from ...core.model import TaskModel
from ...core.rows import Record, Rows
from ...core.task import Task
from ...data.load import load_splits
from ...registry import task_class
from ...reports.results import Run
from ..ending import (
    device_of,
    evaluate_split,
    measured_split,
    process_state,
    reported,
    without_test,
)
from ..folder import METRICS, RunFolder, make_folder, run_folder
from ..metrics import environment
from ..model import build_model, make_encoder, rows_to_fit, sizes
from ..rehearsal import random_states_kept, rehearse, tried_out
from ..run import begin, chosen, end, train_model
from . import router
from .config import ContinualConfig, contrast_jobs, read_jobs
from .report import write_continual_report
from .results import Continual, LearningSequence, Routing, ScoreCell

Splits = dict[Split, Rows]


def learn(
    config: ContinualConfig,
    *,
    overwrite: bool = False,
    quiet: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Continual:
    """Learns all jobs, with adapters and as contrast, and writes the run directory.

    Args:
        overwrite: replace an earlier run in the run directory.
        quiet: no progress bar.
        tell: is called with a line of text before each job.

    Raises:
        ValueError: the jobs, their data, the encoder or the run directory do not fit.
    """
    jobs = read_jobs(config)
    others = contrast_jobs(config, jobs) if config.contrast == "full" else []
    state = process_state(jobs[0])
    with run_folder(
        Path(config.output),
        config,
        resume=False,
        overwrite=overwrite,
        first=state.is_main_process,
    ) as folder:
        done = _learn(config, jobs, others, folder, quiet=quiet, tell=tell)
        end(folder)
        done.folder = folder.path
    return done


def _learn(
    config: ContinualConfig,
    jobs: Sequence[JobConfig],
    others: Sequence[JobConfig],
    folder: RunFolder,
    *,
    quiet: bool,
    tell: Callable[[str], None],
) -> Continual:
    state = process_state(jobs[0])
    splits = [_load(job) for job in jobs]
    learner = _Learner(
        jobs, splits, folder, quiet=quiet, tell=lambda text: tell(f"{text}, adapters")
    )
    begin(folder)
    if state.is_main_process:
        for job in [*jobs, *others]:
            make_folder(folder.inside(job.output), job)
    state.wait_for_everyone()
    learner.rehearse(jobs)
    learner.rehearse(others)
    done = Continual(config, list(jobs), folder.place, learner.learn())
    done.unreported += learner.unreported
    if config.routing:
        done.routing = learner.route()
    if others:
        del learner  # frees its encoder, so that only one is in memory
        contrast = _Learner(
            others, splits, folder, quiet=quiet, tell=lambda text: tell(f"{text}, full")
        )
        done.full = contrast.learn()
        done.unreported += contrast.unreported
    if state.is_main_process:
        _write(done)
    state.wait_for_everyone()
    return done


def _load(job: JobConfig) -> Splits:
    splits = load_splits(job.data, task_class(job.task)(job).columns, SPLITS)
    if "train" not in splits:
        raise ValueError(f"{job.name}: there is no training split: name it in data.splits")
    measured_split(splits)
    return splits


class _Learner:
    """Learns jobs one after another on one encoder.

    All tasks are fitted before the first job is learned, so that wrong data of any job stops the
    run at its start.
    """

    def __init__(
        self,
        jobs: Sequence[JobConfig],
        splits: Sequence[Splits],
        folder: RunFolder,
        *,
        quiet: bool,
        tell: Callable[[str], None],
    ) -> None:
        set_seed(jobs[0].seed)
        backbone = artifact.make_backbone(jobs[0].backbone)
        self.tasks = [task_class(job.task)(job) for job in jobs]
        for task, of_task in zip(self.tasks, splits, strict=True):
            task.fit(rows_to_fit(of_task["train"]), backbone)
        self.encoder = make_encoder(backbone)
        self.models: list[TaskModel] = []
        self.records: list[list[Record]] = []
        self.unreported = ""
        self.splits, self.folder, self.quiet, self.tell = splits, folder, quiet, tell

    def learn(self) -> LearningSequence:
        """Learns all jobs and measures each after every step."""
        sequence = LearningSequence([task.config.name for task in self.tasks])
        started, before = time.perf_counter(), fingerprint(self.encoder.backbone.state_dict())
        for step, (task, splits) in enumerate(zip(self.tasks, self.splits, strict=True)):
            self.tell(f"{task.config.name}, {step + 1} of {len(self.tasks)}")
            set_seed(task.config.seed)
            self.models.append(build_model(task, self.encoder))
            place = self.folder.inside(task.config.output)
            run = train_model(
                task, self.models[-1], splits, folder=place, rehearsed=True, quiet=self.quiet
            )
            self.unreported += run.unreported
            self.records = []
            row = [self._measure(job) for job in range(step + 1)]
            sequence.cells.append([*row, *[None] * (len(self.tasks) - len(row))])
        after = fingerprint(self.encoder.backbone.state_dict())
        sequence.encoder_unchanged = after == before
        sequence.seconds = round(time.perf_counter() - started, 1)
        return sequence

    def rehearse(self, jobs: Sequence[JobConfig]) -> None:
        """Makes the dry pass of each job, with a model that is gone again afterwards.

        So an error in the last job's evaluation ends the run before the first job is learned.

        Args:
            jobs: those of the learner or, with other modes of training, those of the contrast.
        """
        for job, fitted, splits in zip(jobs, self.tasks, self.splits, strict=False):
            task = type(fitted)(job, copy.deepcopy(fitted.state))
            with random_states_kept(), tried_out(self.encoder):
                model = build_model(task, self.encoder)
                place = self.folder.inside(job.output)
                run = Run(place, task, model, facts=sizes(model, job.name))
                model.to(device_of(job))
                used = chosen(task, splits)
                capability(task, Calibration).prepare(model, without_test(used))
                rehearse(run, used)

    def _measure(self, job: int) -> ScoreCell:
        """Measures a job on its test split, with its own adapter and head; keeps the records."""
        task, model = self.tasks[job], self.models[job]
        name = task.config.name
        adapter = name if name in self.encoder.adapter_names else None
        drop = artifact.blocks_dropped(task.config)
        with self.encoder.using(adapter, drop=drop):
            cell, records = measure(task, model, self._test(job))
        self.records.append(records)
        return cell

    def _test(self, job: int) -> Rows:
        return measured_split(self.splits[job])[1]

    def route(self) -> Routing | str:
        """Routes the test pictures of all jobs, or returns why that is impossible."""
        problem = router.obstacle(self.tasks)
        if problem is not None:
            return problem
        train: list[Any] = [rows_to_fit(splits["train"]) for splits in self.splits]
        test = [self._test(job) for job in range(len(self.tasks))]
        return router.measure(self.encoder, self.tasks, train, test, self.records)


def measure(task: Task, model: TaskModel, rows: Rows) -> tuple[ScoreCell, list[Record]]:
    """Evaluates a task on rows; returns its score with the hash of all outputs, and the records."""
    with _watched(model.head) as outputs:
        result = evaluate_split(task, model, rows)
    _feed(outputs, result.records)
    scores = task.score(result.records, bootstrap=task.config.evaluation.bootstrap)
    return ScoreCell(scores[task.metric], outputs.hexdigest()), result.records


@contextmanager
def _watched(head: nn.Module) -> Iterator[Any]:
    """Yields a hash of all outputs of the head inside the block, in order."""
    sha = hashlib.sha256()
    handle = head.register_forward_hook(lambda module, args, output: _feed(sha, output))
    try:
        yield sha
    finally:
        handle.remove()


def fingerprint(value: Any) -> str:
    """Returns a hash of every bit of nested plain data, arrays and tensors."""
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
    """Returns the contents of `metrics.json`; null stands for a job that was not learned yet."""
    return {
        "name": done.config.name,
        "backbone": done.jobs[0].backbone.name,
        "seed": done.config.seed,
        "jobs": [
            {"name": job.name, "task": job.task, "metric": metric.name, "test": metric.count}
            for job, metric in zip(done.jobs, done.adapters.last, strict=True)
        ],
        "adapters": _sequence(done.adapters),
        "full": None if done.full is None else _sequence(done.full),
        "routing": _routing(done.routing),
        "environment": environment(),
    }


def _sequence(sequence: LearningSequence) -> dict[str, Any]:
    return {
        "matrix": [[None if c is None else c.metric.value for c in row] for row in sequence.cells],
        "metrics": [
            [None if c is None else c.metric.to_dict() for c in row] for row in sequence.cells
        ],
        "outputs": [[None if c is None else c.outputs for c in row] for row in sequence.cells],
        "last": {
            name: metric.to_dict()
            for name, metric in zip(sequence.jobs, sequence.last, strict=True)
        },
        "average": sequence.average,
        "forgetting": sequence.forgetting,
        "backward_transfer": sequence.backward_transfer,
        "outputs_unchanged": sequence.unchanged,
        "encoder_unchanged": sequence.encoder_unchanged,
        "seconds": sequence.seconds,
    }


def _routing(routing: Routing | str | None) -> dict[str, Any] | None:
    if routing is None:
        return None
    if isinstance(routing, str):
        return {"skipped": routing}
    return {**dataclasses.asdict(routing), "accuracy": routing.accuracy}


def _write(done: Continual) -> None:
    metrics = metrics_of(done)
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    write_text(done.folder / METRICS, text + "\n")
    done.unreported += reported(
        lambda: write_continual_report(done, metrics["environment"]), Path(done.config.output)
    )
