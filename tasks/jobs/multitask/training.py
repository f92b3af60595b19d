"""Several tasks' heads and adapters on one frozen encoder, trained by one optimiser.

A step is of one task: its adapter acts and its loss is minimised, so that what is shared gets the
gradient of every task in turn. What a step does not use has no gradient and stays as it is, the
optimiser's memory of it too: a task that shares nothing is trained as it would be alone.
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
from ...core.metrics import Metric
from ...core.model import TaskModel
from ...core.rows import Example, Rows
from ...core.task import Task
from ...data.batches import MixedBatches
from ...data.examples import Collate, Examples, Loaded
from ...data.workers import loader_generator, readers
from ...training.trainer import EncoderTrainer, TrainLoader, task_batches, validated
from .config import MultitaskConfig

MEAN = "mean"
_TASK = "task"


class JointModel(TaskModel):
    """The models of several tasks, which have one encoder; `head` holds all their heads."""

    def __init__(self, encoder: AdapterModel, models: Mapping[str, TaskModel]) -> None:
        heads = nn.Module()
        # Not a ModuleDict, which has no place for a task called "keys".
        heads._modules.update({name: model.head for name, model in models.items()})
        super().__init__(encoder, heads)
        # A dict, so that each parameter is known by one name.
        self.models = dict(models)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """What the model of the task named by `task` gives for the rest of the batch, with its own
        adapter acting."""
        name = batch.pop(_TASK)
        with self.encoder.using(name):
            return self.models[name](**batch)

    def train(self, mode: bool = True) -> JointModel:
        super().train(mode)
        for model in self.models.values():
            model.train(mode)
        return self


class JointExamples(Dataset):
    """Examples of several tasks by (task, row, seed), each with its task's number."""

    def __init__(self, tasks: Sequence[Task], rows: Sequence[Rows]) -> None:
        self.parts = [
            Examples(task, own, train=True, views=task.config.trainer.views)
            for task, own in zip(tasks, rows, strict=True)
        ]

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[int, Example | Problem]:
        number, row, seed = key
        return number, self.parts[number][row, seed]


class JointCollate:
    """Gathers what `JointExamples` gives of one task into a `Loaded` that names it."""

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

    The best model is that of the largest mean of the tasks' deciding metrics on their validation
    splits, each as it is, or its negative where less is better.

    Raises:
        ValueError: a task has no turn in so few steps.

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
        # All tasks' configs have the trainer section of the joint training.
        settings = next(iter(tasks.values())).config.trainer
        if settings.cache_trunk in ("memory", "disk"):
            raise ValueError(
                f"trainer.cache_trunk {settings.cache_trunk} keeps the states of one task's "
                "encoder: several tasks that are trained together run without (auto, off)"
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
                    f"{name} has no turn in {total} steps, and would learn nothing: give the "
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

    def note(self, loaded: Loaded) -> None:
        self.bad[loaded.task] |= {problem.index: problem for problem in loaded.problems}
        refuse(loaded.problems, on_error=self.tasks[loaded.task].config.data.on_error)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of the batch's task, which is logged for each."""
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
        found: dict[str, float] = {}
        deciding = []
        for name, task in self.tasks.items():
            drop = blocks_dropped(task.config)
            with self.joint_model.encoder.using(name, drop=drop):
                scores = validated(task, self.joint_model.models[name], self.validation_rows[name])
            deciding.append(scores[task.metric])
            found |= {f"{name}/{metric.name}": metric.value for metric in scores.metrics}
        return {MEAN: mean_of(deciding), **found}


def mean_of(metrics: Sequence[Metric]) -> float:
    """The mean of figures as they are, those that are better when smaller as their negatives."""
    return sum(m.value if m.greater_is_better else -m.value for m in metrics) / len(metrics)


def history_of(history: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """What was logged of one task, under the names that a run of it alone has."""
    found = []
    for entry in history:
        own = {k: entry[k] for k in ("step", "epoch", "learning_rate") if k in entry}
        if f"loss/{task}" in entry:
            own["loss"] = entry[f"loss/{task}"]
        prefix = f"eval_{task}/"
        own |= {
            f"eval_{k.removeprefix(prefix)}": v for k, v in entry.items() if k.startswith(prefix)
        }
        found.append(own)
    return found
