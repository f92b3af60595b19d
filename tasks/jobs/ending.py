"""The end of a run: a trained model is evaluated, saved and reported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from mmadapters.errors import first_line
from mmadapters.files import write_text

from .. import artifact
from ..config.environment import masked
from ..config.schema import JobConfig, Split
from ..core.capabilities import Calibration, capability
from ..core.device import default_device
from ..core.model import TaskModel
from ..core.results import Scores
from ..core.rows import Record, Rows
from ..core.task import Task
from ..data.workers import readers
from ..reports.console import plain
from ..reports.results import Run
from ..reports.run_report import write_run_report
from ..training.checkpoint import CHECKPOINTS
from ..training.evaluate import Evaluation, evaluate
from .folder import METRICS, REPORT
from .metrics import metrics_of

MEASURED: tuple[Split, ...] = ("validation", "test")  # the splits that a run is evaluated on


def finish(run: Run, splits: Mapping[Split, Rows], *, rehearsal: bool = False) -> None:
    """Evaluates a trained model and writes the run directory; every process calls it.

    A report that cannot be made costs nothing else: the reason goes to `run.unreported`.

    Args:
        rehearsal: whether the model is not trained yet. Its head is not calibrated then, the
            weights of the encoder are not written, and a report that cannot be made is an error.
    """
    task, model, encoder = run.task, run.model, run.model.encoder
    state = process_state(task.config)
    if not rehearsal:
        calibration = capability(task, Calibration)
        run.facts |= calibration.calibrate(model.eval(), without_test(splits))
    model.eval()  # the report's pictures need the model too, and must not change its statistics
    with encoder.using(encoder.active_adapters, drop=artifact.blocks_dropped(task.config)):
        records = evaluate_splits(run, splits, workers=0 if rehearsal else None)
        if state.is_main_process:
            _write(run, splits, records, rehearsal=rehearsal)
    state.wait_for_everyone()


def without_test(splits: Mapping[Split, Rows]) -> dict[Split, Rows]:
    """Returns the splits that a task may read before it is measured."""
    return {name: rows for name, rows in splits.items() if name != "test"}


def process_state(config: JobConfig) -> PartialState:
    """Returns the process group of this process; makes it at the first call."""
    return PartialState(cpu=device_of(config) == "cpu")


def device_of(config: JobConfig) -> str:
    """Returns the type of the device that a job runs on."""
    return "cpu" if config.trainer.device == "cpu" else default_device()


def evaluate_split(
    task: Task,
    model: TaskModel,
    rows: Rows,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Evaluates a split with the batch size, workers and precision of the config.

    Args:
        workers: another number of workers.
        progress: is called after each batch with the number of rows done.
    """
    trainer = task.config.trainer
    return evaluate(
        task,
        model,
        rows,
        batch_size=trainer.eval_batch_size or trainer.batch_size,
        workers=readers(trainer) if workers is None else workers,
        precision=trainer.precision,
        progress=progress,
    )


def measured_split(splits: Mapping[Split, Rows]) -> tuple[Split, Rows]:
    """Returns the split of a run's headline figure: test, or validation without a test.

    Raises:
        ValueError: there is neither.
    """
    for name in reversed(MEASURED):
        if name in splits:
            return name, splits[name]
    raise ValueError(
        "there is neither a test nor a validation split to evaluate: give data.fractions"
    )


def evaluate_splits(
    run: Run, splits: Mapping[Split, Rows], *, workers: int | None = None
) -> dict[Split, list[Record]]:
    """Evaluates the validation and the test split, and adds their scores to the run.

    Args:
        workers: another number of workers than that of the config.

    Returns:
        the records by split.
    """
    records: dict[Split, list[Record]] = {}
    for name in MEASURED:
        if name in splits:
            with run.model.encoder.recorded_fusion() as attention:
                result = evaluate_split(run.task, run.model, splits[name], workers=workers)
            run.attention = {
                fusion: {site: weights.tolist() for site, weights in sites.items()}
                for fusion, sites in attention.items()
            }
            run.scores[name] = scored(run, result, name)
            records[name] = result.records
    return records


def scored(run: Run, result: Evaluation, split: str) -> Scores:
    """Returns the scores of an evaluated split, and adds its bad rows to the run."""
    run.problems[split] = result.problems
    return run.task.score(result.records, bootstrap=run.task.config.evaluation.bootstrap)


def _write(
    run: Run, splits: Mapping[Split, Rows], records: dict[Split, list[Record]], *, rehearsal: bool
) -> None:
    config = run.task.config
    _mask(run)
    metrics = metrics_of(run)
    artifact.save(
        run.folder / artifact.FOLDER,
        run.task,
        run.model,
        mode=config.trainer.mode,
        metrics=metrics["splits"],
        whole=not rehearsal,
    )
    metrics["adapter_bytes"] = sum(
        file.stat().st_size for file in (run.folder / artifact.FOLDER).iterdir()
    )
    run.facts["adapter_bytes"] = metrics["adapter_bytes"]
    write_text(run.folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")

    def report() -> None:
        write_run_report(
            run.folder / REPORT,
            run,
            splits=splits,
            records=records,
            environment=metrics["environment"],
        )

    if rehearsal:
        report()
    else:
        run.unreported = reported(report, Path(config.output))
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)


def _mask(run: Run) -> None:
    """Takes the values of environment variables out of what is said about the data."""
    values = run.task.config.environment
    if not values:
        return
    for split, problems in run.problems.items():
        run.problems[split] = [
            dataclasses.replace(problem, reason=masked(problem.reason, values))
            for problem in problems
        ]
    run.findings = [
        dataclasses.replace(
            finding,
            sentence=masked(finding.sentence, values),
            remedy=masked(finding.remedy, values),
        )
        for finding in run.findings
    ]


def reported(write: Callable[[], None], folder: Path) -> str:
    """Writes a report; if that fails, prints the reason to the standard error and returns it.

    Args:
        write: writes the report.
        folder: the run directory, for the message.
    """
    try:
        write()
    except Exception as error:  # whatever it is, the figures and the adapter are kept
        reason = first_line(error) or type(error).__name__
        text = (
            f"the report could not be made ({reason}); metrics and adapters are saved, and "
            f"`mmadapters report {folder}` makes it again"
        )
        Console(stderr=True).print(f"[red]error:[/] {plain(text)}", highlight=False)
        return reason
    return ""
