"""Training of one task's model on its rows, from cached states of the frozen trunk if possible."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config.schema import LOSS
from ..core.capabilities import BatchGrouping, capability
from ..core.device import processes
from ..core.errors import refuse
from ..core.model import TaskModel
from ..core.rows import Rows
from ..core.task import Task
from ..data.batches import EpochBatches, StreamExamples, share_of
from ..data.examples import Collate, Examples, Loaded
from ..data.workers import loader_generator, readers
from .cache.cache import TrunkCache, prepare
from .callbacks import Progress
from .encoder_trainer import EncoderTrainer, TrainLoader
from .evaluate import validated


class TaskTrainer(EncoderTrainer):
    """Trains the model of one task on its rows.

    Args:
        train: the training rows, or a stream of them.
        validation: the validation rows; None trains without validation.
        folder: the run directory.
        quiet: no progress bar.

    Raises:
        ValueError: the rows are a stream, and the config has no `max_steps`, or it has `views`.

    Attributes:
        cache: the cached trunk states; filled by `fit`.
    """

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
            metric=None if validation is None else task.deciding,
            greater_is_better=task.greater_is_better and task.deciding != LOSS,
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
        metrics = {metric.name: metric.value for metric in scores.metrics}
        if self.metric not in metrics:
            raise ValueError(
                f"evaluation.deciding is {self.metric}, which these validation rows do not have; "
                f"they have {', '.join(metrics)}"
            )
        return metrics


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
