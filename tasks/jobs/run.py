"""A job from its config to a run directory (see `folder`): training, evaluation and the files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from ..config.schema import SPLITS, JobConfig, Split
from ..core.capabilities import Calibration, capability
from ..core.model import TaskModel
from ..core.rows import Rows
from ..core.task import Task
from ..data.load import load_splits
from ..data.stream import Stream
from ..registry import task_class
from ..reports.results import Run
from ..training.trainer import TaskTrainer
from .ending import (
    device_of,
    evaluate_split,
    finish,
    measured_split,
    process_state,
    scored,
    without_test,
)
from .folder import RunFolder, run_folder
from .model import adapter_config, make_model, rows_to_fit, sizes
from .preview import look_at_data
from .rehearsal import rehearse


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
    rehearsed: bool = False,
    quiet: bool = False,
) -> Run:
    """Trains and evaluates a model that is already built.

    Args:
        splits: the rows by split.
        folder: the directory that is written to; by default the config's `output`.
        checkpoint: the checkpoint from which training goes on.
        rehearsed: whether the dry pass before the first step was made already.
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
    if not rehearsed:
        rehearse(run, splits)
    if any(parameter.requires_grad for parameter in model.parameters()):
        _fit(run, splits, checkpoint, quiet=quiet or not first)
    finish(run, splits)
    return run


def chosen(task: Task, splits: dict[Split, Rows]) -> dict[Split, Rows]:
    """Returns the splits with only those training rows that the task uses."""
    if "train" not in splits or isinstance(splits["train"], Stream):
        return splits
    return {**splits, "train": capability(task, Calibration).choose(splits["train"])}


@contextlib.contextmanager
def processes(config: JobConfig) -> Iterator[None]:
    """Joins the process group of torchrun or accelerate launch, and leaves it after the block."""
    state = process_state(config)
    yield
    state.wait_for_everyone()
    state.destroy_process_group()


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
