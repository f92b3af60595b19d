"""The config of `mmadapters continual`, and the jobs that it describes.

    YAML -> `ContinualConfig` -> one `JobConfig` for each job and way of learning

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ...config.file import read_as
from ...config.jobs import Job, check_jobs, read_job, several
from ...config.schema import FolderName, JobConfig, Section

FULL = "full"  # the folder of sequential full fine-tuning, next to the folders of the jobs


class ContinualConfig(Section):
    """The keys of a run of continual learning."""

    name: FolderName = "continual"
    """The name of the run."""
    output: str = "runs/${name}"
    """The run directory; each job has a run directory in it."""
    seed: int = 0
    """The seed of every job."""
    jobs: tuple[Job, ...]
    """The jobs, at least two, that are learned in this order on one encoder."""
    contrast: Literal["full", "none"] = "full"
    """full: also learn the same jobs by sequential fine-tuning of the whole encoder; none: do
    not."""
    contrast_overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to every job of the contrast (trainer.learning_rate: 3e-4), but not to its data."""
    routing: bool = True
    """Measure how often a picture without a task label is sent to the right job."""

    @field_validator("jobs")
    @classmethod
    def _several(cls, value: tuple[Job, ...]) -> tuple[Job, ...]:
        return several(value)


def read_continual(name_or_path: str, overrides: Sequence[str] = ()) -> ContinualConfig:
    """Reads the config from a YAML file, or by the name of a config that ships.

    Raises:
        ValueError: the config is wrong; lists every mistake, as `read_config` does.
    """
    return read_as(ContinualConfig, name_or_path, overrides)


def read_jobs(config: ContinualConfig) -> list[JobConfig]:
    """Returns the jobs as adapters learn them, each with a run directory in that of the run.

    Raises:
        ValueError: the config of a job is wrong, two jobs have one name, a job has no adapter, or
            the jobs have different encoders.
    """
    jobs = [_read(config, number, {}, "") for number in range(len(config.jobs))]
    check_jobs(jobs, "jobs", reserved=(FULL,))
    return jobs


def contrast_jobs(config: ContinualConfig, jobs: Sequence[JobConfig]) -> list[JobConfig]:
    """Returns the same jobs as full fine-tuning.

    Raises:
        ValueError: `contrast_overrides` change the name, encoder or data of a job.
    """
    changes = {**config.to_save()["contrast_overrides"], "trainer.mode": "full"}
    contrast = [_read(config, number, changes, FULL) for number in range(len(config.jobs))]
    for job, other in zip(contrast, jobs, strict=True):
        for section in ("name", "backbone", "data"):
            if getattr(job, section) != getattr(other, section):
                raise ValueError(
                    f"contrast_overrides change {section} of {other.name}, and the contrast is "
                    "measured on the same jobs: leave it out"
                )
    return contrast


def _read(
    config: ContinualConfig, number: int, changes: Mapping[str, Any], folder: str
) -> JobConfig:
    # Environment variables are read again with each job.
    overrides = config.to_save()["jobs"][number]["overrides"]
    job = config.jobs[number].model_copy(update={"overrides": overrides})
    return read_job(
        job,
        f"jobs.{number}",
        seed=config.seed,
        output=Path(config.output) / folder,
        changes=changes,
    )
