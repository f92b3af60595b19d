"""The report of a finished run, made again: `mmadapters report`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import artifact
from ..config.file import KINDS, from_data
from ..config.schema import SPLITS
from ..core.errors import Problem
from ..core.findings import Finding
from ..core.metrics import Metric
from ..core.results import Scores
from ..registry import task_class
from ..reports.results import Run
from ..reports.run_report import write_run_report
from ..training.evaluate import check_groups
from .continual.config import FULL, ContinualConfig
from .continual.report import write_continual_report
from .continual.results import Continual, LearningSequence, Routing, ScoreCell
from .ending import MEASURED, evaluate_splits
from .evaluation import load_saved
from .folder import CONFIG, METRICS, REPORT
from .lock import locked
from .multitask.config import MultitaskConfig
from .multitask.report import write_multitask_report
from .multitask.results import Multitask


def report_again(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Path:
    """Makes the report of a finished run from its adapter, its figures and its data.

    The validation and the test split are evaluated again, because the pictures need every answer.
    A run of several jobs gets its own page, and each job a report if it has none.

    Args:
        path: the run directory.
        overrides: changes to the saved job (evaluation.pictures=24).

    Returns:
        the path of the report.

    Raises:
        FileNotFoundError, ValueError: it is no directory of a finished run, its data or its adapter
            cannot be opened, or an override does not fit.
    """
    folder = Path(path)
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no directory of a finished run: it has no {name}")
    config = _read_yaml(folder / CONFIG)
    metrics = json.loads((folder / METRICS).read_text("utf-8"))
    several = [KINDS[kind] for kind in ("multitask", "continual") if KINDS[kind] in config]
    if KINDS["job"] not in config and not several:
        raise ValueError(f"{folder} holds no run of train, multitask or continual")
    if several and overrides:
        raise ValueError(
            f"{folder} holds several jobs: give changes with the directory of one of them"
        )
    with locked(folder):
        for job in _jobs(folder, metrics) if several else [folder]:
            if not several or not (job / REPORT).is_file():
                _report_job(job, json.loads((job / METRICS).read_text("utf-8")), overrides)
        if KINDS["multitask"] in several:
            _report_multitask(folder, config, metrics)
        elif several:
            _report_continual(folder, config, metrics)
    return folder / REPORT


def _jobs(folder: Path, metrics: Mapping[str, Any]) -> list[Path]:
    """Returns the run directories of the jobs in a run of several."""
    if "tasks" in metrics:
        return [folder / name for name in metrics["tasks"]]
    names = [job["name"] for job in metrics["jobs"]]
    full = [] if metrics["full"] is None else [folder / FULL / name for name in names]
    return [folder / name for name in names] + full


def _report_job(folder: Path, metrics: Mapping[str, Any], overrides: Sequence[str]) -> None:
    opened = artifact.open_directory(folder, overrides=overrides)
    task = opened.task
    splits = load_saved(task, SPLITS)
    check_groups(task, {name: splits[name] for name in MEASURED if name in splits})
    run = _run(folder, task, metrics)
    run.model = opened.model
    run.scores = {}
    records = evaluate_splits(run, splits)
    write_run_report(
        folder / REPORT,
        run,
        splits=splits,
        records=records,
        environment=metrics["environment"],
    )


def _run(folder: Path, task: Any, metrics: Mapping[str, Any]) -> Run:
    """Returns a run with the figures of its `metrics.json`, without a model."""
    model: Any = None
    return Run(
        folder,
        task,
        model,
        scores={split: _scores(figures) for split, figures in metrics["splits"].items()},
        before=None if metrics["before"] is None else _scores(metrics["before"]),
        problems={
            split: [Problem(*row) for row in rows]
            for split, rows in metrics.get("bad_rows", {}).items()
        },
        history=metrics.get("log", []),
        facts=dict(metrics),
        findings=[Finding(**finding) for finding in metrics.get("findings", [])],
        attention=metrics.get("fusion_attention", {}),
    )


def _scores(figures: Mapping[str, Any]) -> Scores:
    def metrics(named: Mapping[str, Any]) -> list[Metric]:
        return [Metric(**fields) for fields in named.values()]

    return Scores(
        metrics(figures["metrics"]),
        {
            column: {value: metrics(named) for value, named in values.items()}
            for column, values in figures["groups"].items()
        },
    )


def _report_multitask(folder: Path, config: Any, metrics: Mapping[str, Any]) -> None:
    runs = {}
    for name in metrics["tasks"]:
        figures = json.loads((folder / name / METRICS).read_text("utf-8"))
        job = from_data(_read_yaml(folder / name / CONFIG), source=str(folder / name / CONFIG))
        runs[name] = _run(folder / name, task_class(job.task)(job), figures)
    done = Multitask(
        MultitaskConfig.model_validate(config),
        folder,
        runs,
        steps={name: part["steps"] for name, part in metrics["tasks"].items()},
        history=metrics.get("log", []),
        facts=dict(metrics),
    )
    write_multitask_report(done, metrics["environment"])


def _report_continual(folder: Path, config: Any, metrics: Mapping[str, Any]) -> None:
    names = [job["name"] for job in metrics["jobs"]]
    jobs = [
        from_data(_read_yaml(folder / name / CONFIG), source=str(folder / name / CONFIG))
        for name in names
    ]
    routing = metrics["routing"]
    if routing is not None:
        fields = {name: value for name, value in routing.items() if name != "accuracy"}
        routing = fields.get("skipped") or Routing(**fields)
    done = Continual(
        ContinualConfig.model_validate(config),
        jobs,
        folder,
        _sequence(names, metrics["adapters"]),
        None if metrics["full"] is None else _sequence(names, metrics["full"]),
        routing,
    )
    write_continual_report(done, metrics["environment"])


def _sequence(names: list[str], figures: Mapping[str, Any]) -> LearningSequence:
    if "metrics" not in figures:
        raise ValueError("this run was made by a version that did not keep the figures of its page")
    cells = [
        [
            None if fields is None else ScoreCell(Metric(**fields), outputs)
            for fields, outputs in zip(*row, strict=True)
        ]
        for row in zip(figures["metrics"], figures["outputs"], strict=True)
    ]
    return LearningSequence(names, cells, figures["encoder_unchanged"], figures["seconds"])


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))
