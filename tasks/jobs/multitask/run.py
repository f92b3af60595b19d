"""Trains several tasks together on one frozen encoder; adapters share all, half or nothing.

runs/NAME/
    config.yaml  metrics.json  report.html   of the joint run
    checkpoints/                             only during the run
    TASK/                                    a run directory for each task, with a complete adapter
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from mmadapters import AdapterModel, methods
from mmadapters.files import write_text

from ... import artifact
from ...config.schema import SPLITS, JobConfig, Split
from ...core.capabilities import Calibration, capability
from ...core.model import TaskModel
from ...core.rows import Rows
from ...core.task import Task
from ...data.load import load_splits
from ...registry import task_class
from ...reports.results import Run
from ...training.checkpoint import CHECKPOINTS
from ..ending import (
    device_of,
    evaluate_split,
    finish,
    measured_split,
    process_state,
    reported,
    scored,
    without_test,
)
from ..folder import METRICS, RunFolder, make_folder, run_folder
from ..metrics import environment, figures
from ..model import make_encoder, sizes
from ..preview import look_at_data
from ..rehearsal import rehearse
from ..run import begin, chosen, end
from .config import MultitaskConfig, read_tasks
from .report import write_multitask_report
from .results import Multitask, history_of
from .training import JointModel, JointTrainer

Splits = dict[Split, Rows]


def learn(
    config: MultitaskConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Multitask:
    """Trains all tasks together, evaluates each and writes the run directory.

    Every process of a group calls it; the first one writes.

    Args:
        resume: go on from the last complete checkpoint of the run directory.
        overwrite: replace an earlier run in the run directory.
        quiet: no progress bar.

    Raises:
        ValueError: the jobs, their data, the encoder or the run directory do not fit.
    """
    jobs = read_tasks(config)
    state = process_state(jobs[0])
    with run_folder(
        Path(config.output),
        config,
        resume=resume,
        overwrite=overwrite,
        first=state.is_main_process,
    ) as folder:
        done = _learn(config, jobs, folder, quiet=quiet)
        end(folder)
        done.folder = folder.path
        for run in done.runs.values():
            run.folder = Path(run.task.config.output)
    return done


def _learn(
    config: MultitaskConfig, jobs: Sequence[JobConfig], folder: RunFolder, *, quiet: bool
) -> Multitask:
    state = process_state(jobs[0])
    tasks = {job.name: task_class(job.task)(job) for job in jobs}
    splits = {name: _load(task) for name, task in tasks.items()}
    _check_validation(splits)
    model = build_joint(config, tasks, splits)
    begin(folder)
    places = {job.name: folder.inside(job.output) for job in jobs}
    if state.is_main_process:
        for job in jobs:
            make_folder(places[job.name], job)
    state.wait_for_everyone()
    model.to(device_of(jobs[0]))
    splits = {name: chosen(task, splits[name]) for name, task in tasks.items()}
    done = Multitask(config, folder.place, facts=parameters(model))
    for name, task in tasks.items():
        done.runs[name] = Run(places[name], task, model.models[name])
        if task.config.evaluation.before:
            _measure_before(done.runs[name], splits[name])
    for name, run in done.runs.items():
        look_at_data(run, splits[name])
        with model.encoder.using(name):
            calibration = capability(run.task, Calibration)
            calibration.prepare(run.model, without_test(splits[name]))
    for name, run in done.runs.items():
        with model.encoder.using(name):
            run.facts = sizes(run.model, name)
            rehearse(run, splits[name])
    _fit(done, tasks, model, splits, folder.checkpoint, quiet=quiet or not state.is_main_process)
    for name in tasks:
        _finish(done, name, splits[name])
    if state.is_main_process:
        _write(done)
    state.wait_for_everyone()
    return done


def _load(task: Task) -> Splits:
    config = task.config
    splits = load_splits(config.data, task.columns, SPLITS)
    if "train" not in splits:
        raise ValueError(f"{config.name}: there is no training split: name it in data.splits")
    measured_split(splits)
    return splits


def _check_validation(splits: dict[str, Splits]) -> None:
    lacking = [name for name, of_task in splits.items() if "validation" not in of_task]
    if lacking and len(lacking) < len(splits):
        raise ValueError(
            f"{lacking[0]} has no validation split, and the best checkpoint is chosen by the mean "
            "over all tasks: give it data.fractions.validation"
        )


def build_joint(
    config: MultitaskConfig, tasks: dict[str, Task], splits: dict[str, Splits]
) -> JointModel:
    """Fits each task to its training rows and builds the model of all tasks.

    Adapters and heads are trainable. A head starts from the same values as in a run of its task
    alone.
    """
    set_seed(config.seed)
    first = next(iter(tasks.values())).config
    backbone = artifact.make_backbone(first.backbone)
    for name, task in tasks.items():
        task.fit(splits[name]["train"], backbone)
    encoder = make_encoder(backbone)
    encoder.train_trunk = bool(first.trainer.trunk_dropout)
    encoder.add_adapters(list(tasks), methods.from_dict(config.adapter), sharing=config.sharing)
    models: dict[str, TaskModel] = {}
    for name, task in tasks.items():
        set_seed(config.seed)
        encoder.set_active_adapters(name)
        models[name] = task.build(encoder)
        models[name].active_in_training = artifact.modules_active_in_training(
            first.backbone, encoder
        )
    encoder.set_active_adapters(None)
    encoder.set_grad_checkpointing(first.trainer.gradient_checkpointing)
    encoder.adapters.requires_grad_(True)
    return JointModel(encoder, models)


def parameters(model: JointModel) -> dict[str, Any]:
    """Counts the parameters of the encoder, the adapters (shared ones once) and the heads."""
    encoder = sum(p.numel() for p in model.encoder.backbone.parameters())
    adapters = sum(p.numel() for p in model.encoder.adapters.parameters())
    names = model.encoder.adapter_names
    alone = sum(_size(model.encoder, name) for name in names)
    return {
        "encoder_parameters": encoder,
        "adapter_parameters": adapters,
        "adapter_parameters_unshared": alone,
        "head_parameters": sum(p.numel() for p in model.head.parameters() if p.requires_grad),
        "trained_share": adapters / encoder,
    }


def _size(encoder: AdapterModel, name: str) -> int:
    return sum(parameter.numel() for parameter in encoder.adapter(name).parameters())


def _fit(
    done: Multitask,
    tasks: dict[str, Task],
    model: JointModel,
    splits: dict[str, Splits],
    checkpoint: Path | None,
    *,
    quiet: bool,
) -> None:
    set_seed(done.config.seed)
    trainer = JointTrainer(
        tasks,
        model,
        done.config,
        train={name: of_task["train"] for name, of_task in splits.items()},
        validation={
            name: of_task["validation"]
            for name, of_task in splits.items()
            if "validation" in of_task
        },
        folder=done.folder,
        quiet=quiet,
    )
    done.facts |= trainer.fit(checkpoint)
    done.facts["best_mean"] = trainer.state.best_metric
    done.history = trainer.state.log_history
    steps = trainer.mixed.steps_of_tasks(trainer.state.global_step)
    done.steps = dict(zip(tasks, steps, strict=True))
    for name, bad in trainer.bad.items():
        done.runs[name].problems["train"] = list(bad.values())


def _measure_before(run: Run, splits: Splits) -> None:
    config = run.task.config
    split, rows = measured_split(splits)
    with run.model.encoder.using(config.name, drop=artifact.blocks_dropped(config)):
        run.before = scored(run, evaluate_split(run.task, run.model, rows), split)


def _finish(done: Multitask, name: str, splits: Splits) -> None:
    """Evaluates a task with its adapter and writes its run directory, as a run of it alone does."""
    run = done.runs[name]
    # `sizes` counts trainable parameters, so the adapter must be trainable, and not just active.
    drop = artifact.blocks_dropped(run.task.config)
    run.model.encoder.train_adapter(name, drop=drop)
    run.facts = sizes(run.model, name) | {
        "steps": done.steps[name],
        "best_step": done.facts["best_step"],
        "train_seconds": done.facts["train_seconds"],
        "waited_for_data": done.facts["waited_for_data"],
    }
    run.history = history_of(done.history, name)
    finish(run, splits)


def metrics_of(done: Multitask) -> dict[str, Any]:
    """Returns the contents of the `metrics.json` of the joint run."""
    config, first = done.config, next(iter(done.runs.values()))
    return {
        "name": config.name,
        "backbone": first.task.config.backbone.name,
        "seed": config.seed,
        "sharing": config.sharing,
        "sampling": config.sampling,
        **done.facts,
        "mean": done.mean,
        "tasks": {
            name: {
                "task": run.task.name,
                "metric": run.task.metric,
                "steps": done.steps[name],
                "adapter_parameters": run.facts["adapter_parameters"],
                "head_parameters": run.facts["head_parameters"],
                "splits": {split: figures(scores) for split, scores in run.scores.items()},
                "skipped": {split: len(problems) for split, problems in run.problems.items()},
            }
            for name, run in done.runs.items()
        },
        "log": done.history,
        "environment": environment(),
    }


def _write(done: Multitask) -> None:
    metrics = metrics_of(done)
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    write_text(done.folder / METRICS, text + "\n")
    done.unreported = "".join(run.unreported for run in done.runs.values())
    done.unreported += reported(
        lambda: write_multitask_report(done, metrics["environment"]), Path(done.config.output)
    )
    shutil.rmtree(done.folder / CHECKPOINTS, ignore_errors=True)
