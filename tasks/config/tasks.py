"""The tasks by name, and the two classes of each: its config and the task itself.

The key `task` of a config chooses the class that reads the rest of it, so the names must be known
on this floor, while the classes lie floors above. This table is the only place of the project that
names modules as text instead of importing them; a module is imported when its class is asked for.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mmadapters.suggest import nearest

from .schema import JobConfig


@dataclass(frozen=True)
class TaskClasses:
    """Where the classes of a task are defined, each as "module:Class"."""

    config: str  # a JobConfig
    task: str  # a Task, which imports torch


TASKS: dict[str, TaskClasses] = {
    "segmentation": TaskClasses(
        config="mmadapters.tasks.segmentation.config:SegmentationConfig",
        task="mmadapters.tasks.segmentation.task:SegmentationTask",
    ),
    "asr": TaskClasses(
        config="mmadapters.tasks.asr.config:ASRConfig",
        task="mmadapters.tasks.asr.task:ASRTask",
    ),
    "vqa": TaskClasses(
        config="mmadapters.tasks.vqa.config:VQAConfig",
        task="mmadapters.tasks.vqa.task:VQATask",
    ),
    "retrieval": TaskClasses(
        config="mmadapters.tasks.retrieval.config:RetrievalConfig",
        task="mmadapters.tasks.retrieval.task:RetrievalTask",
    ),
    "captioning": TaskClasses(
        config="mmadapters.tasks.captioning.config:CaptioningConfig",
        task="mmadapters.tasks.captioning.task:CaptioningTask",
    ),
    "classification": TaskClasses(
        config="mmadapters.tasks.classification.config:ClassificationConfig",
        task="mmadapters.tasks.classification.task:ClassificationTask",
    ),
}


def classes_of(task: str) -> TaskClasses:
    """Returns the row of a task in `TASKS`.

    Raises:
        ValueError: no task has this name; the message suggests the nearest one.
    """
    if task not in TASKS:
        raise ValueError(f"no task is called {task!r}{nearest(task, TASKS)}; {one_of(TASKS)}")
    return TASKS[task]


def config_class(task: str) -> type[JobConfig]:
    """Returns the pydantic class of a task's configs.

    Raises:
        ValueError: no task has this name; the message suggests the nearest one.
    """
    return load_class(classes_of(task).config)


def load_class(place: str) -> Any:
    """Imports "module:Class" and returns the class."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def one_of(choices: Iterable[str]) -> str:
    """Returns "there are a, b, c", the end of a message about an unknown name."""
    return f"there are {', '.join(choices)}"
