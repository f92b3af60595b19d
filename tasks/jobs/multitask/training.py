"""Trains the heads and adapters of several tasks on one frozen encoder with one optimiser.

Each step trains one task: its adapter is active and its loss is minimised. Shared parameters get
the gradients of all tasks, one after another. Parameters that a step does not use have no gradient;
they and their optimiser state stay as they are. So a task that shares nothing is trained as it
would be alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmadapters import AdapterModel

from ...artifact import blocks_dropped
from ...core.errors import Problem, refuse
from ...core.model import TaskModel
from ...core.rows import Example, Rows
from ...core.task import Task
from ...data.batches import MixedBatches
from ...data.examples import Collate, Examples, Loaded
from ...data.workers import loader_generator, readers
from ...training.encoder_trainer import EncoderTrainer, TrainLoader
from ...training.evaluate import validated
from ...training.trainer import task_batches
from .config import MultitaskConfig
from .results import MEAN, mean_of

_TASK = "task"


class JointModel(TaskModel):
    """The models of several tasks on one encoder; `head` holds the heads of all tasks.

    Args:
        models: the model of each task, by its name; all have this encoder.
    """

    def __init__(self, encoder: AdapterModel, models: Mapping[str, TaskModel]) -> None:
        heads = nn.Module()
        # A ModuleDict could not hold a task with the name of one of its methods, such as "keys".
        heads._modules.update({name: model.head for name, model in models.items()})
        super().__init__(encoder, heads)
        # A plain dict does not register the models, so that each parameter has one name.
        self.models = dict(models)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Runs the model of the batch's task on the rest of the batch, with the task's adapter.

        Args:
            batch: the keyword arguments of that model, and the name of the task under "task".
        """
        name = batch.pop(_TASK)
        with self.encoder.using(name):
            return self.models[name](**batch)

    def train(self, mode: bool = True) -> JointModel:
        super().train(mode)
        for model in self.models.values():
            model.train(mode)
        return self


class JointExamples(Dataset):
    """Examples of several tasks; a key is (task number, row, seed).

    An item is the number of the task and the example.
    """

    def __init__(self, tasks: Sequence[Task], rows: Sequence[Rows]) -> None:
        self.parts = [
            Examples(task, of_task, train=True, views=task.config.trainer.views)
            for task, of_task in zip(tasks, rows, strict=True)
        ]

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[int, Example | Problem]:
        number, row, seed = key
        return number, self.parts[number][row, seed]


class JointCollate:
    """Gathers `JointExamples` of one task into a `Loaded` that names the task."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.names = list(tasks)
        self.parts = [Collate(task) for task in tasks.values()]

    def __call__(self, parts: Sequence[tuple[int, Example | Problem]]) -> Loaded:
        number = parts[0][0]
        loaded = self.parts[number]([part for _, part in parts])
        loaded.task = self.names[number]
        if loaded.batch is not None:
            loaded.batch[_TASK] = loaded.task
        return loaded


class JointTrainer(EncoderTrainer):
    """Trains a `JointModel` on the rows of all its tasks.

    The best model has the largest mean of the tasks' deciding metrics on their validation splits; a
    metric for which smaller is better counts negatively.

    Args:
        tasks: the tasks by name.
        train: the training rows of each task.
        validation: the validation rows of each task; empty if nothing is validated.
        folder: the run directory.
        quiet: no progress bar.

    Raises:
        ValueError: there are so few steps that a task gets none, or the frozen trunk shall be
            cached.

    Attributes:
        bad: by task, the rows of its training split that could not be used, by number.
    """

    finds_unused = True

    def __init__(
        self,
        tasks: Mapping[str, Task],
        model: JointModel,
        config: MultitaskConfig,
        *,
        train: Mapping[str, Rows],
        validation: Mapping[str, Rows],
        folder: Path,
        quiet: bool = False,
    ) -> None:
        self.tasks, self.joint_model = dict(tasks), model
        self.train_rows, self.validation_rows = train, validation
        self.bad: dict[str, dict[int, Problem]] = {name: {} for name in tasks}
        self._losses: dict[str, list[Tensor]] = {name: [] for name in tasks}
        self.mixed = MixedBatches(
            [task_batches(task, train[name]) for name, task in tasks.items()],
            seed=config.seed,
            temperature=config.temperature,
        )
        # The configs of all tasks have the trainer section of the joint training.
        settings = next(iter(tasks.values())).config.trainer
        if settings.cache_trunk in ("memory", "disk"):
            raise ValueError(
                f"trainer.cache_trunk is {settings.cache_trunk}, and the trunk cannot be cached "
                "for several tasks that are trained together: set it to auto or off"
            )
        super().__init__(
            model,
            name=config.name,
            seed=config.seed,
            settings=settings,
            batches=self.mixed,
            metric=MEAN if validation else None,
            folder=folder,
            quiet=quiet,
        )
        total = self.total_steps()
        for name, steps in zip(tasks, self.mixed.steps_of_tasks(total), strict=True):
            if not steps:
                raise ValueError(
                    f"{name} gets none of the {total} steps, and would learn nothing: give the "
                    "trainer section more max_steps or epochs, or sampling: uniform"
                )

    def get_train_dataloader(self) -> DataLoader:
        workers = readers(self.settings)
        rows = [self.train_rows[name] for name in self.tasks]
        return TrainLoader(
            JointExamples(list(self.tasks.values()), rows),
            batch_sampler=self.mixed,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=JointCollate(self.tasks),
            pin_memory=self.args.device.type == "cuda",
            generator=loader_generator(),
        )

    def take_problems(self, loaded: Loaded) -> None:
        self.bad[loaded.task] |= {problem.index: problem for problem in loaded.problems}
        config = self.tasks[loaded.task].config
        refuse(loaded.problems, on_error=config.data.on_error)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss of the batch's task, and keeps it for the log of this task."""
        name = inputs[_TASK]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        assert isinstance(loss, Tensor)
        self._losses[name].append(loss.detach())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, losses in self._losses.items():
                if losses:
                    logs[f"loss/{name}"] = round(torch.stack(losses).mean().item(), 6)
                losses.clear()
        super().log(logs, start_time)

    def validate(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        deciding = []
        for name, task in self.tasks.items():
            drop = blocks_dropped(task.config)
            with self.joint_model.encoder.using(name, drop=drop):
                scores = validated(task, self.joint_model.models[name], self.validation_rows[name])
            deciding.append(scores[task.deciding])
            metrics |= {f"{name}/{metric.name}": metric.value for metric in scores.metrics}
        return {MEAN: mean_of(deciding), **metrics}
