"""A job from its config to a run directory.

config.yaml     the resolved config
metrics.json    figures with intervals, sizes, times, seed and environment
adapter/        all that `predict` needs
report.html     curves, tables, pictures; opens offline
tensorboard/    events
checkpoints/    while the run goes on: what --resume starts from
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch import nn
from transformers import set_seed

import mmadapters
from mmadapters import AdapterModel, Fuse, methods
from mmadapters.composition import parse
from mmadapters.files import write_text

from .. import artifact
from ..config.renamed import NewNames
from ..config.schema import SPLITS, JobConfig, Section, Split
from ..core.device import default_device
from ..core.errors import Problem
from ..core.machine import processor, versions
from ..core.metrics import Metric
from ..core.task import Record, Rows, Scores, Task, TaskModel
from ..data.load import load_splits
from ..data.stream import Stream
from ..data.workers import readers
from ..encoders.speech import convolutions
from ..registry import task_class
from ..training.evaluate import Evaluation, evaluate
from ..training.trainer import CHECKPOINTS, TaskTrainer, last_checkpoint

STREAMED = 10_000  # rows of a stream that labels and vocabularies are taken from
CONFIG, METRICS, REPORT = "config.yaml", "metrics.json", "report.html"


@dataclass
class Run:
    """What came out. `scores` and `problems` by split; `history` as transformers logs it;
    `attention`: by fusion and site the mean weight of each member on the split that was measured
    last."""

    folder: Path
    task: Task
    model: TaskModel
    scores: dict[str, Scores] = field(default_factory=dict)
    before: Scores | None = None
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def headline(self) -> Metric:
        """The deciding metric on the test split, or else on validation."""
        return self.scores["test" if "test" in self.scores else "validation"][self.task.metric]


def train(
    config: JobConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Run:
    """Trains, evaluates and saves; every process of a group calls it, the first one writes.

    Args:
        resume: go on from the last whole checkpoint of the run directory.
        overwrite: replace what an earlier run left there.

    Raises:
        ValueError: the data, the encoder or the run directory does not fit the config.
    """
    state = process_state(config)
    folder = Path(config.output)
    checkpoint = check_folder(folder, config, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()  # every process has looked before the first one writes
    if checkpoint is None and state.is_main_process:
        make_folder(folder, config)
    state.wait_for_everyone()
    splits = load_splits(config.data, task_class(config.task)(config).columns, SPLITS)
    task, model = make_model(config, rows_to_fit(splits.get("train")))
    return train_model(task, model, splits, checkpoint=checkpoint, quiet=quiet)


def train_model(
    task: Task,
    model: TaskModel,
    splits: dict[Split, Rows],
    *,
    checkpoint: Path | None = None,
    quiet: bool = False,
) -> Run:
    """`train` of a model that is there, in a run directory that `make_folder` has made.

    Raises:
        ValueError: there is no split to train on, or none to evaluate.
    """
    config = task.config
    first = process_state(config).is_main_process
    run = Run(Path(config.output), task, model, facts=sizes(model, config.name))
    model.to(device_of(config))
    splits = chosen(task, splits)
    if config.evaluation.before:
        name, rows = measured_split(splits)
        with _untrained(run):
            run.before = scored(run, evaluate_split(task, model, rows), name)
    task.prepare(model, without_test(splits))
    if any(parameter.requires_grad for parameter in model.parameters()):
        _fit(run, splits, checkpoint, quiet=quiet or not first)
    finish(run, splits)
    return run


def chosen(task: Task, splits: dict[Split, Rows]) -> dict[Split, Rows]:
    """The splits, of the training rows those alone that the task takes."""
    if "train" not in splits or isinstance(splits["train"], Stream):
        return splits
    return {**splits, "train": task.choose(splits["train"])}


def without_test(splits: dict[Split, Rows]) -> dict[Split, Rows]:
    """What a task may look at before it is measured."""
    return {name: rows for name, rows in splits.items() if name != "test"}


def finish(run: Run, splits: dict[Split, Rows]) -> None:
    """Evaluates what was trained and writes the run directory; every process calls it."""
    task, model, encoder = run.task, run.model, run.model.encoder
    state = process_state(task.config)
    run.facts |= task.calibrate(model.eval(), without_test(splits))
    model.eval()  # pictures are drawn with it too, and must not move a head's running statistics
    with encoder.using(encoder.active_adapters, drop=artifact.blocks_dropped(task.config)):
        records = _evaluate(run, splits)
        if state.is_main_process:
            _write(run, splits, records)
    state.wait_for_everyone()


@contextlib.contextmanager
def processes(config: JobConfig) -> Iterator[None]:
    """The group of processes that torchrun or accelerate launch started, left in good order."""
    state = process_state(config)
    yield
    state.wait_for_everyone()
    state.destroy_process_group()


def process_state(config: JobConfig) -> PartialState:
    """The processes of the group that this one is in, which is made where it is not there yet."""
    return PartialState(cpu=device_of(config) == "cpu")


def device_of(config: JobConfig) -> str:
    """Where a job runs."""
    return "cpu" if config.trainer.device == "cpu" else default_device()


def check_folder(folder: Path, config: Section, *, resume: bool, overwrite: bool) -> Path | None:
    """Whether a run may be written there; returns the checkpoint to go on from, if there is one.

    Raises:
        ValueError: a run is there and neither `resume` nor `overwrite` says what to do with it; or
            it is to be resumed and its config is another.
    """
    if not (folder / CONFIG).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files than a run; choose another output=…")
        return None
    if resume:
        written = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
        before = NewNames().of(written, lambda path: str(folder / CONFIG))
        if changed := differences(before, config.model_dump(mode="json")):
            raise ValueError(
                f"{folder} was begun with another config ({', '.join(changed[:3])}): resume it "
                "with the same one, or choose another output"
            )
        return last_checkpoint(folder)
    if not overwrite:
        raise ValueError(
            f"{folder} holds a run already: choose another output=…, or pass --resume to go on "
            "with it or --overwrite to replace it"
        )
    return None


def make_folder(folder: Path, config: Section) -> None:
    """Makes the directory of a run that begins, without what an earlier one has left there."""
    for name in (CHECKPOINTS, "tensorboard", artifact.FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS, REPORT):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = config.model_dump(mode="json")
    write_text(folder / CONFIG, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """The dotted keys whose values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        parts = [
            differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
            for key in keys
        ]
        return [key for part in parts for key in part]
    return [] if before == now else [path]


