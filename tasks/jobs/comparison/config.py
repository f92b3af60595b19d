"""The config of `mmadapters compare`, and the jobs that it describes.

    YAML -> `ComparisonConfig` -> one `JobConfig` for each method

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from ...config.file import read_as, read_config
from ...config.schema import FolderName, JobConfig, Section

NAME = re.compile(r"\w[\w+@ .-]*", re.ASCII)
# Sections and trainer keys that must be equal for all methods, which share one job and budget.
_SHARED = ("data", "backbone", "evaluation", "seed", "augment", "transforms")
_BUDGET = ("epochs", "max_steps", "batch_size", "accumulation", "evaluate_every", "early_stopping")


class ComparisonConfig(Section):
    """The keys of a comparison."""

    name: FolderName = "comparison"
    """The name of the run."""
    output: str = "runs/${name}"
    """The run directory; every training has a folder in it."""
    job: str
    """The job of all methods: a config of `mmadapters train`, a YAML file or the name of a config
    that ships."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to the job for all methods, by dotted keys or in sections (trainer.epochs: 3)."""
    methods: dict[str, dict[str, Any]]
    """The methods, at least one: the name in the table -> the changes to the job, for instance
    {LoRA: {adapter: {method: lora, rank: 8}}}. Neither data nor budget may change."""
    references: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """References, as `methods`. They are trained and shown without a bottleneck of their size:
    {head only: {trainer.mode: head}}."""
    baseline: dict[str, Any] = Field(default_factory=lambda: {"method": "double_seq_bn"})
    """The `adapter` section of the plain bottleneck, without its size. For each method the size is
    chosen so that as many parameters are trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds, at least two. Every method and bottleneck is trained once with each of them."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates above 0 that every method and bottleneck tries with the first seed. The one
    that is best on the validation split is used. By default the learning rate of the job."""
    timed_steps: int = Field(default=10, ge=1)
    """The number of timed training steps, at least 1; their median is shown. A method and its
    bottleneck take them in turns."""

    @field_validator("methods", "references")
    @classmethod
    def _named(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot name a folder: use letters, digits, spaces and + @ . - _"
                )
        return value

    @field_validator("seeds")
    @classmethod
    def _several(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) < 2 or len(set(value)) < len(value):
            raise ValueError("give at least two different seeds: one alone has no spread")
        return value

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(rate <= 0 for rate in value) or len(set(value)) < len(value):
            raise ValueError("give different numbers above 0")
        return value

    @model_validator(mode="after")
    def _fits(self) -> ComparisonConfig:
        if not self.methods:
            raise ValueError("methods is empty: name at least one method to compare")
        if both := self.methods.keys() & self.references.keys():
            raise ValueError(f"{min(both)!r} is both a method and a reference: rename one of them")
        for key in ("size", "reduction_factor"):
            if key in self.baseline:
                raise ValueError(
                    f"baseline has a {key}, but the bottleneck's size follows from each method's "
                    "parameters: take it out"
                )
        return self


def read_comparison(name_or_path: str, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Reads the config from a YAML file, or by the name of a config that ships.

    Raises:
        ValueError: the config is wrong; lists every mistake, as `read_config` does.
    """
    return read_as(ComparisonConfig, name_or_path, overrides)


def read_contenders(config: ComparisonConfig) -> dict[str, JobConfig]:
    """Returns the job of every method and reference, by name.

    Raises:
        ValueError: the config of a job is wrong, or a method changes the data, encoder, evaluation,
            seed or budget that all share.
    """
    plain = make_job(config, {}, "job")
    jobs = {}
    saved = config.to_save()  # environment variables are read again with each job
    for name, changes in {**saved["methods"], **saved["references"]}.items():
        section = "methods" if name in config.methods else "references"
        try:
            job = make_job(config, changes, name)
        except ValueError as error:
            raise ValueError(f"{section}.{name}: {error}") from None
        mine, shared = job.model_dump(mode="json"), plain.model_dump(mode="json")
        changed = [key for key in _SHARED if mine.get(key) != shared.get(key)]
        changed += [
            f"trainer.{key}" for key in _BUDGET if mine["trainer"][key] != shared["trainer"][key]
        ]
        if changed:
            raise ValueError(
                f"{section}.{name} changes {changed[0]}, and all are compared on one job and one "
                "budget: change it under overrides"
            )
        jobs[name] = job
    return jobs


def make_job(config: ComparisonConfig, changes: Mapping[str, Any], name: str) -> JobConfig:
    """Returns the job of the config with these changes and this name.

    Raises:
        ValueError: the config of the job is wrong; see `read_config`.
    """
    given = {
        **{"trainer.tensorboard": False, "evaluation.pictures": 0, "evaluation.before": False},
        **config.to_save()["overrides"],
        **changes,
        **{"name": name, "output": f"{config.output}/{name}"},
    }
    return read_config(config.job, [f"{k}={json.dumps(v)}" for k, v in given.items()])
