"""A job from its config to a run directory (see `folder`): training, evaluation and the files."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from mmadapters.files import write_text

from .. import artifact
from ..config.schema import SPLITS, JobConfig, Split
from ..core.capabilities import Calibration, capability
from ..core.device import default_device
from ..core.model import TaskModel
from ..core.results import Scores
from ..core.rows import Record, Rows
from ..core.task import Task
from ..data.load import load_splits
from ..data.stream import Stream
from ..data.workers import readers
from ..registry import task_class
from ..reports.results import Run
from ..reports.run_report import write_run_report
from ..training.checkpoint import CHECKPOINTS
from ..training.evaluate import Evaluation, evaluate
from ..training.trainer import TaskTrainer
from .folder import METRICS, REPORT, RunFolder, run_folder
from .metrics import metrics_of
from .model import adapter_config, make_model, rows_to_fit, sizes
from .preview import look_at_data


def train(
    config: JobConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Run:
    """Trains and evaluates a job and writes its run directory.

    Every process of a group calls it; the first one writes.

    Args:
        resume: go on from the last complete checkpoint of the run directory.
        overwrite: replace an earlier run in the run directory.
        quiet: no progress bar.

    Raises:
        ValueError: the data, the encoder or the run directory does not fit the config.
    """
    state = process_state(config)
    with run_folder(
        Path(config.output),
        config,
        resume=resume,
        overwrite=overwrite,
        first=state.is_main_process,
    ) as folder:
        splits = load_splits(config.data, task_class(config.task)(config).columns, SPLITS)
        task, model = make_model(config, rows_to_fit(splits.get("train")))
        begin(folder)
        run = train_model(
            task, model, splits, folder=folder.place, checkpoint=folder.checkpoint, quiet=quiet
        )
        end(folder)
        run.folder = folder.path
    return run


def begin(folder: RunFolder) -> None:
    """Makes the directory of a run; every process calls it, and the first one writes."""
    state = PartialState()
    state.wait_for_everyone()  # every process has looked before the first one writes
    if state.is_main_process:
        folder.write()
    state.wait_for_everyone()


def end(folder: RunFolder) -> None:
    """Puts a finished run in its place; every process calls it, and the first one writes."""
    state = PartialState()
    if state.is_main_process:
        folder.finish()
    state.wait_for_everyone()


def train_model(
    task: Task,
    model: TaskModel,
    splits: dict[Split, Rows],
    *,
    folder: Path | None = None,
    checkpoint: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Trains and evaluates a model that is already built.

    Args:
        splits: the rows by split.
        folder: the directory that is written to; by default the config's `output`.
        checkpoint: the checkpoint from which training goes on.
        quiet: no progress bar.

    Raises:
        ValueError: there is no split to train on, or none to evaluate.
    """
    config = task.config
    first = process_state(config).is_main_process
    run = Run(folder or Path(config.output), task, model, facts=sizes(model, config.name))
    model.to(device_of(config))
    splits = chosen(task, splits)
    look_at_data(run, splits)
    if config.evaluation.before:
        name, rows = measured_split(splits)
        with _untrained(run):
            run.before = scored(run, evaluate_split(task, model, rows), name)
    capability(task, Calibration).prepare(model, without_test(splits))
    if any(parameter.requires_grad for parameter in model.parameters()):
        _fit(run, splits, checkpoint, quiet=quiet or not first)
    finish(run, splits)
    return run


def chosen(task: Task, splits: dict[Split, Rows]) -> dict[Split, Rows]:
    """Returns the splits with only those training rows that the task uses."""
    if "train" not in splits or isinstance(splits["train"], Stream):
        return splits
    return {**splits, "train": capability(task, Calibration).choose(splits["train"])}


def without_test(splits: dict[Split, Rows]) -> dict[Split, Rows]:
    """Returns the splits that a task may read before it is measured."""
    return {name: rows for name, rows in splits.items() if name != "test"}


