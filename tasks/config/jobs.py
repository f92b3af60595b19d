"""Several jobs on one encoder, as the configs of `continual` and `multitask` list them.

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
    config: str
    """A config of `mmadapters train`: a YAML file, or the name of one that ships."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to it, by dotted keys or in sections (trainer.epochs: 3)."""


def several(value: tuple[Job, ...]) -> tuple[Job, ...]:
    """For validators: two jobs or more."""
    if len(value) < 2:
        raise ValueError(
            f"there must be at least two, not {len(value)}: one alone is for mmadapters train"
        )
    return value


def read_job(
    job: Job, place: str, *, seed: int, output: Path, changes: Mapping[str, Any]
) -> JobConfig:
    """A job's config with its run directory below `output`.

    Args:
        place: where the job stands, for messages ("jobs.0").
        changes: to it, by dotted keys; they have the last word.

    Raises:
        ValueError: everything that is wrong, after the place.
    """
    given = [*overrides(job.overrides), f"seed={seed}", *overrides(changes)]
    try:
        name = read_config(job.config, given).name
        return read_config(job.config, [*given, *overrides({"output": str(output / name)})])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """As the command line has them; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def check_jobs(jobs: Sequence[JobConfig], key: str, *, reserved: Collection[str] = ()) -> None:
    """Refuses jobs that cannot stand side by side.

    Args:
        key: under which the config lists them.
        reserved: names that the run directory has another use for.

    Raises:
        ValueError: two have one name, one cannot name a folder, composes adapters or trains none,
            or they are not all on one encoder.
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
        raise ValueError(f"{key}: two are called {twice[0]!r}: set overrides: {{name: …}} in one")


def _difference(job: JobConfig, other: JobConfig) -> str:
    own, theirs = job.backbone.model_dump(), other.backbone.model_dump()
    key = next(key for key in own if own[key] != theirs[key])
    return f"{key} {own[key]!r}, not {theirs[key]!r}"