def make_model(config: JobConfig, rows: Rows | None) -> tuple[Task, TaskModel]:
    """The task, fitted to the training rows, and its model: trainable is what the mode says."""
    set_seed(config.seed)
    backbone = artifact.make_backbone(config.backbone)
    task = task_class(config.task)(config)
    task.fit(rows, backbone)
    return task, build_model(task, make_encoder(backbone))


def make_encoder(backbone: nn.Module) -> AdapterModel:
    """The encoder that a model is built on, or several models in turn."""
    encoder = mmadapters.init(backbone)
    encoder.identity()  # of the weights as they came, whatever training does to them
    return encoder


def build_model(task: Task, encoder: AdapterModel) -> TaskModel:
    """A fitted task's model: its own adapter and head are new, other adapters neither act nor
    train; trainable is what the mode says."""
    config, trainer, backbone = task.config, task.config.trainer, encoder.backbone
    full = trainer.mode == "full"
    encoder.train_trunk = full if trainer.trunk_dropout is None else trainer.trunk_dropout
    add_adapters(config, encoder)
    # A head starts from the same numbers in every mode, so that modes can be compared.
    set_seed(config.seed)
    model = task.build(encoder)
    model.active_in_training = artifact.modules_active_in_training(config.backbone, backbone)
    encoder.set_grad_checkpointing(trainer.gradient_checkpointing)
    if trainer.mode == "none":
        model.requires_grad_(False)
    if full:
        backbone.requires_grad_(True)
        if config.backbone.freeze_front_end and "audio" in encoder.sites.towers:
            for part in convolutions(backbone):
                part.requires_grad_(False)
    return model


def add_adapters(config: JobConfig, encoder: AdapterModel) -> None:
    """Loads the members, adds this run's own adapter or fusion and lets the composition act; only
    what is new is trainable.

    Raises:
        ValueError: members without a composition, or mode fusion without a `fuse`.
    """
    for name, directory in config.members.items():
        artifact.load_member(encoder, name, directory)
    adapter, drop = adapter_config(config), config.trainer.adapter_drop
    composition = parse(config.composition)
    if config.members and composition is None:
        raise ValueError(
            "members are loaded but composition does not say how they act: write, for instance, "
            f"composition: {{stack: [{next(iter(config.members))}, {config.name}]}}"
        )
    if config.trainer.mode == "fusion":
        if not isinstance(composition, Fuse):
            raise ValueError(
                "mode fusion trains the attention over several members: write composition: "
                "{fuse: [one, another]}"
            )
        encoder.add_adapter_fusion(composition)
        encoder.train_adapter_fusion(composition, drop=drop)
    elif adapter is None:
        encoder.set_active_adapters(composition, drop=0 if isinstance(drop, tuple) else drop)
    else:
        encoder.add_adapter(config.name, adapter)
        encoder.train_adapter(composition or config.name, drop=drop)
        for name in encoder.adapter_names:
            encoder.adapter(name).requires_grad_(name == config.name)