def finish(run: Run, splits: dict[Split, Rows]) -> None:
    """Evaluates a trained model and writes the run directory; every process calls it."""
    task, model, encoder = run.task, run.model, run.model.encoder
    state = process_state(task.config)
    calibration = capability(task, Calibration)
    run.facts |= calibration.calibrate(model.eval(), without_test(splits))
    model.eval()  # the report's pictures need the model too, and must not change its statistics
    with encoder.using(encoder.active_adapters, drop=artifact.blocks_dropped(task.config)):
        records = _evaluate(run, splits)
        if state.is_main_process:
            _write(run, splits, records)
    state.wait_for_everyone()


@contextlib.contextmanager
def processes(config: JobConfig) -> Iterator[None]:
    """Joins the process group of torchrun or accelerate launch, and leaves it after the block."""
    state = process_state(config)
    yield
    state.wait_for_everyone()
    state.destroy_process_group()


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
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Evaluates a split with the batch size, workers and precision of the config.

    Args:
        progress: is called after each batch with the number of rows done.
    """
    trainer = task.config.trainer
    return evaluate(
        task,
        model,
        rows,
        batch_size=trainer.eval_batch_size or trainer.batch_size,
        workers=readers(trainer),
        precision=trainer.precision,
        progress=progress,
    )


def measured_split(splits: dict[Split, Rows]) -> tuple[Split, Rows]:
    """Returns the split of a run's headline figure: test, or validation without a test.

    Raises:
        ValueError: there is neither.
    """
    for name in ("test", "validation"):
        if name in splits:
            return name, splits[name]
    raise ValueError(
        "there is neither a test nor a validation split to evaluate: give data.fractions"
    )


def _evaluate(run: Run, splits: dict[Split, Rows]) -> dict[Split, list[Record]]:
    records: dict[Split, list[Record]] = {}
    measured: tuple[Split, ...] = ("validation", "test")
    for name in measured:
        if name in splits:
            with run.model.encoder.recorded_fusion() as attention:
                result = evaluate_split(run.task, run.model, splits[name])
            run.attention = {
                fusion: {site: weights.tolist() for site, weights in sites.items()}
                for fusion, sites in attention.items()
            }
            run.scores[name] = scored(run, result, name)
            records[name] = result.records
    return records


@contextlib.contextmanager
def _untrained(run: Run) -> Iterator[None]:
    """Inside the block the encoder is as before training.

    The adapter of this run is inactive there if a fresh one changes the outputs.
    """
    config, encoder = run.task.config, run.model.encoder
    adapter = adapter_config(config)
    if adapter is None or adapter.identity or config.composition is not None:
        yield
        return
    with encoder.using(None):
        yield


def scored(run: Run, result: Evaluation, split: str) -> Scores:
    """Returns the scores of an evaluated split, and adds its bad rows to the run."""
    run.problems[split] = result.problems
    return run.task.score(result.records, bootstrap=run.task.config.evaluation.bootstrap)


def _fit(run: Run, splits: dict[Split, Rows], checkpoint: Path | None, *, quiet: bool) -> None:
    if "train" not in splits:
        raise ValueError("there is no training split: name it in data.splits")
    # An evaluation before training must not change the random numbers of training.
    set_seed(run.task.config.seed)
    trainer = TaskTrainer(
        run.task,
        run.model,
        train=splits["train"],
        validation=splits.get("validation"),
        folder=run.folder,
        quiet=quiet,
    )
    run.facts |= trainer.fit(checkpoint)
    run.history = trainer.state.log_history
    run.problems["train"] = list(trainer.problems.values())


def _write(run: Run, splits: dict[Split, Rows], records: dict[Split, list[Record]]) -> None:
    config = run.task.config
    metrics = metrics_of(run)
    artifact.save(
        run.folder / artifact.FOLDER,
        run.task,
        run.model,
        mode=config.trainer.mode,
        metrics=metrics["splits"],
    )
    metrics["adapter_bytes"] = sum(
        file.stat().st_size for file in (run.folder / artifact.FOLDER).iterdir()
    )
    run.facts["adapter_bytes"] = metrics["adapter_bytes"]
    write_text(run.folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    write_run_report(
        run.folder / REPORT,
        run,
        splits=splits,
        records=records,
        environment=metrics["environment"],
    )
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
