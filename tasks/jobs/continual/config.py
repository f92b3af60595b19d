"""What a config of `mmadapters continual` may say, and the jobs that it speaks of.

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
from ...config.schema import JobConfig, Section

FULL = "full"  # the folder of sequential full fine-tuning, beside those of the jobs


class ContinualConfig(Section):
    name: str = "continual"
    """Of the run."""
    output: str = "runs/${name}"
    """The run directory; each job's own is a folder in it."""
    seed: int = 0
    """Of every job."""
    jobs: tuple[Job, ...]
    """What is learned, in this order, on one encoder."""
    contrast: Literal["full", "none"] = "full"
    """Sequential fine-tuning of the whole encoder on the same jobs, beside the adapters."""
    contrast_overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to every job of the contrast (trainer.learning_rate: 3e-4); not to its data."""
    routing: bool = True
    """Measure how well a picture's job is found where nothing says which it is."""

    @field_validator("jobs")
    @classmethod
    def _several(cls, value: tuple[Job, ...]) -> tuple[Job, ...]:
        return several(value)


def read_continual(name_or_path: str, overrides: Sequence[str] = ()) -> ContinualConfig:
    """The config of a YAML file, or of a name that ships with the package.

    Raises:
        ValueError: everything that is wrong, as `read_config` tells it.
    """
    return read_as(ContinualConfig, name_or_path, overrides)


def read_jobs(config: ContinualConfig) -> list[JobConfig]:
    """The jobs as they are learned with adapters, each with a run directory below the run's own.

    Raises:
        ValueError: a job's config is wrong, two have one name, one has no adapter, or they are not
            all on one encoder.
    """
    jobs = [_read(config, number, {}, "") for number in range(len(config.jobs))]
    check_jobs(jobs, "jobs", reserved=(FULL,))
    return jobs


def contrast_jobs(config: ContinualConfig, jobs: Sequence[JobConfig]) -> list[JobConfig]:
    """The same jobs as full fine-tuning.

    Raises:
        ValueError: `contrast_overrides` change what is compared.
    """
    changes = {**config.contrast_overrides, "trainer.mode": "full"}
    found = [_read(config, number, changes, FULL) for number in range(len(config.jobs))]
    for job, other in zip(found, jobs, strict=True):
        for section in ("name", "backbone", "data"):
            if getattr(job, section) != getattr(other, section):
                raise ValueError(
                    f"contrast_overrides change {section} of {other.name}, and the contrast is "
                    "measured on the same jobs: leave it out"
                )
    return found


def _read(
    config: ContinualConfig, number: int, changes: Mapping[str, Any], folder: str
) -> JobConfig:
    return read_job(
        config.jobs[number],
        f"jobs.{number}",
        seed=config.seed,
        output=Path(config.output) / folder,
        changes=changes,
    )
