"""The tasks by name: their names, their config classes and the tasks themselves."""

from __future__ import annotations

from typing import Any

from .config.tasks import TASKS, classes_of, config_class, load_class
from .core.task import Task

__all__ = ["TASKS", "config_class", "task_class"]


def task_class(name: str) -> type[Task[Any]]:
    """Imports the module of a task and returns its class.

    Raises:
        ValueError: no task has this name; the message suggests the nearest one.
    """
    return load_class(classes_of(name).task)
