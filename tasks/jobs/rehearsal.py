"""A dry pass before the first training step: evaluation, saving and report with two rows.

A group that does not exist, a metric or a picture that fails, a disk that is full: each of them
would end a run after its training. The dry pass meets them first. It leaves no file and does not
change the training: random states, modes and switched adapters are afterwards as they were.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mmadapters import AdapterModel

from ..config.schema import LOSS, Split
from ..core.errors import BadRow, Problem, refuse
from ..core.model import TaskModel
from ..core.rows import Rows
from ..core.task import Task
from ..data.examples import seeded_example
from ..reports.results import Run
from ..training.evaluate import check_groups, mean_loss
from .ending import MEASURED, finish, process_state

PLACE = ".rehearsal.tmp"  # the folder in the run directory that the dry pass writes to
ROWS = 2  # that are evaluated of each split
SEARCHED = 16  # the first rows of a split, among which the good ones are


def rehearse(run: Run, splits: Mapping[Split, Rows]) -> None:
    """Evaluates, saves and reports an untrained model with a few rows; every process calls it.

    Args:
        run: with the model as it will be trained, and the directory that will be written to.
        splits: all rows by split.

    Raises:
        ValueError, OSError, …: whatever would end the run after its training.
    """
    task, folder = run.task, run.folder
    check_groups(task, {name: splits[name] for name in MEASURED if name in splits})
    check_drop(task, run.model.encoder)
    few: dict[Split, Any] = {
        name: few_rows(task, splits[name]) for name in MEASURED & splits.keys()
    }
    few = {name: rows for name, rows in few.items() if rows is not None}
    if not few:
        return
    first = process_state(task.config).is_main_process
    there = folder.exists()
    trial = Run(folder / PLACE, task, run.model, facts=dict(run.facts), findings=list(run.findings))
    others = {name: rows for name, rows in splits.items() if name not in MEASURED}
    try:
        with unchanged(run.model):
            if task.deciding == LOSS and "validation" in few:
                mean_loss(task, run.model, few["validation"])
            if first:
                shutil.rmtree(trial.folder, ignore_errors=True)
            finish(trial, {**others, **few}, rehearsal=True)
    finally:
        if first:
            shutil.rmtree(trial.folder, ignore_errors=True)
            if not there:
                with contextlib.suppress(OSError):  # somebody else writes there
                    folder.rmdir()


def check_drop(task: Task, encoder: AdapterModel) -> None:
    """Checks that the encoder has as many blocks as `evaluation.adapter_drop` says.

    Raises:
        ValueError: it has fewer.
    """
    drop = task.config.evaluation.adapter_drop
    deepest = max(len(tower.blocks) for tower in encoder.sites.towers.values())
    if drop is not None and drop > deepest:
        raise ValueError(
            f"evaluation.adapter_drop is {drop}, and the deepest tower of "
            f"{task.config.backbone.name} has {deepest} blocks: give 0 to {deepest}"
        )


def few_rows(task: Task, rows: Rows) -> Rows | None:
    """Returns the first good rows of a split, or None if there are none among its first rows.

    Raises:
        DataError: a row is bad, and `data.on_error` is "refuse".
    """
    config = task.config
    good: list[int] = []
    problems: list[Problem] = []
    for number in range(min(len(rows), SEARCHED)):
        try:
            row = rows[number]
            seeded_example(task, row, number, train=False)
            if task.deciding == LOSS:
                task.unchanging_example(row)
        except BadRow as error:
            problems.append(Problem(number, str(error)))
            continue
        good.append(number)
        if len(good) == ROWS:
            break
    refuse(problems, on_error=config.data.on_error)
    chosen: Any = rows
    return chosen.select(good) if good else None


@contextlib.contextmanager
def unchanged(model: TaskModel) -> Iterator[None]:
    """Restores, after the block, all random states and the train mode of each module."""
    training = {module: module.training for module in model.modules()}
    was_training = model.training
    with random_states_kept():
        yield
    model.train(was_training)  # a model may have to know, beyond the flags
    for module, mode in training.items():
        module.training = mode


@contextlib.contextmanager
def tried_out(encoder: AdapterModel) -> Iterator[None]:
    """Removes, after the block, what a model that was built in it has changed in the encoder.

    Its adapters are deleted. What acts, what is trainable and the train modes are as before.
    """
    names, fusions = set(encoder.adapter_names), set(encoder.fusion_names)
    trainable = {parameter: parameter.requires_grad for parameter in encoder.parameters()}
    training = {module: module.training for module in encoder.modules()}
    acting, trains_trunk = encoder.active_adapters, encoder.train_trunk
    try:
        yield
    finally:
        encoder.train_trunk = trains_trunk
        encoder.set_active_adapters(acting)
        for name in set(encoder.fusion_names) - fusions:
            encoder.delete_adapter_fusion(name)
        for name in set(encoder.adapter_names) - names:
            encoder.delete_adapter(name)
        for parameter, needs_gradient in trainable.items():
            parameter.requires_grad_(needs_gradient)
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Restores the global random states of Python, NumPy and torch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
