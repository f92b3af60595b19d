"""The config of `mmadapters multitask`, and the jobs that it describes.

    YAML -> `MultitaskConfig` -> one `JobConfig` for each task

Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ...config.file import read_as
from ...config.jobs import Job, check_jobs, read_job, several
from ...config.schema import FolderName, JobConfig, Section, TrainerConfig

# Keys of the trainer section that each job may set for itself.
_PER_JOB = ("batch_size", "eval_batch_size")
# Folders of the run directory, whose names no task may have.
_FOLDERS = ("adapter", "checkpoints", "tensorboard")


class JointTrainerConfig(TrainerConfig):
    """The trainer section of a joint training."""

    batch_size: int | None = Field(default=None, ge=1)  # type: ignore[assignment]
    """Examples of an optimiser step, at least 1. A step trains one task. By default the batch size
    of each job."""
    epochs: float = Field(default=10.0, gt=0)
    """Passes over all training splits together, above 0."""


class MultitaskConfig(Section):
    """The keys of a run of several tasks together."""

    name: FolderName = "multitask"
    """The name of the run."""
    output: str = "runs/${name}"
    """The run directory; each task has a run directory in it."""
    seed: int = 0
    """The seed of every task."""
    tasks: tuple[Job, ...]
    """The jobs, at least two, that are trained together on one encoder."""
    sharing: Literal["single", "multiple", "half_down", "half_up"] = "half_down"
    """single: one adapter for all tasks; multiple: an adapter for each task; half_down, half_up: an
    adapter for each task, with shared down- or up-projections (VL-Adapter)."""
    sampling: Literal["proportional", "uniform"] | float = "proportional"
    """How often each task is trained. proportional: in proportion to the number of its training
    batches; uniform: all tasks equally often; a temperature T of at least 1: in proportion to the
    number of batches to the power 1/T."""
    adapter: dict[str, Any] = Field(default_factory=lambda: {"method": "double_seq_bn"})
    """The method of every task's adapter, and its options."""
    trainer: JointTrainerConfig = JointTrainerConfig()
    """The training of all tasks together, with one optimiser."""

    @field_validator("tasks")
    @classmethod
    def _several(cls, value: tuple[Job, ...]) -> tuple[Job, ...]:
        return several(value)

    @field_validator("sampling")
    @classmethod
    def _sampling(cls, value: str | float) -> str | float:
        if isinstance(value, float) and value < 1:
            raise ValueError(f"a temperature is at least 1, not {value:g}")
        return value

    @field_validator("trainer")
    @classmethod
    def _trainer(cls, value: JointTrainerConfig) -> JointTrainerConfig:
        if value.mode != "adapter":
            raise ValueError(
                f"mode is {value.mode!r}, and tasks are trained together with adapters on a frozen "
                "encoder: leave it out"
            )
        if value.adapter_drop != 0:
            raise ValueError("adapter_drop is for one job: leave it out")
        return value

    @property
    def temperature(self) -> float:
        """The temperature T of `sampling`: the steps of a task are proportional to size^(1/T)."""
        known = {"proportional": 1.0, "uniform": math.inf}
        return known[self.sampling] if isinstance(self.sampling, str) else self.sampling


def read_multitask(name_or_path: str, overrides: Sequence[str] = ()) -> MultitaskConfig:
    """Reads the config from a YAML file, or by the name of a config that ships.

    Raises:
        ValueError: the config is wrong; lists every mistake, as `read_config` does.
    """
    return read_as(MultitaskConfig, name_or_path, overrides)


def read_tasks(config: MultitaskConfig) -> list[JobConfig]:
    """Returns the tasks as they are trained together, each with a run directory in that of the run.

    They have the adapter and the trainer section of the joint training; batch sizes are their own.

    Raises:
        ValueError: the config of a job is wrong or sets keys of the joint training, two jobs have
            one name, a job is streamed, or the jobs have different encoders.
    """
    saved = config.to_save()  # environment variables are read again with each job
    trainer = saved["trainer"]
    changes = {"adapter": saved["adapter"]} | {
        f"trainer.{key}": value
        for key, value in trainer.items()
        if key not in _PER_JOB or value is not None
    }
    jobs = []
    for number, job in enumerate(config.tasks):
        place = f"tasks.{number}"
        _check_overrides(job.overrides, place)
        job = job.model_copy(update={"overrides": saved["tasks"][number]["overrides"]})
        jobs.append(
            read_job(job, place, seed=config.seed, output=Path(config.output), changes=changes)
        )
    check_jobs(jobs, "tasks", reserved=_FOLDERS)
    streamed = next((job.name for job in jobs if job.data.streaming), None)
    if streamed is not None:
        raise ValueError(
            f"{streamed} is streamed, and has no number of batches: turn data.streaming off"
        )
    return jobs


def _check_overrides(overrides: Mapping[str, Any], place: str) -> None:
    """Raises an error for changes that would have no effect, as the joint training sets these keys.

    Raises:
        ValueError: there is such a change.
    """
    for key, value in overrides.items():
        section, _, rest = key.partition(".")
        if section in ("adapter", "seed", "output"):
            raise ValueError(
                f"{place}: overrides set {section}, which all tasks have in common: set it next to "
                "tasks"
            )
        if section == "trainer":
            inner = [rest] if rest else list(value if isinstance(value, Mapping) else ["…"])
            for name in inner:
                if name not in _PER_JOB:
                    raise ValueError(
                        f"{place}: overrides set trainer.{name}, and there is one optimiser for "
                        f"all tasks: set it in the trainer section next to tasks; a job can only "
                        f"set {' and '.join(_PER_JOB)}"
                    )
