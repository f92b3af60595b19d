"""What a config of `mmadapters continual` may say, and the jobs that it speaks of.

    YAML -> `ContinualConfig` -> one `JobConfig` for each job and way of learning

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from .config import JobConfig, Section
from .configfile import read_as, read_config

FULL = "full"  # the folder of sequential full fine-tuning, beside those of the jobs
_NAME = re.compile(r"\w[\w+@ -]*", re.ASCII)


class Job(Section):
    config: str
    """A config of `mmadapters train`: a YAML file, or the name of one that ships."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to it, by dotted keys or in sections (trainer.epochs: 3)."""


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
        if len(value) < 2:
            raise ValueError(
                f"there must be at least two, not {len(value)}: one alone is for mmadapters train"
            )
        return value


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
    for number, job in enumerate(jobs):
        place = f"jobs.{number}"
        if not _NAME.fullmatch(job.name) or job.name == FULL:
            raise ValueError(
                f"{place}: {job.name!r} cannot name a folder and an adapter here: set overrides: "
                f"{{name: …}} to letters, digits and -, other than {FULL!r}"
            )
        if job.members or job.composition is not None:
            raise ValueError(
                f"{place}: {job.name} has members or a composition, and each job learns with the "
                "one adapter that it adds: take them out"
            )
        if job.trainer.mode in ("full", "head", "none", "fusion"):
            raise ValueError(
                f"{place}: trainer.mode is {job.trainer.mode}, and each job gets an adapter; "
                "sequential full fine-tuning is `contrast: full`"
            )
        if job.backbone != jobs[0].backbone:
            raise ValueError(
                f"{place}: {job.name} is on another encoder than {jobs[0].name}: "
                f"{_difference(job, jobs[0])}; all jobs share one backbone section"
            )
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"jobs: two are called {twice[0]!r}: set overrides: {{name: …}} in one")
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
    job = config.jobs[number]
    given = [*_overrides(job.overrides), f"seed={config.seed}", *_overrides(changes)]
    try:
        name = read_config(job.config, given).name
        output = Path(config.output) / folder / name
        return read_config(job.config, [*given, *_overrides({"output": str(output)})])
    except ValueError as error:
        raise ValueError(f"jobs.{number}: {error}") from None


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    """As the command line has them; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def _difference(job: JobConfig, other: JobConfig) -> str:
    own, theirs = job.backbone.model_dump(), other.backbone.model_dump()
    key = next(key for key in own if own[key] != theirs[key])
    return f"{key} {own[key]!r}, not {theirs[key]!r}"
