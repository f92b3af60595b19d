"""Training of one task's model on its rows, from cached states of the frozen trunk if possible."""

from __future__ import annotations

import contextlib
import math
<<<<<<< HEAD
=======
import time
from collections.abc import Iterator
>>>>>>> model
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

<<<<<<< HEAD
from ..core.capabilities import BatchGrouping, capability
from ..core.device import processes
from ..core.errors import refuse
from ..core.model import TaskModel
from ..core.rows import Rows
from ..core.task import Task
from ..data.batches import EpochBatches, StreamExamples, share_of
=======
from mmadapters.files import replacing_file

from ..config.schema import TrainerConfig
from ..core.device import default_device, processes, to_device
from ..core.errors import DataError, Problem
from ..core.task import Rows, Scores, Task, TaskModel
from ..data.batches import EpochBatches, MixedBatches, StreamExamples, share_of
>>>>>>> model
from ..data.examples import Collate, Examples, Loaded
from ..data.workers import loader_generator, readers
from .cache.cache import TrunkCache, prepare
from .callbacks import Progress
from .encoder_trainer import EncoderTrainer, TrainLoader
from .evaluate import validated


class TaskTrainer(EncoderTrainer):
    """Trains the model of one task on its rows."""

    def __init__(
        self,
        task: Task,
        model: TaskModel,
        *,
        train: Any,
        validation: Rows | None,
        folder: Path,
        quiet: bool = False,
    ) -> None:
        self.task = task
        self.train_rows, self.validation_rows = train, validation
        self.cache = TrunkCache()
        config = task.config.trainer
        streaming = not hasattr(train, "__len__")
        if streaming and config.max_steps is None:
            raise ValueError("a streamed training split has no end: set trainer.max_steps")
        if streaming and config.views is not None:
            raise ValueError(
                "trainer.views needs rows that come back in every epoch, and a streamed split has "
                "none: leave it out, or turn data.streaming off"
            )
        super().__init__(
            model,
            name=task.config.name,
            seed=task.config.seed,
            settings=config,
            batches=None if streaming else task_batches(task, train),
            metric=None if validation is None else task.metric,
            greater_is_better=task.greater_is_better,
            folder=folder,
            quiet=quiet,
        )

    def fit(self, checkpoint: Path | None) -> dict[str, Any]:
        """Trains as `EncoderTrainer.fit`, from cached trunk states if `trainer.cache_trunk` allows.

        The figures also tell what was cached, under "cache".
        """
        config = self.settings
        steps = self.total_steps()
        rows = len(self.train_rows) if self.batches is not None else math.inf
        self.cache = prepare(
            self.task,
            self.task_model,
            self.train_rows,
            self.validation_rows,
            passes=steps * config.batch_size / rows,
            evaluations=self._evaluations(steps),
            quiet=not any(isinstance(c, Progress) for c in self.callback_handler.callbacks),
        )
        facts = super().fit(checkpoint)
        return facts if config.cache_trunk == "off" else {**facts, "cache": self.cache.facts()}

    def _evaluations(self, steps: int) -> int:
        if self.metric is None:
            return 0
        if self.args.eval_strategy == "steps" and self.args.eval_steps:
            return int(steps // self.args.eval_steps)
        assert self.batches is not None
        return math.ceil(steps / self.batches.steps)

    def get_train_dataloader(self) -> DataLoader:
        config, (rank, world) = self.settings, processes()
        common: dict[str, Any] = {
            "collate_fn": Collate(self.task),
            "pin_memory": self.args.device.type == "cuda",
            "generator": loader_generator(),
        }
        if self.batches is None:
            stream = StreamExamples(
                self.task, self.train_rows, seed=self.seed, rank=rank, world=world
            )
            share = share_of(config.batch_size, config.accumulation, world)
            workers = min(readers(config), 1)
            return TrainLoader(stream, batch_size=share, num_workers=workers, **common)
        examples: Any = Examples(self.task, self.train_rows, train=True, views=config.views)
        cached = self.cache.train
        workers = readers(config, decoded=cached is not None)
        if cached is not None:
            examples, workers = cached.examples, cached.workers(workers)
            common["collate_fn"] = cached.collate
        return TrainLoader(
            examples,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            **common,
        )

    def take_problems(self, loaded: Loaded) -> None:
        self.problems |= {problem.index: problem for problem in loaded.problems}
        refuse(loaded.problems, on_error=self.task.config.data.on_error)
        if self.cache.train is not None:
            self.cache.train.read += len(loaded.indices)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the task's loss, plus the penalty of a fusion that is trained.

        AdapterDrop chooses the dropped blocks here, once for each batch.
        """
        encoder, cached = self.task_model.encoder, self.cache.train
        resumed = contextlib.nullcontext() if cached is None else cached.resumed(inputs)
        with encoder.randomly_dropped(), resumed:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.settings.mode != "fusion":
            return loss
        assert isinstance(loss, Tensor)
        return loss + encoder.fusion_penalty()

    def validate(self) -> dict[str, float]:
        assert self.validation_rows is not None
        scores = validated(
            self.task, self.task_model, self.validation_rows, cached=self.cache.validation
        )
        return {metric.name: metric.value for metric in scores.metrics}


def task_batches(task: Task, rows: Rows) -> EpochBatches:
    """Returns the training batches of one task for this process."""
    config, (rank, world) = task.config.trainer, processes()
    grouping = capability(task, BatchGrouping)
    return EpochBatches(
        len(rows),
        config.batch_size,
        seed=task.config.seed,
        accumulation=config.accumulation,
        rank=rank,
        world=world,
        lengths=grouping.lengths(rows),
        groups=grouping.groups(rows),
    )
<<<<<<< HEAD
=======


def validated(task: Task, model: TaskModel, rows: Rows, *, kept: KeptSplit | None = None) -> Scores:
    """A task's scores without intervals, in the batches that its config says; `kept`: of rows."""
    config = task.config.trainer
    _, world = processes()
    share = share_of(config.batch_size, config.accumulation, world)
    found = evaluate(
        task,
        model,
        rows,
        batch_size=config.eval_batch_size or share,
        workers=readers(config, decoded=kept is not None),
        precision=config.precision,
        kept=kept,
    )
    return task.score(found.records, bootstrap=0)


_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run: a process that was killed may leave a part of one."""
    found = [path.parent for path in (folder / CHECKPOINTS).glob(f"checkpoint-*/{_WHOLE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def parameter_groups(model: nn.Module, config: TrainerConfig) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and weight decay (none for vectors and scalars)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("module.")
        rate = config.learning_rate
        if name.startswith("head."):
            rate = config.head_learning_rate or rate
        elif name.startswith("encoder.backbone."):
            rate = config.backbone_learning_rate or rate
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def trained_tensors(model: TaskModel) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and buffers beside them; shared ones once."""
    parts = ["head.", "encoder.adapters.", "encoder.fusions."]
    if any(parameter.requires_grad for parameter in model.encoder.backbone.parameters()):
        parts.append("encoder.backbone.")
    tensors = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    tensors |= {n: b for n, b in model.named_buffers() if n.startswith(tuple(parts))}
    return tensors


def write_trained(model: TaskModel, path: Path) -> None:
    """Writes `trained_tensors`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: t.detach().cpu().contiguous() for k, t in trained_tensors(model).items()}
    with replacing_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_trained(model: TaskModel, path: Path) -> None:
    """Copies in what `write_trained` wrote.

    Raises:
        ValueError: the file is of another model.
    """
    own, stored = trained_tensors(model), load_file(path)
    if own.keys() != stored.keys() or any(own[k].shape != stored[k].shape for k in own):
        raise ValueError(
            f"{path} is a checkpoint of another model: the config was changed after it was written"
        )
    for key, tensor in own.items():
        tensor.copy_(stored[key])


class Patience(EarlyStoppingCallback):
    """Early stopping, without the advice to let transformers keep the best model."""

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        return


class Progress(ProgressCallback):
    """The progress bar, with a line for each evaluation instead of one for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")
        values = [
            f"{key.removeprefix('eval_')} {value:.4g}"
            for key, value in logs.items()
            if key.startswith("eval_") and key != "eval_runtime"
        ]
        if values:
            self.training_bar.write(f"step {state.global_step}  validation  {'  '.join(values)}")
>>>>>>> model
