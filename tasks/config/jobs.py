"""The lists of jobs on one encoder in the configs of `continual` and `multitask`.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from .file import read_config
from .schema import JobConfig, Section

_NAME = re.compile(r"\w[\w+@ -]*", re.ASCII)


class Job(Section):
    """An entry of such a list."""

    config: str
    """A config of `mmadapters train`: a YAML file, or the name of one that ships with the
    package."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to this config, by dotted keys or in sections (trainer.epochs: 3)."""


def several(value: tuple[Job, ...]) -> tuple[Job, ...]:
    """Returns the jobs; for validators.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(value) < 2:
        raise ValueError(
            f"there must be at least two, not {len(value)}: run one job with mmadapters train"
        )
    return value


def read_job(
    job: Job, place: str, *, seed: int, output: Path, changes: Mapping[str, Any]
) -> JobConfig:
    """Reads the config of a job, whose run directory is a folder of `output`.

    Args:
        place: the job's place in the list, for messages ("jobs.0").
        changes: further changes by dotted keys; they come after those of the job.

    Raises:
        ValueError: all problems of the config, after the place.
    """
    given = [*overrides(job.overrides), f"seed={seed}", *overrides(changes)]
    try:
        name = read_config(job.config, given).name
        return read_config(job.config, [*given, *overrides({"output": str(output / name)})])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """Returns changes as overrides of the command line; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def check_jobs(jobs: Sequence[JobConfig], key: str, *, reserved: Collection[str] = ()) -> None:
    """Refuses jobs that cannot share an encoder and a run directory.

    Args:
        key: the config's key that lists the jobs.
        reserved: names that the run directory uses otherwise.

    Raises:
        ValueError: two jobs have one name; a name cannot name a folder; a job composes adapters or
            trains none; or the jobs are on different encoders.
    """
    for number, job in enumerate(jobs):
        place = f"{key}.{number}"
        if not _NAME.fullmatch(job.name) or job.name in reserved:
            other = f", other than {', '.join(map(repr, reserved))}" if reserved else ""
            raise ValueError(
                f"{place}: {job.name!r} cannot name a folder and an adapter here: set overrides: "
                f"{{name: …}} to letters, digits and -{other}"
            )
        if job.members or job.composition is not None:
            raise ValueError(
                f"{place}: {job.name} has members or a composition, but each job trains the one "
                "adapter that it adds: take them out"
            )
        if job.trainer.mode in ("full", "head", "none", "fusion"):
            raise ValueError(
                f"{place}: trainer.mode is {job.trainer.mode}, but each job trains an adapter; "
                "for sequential full fine-tuning set `contrast: full`"
            )
        if job.backbone != jobs[0].backbone:
            raise ValueError(
                f"{place}: {job.name} is on another encoder than {jobs[0].name}: "
                f"{_difference(job, jobs[0])}; give all jobs the same backbone section"
            )
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"{key}: two are called {twice[0]!r}: set overrides: {{name: …}} in one")


def _difference(job: JobConfig, other: JobConfig) -> str:
    first, second = job.backbone.model_dump(), other.backbone.model_dump()
    key = next(key for key in first if first[key] != second[key])
    return f"{key} {first[key]!r}, not {second[key]!r}"