def rows_to_fit(rows: Any) -> Rows | None:
    """What a task is fitted to: the training rows, or the first of a stream."""
    return rows.head(STREAMED) if isinstance(rows, Stream) else rows


def adapter_config(config: JobConfig) -> mmadapters.MethodConfig | None:
    """What `trainer.mode` inserts: None in the modes without an adapter."""
    mode = config.trainer.mode
    if mode in ("full", "head", "none", "fusion"):
        return None
    if mode == "adapter":
        return methods.from_dict(config.adapter)
    return methods.method_named(mode)()


def sizes(model: TaskModel, name: str) -> dict[str, Any]:
    """Parameters of the encoder, of the adapters that act (or of `name`) with a trained fusion, and
    of the head; and what is trained of the encoder."""

    def count(module: nn.Module, *, trained: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    encoder = count(model.encoder.backbone)
    acting = model.encoder.active_adapters
    names = [name] if acting is None else [*acting.names()]
    adapter = sum(
        count(model.encoder.adapter(other))
        for other in names
        if other in model.encoder.adapter_names
    )
    adapter += count(model.encoder.fusions, trained=True)
    trained = count(model.encoder, trained=True)
    return {
        "encoder_parameters": encoder,
        "adapter_parameters": adapter,
        "head_parameters": count(model.head, trained=True),
        "trained_share": trained / encoder,
    }


def evaluate_split(
    task: Task,
    model: TaskModel,
    rows: Rows,
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """`evaluate` with what the config says."""
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
    """The split that a run's figure is of: test, or else validation.

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
                found = evaluate_split(run.task, run.model, splits[name])
            run.attention = {
                fusion: {site: weights.tolist() for site, weights in sites.items()}
                for fusion, sites in attention.items()
            }
            run.scores[name] = scored(run, found, name)
            records[name] = found.records
    return records


@contextlib.contextmanager
def _untrained(run: Run) -> Iterator[None]:
    """The encoder as it is before training: without this run's adapter, if a fresh one would
    change it."""
    config, encoder = run.task.config, run.model.encoder
    adapter = adapter_config(config)
    if adapter is None or adapter.identity or config.composition is not None:
        yield
        return
    with encoder.using(None):
        yield


def scored(run: Run, found: Evaluation, split: str) -> Scores:
    """The scores of a split that was evaluated; notes its bad rows."""
    run.problems[split] = found.problems
    return run.task.score(found.records, bootstrap=run.task.config.evaluation.bootstrap)


def _fit(run: Run, splits: dict[Split, Rows], checkpoint: Path | None, *, quiet: bool) -> None:
    if "train" not in splits:
        raise ValueError("there is no training split: name it in data.splits")
    # What was drawn for evaluation before training must not change what training draws.
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
    from ..reports.results import write_run_report

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
    write_run_report(run, splits, records, environment=metrics["environment"])
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)


def metrics_of(run: Run) -> dict[str, Any]:
    """What `metrics.json` says."""
    config = run.task.config
    return {
        "task": config.task,
        "name": config.name,
        "mode": config.trainer.mode,
        "backbone": config.backbone.name,
        "seed": config.seed,
        **run.facts,
        "splits": {name: figures(scores) for name, scores in run.scores.items()},
        "before": None if run.before is None else figures(run.before),
        **({"fusion_attention": run.attention} if run.attention else {}),
        "skipped": {split: len(problems) for split, problems in run.problems.items()},
        "environment": environment(),
    }


def figures(scores: Scores) -> dict[str, Any]:
    """Metrics by name, in total and by group, as plain data."""
    return {
        "metrics": _named(scores.metrics),
        "groups": {
            column: {value: _named(metrics) for value, metrics in values.items()}
            for column, values in scores.groups.items()
        },
    }


def _named(metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    return {metric.name: metric.to_dict() for metric in metrics}


def environment() -> dict[str, Any]:
    """Versions, machine and threads."""
    import platform

    device = default_device()
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "packages": versions(_PACKAGES),
    }


_PACKAGES = (
    *("mmadapters", "torch", "transformers", "timm", "open_clip_torch", "torchaudio"),
    *("accelerate", "datasets", "torchvision"),
)
