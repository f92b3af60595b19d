"""What a config of `mmadapters multitask` may say, and the jobs that it speaks of.

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
from ...config.schema import JobConfig, Section, TrainerConfig

# What remains a job's own of its trainer section.
_OWN = ("batch_size", "eval_batch_size")
_FOLDERS = ("adapter", "checkpoints", "tensorboard")  # of a run, beside those of its tasks


class JointTrainerConfig(TrainerConfig):
    batch_size: int | None = Field(default=None, ge=1)  # type: ignore[assignment]
    """Examples of one optimiser step, which is of one task; each job's own by default."""
    epochs: float = Field(default=10.0, gt=0)
    """Passes over all training splits together."""


class MultitaskConfig(Section):
    name: str = "multitask"
    """Of the run."""
    output: str = "runs/${name}"
    """The run directory; each task's own is a folder in it."""
    seed: int = 0
    """Of every task."""
    tasks: tuple[Job, ...]
    """What is learned together on one encoder."""
    sharing: Literal["single", "multiple", "half_down", "half_up"] = "half_down"
    """One adapter for all tasks, one for each, or one for each of which all share the down- or the
    up-projections (VL-Adapter)."""
    sampling: Literal["proportional", "uniform"] | float = "proportional"
    """How often a task has its turn: as often as it has batches in its training split, as often as
    the others, or a temperature T of at least 1, by the number of its batches to the power 1/T."""
    adapter: dict[str, Any] = Field(default_factory=lambda: {"method": "double_seq_bn"})
    """A method and its options, of every task."""
    trainer: JointTrainerConfig = JointTrainerConfig()
    """Of the one optimiser."""

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
        """T of shares by size^(1/T)."""
        known = {"proportional": 1.0, "uniform": math.inf}
        return known[self.sampling] if isinstance(self.sampling, str) else self.sampling


def read_multitask(name_or_path: str, overrides: Sequence[str] = ()) -> MultitaskConfig:
    """The config of a YAML file, or of a name that ships with the package.

    Raises:
        ValueError: everything that is wrong, as `read_config` tells it.
    """
    return read_as(MultitaskConfig, name_or_path, overrides)


def read_tasks(config: MultitaskConfig) -> list[JobConfig]:
    """The tasks as they are learned together, each with a run directory below the run's own.

    Adapter and trainer section are those of the joint training, but for the batch sizes.

    Raises:
        ValueError: a job's config is wrong or changes what is the joint training's, two have one
            name, or they are not all on one encoder.
    """
    trainer = config.trainer.model_dump(mode="json")
    changes = {"adapter": config.adapter} | {
        f"trainer.{key}": value
        for key, value in trainer.items()
        if key not in _OWN or value is not None
    }
    jobs = []
    for number, job in enumerate(config.tasks):
        place = f"tasks.{number}"
        _check_overrides(job.overrides, place)
        jobs.append(
            read_job(job, place, seed=config.seed, output=Path(config.output), changes=changes)
        )
    check_jobs(jobs, "tasks", reserved=_FOLDERS)
    streamed = next((job.name for job in jobs if job.data.streaming), None)
    if streamed is not None:
        raise ValueError(f"{streamed} is streamed, and has no number of batches: read it whole")
    return jobs


def _check_overrides(overrides: Mapping[str, Any], place: str) -> None:
    """Refuses changes that would be lost, as they are the joint training's to make."""
    for key, value in overrides.items():
        section, _, rest = key.partition(".")
        if section in ("adapter", "seed", "output"):
            raise ValueError(
                f"{place}: overrides set {section}, which all tasks have in common: set it beside "
                "tasks"
            )
        if section == "trainer":
            inner = [rest] if rest else list(value if isinstance(value, Mapping) else ["…"])
            for name in inner:
                if name not in _OWN:
                    raise ValueError(
                        f"{place}: overrides set trainer.{name}, and there is one optimiser for "
                        f"all tasks: set it in the trainer section beside tasks; a job's own are "
                        f"{' and '.join(_OWN)}"
                    )
